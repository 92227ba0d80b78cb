"""C-ROME with and without a prefix at test time: efficacy, generalization, locality on both sets.

  python -m easyeditor.analysis prefix-test              about five minutes on two CPU cores: one value search a request

Fall of ROME, section 5: C-ROME writes the new answer under the mean key, so a collapse case's bare prompt, whose key is
another, does not find it; behind one of the contexts it does. Measured as the papers do: token accuracy on the rewrite
prompt (efficacy), on rephrased prompts (generalization), agreement with the unedited model elsewhere (locality). Their
code puts the prefix before the rewrite prompt alone; the row "prefix on rephrased prompts too" is ours.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from easyeditor.base.errors import ConfigError
from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLUE, SKY, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.evaluate.metric import Settings
from easyeditor.evaluate.registry import measure
from easyeditor.experiments.tools.lab import SETS, Lab, column, common_flags, set_flags
from easyeditor.experiments.tools.papers import PREFIX_TEST
from easyeditor.lm.budget import Budget
from easyeditor.lm.tokens import SLOT
from easyeditor.values.edit import EditRequest
from easyeditor.values.plain import mean
from easyeditor.values.record import Side

WAYS = ("no prefix", "prefix", "prefix on rephrased prompts too")
METRICS = ("efficacy", "generalization", "locality")
COLUMNS = ("set", "case", "prompt", "test", *METRICS)


class Row(NamedTuple):
    """One test of one edit, in the order of `COLUMNS`; None: the request has no such prompts."""

    set: str
    case: Any
    prompt: str
    test: str
    efficacy: float | None
    generalization: float | None
    locality: float | None


def add_flags(p: argparse.ArgumentParser) -> None:
    """The two sets and the common flags."""
    common_flags(p)
    set_flags(p, limit=8)


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """One C-ROME edit for each request, tested in three ways."""
    lab = Lab.of(args)
    texts = [context for context in lab.method.contexts if context != SLOT]
    if not texts:
        raise ConfigError("prefix-test needs a context with text in it; context_templates has only '{}'")
    draw = random.Random(lab.hparams.seed)
    rows: list[Row] = []
    with steps("C-ROME") as show:
        for number, (name, request) in enumerate(lab.requests, 1):
            rows += _tested(lab, name, request, draw.choice(texts))
            show(number, len(lab.requests), request.subject)
    return Outcome(
        tables=[
            _summary(rows),
            Table.of("requests", "every test", COLUMNS, rows, longest=0),
        ],
        figures={"prefix_test": _draw(rows)},
        findings=_findings(rows),
        look_for="efficacy of the collapse set: low without a prefix, as high as the normal set's with one; locality "
        "high everywhere.",
        **lab.recorded("prefix-test"),
    )


def _tested(lab: Lab, name: str, request: EditRequest, prefix: str) -> Iterator[Row]:
    def scores(way: str) -> Side:
        settings = Settings(
            prefix=None if way == "no prefix" else prefix,
            prefix_rephrase=way == WAYS[2],
            budget=Budget(lab.editor.method.batch_tokens),
        )
        return measure(lab.editor.model, lab.editor.tok, [request], [], [settings], record=True).side(0)

    before = {way: scores(way) for way in WAYS}
    delta, _ = lab.edit(request, if_c_rome=True)
    with lab.applied(delta):
        after = {way: scores(way) for way in WAYS}
    for way in WAYS:
        near = [value for values in after[way].agreement(before[way]).values() for value in values]
        numbers = (after[way].rewrite[0], mean(after[way].rephrase), mean(near))
        yield Row(name, request.case_id, request.prompt, way, *numbers)


def _value(rows: list[Row], name: str, way: str, metric: str) -> float | None:
    return mean(column(rows, metric, set=name, test=way).tolist())


def _summary(rows: list[Row]) -> Table:
    made: list[list[Any]] = []
    for name in SETS:
        for way in WAYS:
            values = [_value(rows, name, way, metric) for metric in METRICS]
            made.append([name, way, "ours", *(None if v is None else 100 * v for v in values)])
            published = PREFIX_TEST.get((name, way), {})
            made += [[name, way, f"paper, {model}", *numbers] for model, numbers in published.items()]
    return Table.of("summary", "C-ROME, percent", ["set", "test", "model", *METRICS], made)


def _findings(rows: list[Row]) -> list[Finding]:
    bare, prefixed = (_value(rows, "collapse", way, "efficacy") or 0.0 for way in WAYS[:2])
    normal = _value(rows, "normal", "prefix", "efficacy") or 0.0
    kept = [v for name in SETS if (v := _value(rows, name, "prefix", "locality")) is not None]
    return [
        Finding(
            claim="Without a prefix C-ROME's edits of collapse cases are not found",
            holds=bare < 0.5,
            because=f"efficacy {bare:.0%}",
        ),
        Finding(
            claim="Behind a prefix they are, as in normal cases",
            holds=prefixed >= 0.9,
            because=f"efficacy {prefixed:.0%}, normal cases {normal:.0%}; 90 % taken as the border",
        ),
        Finding(
            claim="Locality stays high",
            holds=min(kept) >= 0.85 if kept else None,
            because=", ".join(f"{v:.0%}" for v in kept) if kept else "the requests have no locality prompts",
        ),
    ]


def _draw(rows: list[Row]) -> Figure:
    figure = canvas.panels([f"{name} set" for name in SETS], width=5.0, height=3.4)
    for ax, name in zip(figure.get_axes(), SETS, strict=True):
        values = {way: [_value(rows, name, way, metric) for metric in METRICS] for way in WAYS}
        figures.bars(ax, METRICS, values, (VERMILLION, BLUE, SKY), "share", hatches=("", "//", ".."))
        ax.set_ylim(0, 1.05)
    canvas.legend_below(figure, figure.get_axes()[0], 3)
    return figure
