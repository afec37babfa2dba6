"""The forward of a block as a graph, by torch.fx, with the block's children as leaves.

A graph holds what was computed from the block's input, and no more. A forward that does anything else (draws random
numbers, keeps a result, switches gradients off) would do it no longer once the graph has taken its place; so it is
found out and left alone.
"""

import copy
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from cmpe_se.conversion.optional import choose_where_left_out, optional_arguments
from cmpe_se.conversion.unconvertible import Unconvertible
from cmpe_se.utils.randomness import random_states, random_states_kept


class Proxy(fx.Proxy):
    """A tensor being traced, whose ``+=`` and the like stay in place, as what else reads that tensor may depend on."""


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Proxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class Trace(NamedTuple):
    """A forward as a graph.

    Args:
        graph: its children are leaves.
        caveat: why the graph is not all of the forward; None where it is.
    """

    graph: fx.Graph
    caveat: str | None = None


class _BlockTracer(fx.Tracer):
    """Children are leaves; gradients and autocast have to stay as they were."""

    proxy_buffer_attributes = True  # or a forward would write into its buffers while it is traced, and never again

    def __init__(self) -> None:
        super().__init__()
        self.contexts = _contexts()

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _contexts() != self.contexts:
            raise Unconvertible("its forward switches gradients or autocast on or off, which a traced one would not")
        return super().create_node(*args, **kwargs)


def trace(block: nn.Module) -> Trace:
    """The block's forward, its children as leaves.

    Raises:
        Unconvertible: control flow that depends on tensors; a forward that differs between training and eval mode, or
            that does more than to compute its output.
    """
    if isinstance(block, fx.GraphModule):
        return Trace(copy.deepcopy(block.graph))
    modes = {part: part.training for part in block.modules()}
    traces = []
    try:
        with _no_side_effects(block):
            for mode in (False, True):
                for part in modes:  # a forward may run methods of its children
                    part.training = mode
                traces.append(_trace_once(block))
    finally:
        for part, mode in modes.items():
            part.training = mode
    if traces[0].graph.python_code("self").src != traces[1].graph.python_code("self").src:
        raise Unconvertible("its forward in training differs from that in eval mode")
    return traces[0]


def _trace_once(block: nn.Module) -> Trace:
    try:
        graph = _BlockTracer().trace(block)
    except Unconvertible:
        raise
    except Exception as error:  # whatever a forward does with a proxy
        raise Unconvertible(f"torch.fx cannot trace it ({first_sentence(error)})") from None
    optional = optional_arguments(graph)
    if len(optional) > 1:
        names = ", ".join(str(argument.target) for argument in optional)
        return Trace(graph, f"its forward has several arguments that may be left out ({names})")
    for argument in optional:
        try:
            left_out = _BlockTracer().trace(block, concrete_args={str(argument.target): None})
            same = choose_where_left_out(graph, argument, left_out)
        except Exception:  # as above
            same = False
        if not same:
            return Trace(graph, f"without its argument {argument.target} its forward does something else")
    return Trace(graph)


@contextmanager
def _no_side_effects(block: nn.Module) -> Iterator[None]:
    """Undo what a forward does beside its output, and refuse it.

    Raises:
        Unconvertible: it drew random numbers, or left something on the block.
    """
    places: tuple[dict[str, Any], ...] = (vars(block), block._parameters, block._buffers)
    before, numbers = [dict(place) for place in places], random_states()
    try:
        with random_states_kept():
            yield
            drew = random_states() != numbers
    finally:
        kept = [name for place, old in zip(places, before, strict=True) for name in _restore(place, old)]
    if kept:
        raise Unconvertible(f"its forward keeps values on the block ({', '.join(kept)}), which a traced one would not")
    if drew:
        raise Unconvertible("its forward draws random numbers, which a traced one would draw only once")


def _restore(place: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """Give a dictionary its old values again; returns the names of those that were others."""
    changed = [name for name in {**before, **place} if name != "training" and place.get(name) is not before.get(name)]
    if changed:
        place.clear()
        place.update(before)
    return changed


def _contexts() -> tuple[Any, ...]:
    devices = ("cpu", "cuda")
    autocast = tuple((torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast


def first_sentence(error: Exception) -> str:
    """What an exception says, as part of a sentence."""
    lines = str(error).splitlines() or [""]  # torch.fx adds lines about the place
    return lines[0].split(". ")[0][:160] or type(error).__name__
