"""Attributions of a class in an image: captum's integrated gradients, and Grad-CAM at the outputs of blocks."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool1d, adaptive_avg_pool2d, adaptive_avg_pool3d

from cmpe_se.networks.blocks import PreActBlock

_STEPS, _BATCH = 32, 64  # of the integral, and images that go through the network at a time
_FINEST = 56  # side of the map on the input: single pixels of large images are speckle
_POOL: dict[int, Callable[..., Tensor]] = {
    1: adaptive_avg_pool1d,
    2: adaptive_avg_pool2d,
    3: adaptive_avg_pool3d,
}  # by the axes of the positions


@dataclass(frozen=True, eq=False)
class Attribution:
    """Maps of one image and class; positive is evidence for the class, negative against it.

    Those of a signal have one axis, (l,), those of a volume or clip three, (d, h, w).

    Args:
        target: index of the class.
        pixels: integrated gradients on the input from an image of the mean colour, summed over colours, (h, w).
        blocks: block to its Grad-CAM, (h, w) at the block's own resolution.
    """

    target: int
    pixels: Tensor
    blocks: dict[str, Tensor]


def attribute(model: nn.Module, images: Tensor, targets: Sequence[int], blocks: Sequence[str]) -> list[Attribution]:
    """Attributions of images (N, C, H, W), signals or volumes, each to one target class, on the CPU.

    Args:
        model: network in eval mode.
        images: normalised, on the network's device.
        targets: a class for each image.
        blocks: names of blocks.
    """
    pixels = integrated_gradients(model, images, targets)
    cams = {name: grad_cam(model, images, targets, name) for name in blocks}
    return [
        Attribution(target, pixels[index], {name: cam[index] for name, cam in cams.items()})
        for index, target in enumerate(targets)
    ]


def integrated_gradients(model: nn.Module, images: Tensor, targets: Sequence[int]) -> Tensor:
    """``Attribution.pixels`` of images (N, C, ...), (N, ...)."""
    from captum.attr import IntegratedGradients

    wanted = torch.tensor(list(targets), device=images.device)
    with torch.enable_grad():
        maps = IntegratedGradients(model).attribute(
            images, target=wanted, n_steps=_STEPS, internal_batch_size=max(_BATCH, len(images))
        )
    return _coarser(maps.detach().float().cpu().sum(1))


def grad_cam(model: nn.Module, images: Tensor, targets: Sequence[int], block: str) -> Tensor:
    """What ``Attribution.blocks`` has of one block, for images (N, C, ...), (N, ...)."""
    from captum.attr import LayerGradCam

    wanted = torch.tensor(list(targets), device=images.device)
    with torch.enable_grad(), _probed(model, block) as probe:
        cam = LayerGradCam(model, probe).attribute(images.detach().requires_grad_(), target=wanted)
    return cam[:, 0].detach().float().cpu()


def _coarser(maps: Tensor) -> Tensor:
    """Sums over cells, so that no side is longer than the finest: (N, H, W) to (N, h, w), other maps likewise."""
    sizes = [min(side, _FINEST) for side in maps.shape[1:]]
    cells = math.prod(maps.shape[1:]) / math.prod(sizes)
    pool: Any = _POOL[len(sizes)]
    return pool(maps, sizes) * cells


class _Probe(nn.Module):
    """Where captum can take hold of a tensor that no layer of its own puts out."""

    def forward(self, x: Tensor) -> Tensor:
        return x.clone()  # whatever is done to it in place later, captum keeps what it was


@contextmanager
def _probed(model: nn.Module, name: str) -> Iterator[_Probe]:
    """A layer that what a block puts out goes through, for as long as the context lasts."""
    probe, block = _Probe(), model.get_submodule(name)

    def through(_: nn.Module, __: object, output: Any) -> Any:
        if isinstance(block, PreActBlock):
            # Without the squeeze that came with it, the next block takes it from the probed tensor, which so gets
            # the gradient of the gates too.
            return probe(output[0]), None
        return (probe(output[0]), *output[1:]) if isinstance(output, tuple) else probe(output)

    handle = block.register_forward_hook(through)
    try:
        yield probe
    finally:
        handle.remove()
