"""The forward of a block as a graph of what one run of it does: the second way, for what torch.fx cannot trace.

The block runs as it is written, on the meta device, with what it got in a run of the whole network. Whatever decides
which way it goes (sizes, the mode, random numbers, counts) is there, so the graph is of that way alone. It says which
additions are residual ones, with the place in the source of each; nobody runs it.
"""

import operator
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from cmpe_se.conversion.additions import is_addition
from cmpe_se.conversion.axes import AxisTracker
from cmpe_se.conversion.recording import BlockCall
from cmpe_se.conversion.source import place_in
from cmpe_se.conversion.tracing import first_sentence
from cmpe_se.conversion.unconvertible import Unconvertible
from cmpe_se.utils.randomness import seeded

_TRIALS = 4  # runs in training mode
SEEN, PLACE = "seen", "place"
"""Keys of what is known of a node: its tensor, as :class:`Layout`, and the :class:`Place` that called it, if any."""


def watch_runs(
    stand_in: nn.Module, call: BlockCall, tracker: AxisTracker
) -> tuple[list[fx.Graph], Unconvertible | None]:
    """What a forward of a block does in eval mode, and in a few runs in training mode, which may draw lots.

    Args:
        stand_in: of the block, on the meta device; what its forward keeps is lost.
        call: what it gets.
        tracker: of the run that showed it.

    Returns:
        Graphs of the runs, the one in eval mode first; and why there are none in training mode, if so.

    Raises:
        Unconvertible: its forward fails in eval mode.
    """
    graphs = [_watch(stand_in, call, tracker, training=False)]
    try:
        return graphs + [_watch(stand_in, call, tracker, True, seed) for seed in range(_TRIALS)], None
    except Unconvertible as failure:
        return graphs, failure


def _watch(stand_in: nn.Module, call: BlockCall, tracker: AxisTracker, training: bool, seed: int = 0) -> fx.Graph:
    """What one forward of a block does, its children as leaves.

    Args:
        stand_in: of the block, on the meta device; what its forward keeps is lost.
        call: what it gets.
        tracker: of the run that showed it.
        training: whether it runs in training mode.
        seed: of the numbers that it draws, so that what is found does not depend on what was drawn before.

    Raises:
        Unconvertible: its forward fails.
    """
    modes = {module: module.training for module in stand_in.modules()}
    kept = [(state, dict(state)) for state in (vars(stand_in), stand_in._parameters, stand_in._buffers)]
    watcher = _Watcher(stand_in, tracker)
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, watcher.receive, (call.args, call.kwargs))
    try:
        stand_in.train(training)
        with torch.no_grad(), seeded(seed), watcher.leaves(), tracker, watcher:
            stand_in(*args, **kwargs)
    except Exception as error:  # whatever a forward does
        mode = "training" if training else "eval"
        raise Unconvertible(f"its forward fails in {mode} mode ({first_sentence(error)})") from None
    finally:
        for state, before in kept:
            state.clear()
            state.update(before)
        for module, before_it in modes.items():
            module.training = before_it
    return watcher.graph


class _Watcher(TorchFunctionMode):
    """Writes down calls of PyTorch's functions and of a block's children, as torch.fx would."""

    def __init__(self, block: nn.Module, tracker: AxisTracker):
        super().__init__()
        self.block, self.tracker, self.graph = block, tracker, fx.Graph()
        self._nodes: dict[int, fx.Node] = {}  # of tensors, by their ids
        self._tensors: list[Tensor] = []  # kept, so that no other tensor gets the id of one
        self._inside: list[nn.Module] = []  # children that run

    def receive(self, tensor: Tensor) -> Tensor:
        """An argument of the block; a tensor that is given twice is one."""
        if id(tensor) not in self._nodes:
            self._know(tensor, self.graph.placeholder(f"argument_{len(self._tensors)}"))
        return tensor

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not self._inside:
            name = getattr(function, "__name__", "")
            if function is Tensor.__getitem__:
                self._write("call_function", operator.getitem, args, kwargs or {}, result)
            elif getattr(Tensor, name, None) is function:
                self._write("call_method", name, args, kwargs or {}, result)
            else:
                self._write("call_function", function, args, kwargs or {}, result)
        return result

    @contextmanager
    def leaves(self) -> Iterator[None]:
        """Let calls of the block's children be seen as calls of layers."""
        with ExitStack() as stack:
            for name, module in self.block.named_modules():
                if module is self.block or isinstance(module, torch.jit.ScriptModule):
                    continue
                handle = module.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(handle.remove)
                handle = module.register_forward_hook(self._leave(name), with_kwargs=True)
                stack.callback(handle.remove)
            yield

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._inside.append(module)

    def _leave(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            self._inside.pop()
            if not self._inside:
                self._write("call_module", name, args, kwargs, output)

        return leave

    def _write(self, op: str, target: Any, args: Any, kwargs: Any, result: Any) -> None:
        values = result if isinstance(result, (tuple, list)) else (result,)
        if not any(isinstance(value, Tensor) for value in values):
            return
        known_args, known_kwargs = torch.utils._pytree.tree_map_only(Tensor, self._node_of, (tuple(args), dict(kwargs)))
        node = self.graph.create_node(op, target, known_args, known_kwargs)
        if is_addition(node):
            node.meta[PLACE] = place_in(type(self.block), sys._getframe())
        if values is not result:
            self._know(result, node)
            return
        for number, value in enumerate(values):
            if isinstance(value, Tensor):
                self._know(value, self.graph.call_function(operator.getitem, (node, number)))

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:  # a parameter, a buffer, or made from nothing
            self._know(tensor, self.graph.create_node("get_attr", "tensor"))
        return self._nodes[id(tensor)]

    def _know(self, tensor: Tensor, node: fx.Node) -> None:
        self._nodes[id(tensor)] = node
        self._tensors.append(tensor)
        node.meta[SEEN] = self.tracker.layout(tensor)
