"""Statistics of accuracies of a few seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_NAN = math.nan


@dataclass(frozen=True)
class Summary:
    """Mean of some values with its 95 % t-interval; ``std`` with n - 1. One value has neither spread nor interval."""

    count: int
    mean: float
    std: float
    low: float
    high: float


@dataclass(frozen=True)
class Difference:
    """Mean and standard deviation of paired differences, 95 % t-interval of the mean, a paired test and an effect size.

    ``p`` is of the two-sided paired t-test. ``effect`` is Hedges' g_z: the mean over the standard deviation of the
    differences, times 1 - 3 / (4 (n - 1) - 1), which takes off most of what small samples exaggerate.
    """

    count: int
    mean: float
    std: float
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

    One pair has no test, and two have no effect size: their correction is 0, whatever the differences. Differences that
    are all the same have no test either, except that p is 1 where all are 0: t would be infinite and p 0, but that two
    or three seeds differ alike comes from counting few test images. With 360 of them, a spread of 0.4 points and no
    true difference, that would call one in ten comparisons of two seeds significant.

    Raises:
        ValueError: the two are not of one length.
    """
    differences = [a - b for a, b in zip(own, others, strict=True)]
    count, mean = len(differences), float(np.mean(differences))
    if count < 2:
        return Difference(count, mean, _NAN, _NAN, _NAN, _NAN, _NAN)
    if _are_one_value(differences):
        return Difference(count, mean, 0.0, _NAN, _NAN, 1.0 if abs(mean) <= 1e-12 else _NAN, _NAN)
    test, std = stats.ttest_rel(own, others), float(np.std(differences, ddof=1))
    low, high = test.confidence_interval(CONFIDENCE)
    effect = (1 - 3 / (4 * (count - 1) - 1)) * mean / std if count > 2 else _NAN
    return Difference(count, mean, std, float(low), float(high), float(test.pvalue), effect)


def equivalence_p(own: Sequence[float], others: Sequence[float], margin: float) -> float:
    """Two one-sided paired t-tests (TOST): small where the mean difference is shown to lie within +- margin.

    The larger p of the two, against "at most -margin" and against "at least margin" (Schuirmann 1987). NaN where there
    is no test, for the reasons of :func:`compare_paired`; also where all differences are 0.

    Args:
        own, others: values that belong together in pairs.
        margin: largest difference that counts as none, above 0; in their unit.

    Raises:
        ValueError: the two are not of one length.
    """
    differences = [a - b for a, b in zip(own, others, strict=True)]
    if len(differences) < 2 or _are_one_value(differences):
        return _NAN
    above = stats.ttest_1samp(differences, -margin, alternative="greater")
    below = stats.ttest_1samp(differences, margin, alternative="less")
    return float(max(above.pvalue, below.pvalue))


def _are_one_value(differences: Sequence[float]) -> bool:
    """Whether they differ by nothing but rounding."""
    return float(np.std(differences, ddof=1)) <= 1e-12 * max(1.0, abs(float(np.mean(differences))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjustment for several comparisons, in the given order; NaN (no test) stays NaN and does not count."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted, largest = list(p_values), 0.0
    for rank, (p, index) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        adjusted[index] = largest
    return adjusted
