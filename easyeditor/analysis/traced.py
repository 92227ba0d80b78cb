"""What traced facts say together: their lines in a journal, averages by role and layer, tables and figures."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from easyeditor.analysis.safety import SAFETY, LayerSafety
from easyeditor.analysis.tracing import KINDS, LAST, ROLES, Fact, Tracer, by_role
from easyeditor.base.errors import ConfigError
from easyeditor.base.progress import steps
from easyeditor.drawing import canvas, figures
from easyeditor.drawing.figures import Group
from easyeditor.drawing.outcome import Finding
from easyeditor.drawing.palette import BLUE, GREEN, ORANGE, VERMILLION
from easyeditor.drawing.table import Table
from easyeditor.results.journal import Journal, read_journal

Line = dict[str, Any]
Array = np.ndarray[Any, np.dtype[Any]]
NAMES = {"state": "one hidden state", "mlp": "MLP outputs", "attention": "attention outputs"}
FEWEST = 3  # facts that are traced however long it takes
LOOKS = {"state": (VERMILLION, "o", "-"), "mlp": (BLUE, "s", "--"), "attention": (ORANGE, "^", ":")}


def traced_lines(
    tracer: Tracer,
    facts: Sequence[Fact],
    kept: Path,
    same: Line,
    kinds: Sequence[str] = KINDS,
    *,
    of: str = "trace",
    last: bool = False,
    until: float = math.inf,
) -> list[Line]:
    """One line for each fact, from the file `kept` or traced now and added to it; with `last` only the subject's last
    token is traced. `same` is what all lines of a file must share, `of` whose file it is. `until` (time.monotonic) ends
    it early, with FEWEST.

    Raises:
        ConfigError: the file's lines are of another model or other settings.
    """
    same = {**same, "places": LAST if last else "all", "kinds": list(kinds)}
    known = {}
    for line in read_journal(kept):
        if line.get("kind") != "trace":
            continue
        other = [key for key, value in same.items() if line.get(key) != value]
        if other:
            key = other[0]
            raise ConfigError(
                f"--kept {kept}: its facts were traced with another {key} ({line.get(key)!r}, now {same[key]!r}); give "
                "another file"
            )
        known[str(line["case"])] = line
    with Journal(kept, of) as journal, steps("trace") as show:
        for number, fact in enumerate(facts, 1):
            if str(fact.request.case_id) not in known:
                if number > FEWEST and time.monotonic() > until:
                    break
                line = {**same, **_line(tracer, fact, kinds, last)}
                journal.append(line)
                known[str(fact.request.case_id)] = line
            show(number, len(facts), fact.request.subject)
    return [known[case] for fact in facts if (case := str(fact.request.case_id)) in known]


def _line(tracer: Tracer, fact: Fact, kinds: Sequence[str], last: bool) -> Line:
    places = {at: role for at, role in fact.places.items() if role == LAST or not last}
    found = tracer.trace(fact, kinds, list(places))
    return {
        "kind": "trace",
        "case": fact.request.case_id,
        "prompt": fact.request.prompt,
        "answer": fact.request.ground_truth,
        "P clean": found.clean,
        "P corrupted": found.corrupted,
        "effects": {kind: by_role(places, gained) for kind, gained in found.effects.items()},
    }


def average(lines: Sequence[Line], kind: str, role: str) -> Array | None:
    """The average indirect effect by layer (L), over the facts that have the role; None where none has."""
    own = [line["effects"][kind][role] for line in lines if role in line["effects"].get(kind, {})]
    return np.array(own).mean(0) if own else None


def kinds_of(lines: Sequence[Line]) -> list[str]:
    """The kinds that were traced."""
    return [kind for kind in KINDS if any(kind in line["effects"] for line in lines)]


def _averages(lines: Sequence[Line]) -> dict[tuple[str, str], Array]:
    """`average` of each kind and role that was traced."""
    every = ((kind, role) for kind in KINDS for role in ROLES)
    return {key: values for key in every if (values := average(lines, *key)) is not None}


def layer_table(lines: Sequence[Line], safety: Sequence[LayerSafety]) -> Table:
    """By layer: the effects at the subject's last token, and the safety of subjects in first place."""
    effects = {kind: values for (kind, role), values in _averages(lines).items() if role == LAST}
    rows = [
        [layer, *(float(values[layer]) for values in effects.values()), *(safety[n].row() if safety else ())]
        for n, layer in enumerate([one.layer for one in safety] or range(max(map(len, effects.values()), default=0)))
    ]
    title = f"average indirect effect at the subject's last token ({len(lines)} facts)"
    title += ", and subjects in first place: reach |k^u.u|/|kbar.u|" if safety else ""
    columns = ["layer", *(f"effect of {NAMES[kind]}" for kind in effects), *(SAFETY if safety else ())]
    return Table.of("layers", title, columns, rows)


def role_table(lines: Sequence[Line]) -> Table:
    """By kind and role: the greatest average effect, and the layer it is at."""
    rows = [
        [NAMES[kind], role, float(values.max()), int(values.argmax()), float(values.mean())]
        for (kind, role), values in _averages(lines).items()
    ]
    columns = ["put back", "token", "greatest effect", "at layer", "mean over layers"]
    return Table.of("roles", "average indirect effect by token", columns, rows)


def fact_table(lines: Sequence[Line]) -> Table:
    """Every fact with its total effect."""
    columns = ["case", "prompt", "answer", "P clean", "P corrupted"]
    rows = [[line[column] for column in columns] for line in lines]
    return Table.of("facts", "every fact", columns, rows, longest=0)


def heat_map(lines: Sequence[Line], window: int) -> Figure:
    """Average indirect effects, tokens by role down, layers across, a panel for each kind (paper, figure 1 and 2)."""
    kinds = kinds_of(lines)
    titles = [NAMES[kind] + ("" if kind == "state" else f", window of {window}") for kind in kinds]
    figure = canvas.panels(titles, width=4.6, height=2.6)
    for number, (ax, kind) in enumerate(zip(figure.get_axes(), kinds, strict=True)):
        found = {role: values for role in ROLES if (values := average(lines, kind, role)) is not None}
        image = ax.imshow(np.stack(list(found.values())), aspect="auto", cmap=figures.HEAT, interpolation="nearest")
        ax.set_yticks(range(len(found)), list(found) if number == 0 else [""] * len(found))
        ax.set_xlabel("layer")
        figure.colorbar(image, ax=ax, shrink=0.9, label="average indirect effect" if number == len(kinds) - 1 else "")
    return figure


def curves(lines: Sequence[Line], safety: Sequence[LayerSafety]) -> Figure:
    """By layer: the effects at the subject's last token, and how safe subjects in first place are; what was not
    measured has no panel."""
    titles = ["Effect, subject's last token"] if lines else []
    titles += ["Reach |kᵘ·u| / |k̄·u|, first place", "‖v₀‖ of subjects in first place"] if safety else []
    figure = canvas.panels(titles, width=4.8)
    axes = figure.get_axes()
    if lines:
        draw_effects(axes[0], lines)
    if safety:
        draw_reach(axes[-2], safety)
        looks = (("bare prompt", "bare_v0", VERMILLION, "o", "-"), ("mean over contexts", "mean_v0", GREEN, "D", "--"))
        groups = [
            Group(label=label, values=[getattr(one, field) for one in safety], color=color, marker=marker, line=line)
            for label, field, color, marker, line in looks
        ]
        figures.curves(axes[-1], [one.layer for one in safety], groups, "layer", "‖v₀‖, median")
        canvas.log_axis(axes[-1], "y")
    for ax in axes:
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8)
    return figure


def draw_effects(ax: Axes, lines: Sequence[Line]) -> None:
    """By layer: the average effect at the subject's last token, a curve for each kind."""
    for kind in kinds_of(lines):
        if (values := average(lines, kind, LAST)) is not None:
            color, marker, line = LOOKS[kind]
            group = Group(label=NAMES[kind], values=values, color=color, marker=marker, line=line)
            figures.curves(ax, range(len(values)), [group], "layer", "average indirect effect")


def draw_reach(ax: Axes, safety: Sequence[LayerSafety]) -> None:
    """By layer: how far the keys of subjects in first place are reached, median and range."""
    ends = [one.least_reach for one in safety], [one.most_reach for one in safety]
    group = Group(label="first place, least to most", values=[one.reach for one in safety], color=VERMILLION)
    figures.curve(ax, [one.layer for one in safety], group, ends)
    figures.level(ax, 1)
    ax.set(xlabel="layer", ylabel="reach")
    canvas.log_axis(ax, "y")


def findings(lines: Sequence[Line]) -> list[Finding]:
    """The paper's three claims about where effects are."""
    peaks = {key: (int(values.argmax()), float(values.max())) for key, values in _averages(lines).items()}
    early, late = peaks.get(("state", LAST)), peaks.get(("state", ROLES[-1]))
    mlp, other = peaks.get(("mlp", LAST)), peaks.get(("attention", LAST))
    places = {role: peak for (kind, role), peak in peaks.items() if kind == "mlp"}
    made = []
    if early is not None and late is not None:
        made.append(
            Finding(
                claim="Hidden states matter at an early site, the subject's last token, and a late one, the last token",
                holds=early[0] < late[0],
                because=f"greatest effect {early[1]:.3f} at layer {early[0]} of the subject's last token, "
                f"{late[1]:.3f} at layer {late[0]} of the last token",
            )
        )
    if mlp is not None and other is not None:
        made.append(
            Finding(
                claim="At the early site MLPs do it, not attention",
                holds=mlp[1] > other[1],
                because=f"MLPs {mlp[1]:.3f} (layer {mlp[0]}), attentions {other[1]:.3f} (layer {other[0]})",
            )
        )
    if mlp is not None and len(places) > 1:
        best = max(places, key=lambda role: places[role][1])
        made.append(
            Finding(
                claim="Of all tokens, MLPs matter most at the subject's last",
                holds=best == LAST,
                because=f"greatest at the {best}: {places[best][1]:.3f}; at the subject's last {mlp[1]:.3f}",
            )
        )
    return made
