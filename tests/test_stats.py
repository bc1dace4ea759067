"""The intervals hold what they promise: checked on published numbers, on limits, and by simulation."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aerogel.errors import AerogelError
from aerogel.stats import Interval, accuracy_interval, adjusted_wald, median_interval, paired_drop


def outcomes(both: int, lost: int, gained: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    before = np.repeat([True, True, False, False], [both, lost, gained, neither])
    after = np.repeat([True, False, True, False], [both, lost, gained, neither])
    return before, after


def test_wilson_known_value() -> None:
    # Newcombe 1998, table I: 81 of 263 gives 0.2553 to 0.3662.
    interval = accuracy_interval(np.arange(263) < 81)
    assert interval.value == pytest.approx(100 * 81 / 263)
    assert (interval.low, interval.high) == pytest.approx((25.53, 36.62), abs=0.005)


@pytest.mark.parametrize(("right", "low", "high"), [(0, 0.0, 79.35), (1, 20.65, 100.0)])
def test_wilson_of_one_sample(right: int, low: float, high: float) -> None:
    interval = accuracy_interval(np.array([bool(right)]))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.005)


def test_paired_drop_by_hand() -> None:
    interval = paired_drop(*outcomes(both=70, lost=15, gained=5, neither=10))
    p12, p21 = 16 / 102, 6 / 102
    half = 1.959964 * np.sqrt((p12 + p21 - (p12 - p21) ** 2) / 102)
    assert interval.value == pytest.approx(10.0)
    assert interval.low == pytest.approx(100 * (p12 - p21 - half), abs=1e-4)
    assert interval.high == pytest.approx(100 * (p12 - p21 + half), abs=1e-4)


@given(
    st.tuples(*[st.integers(0, 200)] * 4).filter(lambda cells: sum(cells) > 0),
    st.sampled_from([0.8, 0.95, 0.99]),
)
def test_laws_of_the_drop(cells: tuple[int, int, int, int], confidence: float) -> None:
    before, after = outcomes(*cells)
    drop, back = paired_drop(before, after, confidence), paired_drop(after, before, confidence)
    assert -100 <= drop.low <= drop.value <= drop.high <= 100
    assert (back.value, back.low, back.high) == pytest.approx((-drop.value, -drop.high, -drop.low))
    accuracy = accuracy_interval(before, confidence)
    assert 0 <= accuracy.low <= accuracy.value <= accuracy.high <= 100


def test_equal_networks_have_a_drop_of_zero_and_an_interval_that_shrinks() -> None:
    few, many = (paired_drop(*outcomes(n, 0, 0, 0)) for n in (1, 10_000))
    assert few.value == many.value == 0
    assert few.low == pytest.approx(-few.high)
    assert many.high < 0.05 < 90 < few.high


@pytest.mark.parametrize("n", [50, 300, 1000, 10_000])
@pytest.mark.parametrize("gain_rate", [0.0, 0.005, 0.05, 0.2])
@pytest.mark.parametrize("allowed", [0.005, 0.01, 0.03])
def test_a_true_drop_at_the_limit_rarely_passes(n: int, gain_rate: float, allowed: float) -> None:
    # The rule of the main job: pass only if the upper limit is within the allowed drop.
    chances = [gain_rate + allowed, gain_rate, 1 - 2 * gain_rate - allowed]
    lost, gained, _ = np.random.default_rng(7).multinomial(n, chances, size=2000).T
    _, high = adjusted_wald(lost.astype(float), gained.astype(float), n)
    assert np.mean(high <= allowed) <= 0.05


def test_the_drop_covers_the_truth() -> None:
    lost, gained, _ = np.random.default_rng(3).multinomial(500, [0.06, 0.04, 0.9], size=5000).T
    low, high = adjusted_wald(lost.astype(float), gained.astype(float), 500)
    assert 0.94 <= np.mean((low <= 0.02) & (high >= 0.02)) <= 0.965


@pytest.mark.parametrize(("n", "ranks"), [(6, (1, 6)), (10, (2, 9)), (20, (6, 15)), (100, (40, 61))])
def test_ranks_of_the_median_interval(n: int, ranks: tuple[int, int]) -> None:
    # The ranks of the published tables for 95 % (Conover, Practical Nonparametric Statistics).
    values = np.random.default_rng(0).permutation(n) + 1
    assert median_interval(values) == Interval((n + 1) / 2, *ranks)


@pytest.mark.parametrize("n", [6, 12, 20])
def test_median_interval_covers_a_skewed_law(n: int) -> None:
    draws = np.random.default_rng(1).exponential(size=(4000, n))
    found = [median_interval(row) for row in draws]
    above = np.mean([interval.low > np.log(2) for interval in found])
    below = np.mean([interval.high < np.log(2) for interval in found])
    assert max(above, below) <= 0.03


def test_too_few_values_for_a_median() -> None:
    with pytest.raises(AerogelError, match=r"5 values cannot give a 95% interval"):
        median_interval(np.arange(5))
    with pytest.raises(AerogelError, match=r"0 values cannot give"):
        median_interval([])


@pytest.mark.parametrize(
    "flags",
    [np.array([], dtype=bool), np.ones(3), np.ones((2, 2), dtype=bool)],
    ids=["empty", "not bool", "matrix"],
)
def test_what_is_not_a_vector_of_flags_is_refused(flags: np.ndarray) -> None:
    with pytest.raises(AerogelError, match="correct must be a bool vector with at least one sample"):
        accuracy_interval(flags)
    with pytest.raises(AerogelError, match="after_correct must be a bool vector"):
        paired_drop(np.ones(3, dtype=bool), flags)


def test_different_lengths_are_refused() -> None:
    with pytest.raises(AerogelError, match="same samples, got 3 and 4"):
        paired_drop(np.ones(3, dtype=bool), np.ones(4, dtype=bool))


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_is_a_fraction(confidence: float) -> None:
    with pytest.raises(AerogelError, match=r"confidence must be in \(0, 1\)"):
        accuracy_interval(np.ones(3, dtype=bool), confidence)
