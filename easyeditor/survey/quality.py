"""What a cell came to: each request's numbers, their means with bootstrap intervals over requests, seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from easyeditor.drawing.table import Estimate
from easyeditor.results.run import Run

Array = NDArray[np.float64]

DRAWS = 1000
LEVEL = 0.95
SCORES = ("ES", "PS", "NS")  # S is made of their means
ACCURACIES = ("rewrite_acc", "rephrase_acc", "locality_acc")


def values_of(run: Run) -> dict[str, list[float | None]]:
    """Metric -> the value of each request: in a sequence at its last evaluation, over the edits in the model; in mode
    single right after each edit, that of the edit that stands where the guard did it again."""
    if run.evaluations:
        rows: list[Mapping[str, float | None]] = [
            {**{name: getattr(r, name) for name in ACCURACIES}, **r.metrics} for r in run.evaluations[-1].retention
        ]
    elif run.mode == "single":
        rows = [{name: after for name, (_, after) in e.standing.values().items()} for e in run.edits if e.stands]
    else:
        rows = []
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def mean_of(values: Sequence[float | None], seed: int = 0) -> Estimate | None:
    """The mean of what is known, with its interval: LEVEL of the means of DRAWS resamples of the requests."""
    return _estimate([values], seed, lambda means: means[0])


def harmonic_of(parts: Sequence[Sequence[float | None]], seed: int = 0) -> Estimate | None:
    """The harmonic mean of the parts' means, 0 if one is 0, with its interval; every resample takes the same requests
    from each part. None where a part has no value."""
    return _estimate(parts, seed, _harmonic)


def score_of(values: Mapping[str, Sequence[float | None]], seed: int = 0) -> Estimate | None:
    """S, the harmonic mean of ES, PS and NS; None where one was not measured."""
    return harmonic_of([values[name] for name in SCORES], seed) if all(name in values for name in SCORES) else None


def quality_of(values: Mapping[str, Sequence[float | None]], seed: int = 0) -> Estimate | None:
    """The harmonic mean of efficacy, generalization and locality, of those that the data has."""
    known = [values[name] for name in ACCURACIES if any(value is not None for value in values.get(name, ()))]
    return harmonic_of(known, seed) if known else None


def median_of(values: Sequence[float], seed: int = 0) -> Estimate | None:
    """The median with its interval."""
    if not values:
        return None
    drawn = np.asarray(values, dtype=np.float64)[_draws(len(values), seed)]
    return _between(float(np.median(values)), np.median(drawn, axis=1))


def _estimate(parts: Sequence[Sequence[float | None]], seed: int, make: Callable[[Array], Array]) -> Estimate | None:
    table = [np.array([np.nan if v is None else v for v in values], dtype=np.float64) for values in parts]
    if not table or any(not len(row) or np.isnan(row).all() for row in table):
        return None
    draws = _draws(len(table[0]), seed)
    resampled = np.stack([_means(row[draws]) for row in table])
    whole = np.stack([_means(row[None]) for row in table])
    return _between(float(make(whole)[0]), make(resampled))


def _draws(count: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, count, size=(DRAWS, count))


def _means(rows: Array) -> Array:
    """Mean of each row's known values; NaN where there is none."""
    known = ~np.isnan(rows)
    counts = known.sum(axis=1)
    sums = np.where(known, rows, 0.0).sum(axis=1)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _harmonic(means: Array) -> Array:
    """Over the first axis."""
    zero = (means <= 0).any(axis=0)
    safe = np.where(means <= 0, 1.0, means)
    found: Array = np.where(zero, 0.0, len(means) / (1.0 / safe).sum(axis=0))
    return found


def _between(value: float, drawn: Array) -> Estimate:
    edge = 100 * (1 - LEVEL) / 2
    good = drawn[~np.isnan(drawn)]
    low, high = (float(x) for x in np.percentile(good, [edge, 100 - edge])) if len(good) else (value, value)
    return Estimate(value, low, high)
