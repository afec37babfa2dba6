"""A backbone that is frozen while the new parts of a network find their place."""

from itertools import chain

from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.finetuning.freezing import freeze_all_but, unfreeze
from cmpe_se.layers.attention import CompetitiveSE


class Backbone:
    """All of a network but its classifier and its gates.

    Args:
        network: network of timm or of this package, which says what its classifier is.
        name: of it, for messages.

    Raises:
        UserError: a network without a classifier that has parameters.
    """

    def __init__(self, network: nn.Module, name: str):
        classifier = network.get_classifier() if hasattr(network, "get_classifier") else ()  # type: ignore[operator]
        heads = classifier if isinstance(classifier, list | tuple) else (classifier,)
        if not any(True for head in heads for _ in head.parameters()):
            raise UserError(f"freeze_epochs trains the classifier first, and {name} has none; give --freeze-epochs 0")
        gates = (module for module in network.modules() if isinstance(module, CompetitiveSE))
        self._network, self._trained = network, list(chain(heads, gates))

    def freeze(self, frozen: bool) -> None:
        """Freeze it, or let it train."""
        if frozen:
            freeze_all_but(self._network, self._trained)
        else:
            unfreeze(self._network)
