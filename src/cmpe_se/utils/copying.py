"""Deep copies of networks, which some layers do not allow."""

import copy
from itertools import chain
from typing import Any

from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.utils.text import in_one_line


def copy_network(model: nn.Module, instead: str, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a network.

    Args:
        model: the network.
        instead: what a user can do where there is no copy, as the end of a sentence.
        memo: what stands for an object in the copy, by the object's id, as :func:`copy.deepcopy` takes it.

    Raises:
        UserError: a layer that cannot be copied, such as one that keeps a result of the last forward pass.
    """
    given = dict(memo or {})
    try:
        return copy.deepcopy(model, dict(given))
    except Exception as error:  # whatever a layer keeps: results with gradients, locks, open files
        reason = in_one_line(error).split(". ")[0].rstrip(".")
        raise UserError(f"{_without_copy(model, given)} cannot be copied: {reason}; {instead}") from None


def _without_copy(model: nn.Module, given: dict[int, Any]) -> str:
    """The first of the innermost modules that cannot be copied."""
    tensors = chain(model.parameters(), model.buffers())
    kept = given | {id(tensor): tensor for tensor in tensors if tensor.is_leaf}  # not copied again for each module

    def copies(module: nn.Module) -> bool:
        try:
            copy.deepcopy(module, dict(kept))
        except Exception:
            return False
        return True

    names, module = [], model
    while inner := next((pair for pair in module.named_children() if not copies(pair[1])), None):
        names.append(inner[0])
        module = inner[1]
    return f"layer {'.'.join(names)} ({type(module).__name__})" if names else f"the network ({type(module).__name__})"
