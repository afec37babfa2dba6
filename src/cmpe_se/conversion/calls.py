"""Whether calling a module runs the forward of its class, which is what a conversion exchanges."""

import functools
from collections.abc import Callable, Iterator
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import fx, nn

_KNOW_THEIR_PARAMETERS = {"DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine"}
"""Wrappers that gather gradients of the parameters that there were when they were made; a gate would not be one."""
_CALLS = ("__call__", "_call_impl", "_wrapped_call_impl")
_COPIES = ("__deepcopy__", "__reduce__", "__reduce_ex__")


def why_block_stays(block: nn.Module) -> str | None:
    """Why a gate in a block's forward might take no part in its output or be lost in a copy; None where it is safe."""
    kind = original_class(block)
    if isinstance(block, fx.GraphModule):
        # Its forward and its copies come from its graph, unless a library has put another forward there.
        return None if _runs_its_class(block) and isinstance(type(block).forward, FunctionType) else _replaced(block)
    if reason := why_inside_stays(block):
        return reason
    if not _runs_its_class(block):
        return _replaced(block)
    for name in _CALLS:
        if name in vars(block) or getattr(kind, name) is not getattr(nn.Module, name):
            return f"it has a {name} of its own, which need not run its forward"
    for name in _COPIES:
        if getattr(kind, name, None) is not getattr(object, name, None):
            return f"{kind.__name__} has a {name} of its own, so that a copy might lose its gates"
    return None


def original_class(block: nn.Module) -> type[nn.Module]:
    """The class that a block had before it was converted, its own if it has not been."""
    return vars(type(block)).get("_unconverted", type(block))


def why_inside_stays(module: nn.Module) -> str | None:
    """Why a gate inside a module might take no part in what the module computes or learns; None where it is safe."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, which runs code of its own; convert the network before it is scripted or traced"
    if wrapper := wrapper_that_knows(module):
        return f"{wrapper} knows only the parameters that it was made with; convert the network, then wrap it"
    if _runs_its_class(module) or _is_bound_to(module, module.forward):
        return None
    return None if _is_compiled(module) else _replaced(module)


def wrapper_that_knows(module: nn.Module) -> str | None:
    """Name of the wrapper that a module is which knows only the parameters that it was made with; None for others."""
    return min(_KNOW_THEIR_PARAMETERS & {kind.__name__ for kind in type(module).__mro__}, default=None)


def own_forward_again(block: nn.Module) -> None:
    """Forget a forward of the instance that is only another name of its class's."""
    if _runs_its_class(block):
        vars(block).pop("forward", None)


def shared_with_original(duplicate: nn.Module, original: nn.Module) -> Iterator[tuple[str, str]]:
    """Modules of a copy whose forward still runs layers of the original: to copy a function is to share it."""
    if duplicate is original:
        return
    forwards = {name: vars(module).get("forward") for name, module in original.named_modules()}
    for name, module in duplicate.named_modules():
        forward = vars(module).get("forward")
        if forward is not None and forward is forwards.get(name) and _holds_modules(forward):
            yield (
                name,
                f"{_described(forward)} is its forward and holds layers of the original network, which this copy goes "
                "on using (inplace=True makes no copy)",
            )


def _runs_its_class(module: nn.Module) -> bool:
    forward = module.forward
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def _is_bound_to(module: nn.Module, forward: Callable[..., Any]) -> bool:
    """Whether a function has the module as its ``self``, so that it is copied with it and calls its children."""
    if isinstance(forward, functools.partial):
        return bool(forward.args) and forward.args[0] is module
    return getattr(forward, "__self__", None) is module


def _is_compiled(module: nn.Module) -> bool:
    """Whether a forward is torch.compile's, of the module that it wraps or of the module's own forward."""
    compiled = getattr(module.forward, "_torchdynamo_orig_callable", None)
    if compiled is None:  # also for code that was compiled ahead of time
        return False
    return type(module).__name__ == "OptimizedModule" or getattr(compiled, "__self__", None) is module


def _holds_modules(forward: object) -> bool:
    if not isinstance(forward, FunctionType):
        return False
    cells = [cell.cell_contents for cell in forward.__closure__ or ()]
    named = [forward.__globals__.get(name) for name in forward.__code__.co_names]
    values = [*cells, *named, *(forward.__defaults__ or ()), *(forward.__kwdefaults__ or {}).values()]
    return any(
        isinstance(value, nn.Module)
        or isinstance(getattr(value, "__self__", None), nn.Module)
        or (isinstance(value, (list, tuple)) and any(isinstance(item, nn.Module) for item in value))
        or (isinstance(value, FunctionType) and value in cells and value is not forward and _holds_modules(value))
        for value in values
    )


def _replaced(module: nn.Module) -> str:
    return (
        f"its forward was replaced by {_described(module.forward)}, which convert cannot change "
        "(convert first, then replace it)"
    )


def _described(forward: object) -> str:
    if isinstance(forward, functools.partial):
        return f"functools.partial of {_described(forward.func)}"
    name = getattr(forward, "__qualname__", None)
    return f"function {name}" if name else f"an object of class {type(forward).__name__}"
