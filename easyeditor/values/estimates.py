"""A number and how far it is known: shares, means, medians and paired differences with their intervals, by scipy.

What varies is the request: where several prompts belong to one, it is drawn with all of them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Known = Sequence[float | None]

LEVEL = 0.95
DRAWS = 4999
"""Resamples of a bootstrap, drawn from seed 0."""


class Estimate(float):
    """A number with its interval, shown with it; both ends are None where nothing says how far it is known. In a CSV
    file it takes three columns."""

    low: float | None
    high: float | None

    def __new__(cls, value: float, low: float | None = None, high: float | None = None) -> Self:
        made = super().__new__(cls, value)
        made.low, made.high = low, high
        return made

    @property
    def apart(self) -> bool:
        """Of a difference: is zero outside the interval?"""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def share_of(held: int, of: int) -> Estimate:
    """A share with Wilson's interval (1927): 6 of 6 is 1 [0.61, 1]."""
    return Estimate(held / of, *_wilson(held, of))


def mean_of(values: Known, of: Sequence[Hashable] | None = None) -> Estimate | None:
    """The mean of what is known; None where nothing is. `of` names the request of each value (else each has its own).

    Where every value is 0 or 1 it is a share (`share_of`), if each request has one value or all values are the same;
    else the interval is BCa's (Efron 1987) over requests. One value, or equal ones inside (0, 1), say nothing of it.
    """
    names: list[Hashable] = list(range(len(values)) if of is None else of)
    requests: dict[Hashable, list[float]] = {}
    for name, value in zip(names, values, strict=True):
        if value is not None:
            requests.setdefault(name, []).append(value)
    known = [value for own in requests.values() for value in own]
    if not known:
        return None
    if set(known) <= {0.0, 1.0} and (len(known) == len(requests) or len(set(known)) == 1):
        return share_of(int(known[0]) * len(requests) if len(set(known)) == 1 else int(sum(known)), len(requests))
    sums, counts = (np.array([f(own) for own in requests.values()], dtype=np.float64) for f in (math.fsum, len))
    return _bootstrapped([sums], [counts], lambda means: means[0])


def harmonic_of(parts: Sequence[Known]) -> Estimate | None:
    """The harmonic mean of the parts' means, 0 if one is 0; every resample takes the same requests from each part.
    None where a part has no value."""
    table = [np.array([np.nan if v is None else v for v in values], dtype=np.float64) for values in parts]
    if not table or any(np.isnan(row).all() for row in table):
        return None
    return _bootstrapped([np.nan_to_num(row) for row in table], [1.0 - np.isnan(row) for row in table], _harmonic)


def median_of(values: Sequence[float]) -> Estimate | None:
    """The median, between two of the values: the exact interval of order statistics, which takes six of them."""
    if not values:
        return None
    from scipy.stats import quantile_test

    low, high = quantile_test(values, p=0.5).confidence_interval(LEVEL)
    return _estimate(float(np.median(values)), low, high)


def difference_of(ours: Known, theirs: Known) -> Estimate | None:
    """The mean of ours less theirs, request by request, where both are known; None where no request has both.

    Where all are 0 or 1: Newcombe's interval of two paired shares (1998, method 10), made of Wilson's two. Else
    BCa's of the differences.
    """
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    if not pairs:
        return None
    if {value for pair in pairs for value in pair} <= {0.0, 1.0}:
        return _paired_shares(pairs)
    apart = np.array([a - b for a, b in pairs], dtype=np.float64)
    return _bootstrapped([apart], [np.ones(len(apart))], lambda means: means[0])


def _paired_shares(pairs: Sequence[tuple[float, float]]) -> Estimate:
    held = [int(sum(side)) for side in zip(*pairs, strict=True)]
    first, second = (count / len(pairs) for count in held)
    (low, high), (lowest, highest) = (_wilson(count, len(pairs)) for count in held)
    both, one, other, none = (pairs.count(kind) for kind in ((1, 1), (1, 0), (0, 1), (0, 0)))
    agree = both * none - one * other
    scale = math.sqrt((both + one) * (other + none) * (both + other) * (one + none))
    phi = (max(agree - len(pairs) / 2, 0) if agree > 0 else agree) / scale if scale else 0.0

    def reach(own: float, its: float) -> float:
        return math.sqrt(max(own * own - 2 * phi * own * its + its * its, 0.0))

    apart = first - second
    return Estimate(apart, apart - reach(first - low, highest - second), apart + reach(high - first, second - lowest))


def _wilson(held: int, of: int) -> tuple[float, float]:
    from scipy.stats import binomtest

    low, high = binomtest(held, of).proportion_ci(LEVEL, method="wilson")
    return float(low), float(high)


def _bootstrapped(sums: list[Array], counts: list[Array], make: Callable[[list[Array]], Array]) -> Estimate:
    """`make` of the parts' means, where request n has `counts[part][n]` values of that `sums[part][n]`."""
    from scipy.stats import bootstrap

    def value(*rows: Array, axis: int = -1) -> Array:
        with np.errstate(invalid="ignore"):
            means = [row.sum(axis) / of.sum(axis) for row, of in zip(rows[::2], rows[1::2], strict=True)]
        return make(means)

    rows: list[Any] = [row for part in zip(sums, counts, strict=True) for row in part]
    whole = float(value(*rows))
    if len(rows[0]) < 2:
        return Estimate(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal values, of which the interval is NaN
        options: dict[str, Any] = {"paired": True, "vectorized": True, "n_resamples": DRAWS, "method": "BCa"}
        found = bootstrap(rows, value, confidence_level=LEVEL, rng=np.random.default_rng(0), **options)
    return _estimate(whole, *found.confidence_interval)


def _harmonic(means: list[Array]) -> Array:
    zero = np.any([mean <= 0 for mean in means], axis=0)
    safe = [np.where(mean <= 0, 1.0, mean) for mean in means]
    found: Array = np.where(zero, 0.0, len(means) / np.sum([1.0 / mean for mean in safe], axis=0))
    return found


def _estimate(value: float, low: float, high: float) -> Estimate:
    """Ends that are NaN, or equal but for rounding, come of values that are all alike: they say nothing."""
    known = not math.isnan(low) and not math.isnan(high) and high - low > 1e-9 * abs(value)
    return Estimate(value, float(low), float(high)) if known else Estimate(value)
