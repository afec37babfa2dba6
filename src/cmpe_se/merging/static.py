"""Static gates scale their residual by the same numbers for every image: the layer that makes it can do that itself."""

import operator
from collections import Counter
from typing import Any, TypeGuard

import torch
from timm.layers import LayerScale2d
from torch import Tensor, fx, nn

from cmpe_se.conversion.blocks import is_rewritten, replace_forward
from cmpe_se.conversion.convolutions import axes_of
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.hooks import will_always_do_so
from cmpe_se.layers.merged_gate import layers_say_what_it_does
from cmpe_se.merging.calls import Calls, is_known_block, passes_on
from cmpe_se.merging.norms import is_plain_convolution, is_plain_norm

_PRODUCTS = (operator.mul, torch.mul, "mul", "multiply")


@torch.no_grad()
def merge_static_gates(model: nn.Module, calls: Calls) -> None:
    """Put every static gate into the convolution, norm or layer scale that makes its residual for it alone.

    Args:
        model: network in eval mode, changed in place. Gates for which there is no such layer stay as they are.
        calls: of the network's layers.
    """
    for block in list(model.modules()):
        static: dict[str, CompetitiveSE] = {name: child for name, child in block.named_children() if _is_static(child)}
        if not static or not calls.has_one_name(block):
            continue
        if not is_known_block(block):
            _merge_where_called(block, static, calls)
        elif _scales(block.last_conv, calls) and passes_on(block.drop_path):
            _scale(block.last_conv, _constant(static["attention"]))
            block.attention = None


def _is_static(module: nn.Module) -> TypeGuard[CompetitiveSE]:
    constant = isinstance(module, CompetitiveSE) and module.kind.form == "constant"
    return constant and layers_say_what_it_does(module)


def _merge_where_called(block: nn.Module, static: dict[str, CompetitiveSE], known: Calls) -> None:
    graph = known.graph(block)
    if graph is None or is_rewritten(block):  # whose forward does more than a graph of it
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets, merged = Counter(call.target for call in calls), []
    for call in calls:
        if call.target not in static or not known.once(static[call.target]) or len(call.args) != 2:
            continue
        residual, identity = call.args
        factors = _constant(static[call.target])
        if (scale := _layer_scale(block, residual, targets, known, len(factors))) is not None:
            _scale_tensor(block, scale, factors)
        elif (layer := _maker(block, residual, targets)) is not None and _scales(layer, known):
            _scale(layer, factors)
        else:
            continue
        with graph.inserting_after(call):
            total = graph.call_function(operator.add, (residual, identity))
        call.replace_all_uses_with(total)
        graph.erase_node(call)
        merged.append(call.target)
    for child in merged:
        delattr(block, child)
    if merged:
        replace_forward(block, graph)


def _maker(block: nn.Module, operand: fx.Node, targets: Counter) -> nn.Module | None:
    """The layer whose output an operand is, if it is called once and nothing else reads what it puts out."""
    made = _made(block, operand, targets)
    return block.get_submodule(str(made.target)) if made is not None and made.op == "call_module" else None


def _made(block: nn.Module, operand: fx.Node, targets: Counter) -> fx.Node | None:
    """What an operand is, before layers that do nothing; None where something else reads it."""
    while len(operand.users) == 1 and (operand.op != "call_module" or targets[operand.target] == 1):
        if operand.op != "call_module" or not passes_on(block.get_submodule(str(operand.target))):
            return operand
        operand = operand.all_input_nodes[0]
    return None


def _layer_scale(block: nn.Module, operand: fx.Node, targets: Counter, known: Calls, channels: int) -> str | None:
    """The block's own parameter, one number a channel, that an operand was multiplied by last (ConvNeXt)."""
    made = _made(block, operand, targets)
    if made is None or made.target not in _PRODUCTS or len(made.args) != 2 or made.kwargs:
        return None
    axes = next((axes for layer in block.modules() if (axes := axes_of(layer))), None)
    factors: list[Any] = [value for value in made.args if _is_node_read_once(value)]
    for factor in factors:
        shape: Any = None
        if factor.target in ("reshape", "view") and _is_node_read_once(factor.args[0]):
            factor, shape = factor.args[0], factor.args[1:]
        name = str(factor.target)
        value = block._parameters.get(name) if factor.op == "get_attr" else None
        once = sum(node.op == "get_attr" and node.target == name for node in made.graph.nodes) == 1
        if type(value) is not nn.Parameter or not once or known.is_read(value):
            continue
        if axes and value.numel() == channels and (shape or tuple(value.shape)) in _of_channels(channels, axes):
            return name
    return None


def _is_node_read_once(value: Any) -> TypeGuard[fx.Node]:
    return isinstance(value, fx.Node) and len(value.users) == 1


def _of_channels(channels: int, axes: int) -> set[tuple[int, ...]]:
    """Shapes of one number a channel that broadcast with maps (N, C, ...) of so many axes of positions."""
    positions = (1,) * axes
    return {(channels, *positions), *((1, number, *positions) for number in (channels, -1))}


def _scales(layer: nn.Module, known: Calls) -> bool:
    """Whether a factor on each output channel can go into a layer's own weights."""
    if not known.is_own(layer) or not known.once(layer):
        return False
    scale = isinstance(layer, LayerScale2d) and will_always_do_so(layer)
    return scale or is_plain_convolution(layer) or (is_plain_norm(layer) and layer.weight is not None)


def _scale(layer: nn.Module, factors: Tensor) -> None:
    for name in ("gamma",) if isinstance(layer, LayerScale2d) else ("weight", "bias"):
        if getattr(layer, name) is not None:
            _scale_tensor(layer, name, factors)


def _scale_tensor(module: nn.Module, name: str, factors: Tensor) -> None:
    """Multiply each channel of a tensor by its factor. Channels are the first axis that is not of length 1."""
    values = getattr(module, name)
    first = next((axis for axis, length in enumerate(values.shape) if length == len(factors)), 0)
    scaled = values.double() * factors.view(*[1] * first, -1, *[1] * (values.ndim - first - 1))
    # A new one, in the place of one that another layer might share.
    setattr(module, name, _like(values, scaled))


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.to(old.dtype)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _constant(gate: CompetitiveSE) -> Tensor:
    """Factor on each channel, (C,), float64."""
    logits = gate.fc2(next(gate.fc2.parameters()).new_zeros(1, gate.channels))[0]
    return gate.gain * logits.double().sigmoid()
