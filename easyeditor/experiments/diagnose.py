"""Why did an edit collapse the model? The four known causes, for every edit of a finished run.

  python -m easyeditor.analysis diagnose results/RUN             a run folder of single_case_edit.py or mass_edit.py
  python -m easyeditor.analysis diagnose results/RUN --limit 40 --rank 16

For each edit: (a) the denominator (Fall of ROME: near zero when the keys are inconsistent), (b) how far the value
search moved the value, ||v*|| / ||v0|| (over-optimised values), (c) the growth of the edited weight, ||W'|| / ||W||
(Frobenius), (d) how much of its leading singular subspaces is left, on the input and on the output side (1 = all,
0 = none). In a sequential run (c) and (d) are those of all edits up to that one. Updates that the run saved are read;
others are computed again from its configuration, contexts and seed (a value search each).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from easyeditor.base.errors import ConfigError
from easyeditor.base.places import at_least_one, declare
from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.table import Table
from easyeditor.editing.editor import Editor
from easyeditor.experiments.tools.lab import group
from easyeditor.experiments.tools.projection import separation
from easyeditor.experiments.tools.replayed import ReplayedRun
from easyeditor.lm.spectrum import leading, overlap
from easyeditor.values.collapse import SMALL_DENOMINATOR
from easyeditor.values.edit import WeightDelta
from easyeditor.values.record import EditRecord

CAUSES = ("|denominator|", "|v*|/|v0|", "|W'|/|W|", "overlap")
BELOW = ("|denominator|", "overlap")  # these are a cause below their border, the others above
APART = 0.95
COLUMNS = ("case", "prompt", "perplexity", "collapsed", *CAUSES, "overlap, outputs", "overlap, inputs", "causes")
SHOWN = ("prompt", "perplexity", "collapsed", *CAUSES)
Row = dict[str, Any]


def borders(rank: int) -> dict[str, float]:
    """Where a cause is named: our borders, no paper's.

    The value: as far as ROME's clamp lets the offset go. The overlap: more than one of the `rank` leading directions is
    lost, which no rank-one update does by itself.
    """
    return {"|denominator|": SMALL_DENOMINATOR, "|v*|/|v0|": 4.0, "|W'|/|W|": 1.1, "overlap": 1 - 1.5 / rank}


def add_flags(p: argparse.ArgumentParser) -> None:
    """The run, and how much of it."""
    p.add_argument("run", metavar="RUN", help="run folder of single_case_edit.py or mass_edit.py")
    p.add_argument("--limit", type=int, default=20, help="most edits looked at (default: %(default)s)")
    p.add_argument("--rank", type=int, default=8, help="singular directions compared (default: %(default)s)")
    p.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="override, e.g. device=cpu"
    )
    p.add_argument("--output", metavar="DIR", help="run folder of this experiment (default: a new one under results/)")
    declare(p, "run", output="run")


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Measure the four causes for every edit, and say which of them tell collapsed edits from stable ones."""
    at_least_one(args, "limit", "rank")
    run = ReplayedRun.read(Path(args.run), args.set)
    editor = run.editor()
    before: dict[str, tuple[Tensor, Tensor]] = {}
    rows: list[Row] = []
    with steps("edits") as show:
        for number, (line, deltas) in enumerate(run.updates(editor, args.limit), 1):
            rows.append(_measured(line.record, deltas, editor, before, args.rank))
            show(number, min(args.limit, len(run.run.edits)), rows[-1]["causes"])
    if not rows:
        raise ConfigError(f"{args.run}: none of the run's edits stayed in its model; there is nothing to diagnose")
    return Outcome(
        tables=[
            Table.of(
                "edits",
                f"the four causes, {editor.method.title}",
                COLUMNS,
                [list(row.values()) for row in rows],
                brief=SHOWN,
            )
        ],
        figures={"diagnose": _draw(rows, borders(args.rank))},
        findings=[_finding(rows, cause) for cause in CAUSES],
        look_for="causes that set the collapsed edits apart: a denominator near 0, and with it a weight that "
        "grew and turned.",
        config=run.hparams.to_dict(),
        manifest={
            "experiment": "diagnose",
            "run": str(args.run),
            "model_fingerprint": run.run.manifest["model_fingerprint"],
            "rank": args.rank,
            "borders": borders(args.rank),
        },
    )


def _measured(
    record: EditRecord,
    deltas: Sequence[WeightDelta],
    editor: Editor,
    before: dict[str, tuple[Tensor, Tensor]],
    rank: int,
) -> Row:
    """The columns of an edit: the four causes are the worst over layers and weights."""
    denominators = [abs(t.denominator) for t in record.trace.values() if t.denominator is not None]
    ratios = [t.value_growth for t in record.trace.values() if t.value_growth is not None]
    grown, left, right = [1.0], [1.0], [1.0]
    changes: dict[str, Tensor] = {}
    for delta in deltas:
        changes[delta.name] = changes.get(delta.name, torch.zeros(())) + delta.dense().double().cpu()
    for name, change in changes.items():
        weight = editor.model.get_parameter(name).detach().double().cpu()
        if weight.ndim != 2:
            continue
        before.setdefault(name, leading(weight, rank))
        after = leading(weight + change, rank)
        grown.append(float((weight + change).norm() / weight.norm()))
        left.append(overlap(before[name][0], after[0]))
        right.append(overlap(before[name][1], after[1]))
    values = (min(denominators, default=None), max(ratios, default=None), max(grown), min(*left, *right))
    causes = dict(zip(CAUSES, values, strict=True))
    limits = borders(rank)
    named = [
        cause
        for cause, value in causes.items()
        if value is not None and (value < limits[cause] if cause in BELOW else value > limits[cause])
    ]
    own = (record.request.case_id, record.request.prompt, record.post.ppl, record.collapsed)
    return dict(zip(COLUMNS, (*own, *causes.values(), min(left), min(right), ", ".join(named) or "none"), strict=True))


def _split(rows: list[Row], cause: str) -> dict[bool, np.ndarray[Any, Any]]:
    """A cause's values of the collapsed (True) and of the stable edits."""
    known = [row for row in rows if row[cause] is not None]
    return {hit: np.array([row[cause] for row in known if row["collapsed"] is hit], float) for hit in (True, False)}


def _finding(rows: list[Row], cause: str) -> Finding:
    values = _split(rows, cause)
    claim = f"{cause} tells collapsed edits from stable ones"
    if not len(values[True]) or not len(values[False]):
        return Finding(claim=claim, holds=None, because="needs collapsed and stable edits with this number in one run")
    apart = separation(values[False], values[True])
    share = 1 - apart if cause in BELOW else apart
    means = " against ".join(f"{np.median(values[hit]):.3g}" for hit in (True, False))
    return Finding(
        claim=claim,
        holds=bool(share >= APART),
        because=f"medians {means}; {share:.0%} of pairs of a collapsed and a stable edit in that order",
    )


def _draw(rows: list[Row], limits: Mapping[str, float]) -> Figure:
    titles = ["(a) |denominator|", "(b) ‖v*‖ / ‖v₀‖", "(c) ‖W′‖ / ‖W‖", "(d) overlap of singular subspaces"]
    figure = canvas.panels(titles, columns=2, width=4.2, height=2.9)
    for ax, cause in zip(figure.get_axes(), CAUSES, strict=True):
        values = _split(rows, cause)
        shown = [
            group("collapse" if hit else "normal", values[hit], label=label)
            for hit, label in ((True, "collapsed"), (False, "stable"))
            if len(values[hit])
        ]
        if not shown:
            ax.text(0.5, 0.5, "not known for this method", ha="center", transform=ax.transAxes)
            continue
        log = cause != "overlap" and all(math.isfinite(v) and v > 0 for own in shown for v in own.values)
        figures.strips(ax, shown, cause, log=log, line=(limits[cause], "border"))
    return figure
