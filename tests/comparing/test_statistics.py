"""Statistics against SciPy's own and against numbers worked out by hand."""

import math
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cmpe_se.comparing.statistics import compare_paired, holm, summarise

accuracies = st.floats(10, 99).map(lambda value: round(value, 2))


def test_summary_by_hand():
    summary = summarise([70.0, 72.0, 74.0])
    assert (summary.count, summary.mean, summary.std) == (3, 72.0, 2.0)
    half = 4.302653 * 2 / math.sqrt(3)  # t of 2 degrees of freedom, from a table
    assert (summary.low, summary.high) == pytest.approx((72 - half, 72 + half), abs=1e-5)


def test_one_value_has_no_interval():
    assert summarise([70.0])[:2] == (1, 70.0)
    assert all(math.isnan(value) for value in summarise([70.0])[2:])


@given(st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=8))
def test_paired_test_is_scipys(pairs):
    own, others = map(list, zip(*pairs, strict=True))
    differences = np.subtract(own, others)
    difference = compare_paired(own, others)
    assert difference.mean == pytest.approx(differences.mean(), abs=1e-9)
    if differences.std() < 1e-9:
        return
    assert difference.p == pytest.approx(stats.ttest_rel(own, others).pvalue, rel=1e-6)
    interval = stats.ttest_rel(own, others).confidence_interval(0.95)
    assert (difference.low, difference.high) == pytest.approx(tuple(interval), rel=1e-6, abs=1e-9)


def test_effect_by_hand():
    difference = compare_paired([71.0, 73.0, 75.0], [70.0, 71.0, 72.0])  # differences 1, 2, 3
    assert difference.effect == pytest.approx(2.0 / 1.0 * (1 - 3 / 7))


def test_pairs_matter():
    """The same values, otherwise paired: seeds that are good for both take nothing from the difference."""
    paired, crossed = compare_paired([70, 75, 80], [69, 74, 79.5]), compare_paired([70, 75, 80], [79.5, 69, 74])
    assert paired.mean == pytest.approx(crossed.mean)
    assert paired.p < 0.05 < crossed.p


@pytest.mark.parametrize(("own", "p"), [([70.0, 71.0], 1.0), ([70.1, 71.1], math.nan)])
def test_the_same_difference_every_time(own, p):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        difference = compare_paired(own, [70.0, 71.0])
    assert difference.p == pytest.approx(p, nan_ok=True)
    assert all(math.isnan(value) for value in (difference.low, difference.high, difference.effect))


def test_one_pair_is_no_test():
    difference = compare_paired([71.0], [70.0])
    assert difference.mean == 1
    assert all(math.isnan(value) for value in difference[2:])
    with pytest.raises(ValueError, match="longer"):
        compare_paired([1.0], [1.0, 2.0])


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])


def test_holm_leaves_out_what_was_not_tested():
    first, missing, last = holm([0.02, math.nan, 0.03])
    assert math.isnan(missing)
    assert (first, last) == pytest.approx((0.04, 0.04))
    assert holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_properties(p_values):
    adjusted = holm(p_values)
    assert all(p <= a <= 1 for p, a in zip(p_values, adjusted, strict=True))
    for p, a in zip(p_values, adjusted, strict=True):
        for q, b in zip(p_values, adjusted, strict=True):
            assert p >= q or a <= b
    if p_values:
        assert min(adjusted) == pytest.approx(min(1.0, len(p_values) * min(p_values)))
