"""Is it the first token's position that makes edits collapse? The second token's position is given to the first.

  python -m easyeditor.analysis position-swap    about five minutes on two CPU cores: two searches a request
  python -m easyeditor.analysis position-swap --limit 20 --hparams hparams/ROME/gpt2-xl.yaml --device cuda:0

Fall of ROME, section 4: the collapse cases are edited in a model whose first token has the second's position (GPT-2:
the learned position embedding copied; rotary models: position id 0 becomes 1), and perplexity is measured in it.
GPT-2-XL collapses less, GPT-J and Llama2-7b as before: the position is not the main reason, attention to oneself alone
is.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.drawing import figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding, Outcome, ResultTable
from easyeditor.drawing.palette import BLUE, VERMILLION
from easyeditor.experiments.tools.lab import Lab, common_flags, set_flags
from easyeditor.experiments.tools.papers import POSITION_SWAP
from easyeditor.lm.hooks import second_position_first

COLUMNS = ("case", "prompt", "denominator", "denominator swapped", "perplexity", "perplexity swapped")


def add_flags(p: argparse.ArgumentParser) -> None:
    """The collapse set and the common flags."""
    common_flags(p)
    set_flags(p, limit=6, normal=False)


def experiment(args: argparse.Namespace, folder: Path) -> Outcome:
    """Edit the collapse cases as they are and with the first position moved."""
    lab = Lab.of(args)
    base, before = _edits(lab, "as it is")
    swapped = lab.relaid(targets_dir=None)  # searches of the swapped model are others than those kept for the model
    with second_position_first(lab.editor.model):
        base_swapped, after = _edits(swapped, "positions swapped")
    rows = [
        [request.case_id, request.prompt, den, den_swapped, ppl, ppl_swapped]
        for request, (den, ppl), (den_swapped, ppl_swapped) in zip(lab.collapse.requests, before, after, strict=True)
    ]
    collapsed = (
        [lab.collapsed(base, ppl) for _, ppl in before],
        [lab.collapsed(base_swapped, ppl) for _, ppl in after],
    )
    return Outcome(
        tables=[
            _summary(rows, base, base_swapped),
            ResultTable(name="requests", title="every case", columns=COLUMNS, rows=rows),
        ],
        figures={"position_swap": _draw(rows, lab.hparams.collapse_threshold)},
        findings=[_finding(*collapsed)],
        look_for="perplexity of the collapse cases as high with swapped positions as without.",
        config=lab.config(),
        manifest=lab.manifest("position-swap"),
        result={"perplexity_before": base, "perplexity_before_swapped": base_swapped},
    )


def _edits(lab: Lab, title: str) -> tuple[float, list[tuple[float, float]]]:
    """Perplexity of the unedited model, and (denominator, perplexity) of ROME on every collapse case."""
    base, measured = lab.perplexity(), []
    with steps(f"ROME, {title}") as show:
        for number, request in enumerate(lab.collapse.requests, 1):
            delta, trace = lab.edit(request)
            assert trace.denominator is not None
            measured.append((trace.denominator, lab.perplexity(delta)))
            show(number, len(lab.collapse.requests), f"{request.subject}: {measured[-1][1]:,.0f}")
    return base, measured


def _summary(rows: list[list[Any]], base: float, base_swapped: float) -> ResultTable:
    ours = [np.array([row[place] for row in rows], dtype=np.float64) for place in (4, 5)]
    made: list[list[Any]] = [
        ["ours", base, base_swapped, *(float(f(values)) for values in ours for f in (np.min, np.mean, np.max))]
    ]
    made += [[f"paper, {model}", None, None, *plain, *moved] for model, (plain, moved) in POSITION_SWAP.items()]
    kinds = [f"{what}{swapped}" for swapped in ("", " swapped") for what in ("min", "mean", "max")]
    title = "perplexity of the collapse cases after ROME"
    return ResultTable(name="summary", title=title, columns=["", "unedited", "unedited swapped", *kinds], rows=made)


def _finding(before: list[bool], after: list[bool]) -> Finding:
    were, still = sum(before), sum(a for a, b in zip(after, before, strict=True) if b)
    return Finding(
        claim="The position of the first token is not the main reason of the collapse",
        holds=None if not were else still > were / 2,
        because=f"{were} of {len(before)} cases collapse, {still} of these also with the second token's position",
    )


def _draw(rows: list[list[Any]], threshold: float) -> Figure:
    figure = figures.panels(["Perplexity after ROME, collapse cases", "|denominator|"])
    for ax, places, label in zip(figure.get_axes(), ((4, 5), (2, 3)), ("perplexity", "|denominator|"), strict=True):
        values = [np.abs(np.array([row[place] for row in rows], dtype=np.float64)) for place in places]
        groups = [
            Group(label="as it is", values=values[0], color=VERMILLION, marker="^"),
            Group(label="positions swapped", values=values[1], color=BLUE, marker="o"),
        ]
        line = (threshold, "collapse threshold") if label == "perplexity" else None
        figures.strips(ax, groups, label, line=line, paired=True)
    return figure
