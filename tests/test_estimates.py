"""Intervals against their definitions, computed anew: Wilson's and Newcombe's formulas, BCa by hand, coverage."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest
from numpy.typing import NDArray

from easyeditor.values.estimates import Estimate, difference_of, harmonic_of, mean_of, median_of, share_of

Z = NormalDist().inv_cdf(0.975)


def wilson(k: int, n: int) -> tuple[float, float]:
    """The two roots of (p - k/n)^2 = z^2 p (1 - p) / n."""
    roots = np.roots([1 + Z**2 / n, -(2 * k / n + Z**2 / n), (k / n) ** 2])
    return float(min(roots)), float(max(roots))


def bca(sums: NDArray[np.float64], counts: NDArray[np.float64]) -> tuple[float, float]:
    """Efron 1987, eq. 2.3 and 6.6, of a mean over clusters, with draws of its own."""
    normal, value = NormalDist(), sums.sum() / counts.sum()
    drawn = np.random.default_rng(99).integers(0, len(sums), size=(20000, len(sums)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    z0 = normal.inv_cdf(float(((means < value).mean() + (means <= value).mean()) / 2))
    left = (sums.sum() - sums) / (counts.sum() - counts)
    apart = left.mean() - left
    a = float((apart**3).sum() / (6 * ((apart**2).sum()) ** 1.5))
    levels = [normal.cdf(z0 + (z0 + z) / (1 - a * (z0 + z))) for z in (-Z, Z)]
    low, high = np.quantile(means, levels)
    return float(low), float(high)


def ends(found: Estimate | None) -> tuple[float | None, float | None]:
    """The interval."""
    assert found is not None
    return found.low, found.high


@pytest.mark.parametrize(("k", "n"), [(6, 6), (0, 6), (0, 40), (50, 50), (3, 7), (1, 1), (60, 100)])
def test_a_share_has_wilson_s_interval(k: int, n: int) -> None:
    found = share_of(k, n)
    assert (float(found), *ends(found)) == pytest.approx((k / n, *wilson(k, n)), abs=1e-9)
    of_values = mean_of([1.0] * k + [0.0] * (n - k) + [None])
    assert (of_values, ends(of_values)) == (found, ends(found))


def test_six_of_six_is_not_certain() -> None:
    assert ends(mean_of([1.0] * 6)) == pytest.approx((0.61, 1.0), abs=0.001)  # it was [1.00, 1.00]


def test_a_mean_has_the_bca_interval_and_is_seeded() -> None:
    values = np.random.default_rng(1).exponential(size=40)
    found = mean_of(values.tolist())
    assert found == pytest.approx(values.mean())
    assert ends(found) == pytest.approx(bca(values, np.ones(40)), abs=0.02)
    assert ends(mean_of([*values.tolist(), None])) == ends(found)


def test_prompts_of_a_request_are_drawn_together() -> None:
    """Ten requests whose ten prompts all say the same: a hundred values know no more than ten."""
    of = [n // 10 for n in range(100)]
    values = [float(n < 4) for n in of]
    found = mean_of(values, of)
    assert found == pytest.approx(0.4)
    sums = np.array([10.0] * 4 + [0.0] * 6)
    assert ends(found) == pytest.approx(bca(sums, np.full(10, 10.0)), abs=0.03)
    alone, ten = mean_of(values), share_of(4, 10)
    assert alone is not None
    assert found is not None
    assert None not in (*ends(alone), *ends(found), *ends(ten))
    wide = [high - low for low, high in map(ends, (alone, found, ten)) if low is not None and high is not None]
    assert wide[0] < 0.5 * wide[1]
    assert wide[1] == pytest.approx(wide[2], rel=0.25)
    assert ends(mean_of([1.0] * 100, of)) == pytest.approx(wilson(10, 10))


@pytest.mark.parametrize("values", [[0.25], [0.1] * 7, [float("inf"), 1.0, 2.0]])
def test_where_nothing_says_how_far_a_mean_is_known_it_has_no_interval(values: list[float]) -> None:
    assert ends(mean_of(values)) == (None, None)


def test_nothing_known_is_no_estimate() -> None:
    for found in (mean_of([]), mean_of([None]), median_of([]), harmonic_of([]), harmonic_of([[1.0], [None]])):
        assert found is None
    assert difference_of([None, 1.0], [1.0, None]) is None


def test_the_harmonic_mean_resamples_requests() -> None:
    halves = [1.0, 0.0] * 20
    found, other = harmonic_of([halves, halves]), mean_of(halves)
    assert found == pytest.approx(0.5)
    assert ends(found) == pytest.approx(ends(other), abs=0.03)
    assert harmonic_of([halves, [0.0] * 40]) == 0
    assert harmonic_of([[1.0, None], [None, 0.5]]) == pytest.approx(2 / 3)


def test_a_median_has_the_interval_of_order_statistics() -> None:
    """P(the median is below the k-th smallest of n) is binomial: of 20 values the 6th and the 15th (Conover 1999)."""
    values = [float(n) ** 2 for n in range(1, 21)]
    assert median_of(values) == pytest.approx((100 + 121) / 2)
    assert ends(median_of(values)) == (36.0, 225.0)
    assert ends(median_of([95.0, 3.0, math.inf, 7.0, 8.0, 9.0])) == (3.0, math.inf)
    assert ends(median_of([1.0, 2.0, 3.0])) == (None, None)


@pytest.mark.parametrize(
    "counts", [(36, 12, 2, 0), (6, 0, 0, 0), (0, 6, 0, 0), (20, 1, 0, 19), (20, 0, 0, 20), (3, 5, 9, 8)]
)
def test_two_methods_on_the_same_requests(counts: tuple[int, int, int, int]) -> None:
    """Newcombe 1998, Statistics in Medicine 17:2635, method 10; counts of both, ours, theirs, neither right."""
    kinds = ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0))
    ours, theirs = zip(*(pair for pair, count in zip(kinds, counts, strict=True) for _ in range(count)), strict=True)
    found = difference_of(ours, theirs)
    a, b, c, d = counts
    n = sum(counts)
    (l1, u1), (l2, u2) = wilson(a + b, n), wilson(a + c, n)
    p1, p2, margins = (a + b) / n, (a + c) / n, (a + b) * (c + d) * (a + c) * (b + d)
    cross = a * d - b * c
    phi = 0.0 if margins == 0 else (max(cross - n / 2, 0) if cross > 0 else cross) / math.sqrt(margins)
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((p2 - l2) ** 2 - 2 * phi * (p2 - l2) * (u1 - p1) + (u1 - p1) ** 2)
    assert found == pytest.approx(p1 - p2)
    assert ends(found) == pytest.approx((low, high), abs=1e-9)
    assert found is not None
    assert found.apart is (counts in ((36, 12, 2, 0), (0, 6, 0, 0)))


def test_pairing_tells_apart_what_two_intervals_do_not() -> None:
    """Requests differ much, the two methods by 0.05 on each: their own intervals overlap, the difference is plain."""
    draw = np.random.default_rng(3)
    ours = draw.uniform(0.1, 0.9, size=50)
    theirs = ours - 0.05 + draw.normal(0, 0.02, size=50)
    found, first, second = (
        difference_of(ours.tolist(), theirs.tolist()),
        mean_of(ours.tolist()),
        mean_of(theirs.tolist()),
    )
    assert found is not None
    assert found.apart
    assert ends(found) == pytest.approx(bca(ours - theirs, np.ones(50)), abs=0.002)
    assert None not in (*ends(first), *ends(second))
    assert ends(second)[1] > ends(first)[0]  # type: ignore[operator]


def test_ninety_five_of_a_hundred_intervals_hold_the_truth() -> None:
    """Shares near 1 of few requests, where resampling alone falls short: it holds 0.9 in 6 of 10 samples of 10."""
    draw, right = np.random.default_rng(5), 0
    for _ in range(400):
        low, high = ends(mean_of((draw.random(10) < 0.9).astype(float).tolist()))
        assert low is not None
        assert high is not None
        right += low <= 0.9 <= high
    assert right / 400 > 0.9
