"""Number of seeds to show an effect: the power of the two-sided paired t-test.

With n pairs whose differences have mean ``effect`` and standard deviation ``sd``, t is noncentral with n - 1 degrees of
freedom and noncentrality ``effect / sd * sqrt(n)``; power is its probability beyond the test's limits (Cohen,
Statistical Power Analysis for the Behavioral Sciences, 1988, chapter 2).
"""

import math

from scipy import optimize, stats

from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_points

LEVEL = 0.05
"""Of all tests of this package, two-sided."""
POWER = 0.8
_MOST_SEEDS = 100_000


def power_of(effect: float, sd: float, seeds: int) -> float:
    """Probability that the paired t-test shows a difference, 0.05 to 1.

    Args:
        effect: true mean of the differences, from 0 on.
        sd: their true standard deviation, above 0.
        seeds: pairs, at least 2.
    """
    limit, shift = stats.t.isf(LEVEL / 2, seeds - 1), effect / sd * math.sqrt(seeds)
    wrong_side = stats.nct.cdf(-limit, seeds - 1, shift)
    # SciPy has NaN for some tails that are nothing.
    return float(stats.nct.sf(limit, seeds - 1, shift)) + (0.0 if math.isnan(wrong_side) else float(wrong_side))


def seeds_needed(effect: float, sd: float, power: float = POWER) -> int:
    """Fewest seeds with which the paired t-test shows an effect with a probability of at least ``power``.

    Args:
        effect: true mean of the differences, above 0; in the unit of ``sd``.
        sd: standard deviation of the differences, above 0.
        power: 0.5 to below 1.

    Raises:
        UserError: arguments out of range, or more than 100,000 seeds.
    """
    for name, value in (("effect", effect), ("sd", sd)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value:g}, should be a number of points above 0")
    if not 0.5 <= power < 1:
        raise UserError(f"power is {power:g}, should be at least 0.5 and below 1, such as 0.8")
    few, enough = 1, 2
    while power_of(effect, sd, enough) < power:
        few, enough = enough, 2 * enough
        if few >= _MOST_SEEDS:
            raise UserError(
                f"an effect of {in_points(effect)} at a standard deviation of {sd:g} needs more than {_MOST_SEEDS:,} "
                "seeds; plan for a larger effect"
            )
    while enough - few > 1:  # power grows with the seeds
        middle = (few + enough) // 2
        few, enough = (few, middle) if power_of(effect, sd, middle) >= power else (middle, enough)
    return enough


def detectable_effect(sd: float, seeds: int, power: float = POWER) -> float:
    """The effect, in the unit of ``sd``, that so many seeds show with this power; NaN for one seed or no spread."""
    if seeds < 2 or not sd > 0:
        return math.nan
    high = 1.0
    while power_of(high, 1, seeds) < power:
        high *= 2
    return sd * float(optimize.brentq(lambda effect: power_of(effect, 1, seeds) - power, 0, high, xtol=1e-9))
