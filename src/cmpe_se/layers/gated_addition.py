"""The gated addition ``identity + gate * residual``, and gradients of it that spare time and memory.

Plain PyTorch would be right everywhere. These functions are for eager training: the large tensors are what a training
step spends its time and memory on, so each backward pass here makes and keeps as few of them as the arithmetic allows.
Under ``torch.compile``, which fuses the plain form itself, and without gradients, the plain form is what runs.

Feature maps are (N, C, ...): signals (N, C, L), images (N, C, H, W), volumes and clips (N, C, D, H, W). What follows
the channels are positions, however many axes they have.
"""

import math
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.functional import avg_pool2d, conv1d, conv2d, conv3d

from cmpe_se.layers.hooks import is_recorded, says_what_it_does
from cmpe_se.layers.precision import autocasts

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Of signals, images, and volumes or clips."""
_CONVOLVE = {3: conv1d, 4: conv2d, 5: conv3d}
"""By the number of axes of what is convolved."""


def add_gated(identity: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
    """``identity + gate * residual`` in one pass: (N, C, ...), (N, C), (N, C, ...) to (N, C, ...)."""
    if gate.dtype != residual.dtype:
        gate = gate.to(residual.dtype)
    gate = _at_positions(gate, residual)
    if _plain_is_best() or identity.dtype != residual.dtype:
        return torch.addcmul(identity, gate, residual)
    return _AddGated.apply(identity, gate, residual)


def add_gated_pointwise(identity: Tensor, gate: Tensor, conv: Convolution, x: Tensor) -> Tensor:
    """``identity + gate * conv(x)`` for a pointwise convolution of stride 1; in training ``conv(x)`` is not kept.

    Args:
        identity: (N, C, ...).
        gate: (N, C).
        conv: see :func:`cmpe_se.layers.attention.is_pointwise`.
        x: the convolution's input, (N, C_in, ...).
    """
    if _plain_is_best():
        return add_gated(identity, gate, conv(x))
    simple = identity.dtype == x.dtype == conv.weight.dtype and conv.bias is None
    if not says_what_it_does(conv) or not simple or autocasts(x.device.type):
        return add_gated(identity, gate, conv(x))
    return _AddGatedPointwise.apply(identity, gate.to(x.dtype), conv.weight, x)


def with_squeeze(residual: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor (N, C, ...) and its squeeze (N, C), whose gradient is added to the tensor's own in place."""
    if _plain_is_best() or residual.dtype not in (torch.float32, torch.float64):
        return residual, squeeze(residual)
    return _WithSqueeze.apply(residual)


def squeeze(x: Tensor) -> Tensor:
    """Global average of each channel, (N, C, ...) to (N, C), in float32 or the input's wider dtype."""
    return _squeeze(x)


@fx.wrap  # one operation to torch.fx, since what it does depends on the dtype
def _squeeze(x: Tensor) -> Tensor:
    if x.dtype == torch.float32:
        return x.mean(_positions(x))
    if _rows_first(x):
        rows = avg_pool2d(x, (1, x.shape[3]))  # (N, C, H, 1), summed in float32 and rounded as x's own numbers are
        return rows.mean(dim=(2, 3), dtype=torch.float32)
    return x.mean(dim=_positions(x), dtype=torch.promote_types(x.dtype, torch.float32))


def _rows_first(x: Tensor) -> bool:
    """Where a mean in float32 would first copy all of x to float32: it costs five times as much as pooling."""
    if x.ndim != 4 or torch.is_grad_enabled() or is_recorded():
        return False
    wide = x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[1] >= 64
    return wide and x.is_contiguous(memory_format=torch.channels_last)


def _positions(x: Tensor) -> tuple[int, ...]:
    """Axes of the positions."""
    return tuple(range(2, x.ndim))


def _at_positions(gate: Tensor, x: Tensor) -> Tensor:
    """A number for each channel, (N, C), as one that broadcasts with x, (N, C, 1, ...)."""
    axes = x.ndim - 2
    if is_recorded():  # an index stays one operation, which asks for no sizes, in whatever format
        return gate[(..., *[None] * axes)]
    return gate.reshape(gate.shape + (1,) * axes)  # started in half the time


def _convolved(x: Tensor, weight: Tensor) -> Tensor:
    return _CONVOLVE[x.ndim](x, weight)


def _plain_is_best() -> bool:
    """Without gradients all forms are one; the compiler fuses the plain one, and a tracer can save nothing else."""
    return is_recorded() or not torch.is_grad_enabled()


class _AddGated(torch.autograd.Function):
    """``addcmul`` whose backward pass makes one large tensor instead of two.

    Fresh memory is what the plain form's gradient spends its time on, on a CPU: the gate's gradient goes through a
    product as large as the residual, and here the residual's own gradient overwrites it.
    """

    generate_vmap_rule = True  # with setup_context and jvp, all that torch.func and forward mode ask for

    @staticmethod
    def forward(identity: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        return torch.addcmul(identity, gate, residual)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, identity: Tensor, gate: Tensor, residual: Tensor) -> Tensor:
        saved_gate, saved_residual = ctx.saved_tensors
        return identity + gate * saved_residual + saved_gate * residual

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, residual = ctx.saved_tensors
        product = gradient * residual  # (N, C, ...)
        gate_gradient = product.sum(dim=_positions(product), keepdim=True)  # (N, C, 1, ...)
        if torch.is_grad_enabled():  # the gradient may be differentiated: keep it differentiable
            return gradient, gate_gradient, gradient * gate
        return gradient, gate_gradient, torch.mul(gradient, gate, out=product)


class _AddGatedPointwise(torch.autograd.Function):
    """``identity + gate * (W x)``, whose backward pass needs neither W x nor any product as large.

    With G the output's gradient, one sample's G x^T, (C, C_in), holds all that is asked for: its rows' products with
    those of W are the gate's gradient, and its sum over samples, gated, is that of W. A gate on the output of a
    pointwise convolution is a gate on the rows of its weight, so x's gradient is (gate W)^T G.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(identity: Tensor, gate: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(identity, _at_positions(gate, x), _convolved(x, weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def jvp(ctx: Any, identity: Tensor, gate: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        saved_gate, saved_weight, saved_x = ctx.saved_tensors
        residual = _at_positions(gate, x) * _convolved(saved_x, saved_weight)
        branch = _convolved(saved_x, weight) + _convolved(x, saved_weight)
        return identity + residual + _at_positions(saved_gate, x) * branch

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        gate, weight, x = ctx.saved_tensors
        matrix, gated = weight.flatten(1), gate[:, :, None] * weight.flatten(1)  # (C, C_in) and (N, C, C_in)
        if gradient.movedim(1, -1).is_contiguous():  # channels last
            pixels = gradient.movedim(1, -1).flatten(1, -2)  # (N, P, C) for P positions, the memory as it is
            outer = torch.bmm(pixels.transpose(1, 2), x.movedim(1, -1).flatten(1, -2))  # (N, C, C_in)
            input_gradient = torch.bmm(pixels, gated).unflatten(1, x.shape[2:]).movedim(-1, 1)
        else:
            pixels = gradient.flatten(2)  # (N, C, P)
            outer = torch.bmm(pixels, x.flatten(2).transpose(1, 2))
            input_gradient = torch.bmm(gated.transpose(1, 2), pixels).view(x.shape)
        gate_gradient = (outer * matrix).sum(2)
        weight_gradient = (outer * gate[:, :, None]).sum(0).view_as(weight)
        return gradient, gate_gradient, weight_gradient, input_gradient


class _WithSqueeze(torch.autograd.Function):
    """A tensor and its mean: the mean's gradient, the same for every pixel, joins the tensor's own without a copy."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), squeeze(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.pixels = math.prod(inputs[0].shape[2:])

    @staticmethod
    def jvp(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.view_as(x), squeeze(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor, squeeze_gradient: Tensor) -> Tensor:
        each = _at_positions(squeeze_gradient / ctx.pixels, gradient)
        if torch.is_grad_enabled() or 0 in gradient.stride():  # to be differentiated, or one number for all pixels
            return gradient + each
        return gradient.add_(each)
