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
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.outcome import Finding, Outcome
from easyeditor.drawing.palette import BLUE, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.experiments.tools.lab import Lab, column, common_flags, set_flags
from easyeditor.experiments.tools.papers import POSITION_SWAP
from easyeditor.lm.hooks import second_position_first

COLUMNS = ("case", "prompt", "denominator", "denominator swapped", "perplexity", "perplexity swapped")


class Row(NamedTuple):
    """One collapse case, in the order of `COLUMNS`."""

    case: Any
    prompt: str
    down: float | None
    down_swapped: float | None
    ppl: float
    ppl_swapped: float


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
    cases = zip(lab.collapse.requests, before, after, strict=True)
    rows = [
        Row(request.case_id, request.prompt, down, down_swapped, ppl, ppl_swapped)
        for request, (down, ppl), (down_swapped, ppl_swapped) in cases
    ]
    were = [lab.collapsed(base, row.ppl) for row in rows]
    still = [lab.collapsed(base_swapped, row.ppl_swapped) for row, before in zip(rows, were, strict=True) if before]
    return Outcome(
        tables=[
            _summary(rows, base, base_swapped),
            Table.of("requests", "every case", COLUMNS, rows),
        ],
        figures={"position_swap": _draw(rows, lab.hparams.collapse_threshold)},
        findings=[
            Finding(
                claim="The position of the first token is not the main reason of the collapse",
                holds=sum(still) > sum(were) / 2 if any(were) else None,
                because=f"{sum(were)} of {len(rows)} cases collapse, {sum(still)} of these also with the second "
                "token's position",
            )
        ],
        look_for="perplexity of the collapse cases as high with swapped positions as without.",
        **lab.recorded("position-swap"),
        result={"perplexity_before": base, "perplexity_before_swapped": base_swapped},
    )


def _edits(lab: Lab, title: str) -> tuple[float, list[tuple[float | None, float]]]:
    """Perplexity of the unedited model, and (denominator, perplexity) of ROME on every collapse case."""
    base, measured = lab.perplexity(), []
    with steps(f"ROME, {title}") as show:
        for number, request in enumerate(lab.collapse.requests, 1):
            delta, trace = lab.edit(request)
            measured.append((trace.denominator, lab.perplexity(delta)))
            show(number, len(lab.collapse.requests), f"{request.subject}: {measured[-1][1]:,.0f}")
    return base, measured


def _summary(rows: list[Row], base: float, base_swapped: float) -> Table:
    ours = [f(column(rows, field)) for field in ("ppl", "ppl_swapped") for f in (np.min, np.mean, np.max)]
    made: list[list[Any]] = [["ours", base, base_swapped, *map(float, ours)]]
    made += [[f"paper, {model}", None, None, *plain, *moved] for model, (plain, moved) in POSITION_SWAP.items()]
    kinds = [f"{what}{swapped}" for swapped in ("", " swapped") for what in ("min", "mean", "max")]
    title = "perplexity of the collapse cases after ROME"
    return Table.of("summary", title, ["", "unedited", "unedited swapped", *kinds], made)


def _draw(rows: list[Row], threshold: float) -> Figure:
    figure = canvas.panels(["Perplexity after ROME, collapse cases", "|denominator|"])
    shown = (("ppl", "perplexity", (threshold, "collapse threshold")), ("down", "|denominator|", None))
    for ax, (field, label, line) in zip(figure.get_axes(), shown, strict=True):
        plain, swapped = (np.abs(column(rows, name)) for name in (field, f"{field}_swapped"))
        groups = [
            figures.Group(label="as it is", values=plain, color=VERMILLION, marker="^"),
            figures.Group(label="positions swapped", values=swapped, color=BLUE, marker="o"),
        ]
        figures.strips(ax, groups, label, line=line, paired=True)
    return figure
