"""Stand-ins of networks on the meta device, where a forward costs nothing and leaves nothing behind."""

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NOT_COPIED = (*_HOOKS, "_modules", "_parameters", "_buffers", "forward")  # a forward may hold the module itself


class StandIns:
    """Stand-ins of a network's modules: of the same classes and names, without numbers and hooks.

    A deep copy would need every layer to allow one, and would copy what its hooks hold. What a module keeps besides
    parameters and buffers is copied, so that a forward which keeps values changes nothing of the network.

    Args:
        model: the network; it is left untouched.
    """

    def __init__(self, model: nn.Module):
        originals = list(model.modules())
        scripted = [module for module in originals if isinstance(module, torch.jit.ScriptModule)]
        own = [module for module in originals if _uncompiled(module) is module and module not in scripted]
        self._made = {id(module): _scripted(module) for module in scripted}
        self._made |= {id(module): object.__new__(type(module)) for module in own}
        self._memo: dict[int, Any] = {id(module): self.of(module) for module in originals}
        for module in own:
            tensors = [*module._parameters.values(), *module._buffers.values()]
            self._memo |= {id(tensor): _on_meta(tensor) for tensor in tensors if tensor is not None}
        for module in own:
            vars(self.of(module)).update(self._state(module))
        self.of(model).eval()

    def of(self, module: nn.Module) -> nn.Module:
        """The stand-in of one of the network's modules."""
        return self._made[id(_uncompiled(module))]

    def _state(self, module: nn.Module) -> dict[str, Any]:
        state = {name: self._copied(value) for name, value in vars(module).items() if name not in _NOT_COPIED}
        state |= {name: OrderedDict() for name in _HOOKS}
        for name in ("_parameters", "_buffers", "_modules"):
            state[name] = {key: self._memo.get(id(value)) for key, value in vars(module)[name].items()}
        return {**state, "_compiled_call_impl": None}

    def _copied(self, value: Any) -> Any:
        try:
            with _TensorsToMeta():
                return copy.deepcopy(value, self._memo)
        except Exception:  # locks, files, results with gradients: what nothing may copy is shared
            return value


def _uncompiled(module: nn.Module) -> nn.Module:
    """What torch.compile was given, since calling its wrapper would compile; other modules as they are."""
    while isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
        module = inner
    return module


def _scripted(module: nn.Module) -> nn.Module:
    """TorchScript's modules have no other stand-in than a copy; what cannot be copied stops the run."""
    try:
        return copy.deepcopy(module).to("meta")
    except Exception:  # parts of what is scripted as a whole
        return nn.Module()


class _TensorsToMeta(TorchFunctionMode):
    """Lets a deep copy put tensors on the meta device."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__name__", "") == "__deepcopy__":
            return _on_meta(args[0])
        return function(*args, **(kwargs or {}))


def _on_meta(tensor: Tensor) -> Tensor:
    values = tensor.detach().to("meta")
    return nn.Parameter(values, requires_grad=False) if isinstance(tensor, nn.Parameter) else values


def on_meta(value: Any) -> Any:
    """Tensors in lists, tuples and dictionaries on the meta device, everything else as it is."""
    return torch.utils._pytree.tree_map_only(Tensor, _on_meta, value)
