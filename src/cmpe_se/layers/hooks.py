"""Hooks on layers, layers whose output is what their parameters say, and tools that record what layers do."""

from functools import partial
from types import FunctionType
from typing import Any, NoReturn, TypeGuard, TypeVar

import torch
from timm.layers import Conv2dSame, DropPath, LayerScale2d
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct
from timm.layers.norm_act import FrozenBatchNorm2d as TimmFrozenBatchNorm2d
from torch import fx, nn
from torch.nn.modules import module as module_hooks
from torchvision.ops import StochasticDepth
from torchvision.ops.misc import FrozenBatchNorm2d

from cmpe_se.errors import UserError

_HARMLESS = {"reset_parameters", "extra_repr"}  # methods that have no part in what a layer computes

_known: dict[type[nn.Module], tuple[tuple[str, FunctionType], ...]] = {}
"""Classes whose parameters say what they compute, each with its methods as they were written."""

Class = TypeVar("Class", bound=type[nn.Module])


def known_layer(layer_class: Class) -> Class:
    """Let :func:`says_what_it_does` know a class; its methods count as they are now. Also a decorator."""
    methods: dict[str, FunctionType] = {}
    for ancestor in layer_class.__mro__[layer_class.__mro__.index(nn.Module) :: -1]:
        if ancestor is not nn.Module:
            own = {name: value for name, value in vars(ancestor).items() if isinstance(value, FunctionType)}
            methods |= {name: value for name, value in own.items() if name not in _HARMLESS and name[:2] != "__"}
    library = layer_class.__module__.partition(".")[0]
    if all(method.__globals__["__name__"].partition(".")[0] in (library, "torch") for method in methods.values()):
        _known[layer_class] = tuple(methods.items())  # else somebody has replaced a method already
    return layer_class


for _class in (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv2dSame, nn.Linear),
    *(nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, DropPath, StochasticDepth),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, FrozenBatchNorm2d, TimmFrozenBatchNorm2d),
    *(BatchNormAct2d, FrozenBatchNormAct2d, SyncBatchNormAct, LayerScale2d),
):
    known_layer(_class)


def says_what_it_does(layer: nn.Module) -> bool:
    """Whether a layer's output is what its class and its parameters say, so that another form may stand for it.

    That is a layer of a class in the table above, not of a subclass (which a parametrisation makes it); none of whose
    methods has been replaced, on the layer or on the class; without hooks, as weight norm and pruning have them.
    """
    return is_unaltered(layer) and not is_watched(layer)


def will_always_do_so(layer: nn.Module) -> bool:
    """Whether a layer says what it does, and its weights are its own parameters: none that something else computes."""
    return says_what_it_does(layer) and vars(layer).keys().isdisjoint(("weight", "bias", "gamma"))


def is_unaltered(module: nn.Module) -> bool:
    """Whether a module runs the code of a known class; hooks may watch it."""
    kind, own = type(module), module.__dict__
    if kind not in _known or "_call_impl" in own:
        return False
    return not any(name in own or getattr(kind, name) is not method for name, method in _known[kind])


def is_watched(module: nn.Module) -> bool:
    """Whether a layer has hooks, or a parametrisation of its weights, which a shortcut around it would miss."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or module_hooks._has_any_global_hook() or "parametrizations" in module._modules


class GateModule(nn.Module):
    """What gates, merged or not, are to PyTorch's tools.

    - To torch.fx and its users a gate is one layer, whichever tracer it is: what a gate does depends on shapes and
      dtypes, and what quantises a traced network is to leave it in float32.
    - A full backward hook makes the output of a module a view, which PyTorch allows nothing to write over. What reads a
      gate in a converted network is often a ReLU that does, so such an output is copied.
    - ``torch.jit.script`` gets a sentence.
    """

    def __call__(self, *inputs: Any, **keywords: Any) -> Any:
        """What the module puts out."""
        for value in inputs:
            if is_symbolic(value) and isinstance(value.tracer, fx.Tracer):
                return value.tracer.call_module(self, partial(_as_one_layer, self, value.tracer), inputs, keywords)
        output = super().__call__(*inputs, **keywords)
        hooked = self._backward_hooks or self._backward_pre_hooks or module_hooks._global_backward_hooks
        return output.clone() if hooked or module_hooks._global_backward_pre_hooks else output

    def __prepare_scriptable__(self) -> nn.Module:
        """What ``torch.jit.script`` asks each module for."""
        raise_not_scriptable(self)


def _as_one_layer(module: nn.Module, tracer: fx.Tracer, *inputs: Any, **keywords: Any) -> fx.Proxy:
    return tracer.create_proxy("call_module", tracer.path_of_module(module), inputs, keywords)


def raise_not_scriptable(module: nn.Module) -> NoReturn:
    """Say in one sentence what TorchScript can do with gates."""
    raise UserError(
        f"torch.jit.script cannot compile {type(module).__name__}, whose forward is Python that TorchScript does not "
        "know; torch.jit.trace, torch.export and torch.compile take the network as it is"
    )


def is_symbolic(value: object) -> TypeGuard[fx.Proxy]:
    """Whether a value is torch.fx's stand-in for a tensor, of which neither shape nor dtype is known."""
    return isinstance(value, fx.Proxy)


def is_recorded() -> bool:
    """Whether torch.compile, torch.export or a tracer is writing down the operations, and should see the plain ones."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
