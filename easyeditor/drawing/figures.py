"""What is drawn on the canvas: curves, points, bars, strips, maps.

Colour is never the only sign: sets and runs also differ by marker or line style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from easyeditor.drawing.canvas import MANY, count_axis, log_axis
from easyeditor.drawing.palette import BLUE, CYCLE, GREY, VERMILLION

Array = np.ndarray[Any, np.dtype[Any]]

COLLAPSE, NORMAL = VERMILLION, BLUE
HEAT = "cividis"  # made to look the same to readers with and without colour blindness
DASHES = ("-", "--", "-.", ":")
FEW = 60
"""A curve of at most so many points has a marker at each."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Points or a line with the look they are drawn in."""

    label: str
    values: Any
    color: str
    marker: str = "o"
    line: str = "-"
    filled: bool = True


def run_group(number: int, label: str, values: Sequence[float]) -> Group:
    """The `number`-th curve of a figure that compares runs."""
    line = DASHES[number // len(CYCLE) % len(DASHES)]
    return Group(label=label, values=values, color=CYCLE[number % len(CYCLE)], line=line)


def curve(axes: Axes, x: Any, group: Group, ends: tuple[Any, Any] | None = None) -> None:
    """A line with the band between `ends`; `values` are (len(x),), or (samples, len(x)): their mean, least to most."""
    values = np.asarray(group.values, dtype=np.float64)
    if values.ndim == 2:
        ends, values = (values.min(0), values.max(0)), values.mean(0)
    if ends is not None:
        axes.fill_between(x, *ends, color=group.color, alpha=0.15, linewidth=0)
    axes.plot(
        x, values, group.line, color=group.color, marker=group.marker if len(x) <= FEW else "", ms=4, lw=1.6,
        label=group.label, zorder=3, rasterized=len(x) > MANY,
    )  # fmt: skip


def curves(axes: Axes, x: Any, groups: Sequence[Group], xlabel: str, ylabel: str) -> None:
    """Curves over whole numbers."""
    for group in groups:
        curve(axes, x, group)
    count_axis(axes.xaxis)
    axes.set(xlabel=xlabel, ylabel=ylabel)


def edits_axis(axes: Axes) -> None:
    """The x axis of what is drawn along a sequence of edits."""
    count_axis(axes.xaxis)
    axes.set_xlabel("edits made")
    axes.set_xlim(left=0)


def points(axes: Axes, x: Any, y: Any, group: Group, *, size: float = 34, **more: Any) -> None:
    """Marks in the group's look."""
    face = group.color if group.filled else "none"
    axes.scatter(x, y, s=size, marker=group.marker, facecolors=face, edgecolors=group.color, label=group.label, **more)


def cloud(axes: Axes, groups: Sequence[Group], xlabel: str, ylabel: str) -> None:
    """Points in the plane, one colour and marker for each group; `values` are (N, 2)."""
    for group in groups:
        points(axes, group.values[:, 0], group.values[:, 1], group, alpha=0.85)
    axes.set(xlabel=xlabel, ylabel=ylabel)


def level(axes: Axes, value: float, name: str = "") -> None:
    """A horizontal line with its name."""
    axes.axhline(value, color=GREY, linestyle=":", linewidth=1)
    look: dict[str, Any] = {"ha": "right", "va": "bottom", "color": GREY, "fontsize": 8}
    axes.annotate(name, (1, value), xycoords=("axes fraction", "data"), **look)


def bars(
    axes: Axes,
    names: Sequence[str],
    values: Mapping[str, Sequence[float | None]],
    colors: Sequence[str],
    ylabel: str,
    *,
    hatches: Sequence[str],
) -> None:
    """Bars in groups: one group for each name, one bar for each entry of `values`; None is "not measured", no bar."""
    width = 0.8 / len(values)
    for place, (label, heights) in enumerate(values.items()):
        x = [i - 0.4 + (place + 0.5) * width for i in range(len(names))]
        look: dict[str, Any] = {"color": colors[place], "hatch": hatches[place], "edgecolor": "white"}
        axes.bar(x, [h or 0 for h in heights], 0.92 * width, label=label, **look)
        for at, height in zip(x, heights, strict=True):
            shown = "–" if height is None else f"{height:.2f}"
            axes.annotate(shown, (at, height or 0), ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(names)), list(names))
    axes.set_ylabel(ylabel)


def strips(
    axes: Axes,
    groups: Sequence[Group],
    ylabel: str,
    *,
    log: bool = True,
    line: tuple[float, str] | None = None,
    paired: bool = False,
) -> None:
    """One column of points for each group, spread sideways in a fixed way so that none hides another; `values` (N,).

    `line` is a level with its name; `paired` joins the i-th points of neighbouring groups.
    """
    spreads = [np.linspace(-0.18, 0.18, len(g.values)) if len(g.values) > 1 else np.zeros(1) for g in groups]
    for left in range(len(groups) - 1 if paired else 0):
        x = np.stack([left + spreads[left], left + 1 + spreads[left + 1]])
        y = np.stack([groups[left].values, groups[left + 1].values])
        axes.plot(x, y, color=GREY, linewidth=0.7, alpha=0.6, zorder=0)
    for place, group in enumerate(groups):
        points(axes, place + spreads[place], group.values, group)
    axes.set_xticks(range(len(groups)), [group.label for group in groups])
    axes.set(xlim=(-0.6, len(groups) - 0.4), ylabel=ylabel)
    if line is not None:
        level(axes, *line)
    if log:
        log_axis(axes, "y")


def heat_maps(figure: Figure, maps: Sequence[Array], xlabel: str, ylabel: str, bar: str) -> None:
    """Matrices of positive numbers on one logarithmic colour scale; the smallest 1 % share the lowest colour."""
    axes = figure.get_axes()[: len(maps)]
    every = np.concatenate([m.ravel() for m in maps])
    every = every[every > 0]
    norm = LogNorm(vmin=float(np.quantile(every, 0.01)), vmax=float(every.max()), clip=True)
    for ax, values in zip(axes, maps, strict=True):
        image = ax.imshow(values, aspect="auto", cmap=HEAT, norm=norm, interpolation="nearest")
        ax.set_xlabel(xlabel)
        ax.grid(visible=False)
    axes[0].set_ylabel(ylabel)
    figure.colorbar(image, ax=axes, label=bar, shrink=0.9)


def max_pooled(matrix: Array, rows: int, columns: int) -> Array:
    """The largest |entry| in each cell of a `rows` x `columns` grid laid over the matrix (fewer if smaller)."""
    size = np.abs(matrix)
    down = np.linspace(0, size.shape[0], min(rows, size.shape[0]) + 1).astype(int)[:-1]
    across = np.linspace(0, size.shape[1], min(columns, size.shape[1]) + 1).astype(int)[:-1]
    pooled: Array = np.maximum.reduceat(np.maximum.reduceat(size, down, axis=0), across, axis=1)
    return pooled
