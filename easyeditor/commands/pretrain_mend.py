"""Train MEND's hypernetwork: it learns to turn the gradient of one fact into an edit of that fact alone.

  python pretrain_mend.py                                        this project's facts, embedded model
  python pretrain_mend.py --hparams hparams/TRAINING/MEND/gpt2-xl.yaml --train FILE.json --val FILE.json
                                                                 CounterFact, ZsRE or any format of docs/data.md
  python pretrain_mend.py ... --resume                           go on after a kill; ends with the same weights
  torchrun --nproc-per-node 4 pretrain_mend.py ...               4 GPUs: each its own requests, gradients all-reduced

Writes results/models/MEND/<model>/: the best archive so far (archive.json, hypernet-<step>.safetensors),
the last one in last/, last.safetensors to go on from, log.jsonl. Edit with it: set `archive` in
hparams/MEND/<model>.yaml. docs/findings/mend.md has times and numbers.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
from contextlib import nullcontext

from easyeditor.base.errors import ConfigError, DataError
from easyeditor.base.files import to_json, write_json
from easyeditor.base.hparams import overrides
from easyeditor.base.paths import SHIPPED
from easyeditor.base.places import declare
from easyeditor.commands.cli import SETTINGS, memory, parser, quiet_transformers, resumable, run

DEFAULT_HPARAMS = SHIPPED / "hparams" / "TRAINING" / "MEND" / "smollm2-135m.yaml"
FACTS = SHIPPED / "data" / "facts.json"


def arguments() -> argparse.Namespace:
    p = parser(__doc__ or "")
    p.add_argument(
        "--hparams", default=str(DEFAULT_HPARAMS), help="YAML of hparams/TRAINING/MEND (default: %(default)s)"
    )
    p.add_argument("--train", metavar="FILE", help="training requests (default: data/facts.json, split `train`)")
    p.add_argument("--val", metavar="FILE", help="validation requests (default: data/facts.json, split `validation`)")
    p.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of refusing the file")
    p.add_argument("--train-size", type=int, metavar="N", help="train on N of the requests, drawn by the seed")
    p.add_argument(
        "--apart",
        nargs="*",
        metavar="FILE",
        help="train on no text that the validation requests, the test split of data/facts.json (where that is trained "
        "on) or these files' requests hold",
    )
    p.add_argument("--set", **SETTINGS, help="override hyper-parameters")
    p.add_argument("--max-iters", type=int, help="training steps (default: the YAML's)")
    p.add_argument("--device", help="GPU number, cpu, cuda:1 … (default: the YAML's; under torchrun the local rank)")
    p.add_argument("--matmul", choices=("exact", "tf32"), help="float32 products on a GPU (default: the YAML's)")
    p.add_argument("--output", metavar="DIR", help="folder (default: results/models/MEND/<model>)")
    p.add_argument(
        "--store-dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="of the archive"
    )
    p.add_argument("--resume", action="store_true", help="go on from last.safetensors in the folder")
    p.add_argument("--dry-run", action="store_true", help="check flags, YAML and data, print them, load no model")
    declare(p, "hparams", "train", "val", "apart", output="shared")
    return p.parse_args()


def main() -> int:
    args = arguments()

    from easyeditor import CounterFactDataset, MENDTrainingHparams
    from easyeditor.commands.outputs import checked
    from easyeditor.dataset.training import apart
    from easyeditor.runs.ranks import placed, process_group, rank_of
    from easyeditor.trainer.state import check_place, training_folder
    from easyeditor.trainer.tasks import check_trainable

    rank = rank_of(os.environ)
    flags = overrides(args.set, max_iters=args.max_iters, device=args.device, matmul=args.matmul)
    hparams = MENDTrainingHparams.from_hparams(args.hparams, flags)
    hparams = placed(hparams, rank, flag=args.device is not None)
    folder = training_folder(hparams, args.output)
    checked(args, hparams.reads(), writes={"--output": folder}, first=rank.first)
    if rank.first:
        check_place(folder, args.resume)
    if (args.train is None) != (args.val is None) and args.train is None:
        raise ConfigError("--val without --train; give both, or neither for data/facts.json")

    def read(file: str | None, split: str | None) -> CounterFactDataset:
        return CounterFactDataset(file or FACTS, split=None if file else split, skip_bad=args.skip_bad)

    train = read(args.train, "train")
    val = read(args.val, "validation") if args.val is not None or args.train is None else None
    if args.apart is not None:
        held_out = [read(file, None) for file in args.apart]
        held_out += [] if val is None else [val]
        held_out += [] if args.train else [read(None, "test")]
        train[:] = apart(train, [request for data in held_out for request in data])
        if not train:
            raise DataError(f"{train.path}: --apart leaves no request; every one shares a text with the held-out ones")
    sets = {name: own.dataset.to_json() for name, own in (("train", train), ("validation", val)) if own is not None}
    for requests in (train, *([] if val is None else [val])):
        check_trainable(requests)
    if args.train_size is not None:
        if not 0 < args.train_size <= len(train):
            raise ConfigError(
                f"--train-size is {args.train_size}; allowed: 1 to {len(train)}, the requests in {train.path}"
            )
        train[:] = random.Random(hparams.seed).sample(train, args.train_size)
    if args.dry_run:
        counts = {"train": len(train), "validation": None if val is None else len(val)}
        print(
            to_json(
                {
                    "hparams": hparams.to_dict(),
                    "requests": counts,
                    "sets": sets,
                    "memory": memory(hparams, training=True),
                },
                indent=1,
            )
        )
        return 0

    from easyeditor import EditTrainer
    from easyeditor.base.locks import working
    from easyeditor.results.folder import environment

    quiet_transformers()
    lock = working(folder) if rank.first else nullcontext()
    with process_group(rank), lock:
        trainer = EditTrainer(hparams, train, val, folder=folder, resume=args.resume, store_dtype=args.store_dtype)
        if rank.first:
            data = {
                "train": [str(train.path), len(train)],
                "validation": None if val is None else [str(val.path), len(val)],
            }
            write_json(folder / "manifest.json", {**environment(), **data, "sets": sets})
            write_json(folder / "config.json", hparams.to_dict())
        else:
            logging.getLogger().setLevel(logging.WARNING)
        with resumable("go on with --resume"):
            trained = trainer.run()
    if rank.first:
        print(f"{trained.steps} steps ({trained.reason}); best: {to_json(trained.best)}; archive: {trained.folder}")
    return 0


if __name__ == "__main__":
    run(main)
