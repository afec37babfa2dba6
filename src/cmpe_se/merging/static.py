"""Static gates scale their residual by the same numbers for every image: the layer that makes it can do that itself."""

import operator
from collections import Counter
from typing import TypeGuard

import torch
from torch import Tensor, fx, nn

from cmpe_se.conversion.blocks import is_rewritten, replace_forward
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.merged_gate import layers_say_what_it_does
from cmpe_se.merging.calls import Calls, is_known_block, passes_on
from cmpe_se.merging.norms import is_plain_convolution, is_plain_norm


@torch.no_grad()
def merge_static_gates(model: nn.Module, calls: Calls) -> None:
    """Put every static gate into the convolution or norm that makes its residual, where nothing else reads that.

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
        layer = _maker(block, residual, targets)
        if layer is None or not _scales(layer, known):
            continue
        _scale(layer, _constant(static[call.target]))
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
    while operand.op == "call_module" and len(operand.users) == 1 and targets[operand.target] == 1:
        module = block.get_submodule(str(operand.target))
        if not passes_on(module):
            return module
        operand = operand.all_input_nodes[0]
    return None


def _scales(layer: nn.Module, known: Calls) -> bool:
    """Whether a factor on each output channel can go into a layer's own weights."""
    if not known.is_own(layer) or not known.once(layer):
        return False
    return is_plain_convolution(layer) or (is_plain_norm(layer) and layer.weight is not None)


def _scale(layer: nn.Module, factors: Tensor) -> None:
    for name in ("weight", "bias"):
        values = getattr(layer, name)
        if values is not None:
            scaled = values.double() * factors.view(-1, *[1] * (values.ndim - 1))
            # A new one, in the place of one that another layer might share.
            setattr(layer, name, _like(values, scaled))


def _like(old: Tensor, new: Tensor) -> Tensor:
    new = new.to(old.dtype)
    return nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new


def _constant(gate: CompetitiveSE) -> Tensor:
    """Factor on each channel, (C,), float64."""
    logits = gate.fc2(next(gate.fc2.parameters()).new_zeros(1, gate.channels))[0]
    return gate.gain * logits.double().sigmoid()
