"""The paired differences of a comparison, and their verdicts."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

from cmpe_se.commands.compare.outcomes import Outcome
from cmpe_se.commands.compare.power import LEVEL, detectable_effect
from cmpe_se.commands.compare.statistics import Difference, compare_paired, equivalence_p, holm
from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_points


class Question(NamedTuple):
    """Settings of the tests of a comparison.

    ``margin`` is the largest difference in points that counts as none. ``primary`` are the labels (A, B) of the one
    comparison that counts, A against B, if there is one.
    """

    margin: float = 0.2
    primary: tuple[str, str] | None = None

    def is_primary(self, label: str, reference: str) -> bool:
        """Whether the two networks are the primary comparison, in either order."""
        return self.primary is not None and set(self.primary) == {label, reference}


USUAL = Question()
"""No primary comparison, and 0.2 points."""


class Comparison(NamedTuple):
    """A network against another one.

    ``p`` and ``same`` are adjusted: by Holm over the secondary comparisons with one reference, each of the two tests by
    itself, and not at all in the primary comparison. ``p`` is of the paired t-test, ``same`` of the equivalence test
    whose own p is ``same_alone``; ``detectable`` is the effect in points that these seeds show with 80 % power at an
    unadjusted 5 %. NaN where there is no test. ``primary`` says whether it is the comparison that counts.
    """

    difference: Difference
    p: float
    same: float
    same_alone: float
    detectable: float
    margin: float
    primary: bool

    @property
    def verdict(self) -> str:
        """The verdict in words: better or worse, the same, or no difference shown."""
        same = self.same < LEVEL
        if self.p < LEVEL:
            word = "better" if self.difference.mean > 0 else "worse"
            return f"{word}, by less than {in_points(self.margin)}" if same else word
        return f"the same within {in_points(self.margin)}" if same else "no difference shown"


def paired_differences(
    outcomes: Sequence[Outcome], reference: Outcome, question: Question = USUAL
) -> dict[str, Comparison]:
    """Each other network against the reference over the seeds they share, by label; the primary one among them."""
    found = {}
    for outcome in outcomes:
        shared = sorted(outcome.seeds.keys() & reference.seeds.keys())
        if outcome.label == reference.label or not shared:
            continue
        own, others = ([each.seeds[seed] for seed in shared] for each in (outcome, reference))
        difference, same = compare_paired(own, others), equivalence_p(own, others, question.margin)
        detectable = detectable_effect(difference.std, difference.count)
        primary = question.is_primary(outcome.label, reference.label)
        found[outcome.label] = Comparison(difference, difference.p, same, same, detectable, question.margin, primary)
    secondary = [label for label, each in found.items() if not each.primary]
    adjusted = zip(
        secondary,
        holm([found[label].p for label in secondary]),
        holm([found[label].same for label in secondary]),
        strict=True,
    )
    return found | {label: found[label]._replace(p=p, same=same) for label, p, same in adjusted}


def primary_comparison(outcomes: Sequence[Outcome], question: Question) -> Comparison | None:
    """The primary comparison, in its own order; None where no seed of both has finished, or none was named."""
    known = {outcome.label: outcome for outcome in outcomes}
    if question.primary is None or not known.keys() >= set(question.primary):
        return None
    own, other = (known[label] for label in question.primary)
    return paired_differences([own], other, question).get(own.label)


def ask(primary: str | None, margin: float, labels: Sequence[str]) -> Question:
    """The settings of the tests from the flags.

    Args:
        primary: A:B or A,B with two of the labels, which hold colons themselves; None for no primary comparison.
        margin: in points, above 0.
        labels: of the networks that are compared.

    Raises:
        UserError: a margin that is none, or a primary comparison that is not two of the labels.
    """
    if not 0 < margin < math.inf:
        raise UserError(f"margin is {margin:g}, should be a number of points above 0, such as 0.2")
    if primary is None:
        return Question(margin)
    pairs = [pair for pair in permutations(labels, 2) if primary in (":".join(pair), ",".join(pair))]
    if len(pairs) != 1:
        why = "can be read in two ways; write A,B" if pairs else "is not two networks of this comparison"
        raise UserError(f"primary '{primary}' {why}; it has {', '.join(labels)}")
    return Question(margin, pairs[0])
