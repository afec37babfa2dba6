"""Statistics against statsmodels and against numbers worked out by hand."""

import math
import warnings
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.weightstats import ttost_paired

from cmpe_se.commands.compare.statistics import compare_paired, equivalence_p, holm, summarise

accuracies = st.floats(10, 99).map(lambda value: round(value, 2))
pairs = st.lists(st.tuples(accuracies, accuracies), min_size=2, max_size=8)


def test_summary_by_hand():
    summary = summarise([70.0, 72.0, 74.0])
    assert (summary.count, summary.mean, summary.std) == (3, 72.0, 2.0)
    half = 4.302653 * 2 / math.sqrt(3)  # t of 2 degrees of freedom, from a table
    assert (summary.low, summary.high) == pytest.approx((72 - half, 72 + half), abs=1e-5)


def test_one_value_has_no_interval():
    count, mean, *others = astuple(summarise([70.0]))
    assert (count, mean) == (1, 70.0)
    assert len(others) == 3
    assert all(math.isnan(value) for value in others)


def test_paired_test_by_hand():
    """Differences 1, 2, 4.5: mean 2.5, variance 3.25."""
    difference = compare_paired([71.0, 73.0, 75.5], [70.0, 71.0, 71.0])
    error = math.sqrt(3.25 / 3)
    assert (difference.mean, difference.std) == pytest.approx((2.5, math.sqrt(3.25)))
    assert (difference.low, difference.high) == pytest.approx(
        (2.5 - 4.302653 * error, 2.5 + 4.302653 * error), abs=1e-5
    )
    t = 2.5 / error  # with 2 degrees of freedom, p in closed form
    assert difference.p == pytest.approx(1 - t / math.sqrt(2 + t * t))


@given(pairs, st.floats(0.05, 3))
def test_equivalence_is_statsmodels(pairs, margin):
    own, others = map(np.array, zip(*pairs, strict=True))
    if np.std(own - others) > 1e-9:
        expected, *_ = ttost_paired(own, others, -margin, margin)
        assert equivalence_p(own, others, margin) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_equivalence_and_difference_are_two_answers():
    plain = [70.0, 71.0, 69.5, 70.5]
    for own, differs, same in [
        ([70.01, 70.98, 69.52, 70.49], False, True),
        ([70.9, 70.2, 69.9, 70.1], False, False),
        ([70.1, 71.11, 69.61, 70.6], True, True),
        ([71.0, 72.1, 70.4, 71.5], True, False),
    ]:
        assert (compare_paired(own, plain).p < 0.05, equivalence_p(own, plain, 0.2) < 0.05) == (differs, same)


@pytest.mark.parametrize("own", [[70.0], [70.0, 71.0], [70.1, 71.1]], ids=["one pair", "equal", "the same difference"])
def test_what_cannot_be_tested_is_not_called_the_same(own):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isnan(equivalence_p(own, [70.0, 71.0][: len(own)], 0.2))


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
    assert difference.std == 0
    assert all(math.isnan(value) for value in (difference.low, difference.high, difference.effect))


def test_one_pair_is_no_test():
    difference = compare_paired([71.0], [70.0])
    count, mean, *others = astuple(difference)
    assert (count, mean) == (1, 1)
    assert len(others) == 5
    assert all(math.isnan(value) for value in others)
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


@pytest.mark.parametrize(
    "p_values", [[0.3], [0.02, 0.01], [0.01, 0.04, 0.03, 0.005], [0.2, 0.2, 0.001, 0.9, 0.0], [1.0, 0.5, 0.4]]
)
def test_holm_is_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])
