"""Gates out of a network again: each gated addition becomes the addition that it was."""

import operator

import torch
from torch import fx, nn

from cmpe_se.conversion.calls import original_class, wrapper_that_knows
from cmpe_se.conversion.convert import GATE_NAME
from cmpe_se.conversion.report import forget
from cmpe_se.errors import UserError
from cmpe_se.finetuning.gates import scale_of, some_gates_of
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.networks.base import ResidualNetwork
from cmpe_se.networks.blocks import PreActBlock
from cmpe_se.utils.copying import copy_network
from cmpe_se.utils.wrappers import unwrapped


def strip_gates(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """The network without its gates: ``identity + gate * residual`` becomes ``identity + residual`` again.

    A converted network becomes the original one: each block has its class and that class's forward back, the state dict
    its keys, and the output is the original's bit for bit, as far as training has not changed other weights. Hooks,
    modes and what is frozen stay. A block that was a ``torch.fx.GraphModule`` has a graph of the same operations.
    :class:`cmpe_se.PreActResNet` and :class:`cmpe_se.WideResNet` become the plain network (``view=None``) of the same
    weights, with which those weights need not have been trained.

    Args:
        model: network with gates; of a wrapped one (``torch.compile``, a moving average) the network inside.
        inplace: change the network itself instead of a copy.

    Returns:
        The network without gates.

    Raises:
        UserError: no gates, or a merged network; a gate in a block of one's own, whose forward calls it; a block that
            got another class or forward since it was converted; in place inside a wrapper that knows the gates'
            parameters; a layer that cannot be copied. The model is left as it was.
    """
    network = unwrapped(model)
    some_gates_of(network)
    if inplace and (wrapper := next(filter(None, map(wrapper_that_knows, model.modules())), None)):
        raise UserError(
            f"{wrapper} knows the gates' parameters, so they cannot be taken out in place; strip a copy, then wrap that"
        )
    if not inplace:
        network = copy_network(network, "strip in place (inplace=True)")
    graphs = [module for module in network.modules() if isinstance(module, fx.GraphModule)]
    calls = [(graph, node) for graph in graphs for node in _calls(graph)]
    called = {graph.get_submodule(str(node.target)) for graph, node in calls}
    blocks = {name: block for name, block in network.named_modules() if _children(block)}
    for name, block in blocks.items():
        if not called.issuperset(_children(block).values()) and (reason := _why_it_stays(block)):
            where = f"block {name} ({type(block).__name__})" if name else f"the network itself ({type(block).__name__})"
            raise UserError(f"{where} keeps its gates: {reason}")

    for graph, node in calls:
        _plain_addition(graph, node)
    for block in blocks.values():
        for child in _children(block):
            delattr(block, child)
        if isinstance(block, PreActBlock):
            block.attention = None
        if (kind := original_class(block)) is not type(block):
            vars(block).pop("forward", None)
            block.__class__ = kind
    for module in network.modules():
        if isinstance(module, ResidualNetwork):
            module.view = None
    for graph in graphs:
        graph.recompile()
    forget(network)
    return network


def _children(block: nn.Module) -> dict[str, CompetitiveSE]:
    return {name: child for name, child in block.named_children() if isinstance(child, CompetitiveSE)}


def _why_it_stays(block: nn.Module) -> str | None:
    children = _children(block)
    if isinstance(block, PreActBlock) and set(children) == {"attention"}:
        return None
    converted = original_class(block) is not type(block)
    if not converted and getattr(type(block), "_unconverted", None) is not None:
        return "its class has changed since it was converted; undo that first (a parametrisation, sharding)"
    if own := [child for child in children if not converted or not GATE_NAME.fullmatch(child)]:
        return f"{own[0]} is part of the block's own code, which calls it; build the network without it"
    forward = vars(block).get("forward")
    if forward is not None and getattr(forward, "__func__", None) is not type(block).forward:
        return "its forward was replaced after it was converted; undo that first"
    return None


def _calls(module: fx.GraphModule) -> list[fx.Node]:
    """Where a traced network calls its gates."""
    calls = [node for node in module.graph.nodes if node.op == "call_module"]
    return [node for node in calls if isinstance(module.get_submodule(str(node.target)), CompetitiveSE)]


def _plain_addition(module: fx.GraphModule, call: fx.Node) -> None:
    gate = module.get_submodule(str(call.target))
    assert isinstance(gate, CompetitiveSE)
    values = {**dict(zip(("residual", "identity"), call.args, strict=False)), **call.kwargs}
    flows = (values["identity"], values["residual"])
    with module.graph.inserting_after(call):
        if (scale := scale_of(gate)) == 1:
            total = module.graph.call_function(operator.add, flows)
        else:
            total = module.graph.call_function(torch.add, flows, {"alpha": scale})
    call.replace_all_uses_with(total)
    module.graph.erase_node(call)
