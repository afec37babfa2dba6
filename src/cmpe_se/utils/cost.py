"""What a network costs: parameters and multiply-adds."""

import copy
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from cmpe_se.errors import UserError


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_multiply_adds(model: nn.Module, *input_sizes: tuple[int, ...]) -> int:
    """Multiply-adds of convolutions and matrix products for one image, counted on the meta device.

    Args:
        model: any network or layer; it is left untouched.
        input_sizes: (channels, height, width) of each of its inputs; (channels, length) of a signal, and (channels,
            depth, height, width) of a volume or clip.

    Raises:
        UserError: the network cannot take such images.
    """
    counted = copy.deepcopy(model).to("meta").eval()
    counter = _Counter()
    try:
        with counter, torch.no_grad():
            counted(*(torch.zeros(1, *size, device="meta") for size in input_sizes))
    except Exception as error:  # networks refuse sizes in many ways
        sizes = " and ".join(map(str, input_sizes))
        raise UserError(
            f"{type(model).__name__} cannot take images of {sizes}: {error}; give another image size or network"
        ) from None
    return counter.flops // 2


class _Counter(TorchDispatchMode):
    """PyTorch's numbers of operations, added up.

    Its own ``FlopCounterMode`` puts hooks on all modules, and a network whose layers have hooks runs each of them where
    it would go shorter ways without: that is not what the network costs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if (formula := flop_registry.get(function._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=result)
        return result
