"""Finding the residual additions of a block, in its forward as torch.fx traces it with its children as leaves."""

import copy
import operator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
_PARTS = (operator.getitem, "chunk", "split", torch.chunk, torch.split)  # what takes a tensor apart
_SIDE = 64  # pixels of the images that shapes are found with


class Addition(NamedTuple):
    """A residual addition; its operands are read off the node, since converting one may replace another's operand."""

    node: fx.Node
    residual_argument: int  # 0 or 1
    channels: int

    @property
    def residual(self) -> fx.Node:
        """The operand with more convolutions behind it."""
        return cast(fx.Node, self.node.args[self.residual_argument])

    @property
    def identity(self) -> fx.Node:
        """The other operand."""
        return cast(fx.Node, self.node.args[1 - self.residual_argument])


class Unconvertible(Exception):
    """Why a block, or one of its additions, cannot be converted."""


class _BlockTracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True


def trace(block: nn.Module) -> fx.Graph:
    """The block's forward, its children as leaves.

    Raises:
        Unconvertible: control flow that depends on tensors, or a forward that differs between training and eval mode.
    """
    mode, graphs = block.training, []
    try:
        for block.training in (False, True):
            graphs.append(_BlockTracer().trace(block))
    except Exception as error:  # whatever a forward does with a proxy
        raise Unconvertible(f"torch.fx cannot trace it ({_first_sentence(error)})") from None
    finally:
        block.training = mode
    if graphs[0].python_code("self").src != graphs[1].python_code("self").src:
        raise Unconvertible("its forward in training differs from that in eval mode")
    return graphs[0]


def find_additions(block: nn.Module, graph: fx.Graph) -> tuple[list[Addition], list[str]]:
    """The residual additions of a traced block, and for those that might have been one, why they are none.

    A residual addition joins two branches of one tensor, one of which has more convolutions than the other. The
    identity branch may project and pool, but not take a part of the tensor: sums of parts are how some blocks (Res2Net)
    work inside their residual branch.
    """
    found, reasons = [], []
    for node in graph.nodes:
        if node.target not in _ADDITIONS or not _adds_two_nodes(node):
            continue
        behind = [_ancestors(argument) for argument in node.args]
        common = behind[0] & behind[1]
        own = [branch - common for branch in behind]
        convolutions = [sum(_convolutions(block, step) for step in branch) for branch in own]
        if not common or not any(convolutions):
            continue  # no branches of one tensor, or no convolutions: an attention block, a positional embedding
        if convolutions[0] == convolutions[1]:
            reasons.append(f"both operands of {node.name} have {convolutions[0]} convolution(s) behind them")
            continue
        residual = int(convolutions[1] > convolutions[0])
        if not any(step.target in _PARTS for step in own[1 - residual]):
            found.append(Addition(node, residual, channels=0))
    if not found:
        return [], reasons
    shapes = _shapes(block, graph)
    additions = []
    for addition in found:
        shape, other = shapes.get(addition.residual), shapes.get(addition.identity)
        if shape is None or len(shape) != 4 or shape != other:
            reasons.append(f"{addition.node.name} adds {shape} and {other}, not two tensors (N, C, H, W) of one shape")
        else:
            additions.append(addition._replace(channels=shape[1]))
    return additions, reasons


def _adds_two_nodes(node: fx.Node) -> bool:
    if len(node.args) != 2 or not all(isinstance(argument, fx.Node) for argument in node.args):
        return False
    scaled = bool(node.kwargs.get("alpha", 1) != 1)
    return node.args[0] is not node.args[1] and not scaled and "out" not in node.kwargs


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    seen, waiting = set(), [node]
    while waiting:
        step = waiting.pop()
        if step not in seen:
            seen.add(step)
            waiting.extend(step.all_input_nodes)
    return seen


def _convolutions(block: nn.Module, node: fx.Node) -> int:
    if node.op != "call_module":
        return 0
    return count_convolutions(block.get_submodule(str(node.target)))


def count_convolutions(module: nn.Module) -> int:
    """Two-dimensional convolutions in a module."""
    return sum(isinstance(part, nn.Conv2d) for part in module.modules())


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of each tensor."""

    def __init__(self, module: nn.Module, graph: fx.Graph):
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.shapes[node] = tuple(result.shape)
        return result


def _shapes(block: nn.Module, graph: fx.Graph) -> dict[fx.Node, tuple[int, ...]]:
    """Shape of each tensor of the graph, from a run on the meta device."""
    first = next(node for node in graph.nodes if node.op == "placeholder")
    stand_in = copy.deepcopy(block).to("meta").eval()
    for module in stand_in.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    dtype = next(stand_in.parameters()).dtype
    recorder = _ShapeRecorder(stand_in, graph)
    try:
        with torch.no_grad():
            recorder.run(torch.zeros(1, _input_channels(block, first), _SIDE, _SIDE, device="meta", dtype=dtype))
    except Unconvertible:
        raise
    except Exception as error:
        raise Unconvertible(f"its shapes cannot be found ({_first_sentence(error)})") from None
    return recorder.shapes


def _input_channels(block: nn.Module, placeholder: fx.Node) -> int:
    """Channels of the block's input: those of the first layer on its way that has a number of them."""
    for node in placeholder.graph.nodes:
        if node.op != "call_module" or placeholder not in _ancestors(node):
            continue
        for layer in block.get_submodule(node.target).modules():
            if isinstance(layer, nn.Conv2d):
                return layer.in_channels
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                return layer.num_features
            if isinstance(layer, nn.GroupNorm):
                return layer.num_channels
    raise Unconvertible("the number of its input's channels cannot be found")


def _first_sentence(error: Exception) -> str:
    return str(error).splitlines()[0].split(". ")[0][:160] if str(error) else type(error).__name__
