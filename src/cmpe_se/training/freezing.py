"""A backbone that is frozen while the new parts of a network find their place."""

from itertools import chain

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from cmpe_se.errors import UserError
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
        trained = {id(module) for part in chain(heads, gates) for module in part.modules()}
        parts = [module for module in network.modules() if id(module) not in trained]
        self._parameters = [
            parameter for part in parts for parameter in part.parameters(recurse=False) if parameter.requires_grad
        ]
        self._norms = [part for part in parts if isinstance(part, _NormBase)]

    def freeze(self, frozen: bool) -> None:
        """Freeze it, or let it train; after the network's own ``train()``, which would wake the norms."""
        for parameter in self._parameters:
            parameter.requires_grad_(not frozen)
        if frozen:
            for norm in self._norms:
                norm.eval()
