"""Intervals for what is measured: an accuracy, a drop in accuracy on the same samples, a median.

Accuracy: Wilson's score interval. E. B. Wilson, "Probable inference, the law of succession, and
    statistical inference", JASA 22, 1927.
    (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
Drop: two networks judged on the same n samples; b are lost (right before, wrong after), c are gained.
    The adjusted Wald interval of D. G. Bonett and R. M. Price, "Adjusted Wald confidence interval for a
    difference of binomial proportions based on paired data", J. Educ. Behav. Stat. 37, 2012:
    p12 = (b+1)/(n+2), p21 = (c+1)/(n+2),     p12 - p21 +- z sqrt((p12 + p21 - (p12 - p21)^2) / (n+2))
Median: the k-th smallest and k-th largest value, k from the binomial law; exact for independent values.

All three are two-sided. `value` is what was observed, never the centre of the interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import bdtr, ndtri

from aerogel.errors import AerogelError

Real = TypeVar("Real", float, np.ndarray)


@dataclass(frozen=True)
class Interval:
    """An observed value and its confidence limits, low <= value <= high, all in one unit."""

    value: float
    low: float
    high: float


def accuracy_interval(correct: np.ndarray, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of an accuracy in percent; `correct` is bool, (n,).

    Raises AerogelError when `correct` is not a bool vector with at least one sample.
    """
    n = len(_flags("accuracy_interval", "correct", correct))
    z = _normal_quantile("accuracy_interval", confidence)
    p = float(np.mean(correct))
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # Rounding alone can leave p outside at 0 % and 100 %, where one limit is p itself.
    low, high = min(centre - half, p), max(centre + half, p)
    return Interval(100 * p, float(100 * max(low, 0.0)), float(100 * min(high, 1.0)))


def paired_drop(before_correct: np.ndarray, after_correct: np.ndarray, confidence: float = 0.95) -> Interval:
    """How much worse the second network is, in percentage points (negative: it is better).

    Both arguments are bool, (n,), and speak of the same samples in the same order.
    Raises AerogelError when they are not bool vectors of one length with at least one sample.
    """
    before = _flags("paired_drop", "before_correct", before_correct)
    after = _flags("paired_drop", "after_correct", after_correct)
    n = len(before)
    if len(after) != n:
        raise AerogelError(
            f"paired_drop: both arrays must judge the same samples, got {n} and {len(after)}; "
            "score both networks on one data set, in one order"
        )
    lost = int(np.count_nonzero(before & ~after))
    gained = int(np.count_nonzero(~before & after))
    low, high = adjusted_wald(float(lost), float(gained), n, confidence)
    return Interval(100 * (lost - gained) / n, 100 * max(low, -1.0), 100 * min(high, 1.0))


def adjusted_wald(lost: Real, gained: Real, n: int, confidence: float = 0.95) -> tuple[Real, Real]:
    """Bonett and Price's limits of (lost - gained) / n: elementwise, as proportions, not clipped."""
    z = _normal_quantile("adjusted_wald", confidence)
    p12, p21 = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    half = z * ((p12 + p21 - (p12 - p21) ** 2) / (n + 2)) ** 0.5
    return p12 - p21 - half, p12 - p21 + half


def median_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """The sample median and the order statistics that enclose the true one; `values` is (n,), independent.

    Raises AerogelError when n is too small for that confidence (fewer than 6 for 95 %).
    """
    ordered = np.sort(np.asarray(values, dtype=float).ravel())
    n = len(ordered)
    tail = (1 - _level("median_interval", confidence)) / 2
    # The k-th smallest misses when at most k-1 values lie below the true median: bdtr(k-1, n, 1/2).
    k = int(np.count_nonzero(bdtr(np.arange(n // 2), n, 0.5) <= tail)) if n else 0
    if k == 0:
        raise AerogelError(
            f"median_interval: {n} values cannot give a {confidence:.0%} interval of the median; measure more"
        )
    return Interval(float(np.median(ordered)), float(ordered[k - 1]), float(ordered[n - k]))


def _flags(caller: str, parameter: str, flags: np.ndarray) -> np.ndarray:
    flags = np.asarray(flags)
    if flags.dtype != np.bool_ or flags.ndim != 1 or len(flags) == 0:
        raise AerogelError(
            f"{caller}: {parameter} must be a bool vector with at least one sample, got {flags.dtype} "
            f"of shape {flags.shape}; pass (predictions == labels)"
        )
    return flags


def _level(caller: str, confidence: float) -> float:
    if not 0 < confidence < 1:
        raise AerogelError(f"{caller}: confidence must be in (0, 1), got {confidence}; 0.95 is usual")
    return confidence


def _normal_quantile(caller: str, confidence: float) -> float:
    return float(ndtri((1 + _level(caller, confidence)) / 2))
