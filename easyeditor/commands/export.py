"""Saved edits as what other tools load: a PEFT adapter, or a Hugging Face checkpoint; docs/export.md.

  python -m easyeditor.export my-edit --to adapter --output my-adapter
        a saved edit (single_case_edit.py --save-edit) as a LoRA adapter: exact, a few kB
  python -m easyeditor.export results/RUN --to adapter --output my-adapter
        all edits that are kept in a run of mass_edit.py, mode sequential or batch, in one adapter
  python -m easyeditor.export one-edit another-edit --to checkpoint --output my-model
        the whole model with both edits, bit by bit what the edits make of it
  python -m easyeditor.export my-edit --to merged --rank 16 --output my-model
        the whole model with the adapter merged in; --rank cuts what is dense, and the error is stated

The base model is the one the edits were made on, unless --model names it (where it lies on this machine). Every export
has a model card (README.md) and edit.json.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.places import declare
from easyeditor.commands.cli import DTYPES, parser, quiet_transformers, run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from easyeditor.export.sources import Source


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("edits", nargs="+", metavar="EDIT", help="folder of --save-edit, or run folder of mass_edit.py")
    p.add_argument("--to", required=True, choices=("adapter", "checkpoint", "merged"), help="what is made")
    p.add_argument("--output", required=True, metavar="DIR", help="new folder")
    p.add_argument("--rank", type=int, metavar="N", help="cut what is dense or of a higher rank to rank N, by SVD")
    p.add_argument("--model", metavar="NAME", help="the base model (default: the one the edits name)")
    p.add_argument("--base-name", metavar="NAME", help="what the base is called in the card and adapter_config.json")
    p.add_argument("--device", default="cpu", help="GPU number, cpu, cuda:1 … (default: %(default)s)")
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the base and of a checkpoint's weights (default: the edits')",
    )
    declare(p, "edits", "model", output="new folder")
    return p.parse_args()


def main() -> int:
    """Read the edits, load their model, write the folder."""
    args = arguments()

    from easyeditor.commands.outputs import checked
    from easyeditor.export.adapter import check_rank
    from easyeditor.export.sources import read_source

    check_rank(args.rank)
    if len({os.path.realpath(edit) for edit in args.edits}) < len(args.edits):
        raise ConfigError("an edit is named twice, and would be written twice; name each once")
    sources = [read_source(Path(edit)) for edit in args.edits]
    name = args.model or base_of(sources)
    places = checked(args, {"--model": name})

    from easyeditor.export.write import export

    quiet_transformers()
    edits, measured = [edit for source in sources for edit in source.edits], [source.measured for source in sources]
    options = {"kind": args.to, "base": args.base_name or name, "measured": measured, "rank": args.rank}
    with places.locked():
        model, tok = checked_base(name, sources, args)
        adapter = export(model, tok, edits, Path(args.output), **options)
    if adapter is not None:
        worst = max(made.lost for made in adapter.factors)
        cut = "exact" if not worst else f"cut, at most {worst:.3g} of a weight's change is lost"
        counted = f"{len(adapter.factors)} module{'s' if len(adapter.factors) > 1 else ''}"
        print(f"adapter of rank {adapter.rank} on {counted}, {cut}")
    print(f"{args.to}: {args.output}")
    return 0


def base_of(sources: Sequence[Source]) -> str:
    """The one model all edits were made on. Raises DataError: they name several, or none."""
    names = list(dict.fromkeys(source.model_name for source in sources))
    if len(names) != 1 or names[0] is None:
        found = ", ".join(name or "a model that Python had loaded" for name in names)
        raise DataError(f"the edits name no one base model, but {found}; give it with --model")
    return names[0]


def checked_base(
    name: str, sources: Sequence[Source], args: argparse.Namespace
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base in the dtype that is asked for, compared with what each edit was computed on in the edit's own dtype.

    Raises:
        DataError: an edit of other weights.
    """
    from easyeditor.lm.loading import load
    from easyeditor.lm.weights import applied, fingerprint

    asked = args.dtype or dtype_of(sources[0])
    pair = None
    for dtype in (*({*map(dtype_of, sources)} - {asked}), asked):
        pair = None  # its memory is for the next
        pair = load(name, device=args.device, dtype=dtype)
        for place, source in zip(args.edits, sources, strict=True):
            if dtype_of(source) == dtype and source.fingerprint not in (None, fingerprint(pair[0])):
                with applied(pair[0], [delta for edit in source.edits for delta in edit.deltas]):
                    pass  # of another architecture or shape: this says which weight
                raise DataError(f"{place} was computed on other weights than {name} has; --model names its own base")
    assert pair is not None
    return pair


def dtype_of(source: Source) -> str:
    """The dtype the edits were made in. Raises DataError: their hyper-parameters are damaged."""
    found = "float16" if source.hparams.get("fp16") is True else source.hparams.get("dtype", "float32")
    if found not in DTYPES:
        raise DataError(f"the edits were made in dtype {found!r}, which is none; give --dtype")
    return str(found)


if __name__ == "__main__":
    run(main)
