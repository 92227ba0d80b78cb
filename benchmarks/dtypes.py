"""One edit in two dtypes: how far v*, P(target) and perplexity of `dtype: bfloat16` are from float32's.

  python benchmarks/dtypes.py                        ROME on the embedded model, six facts
  python benchmarks/dtypes.py --dtype float16 --requests 2

Weights and forwards are in the narrow dtype; the value search's offset, its Adam and its loss stay float32, statistics
and solves float64; the update is rounded when it is written. Both dtypes get the same contexts. P(target) is the mean
over the target's tokens on the edited model (ROME's), perplexity that of the edited model.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

HEAD = "| request | v* apart | P(target) | narrow | perplexity | narrow |\n|---|---|---|---|---|---|"


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """A row for each request, and the medians."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hparams", default=str(ROOT / "hparams/ROME/smollm2-135m.yaml"))
    p.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    p.add_argument("--requests", type=int, default=6)
    p.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE")
    args = p.parse_args(argv)

    from easyeditor.commands.cli import quiet_transformers
    from easyeditor.dataset.reader import read_dataset
    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.methods.registry import load_hparams

    quiet_transformers()
    requests = list({r.subject: r for r in read_dataset(str(ROOT / "data/facts.json")).requests}.values())
    requests = requests[: args.requests]
    plain = load_hparams(args.hparams).override([*args.set, "dtype=float32"])
    wide = BaseEditor(plain)
    narrow_hparams = plain.override([f"dtype={args.dtype}"])
    narrow_hparams.context_templates = list(wide.method.contexts)
    narrow = BaseEditor(narrow_hparams)
    unedited = [editor.perplexity().mean for editor in (wide, narrow)]
    print(f"float32 and {args.dtype}, {args.hparams}; unedited perplexity {unedited[0]:.2f} and {unedited[1]:.2f}\n")
    print(HEAD)
    rows = []
    for request in requests:
        (v_D, p, ppl), (narrow_v_D, narrow_p, narrow_ppl) = (edited(editor, request) for editor in (wide, narrow))
        apart = float((narrow_v_D - v_D).norm() / v_D.norm())
        rows.append({"apart": apart, "p": p, "narrow_p": narrow_p, "ppl": ppl, "narrow_ppl": narrow_ppl})
        print(shown(f"{request.prompt} -> {request.target_new}", rows[-1]), flush=True)
    print(shown("median", {key: statistics.median(row[key] for row in rows) for key in rows[0]}))
    return rows


def edited(editor: Any, request: Any) -> tuple[Any, float, float]:
    """v*, P(target) and perplexity of one edit, which is taken back."""
    from easyeditor.evaluate.scoring import score

    result = editor.compute(request)
    (trace,) = result.traces[0].values()
    with editor.applied(result):
        (scored,) = score(editor.model, editor.tok, [(request.prompt, request.target_new)])
        return trace.vectors["target"], scored.probability, editor.perplexity().mean


def shown(name: str, row: dict[str, float]) -> str:
    """A line of the table."""
    p, ppl = f"{row['p']:.3f} | {row['narrow_p']:.3f}", f"{row['ppl']:.2f} | {row['narrow_ppl']:.2f}"
    return f"| {name} | {100 * row['apart']:.1f} % | {p} | {ppl} |"


if __name__ == "__main__":
    main()
