"""Batch norms folded into the convolutions before them: in eval mode a norm is one more linear map of each channel."""

from typing import TypeGuard, cast

import torch
from timm.layers import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.norm_act import FrozenBatchNorm2d as TimmFrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from cmpe_se.layers.gated_addition import Convolution
from cmpe_se.layers.hooks import will_always_do_so
from cmpe_se.merging.calls import Calls, passes_on

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
_FROZEN = (FrozenBatchNorm2d, TimmFrozenBatchNorm2d, FrozenBatchNormAct2d)
_WITH_ACTIVATION = (BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, *_FROZEN, *_WITH_ACTIVATION)


@torch.no_grad()
def fold_norms(model: nn.Module, calls: Calls) -> int:
    """Fold each batch norm that directly follows a convolution, and nothing else uses, into it; returns how many.

    The norm's place is taken by its activation (timm's norms have one), or by an identity. A pair stays as it is where
    one of both may do more than its parameters say, or is used elsewhere too.

    Args:
        model: network in eval mode, changed in place.
        calls: of its layers.
    """
    names = {id(module): name for name, module in model.named_modules()}
    folded = 0
    for conv, norm in calls.normed:
        if not (is_plain_convolution(conv) and _is_norm(norm) and calls.is_own(conv) and calls.is_own(norm)):
            continue
        if conv.out_channels != len(cast(Tensor, norm.running_mean)):  # without a batch, it reads another axis
            continue
        _fold(conv, norm)
        folded += 1
        parent, _, child = names[id(norm)].rpartition(".")
        rest = norm.get_submodule("act") if isinstance(norm, _WITH_ACTIVATION) else nn.Identity().eval()
        setattr(model.get_submodule(parent), child, rest)
    return folded


def is_plain_convolution(module: nn.Module) -> TypeGuard[Convolution]:
    """Whether a layer is a convolution, of any dimension, that uses its weight as it is."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame)) and will_always_do_so(module)


def is_plain_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a layer is a batch norm in eval mode and nothing else, not even with an activation behind it."""
    return _is_norm(module) and not isinstance(module, _WITH_ACTIVATION)


def _is_norm(module: nn.Module) -> TypeGuard[BatchNorm]:
    """Whether a layer is a batch norm that uses its running statistics. A frozen one has buffers of the same names."""
    if not isinstance(module, _NORMS) or not will_always_do_so(module):
        return False
    fixed = module.running_mean is not None and module.running_var is not None
    dropout = getattr(module, "drop", None)  # between a norm of timm's and its activation
    return fixed and (isinstance(module, _FROZEN) or not module.training) and (dropout is None or passes_on(dropout))


def _fold(conv: Convolution, norm: BatchNorm) -> None:
    """Computed in float64 and rounded once."""
    mean, variance = (cast(Tensor, values).double() for values in (norm.running_mean, norm.running_var))
    scale, shift, bias = (None if values is None else values.double() for values in (norm.weight, norm.bias, conv.bias))
    dtype = conv.weight.dtype
    fused = fuse_conv_bn_weights(conv.weight.double(), bias, mean, variance, norm.eps, scale, shift)
    conv.weight, conv.bias = (nn.Parameter(values.detach().to(dtype), requires_grad=False) for values in fused)
