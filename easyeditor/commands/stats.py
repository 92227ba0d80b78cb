"""Second moments of keys, C = E[k k^T], for ROME (mom2_adjustment) and MEMIT: one pass for all layers, resumable.

  python -m easyeditor.stats --hparams hparams/MEMIT/smollm2-135m.yaml
        what that file needs: model, layers, corpus, samples (about two minutes on two CPU cores)
  python -m easyeditor.stats --model gpt2-xl --layers 13 14 15 16 17 --corpus wikipedia --samples 100000
        Wikipedia through `datasets`, streamed: needs a connection
  torchrun --nproc-per-node 4 -m easyeditor.stats --model ... --layers ... --corpus wikipedia
        documents dealt out over 4 GPUs; on several machines the same command on each, with torchrun's
        --nnodes N --node-rank R --rdzv-backend c10d --rdzv-endpoint HOST:29500
  python -m easyeditor.stats --hparams ... --check
        verify the files that are there
  python -m easyeditor.stats --hparams ... --dry-run
        what would be collected, which files are there already, and the memory it would take
  python -m easyeditor.stats --hparams ... --pack DIR
        collect what is not there, and pack all of it as a folder to share
  python -m easyeditor.stats pack | unpack | verify --help
        folders to share, on a hub or a web server

Kill it at any moment: --resume goes on from the last checkpoint, and the result is bit-equal to an uninterrupted run.
Files are upstream's: <output>/<model>/<corpus>_stats/<module>_<dtype>_mom2_<samples>.npz, with a JSON manifest
next to each.
"""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from easyeditor import __version__
from easyeditor.base.errors import ConfigError, StatsError
from easyeditor.base.files import LARGEST, to_json
from easyeditor.base.locks import locked
from easyeditor.base.places import declare
from easyeditor.commands import packed_stats
from easyeditor.commands.cli import SETTINGS, parser, quiet_transformers, resumable, run
from easyeditor.commands.outputs import checked
from easyeditor.methods.registry import load_hparams
from easyeditor.runs.ranks import own_device, process_group, rank_of

_YAML_KEYS = {
    "model": "model_name",
    "layers": "layers",
    "corpus": "mom2_dataset",
    "samples": "mom2_n_samples",
    "dtype": "mom2_dtype",
    "output": "stats_dir",
    "model_parallel": "model_parallel",
}
_YAML_TEMPLATES = {"block": "layer_module_tmp", "mlp": "mlp_module_tmp", "rewrite": "rewrite_module_tmp"}


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("--hparams", help="YAML of ROME or MEMIT: gives model, layers, corpus, samples, stats_dir")
    p.add_argument("--model", help="folder, hub name, or smollm2-135m")
    p.add_argument("--layers", type=int, nargs="+", help="layers to collect, all in one pass")
    p.add_argument("--corpus", help="wikipedia, wikipedia-excerpt, or a .txt/.jsonl/.parquet/.arrow file")
    p.add_argument("--samples", type=int, help="documents read (default: the YAML's, else 100000)")
    p.add_argument("--max-length", type=int, default=1024, help="tokens kept of each document (default: %(default)s)")
    p.add_argument("--batch-tokens", type=int, default=4096, help="padded tokens in one forward (default: %(default)s)")
    p.add_argument("--tokens-per-dim", type=int, help="fast mode: stop at this many tokens per key dimension")
    p.add_argument("--dtype", choices=("float32", "float64"), help="dtype of the stored sums (default: float32)")
    p.add_argument("--sums", choices=("float32", "float64"), default="float32", help="precision of the products")
    p.add_argument("--set", **SETTINGS, help="over the YAML's keys")
    p.add_argument("--output", help="statistics folder (default: the YAML's stats_dir, else data/stats)")
    p.add_argument("--device", default=None, help="GPU number, cpu, cuda:1 ... (default: 0, or torchrun's local rank)")
    pace = p.add_mutually_exclusive_group()
    pace.add_argument(
        "--every-seconds", type=float, default=60.0, help="time between checkpoints (default: %(default)s)"
    )
    pace.add_argument("--every", type=int, help="checkpoint after this many windows of 64 documents instead")
    p.add_argument("--resume", action="store_true", help="go on from the checkpoint of a run that was cut short")
    p.add_argument("--check", action="store_true", help="verify the files instead of collecting")
    p.add_argument("--pack", metavar="DIR", help="collect only what is not there, then pack all as this new folder")
    p.add_argument("--dry-run", action="store_true", help="check flags and YAML, print them, load no model")
    declare(p, "hparams", "model", "corpus", output="shared", pack="new folder")
    return p.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Model, layers, corpus, samples, dtype and folder, from the flags over the YAML. Raises ConfigError."""
    values: dict[str, Any] = {"samples": 100000, "dtype": "float32", "output": "data/stats", "corpus": "wikipedia"}
    values["model_parallel"] = False
    templates: dict[str, str | None] = {}
    if args.hparams is not None:
        given = load_hparams(args.hparams, args.set).to_dict()
        values |= {ours: given[theirs] for ours, theirs in _YAML_KEYS.items() if theirs in given}
        templates = {ours: given.get(theirs) for ours, theirs in _YAML_TEMPLATES.items()}
    values |= {
        key: value
        for key in ("model", "layers", "corpus", "samples", "dtype", "output")
        if (value := getattr(args, key)) is not None
    }
    lacking = [f"--{key}" for key in ("model", "layers") if key not in values]
    if lacking:
        raise ConfigError(f"give {' and '.join(lacking)}, or --hparams")
    return {**values, "templates": templates}


def check_flags(args: argparse.Namespace) -> None:
    """Raise ConfigError, before a model is loaded, for a number or name that cannot be meant."""
    for key in ("samples", "max_length", "batch_tokens", "tokens_per_dim", "every", "every_seconds"):
        value = getattr(args, key)
        if value is not None and not 0 < value <= LARGEST:
            least = "above 0" if key == "every_seconds" else "1 or more"
            raise ConfigError(f"--{key.replace('_', '-')} is {value}; allowed: {least}")
    for key in ("corpus", "output"):
        if getattr(args, key) == "":
            raise ConfigError(f"--{key} is empty; name one, or leave the flag out")
    layers = args.layers or []
    if len(set(layers)) < len(layers) or min(layers, default=0) < 0:
        raise ConfigError(f"--layers is {layers}; allowed: layer numbers from 0, each once")


def main() -> int:
    """Collect or check."""
    if sys.argv[1:2] and sys.argv[1] in packed_stats.ACTIONS:
        return packed_stats.main()
    args = arguments()
    rank = rank_of(os.environ)
    check_flags(args)
    wanted = settings_of(args)
    spread, flag = wanted["model_parallel"], args.device is not None
    device = own_device(rank, args.device if flag else 0, flag=flag, model_parallel=spread)
    if args.check and args.pack is not None:
        raise ConfigError("--check and --pack were both given; the first writes nothing")
    if not args.check:
        target = Path(wanted["output"]) / Path(str(wanted["model"])).name
        reads = {"--model": wanted["model"], "--corpus": wanted["corpus"]}
        places = checked(args, reads, writes={"--output": target}, first=rank.first)

    if args.dry_run:
        print(to_json(planned(args, wanted, device), indent=1))
        return 0

    from easyeditor.lm.discover import anatomy
    from easyeditor.lm.loading import load
    from easyeditor.methods.locate.statistics import COLLECTING
    from easyeditor.stats.collect import Pace
    from easyeditor.stats.gather import gather
    from easyeditor.stats.packed import pack

    quiet_transformers()
    with process_group(rank):
        model, tok = load(wanted["model"], device=device, model_parallel=spread)
        parts = anatomy(model, **wanted["templates"])
        parts.check_layers(wanted["layers"], "--layers")
        keys = keys_of(parts, wanted, str(model.config.name_or_path))
        if args.check:
            return check(parts, keys)
        lacking = {layer: key for layer, key in keys.items() if args.pack is None or key.find() is None}
        width = max(parts.key_width(layer) for layer in keys)
        folder = keys[wanted["layers"][0]].paths[0].parent
        own = locked(folder / COLLECTING, f"the second moments in {folder}") if rank.first else nullcontext()
        with own, resumable("go on with --resume"):
            paths = (
                []
                if not lacking
                else gather(
                    parts,
                    tok,
                    lacking,
                    corpus=wanted["corpus"],
                    max_length=args.max_length,
                    batch_tokens=args.batch_tokens,
                    sums=args.sums,
                    tokens=None if args.tokens_per_dim is None else args.tokens_per_dim * width,
                    resume=args.resume,
                    pace=Pace(seconds=args.every_seconds, every=args.every),
                    show=True,
                )
            )
        if rank.first:
            for path in paths:
                print(path)
            if args.pack is not None:
                with places.locked():
                    whole = [found for key in keys.values() if (found := key.find())]
                    packed_stats.show(pack(whole, Path(args.pack), code=__version__))
    return 0


def planned(args: argparse.Namespace, wanted: dict[str, Any], device: int | str) -> dict[str, Any]:
    """What would be collected, which of its files are there, and the memory it would take.

    Raises:
        ConfigError: layers that the model does not have. DataError: no such corpus.
    """
    from easyeditor.lm import embedded
    from easyeditor.stats.corpus import check_corpus

    check_corpus(wanted["corpus"])
    folder = embedded.model_folder(str(wanted["model"]))
    if folder is None:
        why = f"{wanted['model']}: no config.json here yet"
        return {**wanted, "files": None, "memory": {"estimate_gib": None, "why": why}}
    from easyeditor.commands.estimate import collecting_report, config_in, on_meta

    try:
        parts = on_meta(config_in(folder), **wanted["templates"])
    except Exception as error:  # a config that is wrong fails in many ways; the collection itself says how
        why = f"{folder}: no model whose memory can be estimated ({type(error).__name__})"
        return {**wanted, "files": None, "memory": {"estimate_gib": None, "why": why}}
    parts.check_layers(wanted["layers"], "--layers")
    known = embedded.find(str(wanted["model"]))
    keys = keys_of(parts, wanted, str(wanted["model"] if known is None else folder)).values()
    files = {str(key.find() or key.paths[0]): "missing" if key.find() is None else "there" for key in keys}
    options = {"device": device, "spread": wanted["model_parallel"], "tokens": args.batch_tokens, "sums": args.sums}
    return {**wanted, "files": files, "memory": collecting_report(parts, folder, wanted["layers"], **options)}


def keys_of(parts: Any, wanted: dict[str, Any], name: str) -> dict[int, Any]:
    """The file of each layer."""
    from easyeditor.stats.store import StatsKey

    return {
        layer: StatsKey(
            stats_dir=wanted["output"],
            model_name=name,
            module=parts.rewrite_name(layer),
            dataset=Path(wanted["corpus"]).stem,
            dtype=wanted["dtype"],
            samples=wanted["samples"],
        )
        for layer in wanted["layers"]
    }


def check(parts: Any, keys: Any) -> int:
    """Print one line per file: good, missing, or what is wrong with it; 2 unless all are good."""
    from easyeditor.lm.weights import sample
    from easyeditor.stats.store import read_manifest, read_moment

    weights, bad = sample(parts.model), 0
    for layer, key in keys.items():
        path = key.find()
        if path is None:
            print(f"missing  {key.paths[0]}")
            bad += 1
            continue
        try:
            read_moment(path, parts.key_width(layer), weights)
            made = read_manifest(path)
            print(
                f"good     {path}"
                + (f"  ({made.documents} documents, {made.tokens:,} tokens)" if made else "  (no manifest)")
            )
        except StatsError as error:
            print(f"bad      {error}")
            bad += 1
    return 2 if bad else 0


if __name__ == "__main__":
    run(main)
