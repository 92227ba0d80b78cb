"""Edit every request of a dataset, probe perplexity after each edit, and end with the list of collapses.

  python mass_edit.py --data data/hard/smollm2-135m.json                    every edit on the original model (single)
  python mass_edit.py --data FILE --mode sequential --eval-every 10         edits stay; all are evaluated as they age
  python mass_edit.py --data FILE --mode batch --batch-size 100 --hparams hparams/MEMIT/smollm2-135m.yaml
  python mass_edit.py --data FILE --screen                                  denominators only: who would collapse?
  python mass_edit.py --data FILE --collect-collapsed hard.json             also write the collapsing requests
  python mass_edit.py --data FILE --case-files run_000      also write what ROME's and MEMIT's summarize.py reads
  python mass_edit.py --union a.json b.json --collect-collapsed both.json   merge several models' collapsing requests
  python mass_edit.py --resume results/RUN                                  go on after a kill, a reboot, a full disk
  torchrun --nproc-per-node 4 mass_edit.py --data FILE --output RUN         requests shared out over 4 GPUs
  torchrun --nnodes 2 --node-rank 0 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d \\
      --rdzv-endpoint HOST:29500 mass_edit.py --data FILE --output /shared/RUN
        two machines of 4 GPUs: the same command on both, --node-rank 1 on the second; HOST is the first, and RUN lies
        in a folder both see. When a process dies torchrun starts all again, and they go on where they were.

--data takes JSON or JSON lines in CounterFact's, EasyEdit's flat, ZsRE's, HardCF's, KnowEdit's, MQuAKE's, QAEdit's,
WikiBigEdit's or question/answer form, or a Hugging Face dataset as NAME[:SPLIT] or NAME:FILE.json. Writes a run folder:
config.json, manifest.json, results.jsonl (one record an edit, on disk before the next begins), summary.json; sequential
runs also deltas/. Kill it at any moment: --resume repeats nothing that is recorded, and a sequential run gets the same
weights back from its saved deltas. Exit code: 0, 2 for bad input, 3 for a collapse with --fail-on-collapse, 130 for
Ctrl-C, 143 for SIGTERM. On two CPU cores an edit of the embedded model takes about 10 s.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.files import to_json, write_json
from easyeditor.base.hparams import HyperParams
from easyeditor.base.places import declare
from easyeditor.base.process import terminal
from easyeditor.commands.cli import (
    DEFAULT_HPARAMS,
    EXIT_COLLAPSED,
    edit_flags,
    hparams_of,
    memory,
    parser,
    quiet_transformers,
    resumable,
    run,
)
from easyeditor.runs.ranks import Rank, placed, rank_of
from easyeditor.runs.settings import RunSettings
from easyeditor.values.collapse import SMALL_DENOMINATOR

if TYPE_CHECKING:
    from easyeditor.commands.outputs import Places

FLAGS = (  # flags that are run settings of the same name
    *("data", "mode", "batch_size", "eval_every", "stop_on_collapse", "sample", "start", "limit", "shuffle", "seed"),
    *("order", "order_seed", "skip_bad", "screen", "screen_threshold", "on_collapse", "together", "measure", "metrics"),
)


def arguments() -> argparse.Namespace:
    p = parser(__doc__ or "")
    yes: dict[str, Any] = {"action": "store_true", "default": None}
    n: dict[str, Any] = {"type": int, "metavar": "N"}
    edit_flags(p, printed="summary", checked="data", where="; under torchrun the local rank")
    p.add_argument("--data", metavar="FILE", help="a file, a folder, or Hugging Face NAME[:SPLIT or FILE.json]")
    p.add_argument("--mode", choices=("single", "sequential", "batch"), help="default: single")
    p.add_argument("--batch-size", **n, help="requests in one edit (mode batch)")
    p.add_argument("--eval-every", **n, help="evaluate all edits so far after every N edits, too (default: at the end)")
    p.add_argument("--stop-on-collapse", **yes, help="end after the first collapse that stays or is rolled back")
    p.add_argument("--sample", metavar="FILE[:NAME]", help="JSON list of record numbers (or lists by name) to use")
    p.add_argument("--start", **n, help="first record used (default: 0)")
    p.add_argument("--limit", **n, help="most records used (default: all)")
    p.add_argument("--shuffle", **yes, help="shuffle by --seed before --start and --limit choose")
    p.add_argument("--seed", **n, help="seed of --shuffle (default: 0); contexts have --set seed=N")
    order = "order of the chosen records: as-is (default), random, or clustered: random, and the same words "
    p.add_argument("--order", choices=("as-is", "random", "clustered"), help=f"{order}around a subject together")
    p.add_argument("--order-seed", **n, help="seed of --order random and clustered (default: 0)")
    p.add_argument("--skip-bad", **yes, help="leave bad records out instead of refusing the dataset")
    guard = "leave a collapsing edit (default), take it back, take it back and do it again with the method's remedy, "
    guard += "or go back to the last batch that stood and say which (rollback; not in mode single)"
    p.add_argument("--on-collapse", choices=("keep", "revert", "remedy", "rollback"), help=guard)
    many = "edits computed together in mode single, or auto (the default): 8 on a CPU, on a GPU what its memory holds"
    p.add_argument("--together", metavar="N", help=many)
    shared = "whether their edited models share forwards (default: auto, not on a CPU)"
    p.add_argument("--measure", choices=("auto", "together", "alone"), help=shared)
    p.add_argument("--screen", **yes, help="compute denominators only, rank them, predict collapse")
    threshold = f"|denominator| below which a collapse is predicted (default: {SMALL_DENOMINATOR:g})"
    p.add_argument("--screen-threshold", type=float, metavar="X", help=threshold)
    p.add_argument("--collect-collapsed", metavar="FILE", help="write the collapsing requests as a dataset")
    p.add_argument("--case-files", metavar="DIR", help="also write the layout of ROME's and MEMIT's summarize.py")
    p.add_argument("--union", nargs="+", metavar="FILE", help="only merge collected files into --collect-collapsed")
    p.add_argument("--resume", metavar="RUN", help="go on with a run folder; other flags, if given, must say the same")
    declare(p, "hparams", "data", "sample", "union", collect_collapsed="requests", case_files="new folder")
    declare(p, output="run", resume="run to resume")
    args = p.parse_args()
    if args.resume is not None and args.output is not None:
        p.error("--resume and --output were both given; --resume writes to its own folder")
    if args.data is None and args.resume is None and args.union is None:
        p.error("--data is missing (or --resume RUN, or --union FILE …)")
    if args.union is not None and args.collect_collapsed is None:
        p.error("--union needs --collect-collapsed FILE, where the union is written")
    return args


def wanted(args: argparse.Namespace, rank: Rank) -> tuple[HyperParams, RunSettings]:
    """Hyper-parameters and settings: the run's that is resumed, or the defaults, with the flags over them."""
    from easyeditor.runs.mass import stored

    given = {key: value for key in FLAGS if (value := getattr(args, key)) is not None}
    if args.case_files is not None and (args.resume is None or args.metrics is not None):
        from easyeditor.export.cases import METRICS

        given["metrics"] = list(dict.fromkeys([*(args.metrics or []), *METRICS]))
    begun = None
    if args.resume is not None:
        begun, settings = stored(Path(args.resume))
        given = {**settings.to_dict(), **given}
    hparams = placed(hparams_of(args, begun), rank, flag=args.device is not None)
    hparams.check_files()
    return hparams, RunSettings.from_dict(given, "flags")


def places_of(args: argparse.Namespace, hparams: HyperParams, settings: RunSettings, rank: Rank) -> Places:
    """What is read and written, checked before anything is computed. Raises, too, if what is to be written will not be
    known."""
    from easyeditor.commands.outputs import checked
    from easyeditor.export.cases import check_metrics

    if args.case_files is not None:
        check_metrics(settings)
    if args.collect_collapsed is not None and (settings.mode != "single" or settings.screen):
        raise ConfigError("--collect-collapsed needs mode single, where each collapse is one request's doing")
    if args.collect_collapsed is not None and not hparams.ppl_sentence_num:
        raise ConfigError("--collect-collapsed needs perplexity to know a collapse, and ppl_sentence_num is 0")
    reads = {"--hparams": args.hparams or DEFAULT_HPARAMS, "--data": settings.data, "--sample": settings.sample}
    return checked(args, {**reads, **hparams.reads()}, first=rank.first)


def mass_edit(args: argparse.Namespace, rank: Rank) -> int:
    from easyeditor.dataset.probes import probes_of
    from easyeditor.results.run import CONFIG
    from easyeditor.runs.mass import begun, check_same, check_world, execute, taken_up
    from easyeditor.runs.planning import plan

    if rank.world > 1 and args.output is not None and (Path(args.output) / CONFIG).is_file():
        args.resume, args.output = args.output, None  # torchrun starts the same command again when a process has died
    hparams, settings = wanted(args, rank)
    check_world(settings, rank, args.resume or args.output)
    what = plan(hparams, settings)
    places = places_of(args, hparams, settings, rank)
    if args.resume is not None:
        check_same(Path(args.resume), what)
    if args.dry_run:
        counts = {"selected": len(what.requests), "records": len(what.records), "probes": probes_of(what.requests)}
        data = {"data": what.dataset.to_json(), **counts}
        print(to_json({**what.config(), **data, "memory": memory(hparams)}, indent=1))
        return 0

    from easyeditor.editing.easyedit import BaseEditor
    from easyeditor.export.cases import write_cases
    from easyeditor.runs.collapsing import collapsing

    quiet_transformers()
    there = args.resume if rank.first else args.resume or args.output
    run_at = begun(args.output, what) if there is None else taken_up(Path(there), rank)
    with places.locked(), run_at as folder:
        with resumable(f"go on with --resume {folder}"):
            editor = functools.partial(BaseEditor, metrics=settings.metrics)
            summary = execute(folder, what, editor, rank, not args.json or sys.stderr.isatty())
        if summary is None:
            return 0
        if args.collect_collapsed is not None:
            write_json(Path(args.collect_collapsed), collapsing(folder))
        if args.case_files is not None:
            write_cases(folder, Path(args.case_files))
    show(summary, folder, args)
    return EXIT_COLLAPSED if args.fail_on_collapse and summary["counts"]["collapsed"] else 0


def show(summary: dict[str, Any], folder: Path, args: argparse.Namespace) -> None:
    """The summary, as JSON or as tables."""
    if args.json:
        print(to_json(summary))
        return
    from easyeditor.report.terminal import print_summary

    print_summary(summary, terminal())
    if args.collect_collapsed is not None:
        print(f"collapsing requests: {args.collect_collapsed}")
    if args.case_files is not None:
        print(f"case files: {args.case_files}")
    print(f"\nrun: {folder}")


def main() -> int:
    args = arguments()
    if args.union is None:
        return mass_edit(args, rank_of(os.environ))

    from easyeditor.commands.outputs import checked
    from easyeditor.runs.collapsing import union

    with checked(args).locked():
        records = union([Path(file) for file in args.union])
        write_json(Path(args.collect_collapsed), records)
    print(f"{len(records)} requests: {args.collect_collapsed}")
    return 0


if __name__ == "__main__":
    run(main)
