"""What all figures share: size, fonts, axes, the band for what is not finite, labels that do not collide, files."""

from __future__ import annotations

import io
import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter, StrMethodFormatter
from matplotlib.transforms import Bbox

from easyeditor.drawing.palette import GREY

MANY = 2000  # more points than this are drawn as one bitmap inside the SVG: all of them, in a bounded file
LAYOUT: Literal["constrained"] | None = "constrained"
STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,  # whole numbers at the ticks, no "+1" above them
    "axes.grid": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",  # looks the same whatever fonts the reader has
    "svg.hashsalt": "easyeditor.report",  # the same run gives the same file
    "figure.dpi": 150,
}
THOUSANDS = StrMethodFormatter("{x:,.0f}")
_MISSING = "\u25af"  # in place of a character the font lacks


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A finished figure: file name without ending, title and caption as plain text, and its two pictures."""

    name: str
    title: str
    caption: str
    png: bytes
    svg: bytes


@contextmanager
def styled() -> Iterator[None]:
    """The look of all figures inside the block; the user's settings come back after it."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def new_figure(width: float = 9.0, height: float = 5.0) -> Figure:
    """An empty figure that can be measured and saved; inches."""
    figure = Figure(figsize=(width, height), layout=LAYOUT)
    FigureCanvasAgg(figure)
    return figure


def panels(titles: Sequence[str], *, width: float = 4.6, height: float = 3.8, columns: int | None = None) -> Figure:
    """A figure with one titled panel for each title, side by side or in rows of `columns`."""
    columns = columns or len(titles)
    rows = -(-len(titles) // columns)
    figure = new_figure(width * columns, height * rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title)
    for axes in grid[len(titles) :]:
        axes.remove()
    return figure


def stacked(count: int, height: float) -> tuple[Figure, list[Any]]:
    """A figure of `count` panels one below the other, with one x axis."""
    figure = new_figure(height=height)
    return figure, list(figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0])


def heading(figure: Figure, title: str, subtitle: str) -> None:
    """The two lines above the axes: what is shown, of which run."""
    text = drawable(title, 80) + "\n" + drawable(subtitle, 100)
    figure.suptitle(text, x=0.01, ha="left", fontsize=10.5)


def finish(figure: Figure, name: str, title: str = "", caption: str = "") -> Drawn:
    """Both pictures of a figure, without dates in them."""
    _freeze(figure)
    png, svg = io.BytesIO(), io.BytesIO()
    FigureCanvasAgg(figure).print_png(png, metadata={"Software": None})  # `savefig` would draw everything twice
    FigureCanvasSVG(figure).print_svg(svg, metadata={"Date": None})
    return Drawn(name=name, title=title, caption=caption, png=png.getvalue(), svg=svg.getvalue())


def _freeze(figure: Figure) -> None:
    """Lay the figure out once and for all: measuring its texts again for each picture would take most of the time."""
    if figure.get_layout_engine() is not None:
        figure.draw_without_rendering()
        figure.set_layout_engine("none")


@lru_cache
def _glyphs() -> frozenset[int]:
    font = font_manager.get_font(font_manager.findfont("DejaVu Sans"))
    return frozenset(font.get_charmap())


def drawable(text: str, longest: int = 28) -> str:
    """`text` for a figure: one line, at most `longest` characters, no formula signs, only characters the font has."""
    flat = " ".join(text.split())
    if len(flat) > longest:
        flat = flat[: longest - 1].rstrip() + "…"
    return "".join(c if _can_draw(c) else _MISSING for c in flat).replace("$", r"\$")


def _can_draw(character: str) -> bool:
    """Whether the font has it; scripts written from right to left would come out reversed, so they count as missing."""
    leftward = unicodedata.bidirectional(character) in ("R", "AL")
    return character.isprintable() and ord(character) in _glyphs() and not leftward


@dataclass(frozen=True)
class Scale:
    """A logarithmic axis for perplexities: what is finite below `band`, what is not between `band` and `top`."""

    low: float
    band: float
    top: float

    @property
    def above(self) -> float:
        """Where values that are not finite are drawn."""
        return math.sqrt(self.band * self.top)

    def place(self, values: Iterable[float]) -> list[float]:
        """Heights to draw at: finite values as they are, others in the band at the top edge."""
        return [value if math.isfinite(value) else self.above for value in values]


def log_scale(axes: Any, values: Iterable[float], lines: Iterable[float | None]) -> Scale:
    """Make the y axis logarithmic around positive `values` and reference `lines`; a marked band on top if any value
    is not finite."""
    values = list(values)
    shown = [v for v in [*values, *(line for line in lines if line is not None)] if math.isfinite(v) and v > 0]
    low, high = (min(shown), max(shown)) if shown else (1.0, 10.0)
    spread = max(high / low, 10.0)
    low, band = low / spread**0.06, high * spread**0.1
    lost = sum(not math.isfinite(value) for value in values)
    top = band * (spread**0.12 if lost else 1.0)
    log_axis(axes, "y", low, top)
    _log_ticks(axes.yaxis, low, band)
    if lost:
        axes.axhspan(band, top, color="#EDEDED", zorder=0, lw=0)
        axes.axhline(band, color=GREY, lw=0.8, zorder=1)
        axes.annotate(
            "not\nfinite", (1.005, math.sqrt(band * top)), xycoords=("axes fraction", "data"), va="center", fontsize=8.5
        )
    return Scale(low, band, top)


def log_axis(axes: Any, which: str, low: float | None = None, high: float | None = None) -> None:
    """Make the "x" or "y" axis logarithmic, from `low` to `high` (None: where it ends now)."""
    getattr(axes, f"set_{which}scale")("log")
    low, high = getattr(axes, f"set_{which}lim")(low, high)
    _log_ticks(getattr(axes, f"{which}axis"), low, high)


def count_axis(axis: Any) -> None:
    """Whole numbers at the ticks."""
    axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.set_major_formatter(THOUSANDS)


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Ticks of a logarithmic axis from `low` to `high` only: decades, or plain 1, 2, 5 where it spans few decades."""
    first, last = math.floor(math.log10(low)), math.floor(math.log10(high))
    decades, few = range(first, last + 1), high / low < 300
    every = max(1, len(decades) // 9)
    steps = (1, 2, 5) if few else (1,)
    finer = range(2, 10) if len(decades) <= 6 else ()
    ticks = FixedLocator(_within(low, high, decades[::every], steps))
    axis.set_major_locator(ticks if high / low >= 4 else MaxNLocator(4))
    axis.set_minor_locator(FixedLocator(_within(low, high, decades, finer)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}" if few else _power(value)))


def _power(value: float) -> str:
    """10 to the power: in plain characters, which are set much faster than a formula."""
    return "10" + str(round(math.log10(value))).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _within(low: float, high: float, decades: Iterable[int], steps: Iterable[int]) -> list[float]:
    ticks = [step * 10.0**decade for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]


def legend_below(figure: Figure, axes: Any, columns: int) -> None:
    """One legend under all panels, with the handles of one of them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def legend_above(axes: Any, columns: int = 4) -> None:
    """The legend over the axes, where it hides nothing."""
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=columns, columnspacing=1.4)


def label_points(
    axes: Any, points: Sequence[tuple[float, float, str]], seen: Sequence[tuple[float, float]], most: int
) -> int:
    """Write each point's text next to it, with a thin line, where it hides no other text or line or point of `seen`.

    Points are in data coordinates, most important first; one that finds no free place stays without a text, and after
    `most` texts no more are tried. Returns how many were placed.
    """
    if not points:
        return 0
    figure = axes.figure
    _freeze(figure)
    renderer, frame = figure.canvas.get_renderer(), axes.get_window_extent()
    where = axes.transData.transform([(x, y) for x, y, _ in points])
    marks = axes.transData.transform([*seen, *((x, y) for x, y, _ in points)])
    boxes, lines = [text.get_window_extent(renderer) for text in axes.texts], np.empty((0, 2))
    placed = 0
    for (x, y, text), point in zip(points, where, strict=True):
        if placed == most:
            break
        measured = axes.text(x, y, text, fontsize=8.5)
        size = measured.get_window_extent(renderer)
        measured.remove()
        for dx, dy, side in _offsets():
            anchor = point + np.array([dx, dy]) * figure.dpi / 72
            left = anchor[0] - {"left": 0, "center": size.width / 2, "right": size.width}[side]
            box = Bbox.from_bounds(left, anchor[1] - size.height / 2, size.width, size.height).expanded(1.02, 1.15)
            line = point + np.linspace(0, 1, 40)[:, None] * (anchor - point)
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            if not inside or _covers(box, marks) or _covers(box, lines) or any(_covers(b, line) for b in boxes):
                continue
            if any(box.overlaps(other) for other in boxes):
                continue
            axes.annotate(
                text, (x, y), (dx, dy), textcoords="offset points", fontsize=8.5, zorder=6, ha=side, va="center",
                arrowprops={"arrowstyle": "-", "color": GREY, "lw": 0.6, "shrinkA": 1, "shrinkB": 3},
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
            )  # fmt: skip
            boxes.append(box)
            lines = np.concatenate([lines, line])
            placed += 1
            break
    return placed


def _offsets() -> Iterator[tuple[float, float, str]]:
    """Places to try around a point, in points, near ones first."""
    for reach in (9, 16, 26, 40, 58, 80):
        for dx, dy, side in (
            (1, 0, "left"), (-1, 0, "right"), (0.7, 0.9, "left"), (0.7, -0.9, "left"), (-0.7, 0.9, "right"),
            (-0.7, -0.9, "right"), (0, 1.1, "center"), (0, -1.1, "center"),
        ):  # fmt: skip
            yield dx * reach, dy * reach, side


def _covers(box: Any, marks: Any) -> bool:
    across = (marks[:, 0] > box.x0 - 3) & (marks[:, 0] < box.x1 + 3)
    return bool((across & (marks[:, 1] > box.y0 - 3) & (marks[:, 1] < box.y1 + 3)).any())


def counted(number: int, one: str, more: str | None = None) -> str:
    """`1 edit`, `2 edits`, `20,000 edits`."""
    return f"{number:,} {one if number == 1 else more or one + 's'}"
