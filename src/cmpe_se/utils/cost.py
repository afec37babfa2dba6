"""What a network costs: parameters and multiply-adds."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cmpe_se.errors import UserError


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_multiply_adds(model: nn.Module, *input_sizes: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and matrix products for one image, counted on the meta device.

    Args:
        model: any network or layer; it is left untouched.
        input_sizes: (channels, height, width) of each of its inputs.

    Raises:
        UserError: the network cannot take such images.
    """
    counted = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            counted(*(torch.zeros(1, *size, device="meta") for size in input_sizes))
    except Exception as error:  # networks refuse sizes in many ways
        sizes = " and ".join(map(str, input_sizes))
        raise UserError(
            f"{type(model).__name__} cannot take images of {sizes}: {error}; give another image size or network"
        ) from None
    return counter.get_total_flops() // 2
