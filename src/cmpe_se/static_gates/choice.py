"""Which gates a network can spare: a greedy choice within a budget of accuracy."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from cmpe_se.static_gates.calibration import Calibration, Progress


@dataclass(frozen=True)
class Trial:
    """A gate that was tried as a static one, beside those kept static before it.

    Args:
        block: name of its block.
        effect: squeezed into one number, what freezing it alone does to the output, see
            :meth:`cmpe_se.static_gates.Calibration.effects`.
        top1: accuracy with it and those before it static, percent.
        static: whether it stays static.
    """

    block: str
    effect: float
    top1: float
    static: bool


def choose_within(
    calibration: Calibration, accuracy: Callable[[nn.Module], float], budget: float, progress: Progress
) -> tuple[float, list[Trial]]:
    """Try gates one by one, the one with the least effect first, and keep those static that stay within the budget.

    Args:
        calibration: of the network.
        accuracy: of a network, in percent, on images that calibrated nothing.
        budget: points of accuracy that all static gates together may cost.
        progress: shows how far it is.

    Returns:
        The accuracy with no gate static, and what was tried, in that order.
    """
    effects = calibration.effects(progress)
    before = accuracy(calibration.model)
    trials: list[Trial] = []
    kept: list[str] = []
    for block in progress(sorted(effects, key=lambda name: effects[name]), "trying the gates one by one"):
        with calibration.freezing([*kept, block]) as network:
            top1 = accuracy(network)
        fits = before - top1 <= budget
        kept += [block] * fits
        trials.append(Trial(block, effects[block], top1, fits))
    return before, trials
