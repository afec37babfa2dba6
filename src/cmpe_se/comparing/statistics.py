"""What accuracies of a few seeds allow to say."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_NAN = math.nan


class Summary(NamedTuple):
    """Mean of some values with its 95 % t-interval; ``std`` with n - 1. One value has neither spread nor interval."""

    count: int
    mean: float
    std: float
    low: float
    high: float


class Difference(NamedTuple):
    """Mean of paired differences with its 95 % t-interval, a paired test and an effect size.

    ``p`` is of the two-sided paired t-test. ``effect`` is Hedges' g_z: the mean over the standard deviation of the
    differences, times 1 - 3 / (4 (n - 1) - 1), which takes off most of what small samples exaggerate.
    """

    count: int
    mean: float
    low: float
    high: float
    p: float
    effect: float


def summarise(values: Sequence[float]) -> Summary:
    """Mean, spread and interval of at least one value."""
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return Summary(count, mean, _NAN, _NAN, _NAN)
    std = float(np.std(values, ddof=1))
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, count - 1)) * std / math.sqrt(count)
    return Summary(count, mean, std, mean - half, mean + half)


def compare_paired(own: Sequence[float], others: Sequence[float]) -> Difference:
    """Differences own - others of values that belong together in pairs.

    One pair has no test. Neither have differences that are all the same, except that p is 1 where all are 0: t would be
    infinite and p 0, but that two or three seeds differ alike comes from counting few test images. With 360 of them, a
    spread of 0.4 points and no true difference, that would call one in ten comparisons of two seeds significant.

    Raises:
        ValueError: the two are not of one length.
    """
    differences = [a - b for a, b in zip(own, others, strict=True)]
    summary = summarise(differences)
    if summary.count < 2:
        return Difference(summary.count, summary.mean, _NAN, _NAN, _NAN, _NAN)
    if summary.std <= 1e-12 * max(1.0, abs(summary.mean)):  # nothing but rounding
        p = 1.0 if abs(summary.mean) <= 1e-12 else _NAN
        return Difference(summary.count, summary.mean, _NAN, _NAN, p, _NAN)
    freedom = summary.count - 1
    t = summary.mean / summary.std * math.sqrt(summary.count)
    correction = 1 - 3 / (4 * freedom - 1)
    p = 2 * float(stats.t.sf(abs(t), freedom))
    return Difference(
        summary.count, summary.mean, summary.low, summary.high, p, correction * summary.mean / summary.std
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment for several comparisons, in the given order; NaN (no test) stays NaN and does not count."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
