"""The mean of the picture's normalised maps, in training, without a convolution or a norm.

A gate convolves its picture to m maps, normalises each over the batch, and averages them. A map is w . p at each patch
p of the picture, so with the patches gathered once, all maps are one small matrix product, and the rest is::

    variance = mean of (w . (p - mean(p)))^2                              # (m,), over the batch
    mean of the maps = mean of gamma / sqrt(variance + eps) w . (p - mean(p)), plus mean(beta)

That is exact, and several times faster with many maps: what a convolution's backward pass does with one input channel
is what it spends its time on. Nothing but the picture is kept for the backward pass.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from cmpe_se.layers.hooks import is_recorded, says_what_it_does


def averaged_maps(conv: nn.Conv2d, norm: nn.BatchNorm2d, picture: Tensor) -> Tensor:
    """``norm(conv(picture)).mean(1).flatten(1)`` in training mode, the norm's running statistics updated.

    Args:
        conv: one channel to m maps, no padding, no bias.
        norm: over the maps; see :func:`can_average`.
        picture: (N, 1, height, width).

    Returns:
        (N, pixels), the pixels of the convolved picture in rows.
    """
    kernel, (height, width) = conv.kernel_size, picture.shape[2:]
    taps, readers = _tap_indices(height, width, *kernel, picture.device)
    pixels = picture.flatten(1).t().contiguous()  # (height width, N), whose rows are gathered whole
    kernels = conv.weight.flatten(1)  # (m, k)
    averaged, patch_mean, variance = _AveragedMaps.apply(
        pixels, kernels, norm.weight, norm.bias, norm.eps, taps, readers
    )
    if norm.track_running_stats:
        _update_statistics(norm, kernels @ patch_mean, variance, averaged.numel())
    return averaged.t()


def can_average(conv: nn.Conv2d, norm: nn.Module, picture: Tensor) -> bool:
    """Whether :func:`averaged_maps` may stand for the two layers: both are what their parameters say."""
    if is_recorded():
        return False
    if type(picture) is not Tensor or torch.is_inference_mode_enabled() or picture.dtype.itemsize < 4:
        return False  # indices made now could not be kept for a later step; and halves have too few digits
    usual = type(norm) is nn.BatchNorm2d and norm.affine and norm.training and torch.is_grad_enabled()
    several = usual and len(picture) > 1  # of a single value per map there is no variance, and the norm says so
    return several and says_what_it_does(conv) and says_what_it_does(norm)


@torch.no_grad()
def _update_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    if norm.num_batches_tracked is None or norm.running_mean is None or norm.running_var is None:
        return
    norm.num_batches_tracked.add_(1)
    momentum = 1 / norm.num_batches_tracked.item() if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    norm.running_var.lerp_((variance * (count / (count - 1))).to(norm.running_var.dtype), momentum)


@lru_cache(maxsize=64)
def _tap_indices(height: int, width: int, rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which pixel each tap meets at each position, (k positions,); and where each pixel was met, (pixels, k).

    A pixel that a tap never meets has the index k positions there, one beyond the last.
    """
    pixels = torch.arange(height * width, device="cpu").view(height, width)
    windows = pixels.unfold(0, rows, 1).unfold(1, columns, 1)  # (h', w', rows, columns)
    taps = windows.permute(2, 3, 0, 1).reshape(rows * columns, -1)  # (k, positions)
    readers = torch.full((height * width, rows * columns), taps.numel(), device="cpu")
    places = torch.arange(taps.numel(), device="cpu").view_as(taps)
    readers[taps, torch.arange(len(taps), device="cpu")[:, None]] = places
    return taps.flatten().to(device), readers.flatten().to(device)


Outputs = tuple[Tensor, Tensor, Tensor]


def _forward(pixels: Tensor, kernels: Tensor, weight: Tensor, bias: Tensor, eps: float, taps: Tensor) -> Outputs:
    """Averaged maps (positions, N), mean of the patches (k,), and variance of each map (m,)."""
    patches = pixels.index_select(0, taps).view(kernels.shape[1], -1)  # (k, M), M = positions N
    mean = patches.mean(1)
    maps = kernels @ (patches - mean[:, None])  # (m, M), each of mean 0
    variance = maps.square().mean(1)  # from the maps: from the patches' covariance it could cancel
    scale = weight / (variance + eps).sqrt()
    averaged = (scale @ maps / len(kernels) + bias.mean()).view(-1, pixels.shape[1])
    return averaged, mean, variance


class _AveragedMaps(torch.autograd.Function):
    """:func:`_forward` with a backward pass of two small matrix products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        pixels: Tensor, kernels: Tensor, weight: Tensor, bias: Tensor, eps: float, taps: Tensor, readers: Tensor
    ) -> Outputs:
        return _forward(pixels, kernels, weight, bias, eps, taps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Outputs) -> None:
        pixels, kernels, weight, bias, ctx.eps, taps, readers = inputs
        _, mean, variance = output
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)  # of those two
        ctx.save_for_backward(pixels, kernels, weight, bias, mean, variance, taps, readers)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, *_: object) -> tuple[Tensor | None, ...]:
        if gradient is None:
            return (None,) * 7
        pixels, kernels, weight, bias, mean, variance, taps, readers = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again: let autograd do it
            inputs = (pixels, kernels, weight, bias)
            wanted = [value for value, needed in zip(inputs, ctx.needs_input_grad, strict=False) if needed]
            averaged = _forward(*inputs, ctx.eps, taps)[0]
            found = iter(torch.autograd.grad(averaged, wanted, gradient, create_graph=True))
            return tuple(next(found) if needed else None for needed in ctx.needs_input_grad)

        # Gathered again: kept, the patches of 18 blocks would be 2 % of a network's memory.
        centred = pixels.index_select(0, taps).view(kernels.shape[1], -1) - mean[:, None]
        maps, number, count = kernels @ centred, len(kernels), centred.shape[1]
        reciprocal = (variance + ctx.eps).rsqrt()  # (m,)
        scale = weight * reciprocal
        gradient = gradient.reshape(-1)  # (M,)
        of_scale = maps @ gradient / number  # (m,)
        of_variance = -0.5 * of_scale * scale * reciprocal.square()
        of_kernels = torch.outer(scale, centred @ gradient) / number
        of_kernels = of_kernels + 2 / count * of_variance[:, None] * (maps @ centred.t())
        total = gradient.sum()

        kernel = scale @ kernels / number
        through_variance = 2 / count * (kernels * of_variance[:, None]).t()  # (k, m)
        patches = torch.cat((through_variance, kernel[:, None]), 1) @ torch.cat(
            (maps, (gradient - total / count)[None])
        )  # (k, M)
        patches = patches.view(-1, pixels.shape[1])  # (k positions, N)
        patches = torch.cat((patches, patches.new_zeros(1, pixels.shape[1])))  # for what no tap meets
        of_pixels = patches.index_select(0, readers).view(len(pixels), -1, pixels.shape[1]).sum(1)
        return of_pixels, of_kernels, of_scale * reciprocal, (total / number).expand(number), None, None, None
