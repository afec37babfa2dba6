"""Batch norms folded into the convolutions before them: in eval mode a norm is one more linear map of each channel."""

from collections import Counter
from typing import cast

import torch
from timm.layers import Conv2dSame
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.norm_act import FrozenBatchNorm2d as TimmFrozenBatchNorm2d
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops.misc import FrozenBatchNorm2d

from cmpe_se.layers.hooks import is_watched

_CONVOLUTIONS = (nn.Conv2d.forward, Conv2dSame.forward)  # those that use their weight as it is
_WITH_ACTIVATION = (BatchNormAct2d.forward, FrozenBatchNormAct2d.forward, SyncBatchNormAct.forward)
_NORMS = (  # by their forward: a subclass may do more
    nn.BatchNorm2d.forward,
    nn.SyncBatchNorm.forward,
    FrozenBatchNorm2d.forward,
    TimmFrozenBatchNorm2d.forward,
    *_WITH_ACTIVATION,
)


class _FlatTracer(fx.Tracer):
    """Traces one module with its children as leaves, but looks into sequences."""

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return type(module).forward is not nn.Sequential.forward or is_watched(module)


def trace_eval(module: nn.Module) -> fx.Graph | None:
    """The module's forward in eval mode, its children as leaves; None where torch.fx cannot trace it."""
    try:
        return _FlatTracer().trace(module)
    except Exception:  # whatever a forward does with a proxy
        return None


@torch.no_grad()
def fold_norms(model: nn.Module) -> int:
    """Fold each batch norm that directly follows a convolution, and nothing else uses, into it; returns how many.

    The norm's place is taken by its activation (timm's norms have one), or by an identity.
    """
    pairs = {}  # name of the norm to name of the convolution
    shared = set()  # names of convolutions whose output has another reader somewhere
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for conv, norm in _pairs(module):
            if norm is None:
                shared.add(prefix + conv)
            elif _foldable(module.get_submodule(conv), module.get_submodule(norm)):
                pairs[prefix + norm] = prefix + conv
    pairs = {norm: conv for norm, conv in pairs.items() if conv not in shared}
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    folded = 0
    for norm_name, conv_name in pairs.items():
        layer, before = model.get_submodule(norm_name), model.get_submodule(conv_name)
        if names[id(layer)] == names[id(before)] == 1:
            _fold(cast(nn.Conv2d, before), cast(nn.BatchNorm2d, layer))
            parent, _, child = norm_name.rpartition(".")
            rest = layer.get_submodule("act") if type(layer).forward in _WITH_ACTIVATION else nn.Identity()
            setattr(model.get_submodule(parent), child, rest)
            folded += 1
    return folded


def _pairs(module: nn.Module) -> list[tuple[str, str | None]]:
    """Layers of a module's own forward, each with the layer that alone reads its output, or None."""
    if (known := getattr(module, "normed_convolutions", None)) is not None:
        return list(known)
    if not any(True for _ in module.children()) or (graph := trace_eval(module)) is None:
        return []
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    pairs: list[tuple[str, str | None]] = []
    for node in graph.nodes:
        if node.op != "call_module":
            continue
        if len(node.users) != 1:
            pairs.append((node.target, None))
            continue
        reader = next(iter(node.users))
        if reader.op == "output":  # what a sequence returns, its parent may read in any way; the parent's trace tells
            continue
        alone = reader.op == "call_module" and reader.args == (node,)
        once = alone and calls[node.target] == calls[reader.target] == 1
        pairs.append((node.target, reader.target if once else None))
    return pairs


def is_plain_convolution(module: nn.Module) -> bool:
    """Whether a layer is a 2-D convolution that uses its weight as it is."""
    return isinstance(module, nn.Conv2d) and type(module).forward in _CONVOLUTIONS


def is_plain_norm(module: nn.Module) -> bool:
    """Whether a layer is a batch norm and nothing else, not even with an activation behind it."""
    return type(module).forward in _NORMS and type(module).forward not in _WITH_ACTIVATION


def _foldable(conv: nn.Module, norm: nn.Module) -> bool:
    if not is_plain_convolution(conv) or type(norm).forward not in _NORMS:
        return False
    return norm.running_mean is not None and not is_watched(conv) and not is_watched(norm)


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Computed in float64 and rounded once. A frozen norm has buffers for parameters, of the same names."""
    mean, variance = (cast(Tensor, values).double() for values in (norm.running_mean, norm.running_var))
    scale, shift, bias = (None if values is None else values.double() for values in (norm.weight, norm.bias, conv.bias))
    dtype = conv.weight.dtype
    fused = fuse_conv_bn_weights(conv.weight.double(), bias, mean, variance, norm.eps, scale, shift)
    conv.weight, conv.bias = (nn.Parameter(values.detach().to(dtype), requires_grad=False) for values in fused)
