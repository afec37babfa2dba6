"""How many seeds show what: against tables and statsmodels."""

import math

import pytest
from statsmodels.stats.power import TTestPower

from cmpe_se.commands.compare.power import detectable_effect, power_of, seeds_needed
from cmpe_se.errors import UserError


@pytest.mark.parametrize(("size", "seeds"), [(0.5, 34), (0.75, 16), (1, 10), (1.5, 6), (2, 5)])
def test_seeds_are_those_of_the_tables(size, seeds):
    assert seeds_needed(size * 0.4, 0.4) == seeds


@pytest.mark.parametrize("power", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("size", [0.07, 0.3, 0.9, 2.5])
def test_seeds_are_statsmodels(size, power):
    expected = TTestPower().solve_power(effect_size=size, power=power, alpha=0.05, alternative="two-sided")
    assert seeds_needed(size, 1, power) == math.ceil(expected)


@pytest.mark.parametrize("seeds", [3, 5, 10, 200])
@pytest.mark.parametrize("size", [0.0, 0.1, 1.0, 4.0])
def test_power_is_statsmodels(size, seeds):
    expected = TTestPower().power(effect_size=size, nobs=seeds, alpha=0.05)
    assert power_of(0.3 * size, 0.3, seeds) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("sd", "seeds"), [(0.4, 2), (0.4, 3), (1.3, 5), (0.05, 10), (0.4, 1000)])
def test_the_detectable_effect_has_the_power(sd, seeds):
    effect = detectable_effect(sd, seeds)
    assert power_of(effect, sd, seeds) == pytest.approx(0.8, abs=1e-6)
    assert seeds_needed(effect * 1.0001, sd) == seeds


@pytest.mark.parametrize(("sd", "seeds"), [(0.4, 1), (0.0, 3), (math.nan, 3)])
def test_nothing_is_said_without_a_spread(sd, seeds):
    assert math.isnan(detectable_effect(sd, seeds))


def test_a_large_effect_still_needs_a_pair_of_seeds():
    assert seeds_needed(1000, 0.1) == 2


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ((0, 0.4), "effect is 0, should be a number of points above 0"),
        ((-0.3, 0.4), "effect is -0.3"),
        ((math.nan, 0.4), "effect is nan"),
        ((0.3, 0), "sd is 0"),
        ((0.3, math.inf), "sd is inf"),
        ((0.3, 0.4, 1), "power is 1, should be at least 0.5 and below 1"),
        ((0.3, 0.4, 80), "power is 80"),
        ((0.0001, 1), "needs more than 100,000 seeds"),
    ],
)
def test_nonsense_is_one_line(arguments, complaint):
    with pytest.raises(UserError, match=complaint):
        seeds_needed(*arguments)
