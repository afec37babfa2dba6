"""What a network costs: parameters and multiply-adds."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(model: nn.Module) -> int:
    """Trainable parameters."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def count_multiply_adds(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-adds of convolutions and matrix products for one image, counted on the meta device.

    Args:
        model: any network; it is left untouched.
        input_size: (channels, height, width).
    """
    counted = copy.deepcopy(model).to("meta").eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        counted(torch.zeros(1, *input_size, device="meta"))
    return counter.get_total_flops() // 2
