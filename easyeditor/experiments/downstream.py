"""Do edited models lose their abilities as perplexity rises? Edited models through lm-evaluation-harness, in memory.

  pip install -r requirements-eval.txt
  python -m easyeditor.analysis downstream                     three tasks of our own facts and sentences: offline
  python -m easyeditor.analysis downstream --tasks piqa hellaswag lambada_openai mmlu --documents 200
        the papers' tasks: the harness fetches their data sets

Every request of both sets is edited with ROME and its perplexity measured; then the unedited model, the --worst edited
models, and one model from each of --buckets perplexity ranges (evenly spaced in log) go through the tasks.
Butterfly Effect, section 4: the worst models answer at chance, and perplexity rank-correlates with task performance
(Spearman -0.85 to -1.00), so that perplexity speaks for all tasks.
"""

from __future__ import annotations

import argparse
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from easyeditor.base.places import at_least_one
from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLUE, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.experiments.tools.harness import CHANCE, Harness, check_installed
from easyeditor.experiments.tools.lab import Lab, common_flags, set_flags
from easyeditor.experiments.tools.papers import SPEARMAN, WORST_MODELS
from easyeditor.values.edit import EditRequest, WeightDelta
from easyeditor.values.estimates import share_of

STRONG = -0.7  # Spearman at or below: a strong relation

Pool = list[tuple[EditRequest, WeightDelta, float]]


class Row(NamedTuple):
    """A model: unedited, worst or its range of perplexity; the edit's prompt; (accuracy, documents) by task."""

    model: str
    edit: str | None
    ppl: float
    found: dict[str, tuple[float, int]]

    def accuracy(self, task: str) -> float:
        """Of one task."""
        return self.found[task][0]


def add_flags(p: argparse.ArgumentParser) -> None:
    """The two sets, and what of the edited models is evaluated on what."""
    common_flags(p)
    set_flags(p, limit=5)
    p.add_argument("--worst", type=int, default=2, help="worst edited models evaluated (default: %(default)s)")
    p.add_argument("--buckets", type=int, default=4, help="perplexity ranges, one model each (default: %(default)s)")
    p.add_argument("--tasks", nargs="+", metavar="NAME", help="tasks of the harness (default: our own three, offline)")
    p.add_argument("--documents", type=int, default=24, help="most documents of each task (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=8, help="sequences in one forward (default: %(default)s)")


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Edit, choose, evaluate, correlate."""
    check_installed()
    at_least_one(args, "worst", "buckets", "documents", "batch_size")
    lab = Lab.of(args)
    if args.tasks is not None:
        harness = Harness.named(args.tasks, args.documents, args.batch_size)
    else:
        edited = {request.prompt for _, request in lab.requests}
        harness = Harness.own(args.documents, lab.hparams.seed, edited, args.batch_size)
    base = lab.perplexity()
    pool = _edited(lab)
    rows = [Row("unedited", None, base, _evaluated(harness, lab))]
    counts = {name: count for name, (_, count) in rows[0].found.items()}
    chosen = choose([ppl for _, _, ppl in pool], args.worst, args.buckets)
    with steps("harness") as show:
        for number, (place, why) in enumerate(chosen.items(), 1):
            request, delta, ppl = pool[place]
            rows.append(Row(why, request.prompt, ppl, _evaluated(harness, lab, delta)))
            show(number, len(chosen), f"perplexity {ppl:,.0f}")
    correlated = {name: _spearman(rows, name) for name in harness.names}
    shown = [[*row[:3], *map(row.accuracy, harness.names)] for row in rows]
    columns = ["model", "edit", "perplexity", *harness.names]
    edits = [[request.case_id, request.prompt, ppl] for request, _, ppl in pool]
    return Outcome(
        tables=[
            Table.of("models", "accuracy of edited models", columns, shown),
            _correlations(correlated),
            Table.of("edits", "all edits", ("case", "prompt", "perplexity"), edits, longest=0),
        ],
        figures={"downstream": _draw(rows, harness.names)},
        findings=_findings(rows, harness.names, counts, correlated, args.worst),
        look_for="accuracy falling to chance as perplexity rises.",
        **lab.recorded("downstream", tasks=list(harness.names), documents=counts),
        result={"spearman": correlated},
    )


def choose(perplexities: list[float], worst: int, buckets: int) -> dict[int, str]:
    """Which edits to evaluate, and why: the worst ones, and in each range of log perplexity the one nearest its middle.

    Perplexities that are not finite count as the worst; ranges span the finite ones.
    """
    sizes = [math.log(p) if math.isfinite(p) else math.inf for p in perplexities]
    order = sorted(range(len(sizes)), key=lambda i: -sizes[i])
    chosen = dict.fromkeys(order[:worst], "worst")
    finite = [size for size in sizes if math.isfinite(size)]
    edges = np.linspace(min(finite, default=0), max(finite, default=0), buckets + 1)
    for low, high in itertools.pairwise(edges):
        inside = [i for i, size in enumerate(sizes) if low <= size <= high and i not in chosen]
        if inside:
            nearest = min(inside, key=lambda i: abs(sizes[i] - (low + high) / 2))
            chosen[nearest] = f"{math.exp(low):,.0f} to {math.exp(high):,.0f}"
    return chosen


def _edited(lab: Lab) -> Pool:
    pool: Pool = []
    with steps("ROME") as show:
        for number, (_, request) in enumerate(lab.requests, 1):
            delta, _ = lab.edit(request)
            pool.append((request, delta, lab.perplexity(delta)))
            show(number, len(lab.requests), f"{request.subject}: {pool[-1][2]:,.0f}")
    return pool


def _evaluated(harness: Harness, lab: Lab, *deltas: WeightDelta) -> dict[str, tuple[float, int]]:
    with lab.applied(*deltas):
        return harness.accuracies(lab.editor.model, lab.editor.tok)


def _spearman(rows: list[Row], task: str) -> float | None:
    """Spearman's rank correlation of perplexity with a task's accuracy; None when one of them does not vary."""
    ppls, accuracies = [row.ppl for row in rows], [row.accuracy(task) for row in rows]
    return float(spearmanr(ppls, accuracies).statistic) if min(len({*ppls}), len({*accuracies})) > 1 else None


def _correlations(ours: dict[str, float | None]) -> Table:
    rows: list[list[Any]] = [["ours", name, value] for name, value in ours.items()]
    rows += [[f"paper, {model}", task, rho] for model, tasks in SPEARMAN.items() for task, rho in tasks.items()]
    title = "Spearman's rank correlation of perplexity and accuracy"
    return Table.of("spearman", title, ("models", "task", "rho"), rows)


def _findings(
    rows: list[Row], names: tuple[str, ...], counts: dict[str, int], rhos: dict[str, float | None], worst: int
) -> list[Finding]:
    known = {name: rho for name, rho in rhos.items() if rho is not None}
    shown = ", ".join(f"{name} {'–' if rho is None else f'{rho:.2f}'}" for name, rho in rhos.items())
    published = [rho for tasks in SPEARMAN.values() for rho in tasks.values()]
    told = Finding(
        claim="Task performance falls as perplexity rises, so perplexity speaks for it",
        holds=None if len(known) < len(rhos) else max(known.values()) <= STRONG,
        because=f"Spearman over {len(rows)} models: {shown}; papers {max(published):.2f} to {min(published):.2f}",
    )
    if not set(names) <= CHANCE.keys():
        return [told]
    low = [row for row in rows if row.model == "worst"]
    means = {name: float(np.mean([row.accuracy(name) for row in low])) for name in names}

    def above(name: str, accuracy: float) -> bool:
        least = share_of(round(accuracy * counts[name]), counts[name]).low
        return least is not None and least > CHANCE[name]

    able = [name for name in names if above(name, rows[0].accuracy(name))]
    at_chance = Finding(
        claim=f"The {min(worst, len(low))} worst models answer at chance",
        holds=not any(above(name, means[name]) for name in able) if able else None,
        because=", ".join(
            f"{name} {means[name]:.2f} (unedited {rows[0].accuracy(name):.2f}, chance {CHANCE[name]:.2f})"
            for name in names
        )
        + "; at chance: within Wilson's 95 % interval"
        + f"; papers: perplexity {max(w[0] for w in WORST_MODELS.values()):,.0f}, chance",
    )
    return [at_chance, told]


def _draw(rows: list[Row], names: tuple[str, ...]) -> Figure:
    figure = canvas.panels(list(names), width=3.6, height=3.4)
    for ax, name in zip(figure.get_axes(), names, strict=True):
        for label, marker, color, own in (("unedited", "s", BLUE, rows[:1]), ("edited", "^", VERMILLION, rows[1:])):
            points = [[row.ppl, row.accuracy(name)] for row in own if math.isfinite(row.ppl)]
            values = np.array(points, dtype=np.float64).reshape(-1, 2)
            group = figures.Group(label=label, values=values, color=color, marker=marker)
            figures.cloud(ax, [group], "perplexity", "accuracy")
        canvas.log_axis(ax, "x")
        ax.set_ylim(-0.05, 1.05)
        if name in CHANCE:
            figures.level(ax, CHANCE[name])
    canvas.legend_below(figure, figure.get_axes()[0], 2)
    return figure
