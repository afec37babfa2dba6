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
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever a layer keeps: results with gradients, locks, open files
        layer, kind = _without_copy(model)
        reason = in_one_line(error).split(". ")[0].rstrip(".")
        raise UserError(f"{layer or 'the network'} ({kind}) cannot be copied: {reason}; {instead}") from None


def _without_copy(model: nn.Module) -> tuple[str, str]:
    """Name and class of the innermost module that cannot be copied."""
    tensors = chain(model.parameters(), model.buffers())
    kept = {id(tensor): tensor for tensor in tensors if tensor.is_leaf}  # not copied again for each module
    for name, module in reversed(list(model.named_modules())):
        try:
            copy.deepcopy(module, dict(kept))
        except Exception:
            return name, type(module).__name__
    return "", type(model).__name__
