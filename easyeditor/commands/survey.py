"""Methods x model x data x mode x seeds from one plan, each cell an ordinary run, ending in one page.

  python -m easyeditor.survey hparams/survey/smollm2-135m.yaml --dry-run    the cells, and how long each takes
  python -m easyeditor.survey hparams/survey/smollm2-135m.yaml              runs what is not done, then makes the page
  python -m easyeditor.survey PLAN.yaml --page                              only the page, from what is recorded
  torchrun --nproc-per-node 4 -m easyeditor.survey PLAN.yaml                cells dealt out over 4 GPUs

Every cell is a run folder of mass_edit.py under the plan's output, so it can be resumed, reported and repeated alone;
the page has the command of each. Kill the survey at any moment and start it again: nothing recorded is done twice.
docs/report.md explains plans and columns. Exit code: 0, 2 for bad input or when a cell could not be run (the others
are), 130 for Ctrl-C, 143 for SIGTERM.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from easyeditor.base.errors import ConfigError
from easyeditor.base.places import declare
from easyeditor.base.process import terminal
from easyeditor.commands.cli import parser, quiet_transformers, resumable, run

if TYPE_CHECKING:
    from easyeditor.survey.cells import Cell
    from easyeditor.survey.page import CellResult
    from easyeditor.survey.plan import Survey


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("plan", metavar="PLAN", type=Path, help="YAML of the survey")
    p.add_argument("--output", metavar="DIR", type=Path, help="folder of the survey (default: the plan's output)")
    p.add_argument("--dry-run", action="store_true", help="print the cells and the time each takes; run nothing")
    p.add_argument("--page", action="store_true", help="only make the page, from what is recorded")
    declare(p, "plan", output="survey")
    args = p.parse_args()
    if args.dry_run and args.page:
        p.error("--dry-run and --page were both given; the first writes nothing")
    return args


def main() -> int:
    """Read the plan, run the cells, make the page; returns the exit code."""
    args = arguments()
    from easyeditor.base.locks import LOCK, lock_of, locked
    from easyeditor.commands.outputs import checked
    from easyeditor.runs.ranks import rank_of
    from easyeditor.survey.cells import PAGE, cells_of
    from easyeditor.survey.plan import read_plan

    rank, survey = rank_of(os.environ), read_plan(args.plan)
    output = args.output or Path(survey.plan.output)
    cells = cells_of(survey, output, rank)
    named: dict[str, tuple[str, Any]] = {}
    for cell in cells:
        used = {"hparams": cell.yaml, "data": cell.what.settings.data, "sample": cell.what.settings.sample}
        used |= cell.what.hparams.reads()
        named |= {str(place): (f"{cell.name} {key}", place) for key, place in used.items()}
    reads = {"hparams": survey.plan.hparams, **dict(named.values())}
    checked(args, reads, writes={"--output": output}, first=rank.first)
    if args.dry_run:
        show_cells(cells)
        return 0
    if not args.page:
        from easyeditor.survey.running import run_cells

        quiet_transformers()
        own = locked(output / (LOCK if rank.first else f"{LOCK}-{rank.rank}"), str(output))
        with own, resumable("start the same command again"):
            run_cells(cells, rank, show=True)
    if not rank.first:
        return 0
    with locked(lock_of(output / PAGE), str(output / PAGE)):
        return show_page(survey, args.plan, cells, output / PAGE)


def show_cells(cells: Sequence[Cell]) -> None:
    """The cells, one a line, and the time that is known of them."""
    from easyeditor.survey.cells import TABLES, estimates, progress_of, recorded

    every = progress_of(cells)
    left = estimates(every)
    width = max(len(cell.name) for cell in cells)
    named = False
    for n, one in enumerate(every):
        kind, seconds, by = f"{one.cell.what.settings.mode}, {one.cell.size:,} requests", left[n], ""
        if seconds is None and (kept := recorded(one.cell)):
            seconds, by = kept[0], f", by {', '.join(kept[1])}"
            left[n], named = seconds, True
        time = "time unknown" if seconds is None else "nothing to do" if not seconds else f"about {_duration(seconds)}"
        print(f"{one.cell.name:<{width}}  {kind}; {one.state}; {time}{by}")
    known = [seconds for seconds in left if seconds is not None]
    total = f"about {_duration(sum(known))} for {len(known)} of them" if known else "time unknown"
    print(f"{len(cells)} cells: {total}")
    print("Time is that of edits made so far; loading models and evaluating earlier edits are not in it.")
    if named:
        print(f"By a table of {TABLES}: its seconds an edit, since no such edit is made yet; measuring is not in it.")


def show_page(survey: Survey, plan: Path, cells: Sequence[Cell], folder: Path) -> int:
    """Write the page, print the table; 2 if a cell could not be run."""

    from easyeditor.drawing.render import rich_table
    from easyeditor.report.build import describe, write_report
    from easyeditor.survey.page import brief_table, make_page, outcomes_of

    outcomes = outcomes_of(cells)
    report = make_page(survey, plan, outcomes)
    page = write_report(report, folder)
    console = terminal()
    console.print(rich_table(brief_table(outcomes)))
    console.print(f"page: {page} ({describe(report)})", markup=False, highlight=False, soft_wrap=True)
    return _check_failed(outcomes)


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _check_failed(outcomes: Sequence[CellResult]) -> int:
    failed = [o for o in outcomes if o.progress.state.startswith("failed")]
    if failed:
        first = failed[0]
        raise ConfigError(
            f"{len(failed)} of {len(outcomes)} cells could not be run; the first is {first.cell.name}, "
            f"{first.progress.state}; mend the plan and start the survey again"
        )
    return 0


if __name__ == "__main__":
    run(main)
