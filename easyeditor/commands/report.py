"""Tables, figures and one HTML page from run folders; loads no model.

  python -m easyeditor.report results/mass-rome                       one run: writes results/mass-rome/report/
  python -m easyeditor.report results/hard-rome results/hard-crome --output results/hard --label ROME C-ROME
                                                                      several runs side by side
  python -m easyeditor.report results/models/MEND/smollm2-135m        training curve of a hypernetwork

A RUN is a folder of mass_edit.py (running or killed ones too), single_case_edit.py or pretrain_mend.py. Written are
index.html (opens from disk, needs nothing else), figures/*.png and *.svg, tables/*.csv and *.tex. docs/report.md
explains each.
Exit code: 0, 2 for bad input.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from easyeditor.base.errors import ConfigError
from easyeditor.base.places import declare
from easyeditor.base.process import terminal
from easyeditor.commands.cli import parser, run


def arguments() -> argparse.Namespace:
    """The flags."""
    p = parser(__doc__ or "")
    p.add_argument("runs", nargs="+", metavar="RUN", type=Path, help="run folder")
    p.add_argument("--output", metavar="DIR", type=Path, help="report folder (default for one run: RUN/report)")
    p.add_argument("--label", nargs="+", action="extend", default=[], metavar="TEXT", help="one name for each run")
    p.add_argument("--worst", type=int, default=8, metavar="N", help="cases named in a figure (default: %(default)s)")
    declare(p, "runs", output="report")
    return p.parse_args()


def main() -> int:
    """Read the runs, write the report, print the short tables; returns the exit code."""
    args = arguments()
    if args.output is None and len(args.runs) > 1:
        raise ConfigError(f"{len(args.runs)} runs need --output DIR, the folder of their common report")
    if args.label and len(args.label) != len(args.runs):
        raise ConfigError(f"--label names {len(args.label)} runs, and {len(args.runs)} are given; name each of them")
    if args.worst < 0:
        raise ConfigError(f"--worst {args.worst}: give 0 or more")
    output = args.output if args.output is not None else args.runs[0] / "report"

    from easyeditor.commands.outputs import checked
    from easyeditor.drawing.render import rich_table
    from easyeditor.report.build import describe, make_report, write_report
    from easyeditor.results.run import load_runs

    runs = load_runs(args.runs, args.label)  # the lock would make a run folder that is not there
    with checked(args, writes={"--output": output}).locked():
        report = make_report(runs, args.worst)
        page = write_report(report, output)
    console = terminal()
    for table in report.tables:
        if table.longest != 0:
            console.print(rich_table(table), "")
    for note in report.notes:
        console.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console.print(f"report: {page} ({describe(report)})", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    run(main)
