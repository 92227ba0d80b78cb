"""Where perplexity is going along a sequence of edits: a straight line through its logarithm, and when it crosses.

The rule. Through the later half of the points so far (at least FEWEST) goes a least-squares line of ln(perplexity) over
edits made. It counts as a rise when its slope is more than SURE times its standard error; then the crossing is where
the line meets the threshold. Beyond FAR times the edits made so far no place is named.

What it cannot see: a collapse by one edit (a small denominator) comes without a rise before it; a rise that speeds up
crosses earlier than the line says.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from easyeditor.results.lines import EditLine

FEWEST = 5
SURE = 3.0
FAR = 4
FACTOR = 2.0
"""A forecast was right when the true distance to the crossing is within this factor of the predicted one."""

Points = Sequence[tuple[int, float]]
"""(edits made, perplexity), ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """`crossed`: the edits made at the first point beyond the threshold; `near`: where the crossing is predicted;
    `rising`: is there a rise at all? `used` points were fitted, the last at `after` edits."""

    threshold: float
    after: int
    used: int = 0
    crossed: int | None = None
    near: int | None = None
    rising: bool = False

    @property
    def words(self) -> str:
        """One sentence."""
        limit = f"the threshold of {self.threshold:,.0f}"
        if self.crossed is not None:
            return f"Perplexity crossed {limit} at edit {self.crossed:,}."
        if not self.used:
            return f"Too few measurements after {self.after:,} edits to say where perplexity is going."
        seen = f"(the trend of the last {self.used} measurements)"
        if not self.rising:
            return f"Perplexity does not rise beyond its own scatter after {self.after:,} edits {seen}."
        if self.near is None:
            return f"At this rate {limit} is not crossed before edit {FAR * self.after:,} {seen}."
        return f"At this rate {limit} is crossed near edit {self.near:,} {seen}."

    def to_json(self) -> dict[str, Any]:
        """The `forecast` of a summary."""
        return {"words": self.words, "crossed": self.crossed, "near": self.near, "after": self.after}


def points_of(edits: Iterable[EditLine]) -> list[tuple[int, float]]:
    """The points of a sequence's lines: the unedited model, then every step that was watched and whose edit is kept."""
    points: list[tuple[int, float]] = []
    for line in edits:
        if line.step == 1 and line.record.pre.ppl is not None:
            points.append((0, line.record.pre.ppl))
        if line.watched is not None and line.left_ppl is not None:
            points.append((line.step, line.left_ppl))
    return points


def forecast(points: Points, threshold: float) -> Forecast | None:
    """What the points say; None where there is nothing but the unedited model.

    A point that is not finite lies beyond every threshold.
    """
    if not points or points[-1][0] == 0:
        return None
    after = points[-1][0]
    crossed = next((made for made, ppl in points if not ppl <= threshold), None)
    if crossed is not None:
        return Forecast(threshold=threshold, after=after, crossed=crossed)
    fitted = points[-max(FEWEST, (len(points) + 1) // 2) :]
    if len(fitted) < FEWEST:
        return Forecast(threshold=threshold, after=after)
    level, slope, error = _line([made for made, _ in fitted], [math.log(ppl) for _, ppl in fitted])
    rising = slope > SURE * error and slope > 0
    place = (math.log(threshold) - level) / slope if rising else math.inf
    near = None if place > FAR * after else max(after + 1, math.ceil(place))
    return Forecast(threshold=threshold, after=after, used=len(fitted), near=near, rising=rising)


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """A crossing predicted `after` so many edits, `predicted` edits ahead; it came `true` edits ahead (None: it did not
    come)."""

    after: int
    predicted: int
    true: int | None

    @property
    def right(self) -> bool:
        """Was the way still to go within FACTOR of the one predicted?"""
        return self.true is not None and self.predicted / FACTOR <= self.true <= FACTOR * self.predicted


def looked_back(points: Points, threshold: float) -> list[Told]:
    """The crossings predicted before the last point of a sequence, next to what came.

    A sequence that ends before FACTOR times the predicted way and has not crossed says nothing of a forecast, which is
    left out.
    """
    crossed = next((at for at, ppl in points if not ppl <= threshold), None)
    made = []
    for end in range(1, len(points)):
        told = forecast(points[:end], threshold)
        if told is None or told.near is None:
            continue
        predicted = told.near - told.after
        if crossed is not None or points[-1][0] - told.after >= FACTOR * predicted:
            true = None if crossed is None else crossed - told.after
            made.append(Told(after=told.after, predicted=predicted, true=true))
    return made


def hindsight(points: Points, threshold: float) -> tuple[int, int]:
    """(right, made): of the crossings predicted before the last point, how many came true."""
    made = looked_back(points, threshold)
    return sum(told.right for told in made), len(made)


def _line(xs: Sequence[int], ys: Sequence[float]) -> tuple[float, float, float]:
    """Level, slope and the slope's standard error of the least-squares line."""
    count, middle, mean = len(xs), math.fsum(xs) / len(xs), math.fsum(ys) / len(ys)
    spread = math.fsum((x - middle) ** 2 for x in xs)
    slope = math.fsum((x - middle) * (y - mean) for x, y in zip(xs, ys, strict=True)) / spread
    level = mean - slope * middle
    left = math.fsum((y - level - slope * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return level, slope, math.sqrt(left / (count - 2) / spread)
