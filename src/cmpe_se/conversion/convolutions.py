"""Convolutions of signals, images and volumes, transposed ones too, as layers and as functions."""

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

_FUNCTIONS = {
    getattr(place, f"conv{kind}{axes}d"): axes
    for axes in (1, 2, 3)
    for kind in ("", "_transpose")
    for place in (torch, functional)
}
"""Axes of the positions that each function convolves."""


def convolution_axes(block: nn.Module, step: fx.Node) -> list[int]:
    """Of each convolution that a step of a block's forward runs, the axes of its positions, in order."""
    if step.op == "call_function" and step.target in _FUNCTIONS:
        return [_FUNCTIONS[step.target]]
    layers = block.get_submodule(str(step.target)).modules() if step.op == "call_module" else ()
    return [axes for layer in layers if (axes := axes_of(layer))]


def count_convolutions(module: nn.Module) -> int:
    """Convolutions in a module."""
    return sum(axes_of(layer) is not None for layer in module.modules())


def axes_of(layer: nn.Module) -> int | None:
    """Axes of the positions that a layer convolves, one of PyTorch or with such a weight; None if it does not."""
    if isinstance(layer, nn.modules.conv._ConvNd):
        return len(layer.kernel_size)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim not in (3, 4, 5):
        return None
    # Other layers have weights with three or five axes (bilinear maps, experts); with four it is a convolution's.
    return weight.ndim - 2 if weight.ndim == 4 or hasattr(layer, "kernel_size") else None
