"""Hyper-parameters for a model, measured on it: layers by causal tracing and collapse safety, then a small search.

  python -m easyeditor.tune --model NAME_OR_FOLDER --output hparams/ROME/NAME.yaml
  python -m easyeditor.tune --model NAME --method MEMIT --minutes 60 --output hparams/MEMIT/NAME.yaml
  python -m easyeditor.tune … --kept results/tune-…/tune.jsonl      go on: nothing measured is measured again

The method is any that rewrites one projection at chosen layers (ROME, MEMIT and their variants, FT). Values that are
not searched for are taken from --start, by default the file in hparams/ of the model's name, else the embedded model's.
The YAML says in comments what was tried and measured, and how it does on held-out facts; the run folder (--run) has a
page with tables and figures. A decoder of a type that is not known is taken apart by its module tree; a line says so.
docs/models.md explains the search. Exit code: 0, 2 for bad input, 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from easyeditor.base.errors import ConfigError
from easyeditor.base.places import at_least_one, declare
from easyeditor.base.process import terminal
from easyeditor.commands.cli import SETTINGS, parser, quiet_transformers, resumable, run

if TYPE_CHECKING:
    from easyeditor.tune.running import Plan

UNTOLD = ("output", "run", "kept", "device", "places")  # flags that change nothing that is found
WIDTH = 140  # of tables that go into a file or a pipe


def arguments() -> argparse.Namespace:
    """The flags, checked."""
    p = parser(__doc__ or "")
    p.add_argument("--model", required=True, help="folder, hub name, or an embedded model's name")
    p.add_argument("--method", default="ROME", help="method to tune (default: %(default)s)")
    p.add_argument("--output", metavar="FILE", required=True, help="YAML that is written; must not be there yet")
    p.add_argument(
        "--minutes",
        type=float,
        default=20.0,
        help="of search; check and held-out facts come after (default: %(default)g)",
    )
    p.add_argument(
        "--start", metavar="YAML", help="what is not searched for (default: the model's or the embedded model's)"
    )
    p.add_argument("--set", **SETTINGS, help="override the start")
    p.add_argument("--data", metavar="FILE", help="requests with paraphrases and neighbours (default: ours)")
    p.add_argument("--skip-bad", action="store_true", help="leave bad records out instead of refusing the file")
    p.add_argument("--edits", type=int, default=8, help="facts in each trial, and in the check (default: %(default)s)")
    p.add_argument("--held-out", type=int, default=20, help="facts the result is judged by (default: %(default)s)")
    p.add_argument("--facts", type=int, default=12, help="known facts that are traced (default: %(default)s)")
    p.add_argument("--candidates", type=int, default=4, help="layers to begin with (default: %(default)s)")
    p.add_argument("--sentences", type=int, default=16, help="for perplexity in a trial (default: %(default)s)")
    p.add_argument("--ppl-ratio", type=float, default=1.2, help="most perplexity, x unedited (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the facts drawn (default: %(default)s)")
    p.add_argument("--device", help="GPU number, cpu, cuda:1 ... (default: the start file's)")
    p.add_argument(
        "--kept", metavar="FILE", help="JSON lines of what was measured (default: tune.jsonl in the run folder)"
    )
    p.add_argument("--run", metavar="DIR", help="run folder (default: a new one under results/)")
    declare(p, "model", "start", "data", output="new file", kept="kept of tune", run="run")
    args = p.parse_args()
    if not (math.isfinite(args.minutes) and args.minutes > 0):
        raise ConfigError(f"--minutes is {args.minutes:g}; allowed: a number above 0")
    at_least_one(args, "edits", "held_out", "facts", "candidates", "sentences")
    if not args.ppl_ratio >= 1:
        raise ConfigError(f"--ppl-ratio is {args.ppl_ratio:g}; allowed: 1 or more")
    told = {name: value for name, value in vars(args).items() if name not in UNTOLD and value != p.get_default(name)}
    words = [
        [f"--{name.replace('_', '-')}", *(v if isinstance(v, list) else [] if v is True else [f"{v}"])]
        for name, v in told.items()
    ]
    args.command = shlex.join(["python", "-m", "easyeditor.tune", *(word for flag in words for word in flag)])
    return args


def main() -> int:
    """Measure, search, write; returns the exit code."""
    args = arguments()
    deadline = time.monotonic() + 60 * args.minutes

    from easyeditor.base.files import write_text
    from easyeditor.commands.outputs import checked
    from easyeditor.drawing.canvas import styled
    from easyeditor.report.build import PAGE
    from easyeditor.results.folder import run_folder
    from easyeditor.tune.page import page
    from easyeditor.tune.running import run_search
    from easyeditor.tune.written import outcome, yaml_text

    plan = planned(args)
    keys = {key: plan.values.get(key) for key in ("mom2_dataset", "stats_dir", "targets_dir")}
    places = checked(args, {"--start": plan.start, **keys})
    quiet_transformers()
    with places.locked(), run_folder(args.run, f"tune-{plan.method}") as folder:
        kept = folder / "tune.jsonl" if args.kept is None else Path(args.kept)
        with resumable(f"the same command with --kept {kept}"):
            found = run_search(plan, kept, deadline)
        with styled():
            made = outcome(found)
            written = [PAGE, *made.write(folder)]
            write_text(folder / PAGE, page(found, made.tables, args.output))
        write_text(Path(args.output), yaml_text(found))  # last: once it is there, the command is not begun again
    made.show(terminal(None if sys.stdout.isatty() else WIDTH))
    print(f"\nwritten: {args.output}; in {folder}: {', '.join([*written, 'result.json'])}")
    return 0


def planned(args: argparse.Namespace) -> Plan:
    """What the flags ask for, checked before any model is loaded."""
    from easyeditor.dataset.reader import read_dataset
    from easyeditor.dataset.sentences import load_sentences
    from easyeditor.tune.running import FACTS, Plan
    from easyeditor.tune.start import keys_of, start_values, tunable
    from easyeditor.tune.trials import drawn

    method = tunable(args.method)
    values, path = start_values(method, args.model, args.start, args.set)
    data = read_dataset(str(FACTS) if args.data is None else args.data, skip_bad=args.skip_bad)
    searched, checked, held_out = drawn(data.grouped(), (args.edits, args.edits, args.held_out), args.seed)
    return Plan(
        method=method,
        model=args.model,
        values=values,
        start=path,
        device=args.device,
        requests=data.requests,
        searched=searched,
        checked=checked,
        held_out=held_out,
        sentences=load_sentences(args.sentences),
        facts=args.facts,
        candidates=args.candidates,
        most_ratio=args.ppl_ratio,
        seed=args.seed,
        fixed=keys_of(args.set),
        command=args.command,
    )


if __name__ == "__main__":
    run(main)
