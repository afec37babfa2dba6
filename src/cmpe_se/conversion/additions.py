"""Finding the residual additions of a block in the graph of its forward, and saying of others why they are none."""

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from timm.layers import DropPath
from torch import Tensor, fx, nn
from torch.nn import functional

from cmpe_se.conversion.axes import Seen
from cmpe_se.conversion.optional import given_or
from cmpe_se.conversion.unconvertible import Unconvertible

_IN_PLACE = (operator.iadd, Tensor.add_, "add_", "__iadd__")
_ADDITIONS = (operator.add, torch.add, Tensor.add, Tensor.__add__, "add", "__add__", "__radd__", *_IN_PLACE)
_OTHER_SUMS = (
    *(operator.sub, operator.isub, torch.sub, "sub", "sub_", torch.rsub, torch.stack),
    *(torch.addcmul, "addcmul", "addcmul_", torch.lerp, "lerp", "lerp_"),
)
"""Functions that can join an identity and a residual in another way than by adding them."""
_PARTS = (torch.chunk, torch.split, torch.tensor_split, torch.unbind, torch.narrow, torch.index_select, torch.select)
_PART_METHODS = tuple(function.__name__ for function in _PARTS)
_PADS_OR_POOLS = (functional.pad, functional.avg_pool2d, functional.adaptive_avg_pool2d, operator.getitem)
_PROJECTION_LAYERS = (
    *(nn.Conv2d, nn.modules.batchnorm._BatchNorm, nn.GroupNorm, nn.AvgPool2d, nn.AdaptiveAvgPool2d),
    *(nn.ZeroPad2d, nn.ConstantPad2d, nn.Identity, nn.Dropout, nn.Dropout2d, DropPath),
)
"""Layers without an activation: what a projection shortcut may be made of."""
_MAY_RETURN_THEIR_INPUT = (nn.Identity, nn.Dropout, nn.Dropout2d, DropPath)
_VIEWS = ("getitem", "view", "reshape", "contiguous", "to", "dropout", "given_or")


class Addition(NamedTuple):
    """A residual addition; its operands are read off the node, since converting one may replace another's operand."""

    node: fx.Node
    residual_argument: int  # 0 or 1
    scale: float = 1.0
    channels: int = 0

    @property
    def residual(self) -> fx.Node:
        """The operand with more convolutions behind it."""
        return self._operands[self.residual_argument]

    @property
    def identity(self) -> fx.Node:
        """The other operand."""
        return self._operands[1 - self.residual_argument]

    @property
    def _operands(self) -> tuple[fx.Node, fx.Node]:
        return cast(tuple[fx.Node, fx.Node], operands_of(self.node))


def find_additions(
    block: nn.Module, graph: fx.Graph, look: Callable[[dict[fx.Node, tuple[fx.Node, fx.Node]]], dict[fx.Node, Seen]]
) -> tuple[list[Addition], dict[fx.Node, str]]:
    """The residual additions of a traced block, and for those that might have been one, why they are none.

    A residual addition joins two branches of one tensor, one of which has more convolutions than the other. The
    identity branch may project, pool, skip pixels and pad, but not take some of the channels: sums of parts are how
    some blocks (Res2Net) work inside their residual branch.

    Args:
        block: the block, or its stand-in.
        graph: of its forward.
        look: finds shapes and channels' axes of the graph's tensors; it is told of additions whose second operand, of
            those given, has the shape of the first.
    """
    found: list[Addition] = []
    reasons: dict[fx.Node, str] = {}
    for node in graph.nodes:
        try:
            if addition := _residual_addition(block, node):
                found.append(addition)
        except Unconvertible as reason:
            reasons[node] = str(reason)
    # A shortcut that the caller gives is of the residual's shape; what stands for it without one need not be.
    given = [addition for addition in found if addition.identity.target is given_or]
    alike = {addition.node: (addition.residual, addition.identity) for addition in given}
    seen = look(alike) if found else {}
    additions: list[Addition] = []
    for addition in found:
        residual, identity = seen.get(addition.residual), seen.get(addition.identity)
        if why := _why_no_maps(residual, identity):
            reasons[addition.node] = why
        elif residual is not None:
            additions.append(addition._replace(channels=residual.shape[1]))
    return additions, reasons


def _why_no_maps(residual: Seen | None, identity: Seen | None) -> str | None:
    """Why two operands are not feature maps of one shape; None if they are."""
    shape, other = residual and residual.shape, identity and identity.shape
    if residual is None or identity is None or shape != other or len(residual.shape) != 4:
        return f"its operands are {shape} and {other}, not two tensors (N, C, H, W) of one shape"
    axis = identity.axis if residual.axis is None else residual.axis
    if axis is None:
        return "it cannot be told which axis of its operands holds the channels"
    if axis != 1:
        return f"the channels of its operands {shape} are on axis {axis}, not on the second one"
    if residual.shape[1] == 1:
        return f"its operands {shape} have one channel, as attention maps have"
    return None


def listed(reasons: dict[fx.Node, str]) -> str:
    """Each reason once, with the names of the nodes that have it."""
    names: dict[str, dict[str, None]] = defaultdict(dict)
    for node, words in reasons.items():
        names[words][node.name] = None
    return "; ".join(f"{' and '.join(nodes)}: {words}" for words, nodes in names.items())


def is_addition(node: fx.Node) -> bool:
    """Whether a node adds, as far as its name tells."""
    return node.op in ("call_function", "call_method") and node.target in _ADDITIONS


def operands_of(node: fx.Node) -> tuple[fx.Node, ...]:
    """The tensors that a node adds, in order."""
    values = (*node.args, *(node.kwargs[name] for name in ("input", "other") if name in node.kwargs))
    return tuple(value for value in values if isinstance(value, fx.Node))


def _residual_addition(block: nn.Module, node: fx.Node) -> Addition | None:
    """The node as a residual addition; None if it is nothing of the kind.

    Raises:
        Unconvertible: it joins branches of convolutions, but cannot be converted.
    """
    if node.op not in ("call_function", "call_method") or node.target not in (*_ADDITIONS, *_OTHER_SUMS):
        return None
    flows = [flow for flow in node.all_input_nodes if any(step.op == "placeholder" for step in _ancestors(flow))]
    behind = [_ancestors(flow) for flow in flows]
    if len(flows) < 2:
        return None
    common = set.intersection(*behind)
    own = [branch - common for branch in behind]
    convolutions = [sum(_convolutions(block, step) for step in branch) for branch in own]
    if not any(convolutions):
        return None  # no convolutions: an attention block, a positional embedding
    operands = operands_of(node)
    values = [*node.args, *(value for name, value in node.kwargs.items() if name != "alpha")]
    if node.target in _OTHER_SUMS or list(operands) != flows or values != flows:
        if not common or len(set(convolutions)) == 1:
            return None
        raise Unconvertible("it joins branches, but not by adding two tensors")
    if not common:
        raise Unconvertible("its operands come from different arguments, which need not be one tensor")
    residual = _residual_of(block, own, convolutions)
    if any(_takes_a_part(step) for step in own[1 - residual]):
        raise Unconvertible("its identity is a part of a tensor, or one of several")
    if node.target in _IN_PLACE and _is_read_elsewhere(block, node, operands[0]):
        raise Unconvertible("it writes over a tensor that is read elsewhere")
    scale = node.kwargs.get("alpha", 1)
    if scale != 1 and (residual == 0 or not isinstance(scale, (int, float)) or scale <= 0):
        raise Unconvertible(f"it scales its {('second operand', 'residual')[residual]} by {scale}")
    return Addition(node, residual, float(cast(float, scale)))


def _residual_of(block: nn.Module, own: list[set[fx.Node]], convolutions: list[int]) -> int:
    """Which branch is the residual: the one with more convolutions, or the one whose other is a mere projection."""
    if convolutions[0] != convolutions[1]:
        return int(convolutions[1] > convolutions[0])
    linear = [all(_is_linear(block, step) for step in branch) for branch in own]
    if linear[0] != linear[1]:
        layers = [layer for step in own[linear.index(True)] for layer in _modules(block, step)]
        if all(layer.kernel_size == (1, 1) for layer in layers if isinstance(layer, nn.Conv2d)):
            return linear.index(False)
    raise Unconvertible(f"both operands have {convolutions[0]} convolution(s) behind them")


def _is_linear(block: nn.Module, step: fx.Node) -> bool:
    """Whether a step of a branch is one that a projection shortcut takes."""
    if step.op == "call_module":
        layers = (layer for layer in _modules(block, step) if not any(True for _ in layer.children()))
        return all(isinstance(layer, _PROJECTION_LAYERS) for layer in layers)
    return step.target in (*_PADS_OR_POOLS, *_ADDITIONS)


def _takes_a_part(step: fx.Node) -> bool:
    """Whether a step takes some of a tensor's channels; to take some of its rows and columns is to have a stride."""
    if step.target is not operator.getitem:
        return step.target in _PARTS or (step.op == "call_method" and step.target in _PART_METHODS)
    index = step.args[1]
    if not isinstance(index, tuple):
        return True
    if index[0] is ...:
        return len(index) > 3
    return any(axis != slice(None) for axis in index[:2])


def _is_read_elsewhere(block: nn.Module, addition: fx.Node, operand: fx.Node) -> bool:
    """Whether the memory of an operand belongs to the caller, or is read after the addition has written over it."""
    order = {node: position for position, node in enumerate(addition.graph.nodes)}
    while True:
        if operand.op in ("placeholder", "get_attr"):
            return True
        if any(order[user] > order[addition] for user in operand.users):
            return True
        if not _may_return_its_input(block, operand):
            return False
        operand = operand.all_input_nodes[0]


def _may_return_its_input(block: nn.Module, node: fx.Node) -> bool:
    if not node.all_input_nodes:
        return False
    if node.op == "call_module":
        layer = block.get_submodule(str(node.target))
        return isinstance(layer, _MAY_RETURN_THEIR_INPUT) or bool(getattr(layer, "inplace", False))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    same = name in _VIEWS or name in _PART_METHODS or node.target in _IN_PLACE or name.endswith("_")
    return same or bool(node.kwargs.get("inplace", False))


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and everything that it is computed from."""
    seen, waiting = set(), [node]
    while waiting:
        step = waiting.pop()
        if step not in seen:
            seen.add(step)
            waiting.extend(step.all_input_nodes)
    return seen


def _modules(block: nn.Module, node: fx.Node) -> list[nn.Module]:
    return list(block.get_submodule(str(node.target)).modules()) if node.op == "call_module" else []


def _convolutions(block: nn.Module, node: fx.Node) -> int:
    if node.target in (torch.conv2d, functional.conv2d):
        return 1
    return sum(is_convolution(layer) for layer in _modules(block, node))


def calls_of(block: nn.Module, graph: fx.Graph) -> set[nn.Module]:
    """Children and layers inside them that a forward runs, as far as they have convolutions."""
    layers = (block.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module")
    return {layer for layer in layers if count_convolutions(layer)}


def count_convolutions(module: nn.Module) -> int:
    """Two-dimensional convolutions in a module."""
    return sum(is_convolution(layer) for layer in module.modules())


def is_convolution(layer: nn.Module) -> bool:
    """Whether a layer is a two-dimensional convolution, of PyTorch or with such a weight."""
    return isinstance(layer, nn.Conv2d) or (
        isinstance(weight := getattr(layer, "weight", None), Tensor) and weight.ndim == 4
    )
