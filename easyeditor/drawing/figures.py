"""Shared drawing: one style, colours that colour-blind readers can tell apart (Okabe and Ito 2008), PNG and SVG.

Colour is never the only sign: the two sets also differ by marker or line style. Nothing here opens a window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatterSciNotation, LogLocator, MaxNLocator, NullLocator

from easyeditor.base.files import whole_file
from easyeditor.drawing.palette import BLUE, GREY, VERMILLION

Array = np.ndarray[Any, np.dtype[Any]]

COLLAPSE, NORMAL = VERMILLION, BLUE
HEAT = "cividis"  # made to look the same to readers with and without colour blindness

LAYOUT: Literal["constrained"] | None = "constrained"
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.hashsalt": "easyeditor",  # the same figure gives the same file
    "figure.dpi": 110,
}


@dataclass(frozen=True, kw_only=True)
class Group:
    """Points or a line with the look they are drawn in."""

    label: str
    values: Array
    color: str
    marker: str = "o"
    line: str = "-"
    filled: bool = True


def panels(titles: Sequence[str], *, width: float = 4.6, height: float = 3.8, columns: int | None = None) -> Figure:
    """A figure with one titled panel for each title, side by side or in rows of `columns`."""
    columns = columns or len(titles)
    rows = -(-len(titles) // columns)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width * columns, height * rows), layout=LAYOUT)
        FigureCanvasAgg(figure)
        grid = figure.subplots(rows, columns, squeeze=False).ravel()
        for ax, title in zip(grid, titles, strict=False):
            ax.set_title(title, loc="left")
        for ax in grid[len(titles) :]:
            ax.set_axis_off()
    return figure


def cloud(ax: Axes, groups: Sequence[Group], xlabel: str, ylabel: str) -> None:
    """Points in the plane, one colour and marker for each group; `values` are (N, 2)."""
    for group in groups:
        face = group.color if group.filled else "none"
        x, y = group.values[:, 0], group.values[:, 1]
        ax.scatter(
            x, y, s=34, marker=group.marker, facecolors=face, edgecolors=group.color, label=group.label, alpha=0.85
        )
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)


def bands(
    ax: Axes, x: Sequence[float], groups: Sequence[Group], xlabel: str, ylabel: str, *, every: bool = False
) -> None:
    """Mean lines with a min-to-max band; `values` are (samples, len(x)); `every` marks each point of a line."""
    for group in groups:
        low, mean, high = group.values.min(0), group.values.mean(0), group.values.max(0)
        ax.fill_between(x, low, high, color=group.color, alpha=0.15, linewidth=0)
        step = 1 if every else max(1, len(x) // 8)
        ax.plot(x, mean, group.line, color=group.color, marker=group.marker, markevery=step, ms=5, label=group.label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)


def bars(
    ax: Axes,
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
        ax.bar(
            x,
            [0 if h is None else h for h in heights],
            0.92 * width,
            color=colors[place],
            hatch=hatches[place],
            edgecolor="white",
            label=label,
        )
        for at, height in zip(x, heights, strict=True):
            shown = "–" if height is None else f"{height:.2f}"
            ax.annotate(shown, (at, height or 0), ha="center", va="bottom", fontsize=8)
    ax.set_xticks(range(len(names)), list(names))
    ax.set_ylabel(ylabel)


def strips(
    ax: Axes,
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
        ax.plot(x, y, color=GREY, linewidth=0.7, alpha=0.6, zorder=0)
    for place, group in enumerate(groups):
        face = group.color if group.filled else "none"
        ax.scatter(
            place + spreads[place], group.values, s=34, marker=group.marker, facecolors=face, edgecolors=group.color
        )
    ax.set_xticks(range(len(groups)), [group.label for group in groups])
    ax.set_xlim(-0.6, len(groups) - 0.4)
    ax.set_ylabel(ylabel)
    if line is not None:
        ax.axhline(line[0], color=GREY, linestyle=":", linewidth=1)
        ax.annotate(
            line[1], (1, line[0]), xycoords=("axes fraction", "data"), ha="right", va="bottom", color=GREY, fontsize=8
        )
    if log:
        log_scale(ax, "y")


def log_scale(ax: Axes, axis: str) -> None:
    """A logarithmic axis ("x" or "y") with plain numbers at its ticks, also where it spans little, and with powers of
    ten where it spans very much; call it last."""
    (ax.set_xscale if axis == "x" else ax.set_yscale)("log")
    chosen = ax.xaxis if axis == "x" else ax.yaxis
    low, high = ax.get_xlim() if axis == "x" else ax.get_ylim()
    if high / low < 4:
        chosen.set_major_locator(MaxNLocator(4))
    elif high / low < 300:
        chosen.set_major_locator(LogLocator(subs=(1, 2, 5)))
    if high / low > 1e8:
        chosen.set_major_formatter(LogFormatterSciNotation())
    else:
        chosen.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 100 else f"{value:.3g}"))
    chosen.set_minor_locator(NullLocator())


def heat_maps(figure: Figure, maps: Sequence[Array], xlabel: str, ylabel: str, bar: str) -> None:
    """Matrices of positive numbers on one logarithmic colour scale; the smallest 1 % share the lowest colour."""
    axes = figure.get_axes()[: len(maps)]
    every = np.concatenate([m.ravel() for m in maps])
    every = every[every > 0]
    norm = LogNorm(vmin=float(np.quantile(every, 0.01)), vmax=float(every.max()), clip=True)
    for ax, values in zip(axes, maps, strict=True):
        image = ax.imshow(values, aspect="auto", cmap=HEAT, norm=norm, interpolation="nearest")
        ax.set_xlabel(xlabel)
    axes[0].set_ylabel(ylabel)
    figure.colorbar(image, ax=axes, label=bar, shrink=0.9)


def legend_below(figure: Figure, handles_of: Axes, columns: int) -> None:
    """One legend under all panels, with the handles of one of them."""
    handles, labels = handles_of.get_legend_handles_labels()
    with matplotlib.rc_context(STYLE):
        figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def max_pooled(matrix: Array, rows: int, columns: int) -> Array:
    """The largest |entry| in each cell of a `rows` x `columns` grid laid over the matrix (fewer if smaller)."""
    size = np.abs(matrix)
    down = np.linspace(0, size.shape[0], min(rows, size.shape[0]) + 1).astype(int)[:-1]
    across = np.linspace(0, size.shape[1], min(columns, size.shape[1]) + 1).astype(int)[:-1]
    pooled: Array = np.maximum.reduceat(np.maximum.reduceat(size, down, axis=0), across, axis=1)
    return pooled


def save(figure: Figure, folder: Path, name: str) -> list[str]:
    """Write `<name>.png` and `<name>.svg`, each whole or not at all. Returns the file names."""
    with matplotlib.rc_context(STYLE):
        figure.draw_without_rendering()  # lays the figure out, once for both files
    figure.set_layout_engine("none")
    written: Mapping[str, dict[str, Any]] = {"png": {"Software": None}, "svg": {"Date": None}}
    for kind, metadata in written.items():
        path = folder / f"{name}.{kind}"
        with whole_file(path) as part, matplotlib.rc_context(STYLE):
            figure.savefig(part, format=kind, metadata=metadata)
    return [f"{name}.{kind}" for kind in written]
