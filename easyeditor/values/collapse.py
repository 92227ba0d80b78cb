"""The verdict on an edit, did it collapse the model?, and in words what its numbers say of the cause."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from easyeditor.values.plain import Flat

SMALL_DENOMINATOR = 1.0
"""|denominator| below which a collapse is predicted, and explained: between those of collapse cases (up to 0.2 in the
papers and on the embedded model) and of ordinary requests (above 2; Fall of ROME, table 2), nearer to the latter so
that few are missed."""


@dataclass(frozen=True, kw_only=True)
class Collapse(Flat):
    """Perplexity of the original model and after the edit, the limits, and whether they were crossed.

    Non-finite counts as collapsed. `ppl_just_before` is that of the model the edit was made on (None: the original's).
    """

    collapsed: bool
    threshold: float
    ratio: float
    limit: float
    finite: bool
    ppl_before: float
    ppl_after: float
    ppl_just_before: float | None = None

    @property
    def damaged(self) -> bool:
        """Collapsed, or perplexity above `ratio` times that before and only below the threshold still?"""
        return self.collapsed or self.ppl_after > self.ratio * self.ppl_before

    def to_json(self) -> dict[str, Any]:
        """The `collapse` entry of a record; `times_…` is perplexity after the edit as a multiple of that before."""
        just_before = self.ppl_before if self.ppl_just_before is None else self.ppl_just_before
        return {
            **super().to_json(),
            "ppl_just_before": just_before,
            "times_before": self.ppl_after / self.ppl_before,
            "times_just_before": self.ppl_after / just_before,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Self:
        """Inverse of `to_json`; a perplexity that is null there was not finite."""
        lost = {key: math.inf for key in ("ppl_before", "ppl_after", "ppl_just_before") if raw.get(key, 0.0) is None}
        return super().from_json({**raw, **lost})


def verdict(ppl_before: float, ppl_after: float, *, threshold: float, ratio: float) -> Collapse:
    """Collapsed when perplexity after is above `threshold` (Butterfly paper: 1000) and above `ratio` times that before.

    The ratio matters only for models whose base is above threshold / ratio. NaN or infinity is a collapse.
    """
    limit = max(threshold, ratio * ppl_before) if math.isfinite(ppl_before) else threshold
    finite = math.isfinite(ppl_after)
    return Collapse(
        collapsed=not finite or ppl_after > limit,
        threshold=threshold,
        ratio=ratio,
        limit=limit,
        finite=finite,
        ppl_before=ppl_before,
        ppl_after=ppl_after,
    )


def is_small(denominator: float | None, border: float = SMALL_DENOMINATOR) -> bool:
    """Does this denominator foretell a collapse? A method without one foretells none."""
    return denominator is not None and abs(denominator) < border


@dataclass(frozen=True, kw_only=True, slots=True)
class PredictionQuality:
    """How well something was predicted: counts, and the two shares, None for 0 / 0."""

    pairs: int
    predicted: int
    happened: int
    both: int

    @property
    def precision(self) -> float | None:
        """Share of the predicted that happened."""
        return self.both / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        """Share of what happened that was predicted."""
        return self.both / self.happened if self.happened else None


def prediction_quality(pairs: Iterable[tuple[bool, bool]]) -> PredictionQuality:
    """Counts of (predicted, happened) pairs."""
    listed = list(pairs)
    return PredictionQuality(
        pairs=len(listed),
        predicted=sum(guess for guess, _ in listed),
        happened=sum(was for _, was in listed),
        both=sum(guess and was for guess, was in listed),
    )
