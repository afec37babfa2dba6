"""The deploy form of a network: the same function in eval mode, with nothing left that only training needs.

Every gate that has such a form becomes two linear maps (fact 1 of ``docs/method.md``), every static gate goes into the
layer that makes its residual, and every batch norm that follows a convolution is folded into it. In converted networks
a gate reads its squeeze off a pointwise convolution's input where that is smaller than the output (fact 2; a folded
norm is part of that convolution). In our own networks facts 2 and 3 hold already.
"""

import inspect
import operator
from collections.abc import Sequence
from functools import partial
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor, fx, nn
from torchvision.models import feature_extraction

from cmpe_se.conversion.blocks import is_rewritten, replace_forward
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE, is_pointwise, kept_by_stride
from cmpe_se.layers.gated_addition import Convolution, squeeze
from cmpe_se.layers.hooks import will_always_do_so
from cmpe_se.layers.merged_gate import MergedGate, layers_say_what_it_does, merge_gate
from cmpe_se.merging.calls import Calls, passes_on
from cmpe_se.merging.norms import fold_norms, is_plain_convolution
from cmpe_se.merging.static import merge_static_gates
from cmpe_se.static_gates.calibration import Images, with_static_gates
from cmpe_se.utils.copying import copy_network


def merge(
    model: nn.Module, *, static: str | int | Sequence[str] | None = None, images: Images | None = None
) -> nn.Module:
    """An exact copy for inference: the same outputs in eval mode, from less work.

    Works on our networks, on converted ones, and on any other, whose norms alone are folded. Gates without a merged
    form, such as modules of their own, stay as they are. So does a layer whose parameters do not say what it puts out
    (hooks, a forward of its own, a parametrisation, a subclass), or that is used in more than one place. What it
    returns is in eval mode, has no gradients, and refuses to be trained. The model itself is left untouched.

    With ``static`` it is not exact: gates that depend on the image are first replaced by their means over calibration
    images, and then cost nothing at all (:func:`cmpe_se.with_static_gates`).

    Args:
        model: any network; the mode that it is in makes no difference.
        static: gates to make static: ``all``, a number of them, or names of blocks; none if left out.
        images: calibration images for ``static``: (N, C, H, W), or batches of them.

    Returns:
        The merged copy. Merging that again returns an equal copy.

    Raises:
        UserError: a layer that cannot be copied; what :func:`cmpe_se.with_static_gates` refuses.
    """
    if static is not None:
        model = with_static_gates(model, static, images=images)
    elif images is not None:
        raise UserError("images are for making gates static; say which, such as static='all'")
    merged = _frozen_copy(model)
    if _merges(merged):
        return merge_gate(merged)
    if isinstance(merged, CompetitiveSE):
        return merged
    calls = Calls(merged)
    fold_norms(merged, calls)
    merge_static_gates(merged, calls)
    for block in _gated(merged):
        _merge_gates(block, calls)
    merged.train = partial(_refuse_training, merged)  # type: ignore[method-assign]  # of this one network
    return merged


def _frozen_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode whose parameters take no gradients.

    A weight that a hook computes before each forward pass (weight norm, pruning) is left over from the last one with
    its graph, which cannot be copied. The copy has its numbers alone, until its own hook computes it again.
    """
    kept = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Tensor)]
    memo: dict[int, Any] = {id(value): value.detach().clone() for value in kept if not value.is_leaf}
    with torch.no_grad():  # TorchScript's copies of parameters would be results, which take gradients for ever
        merged = copy_network(model, "merge the network without that layer, or before it is given one", memo)
    return merged.eval().requires_grad_(False)


def _gated(model: nn.Module) -> list[nn.Module]:
    """Modules that have gates with a merged form among their children."""
    return [module for module in model.modules() if any(_merges(child) for child in module.children())]


def _merges(module: nn.Module) -> TypeGuard[CompetitiveSE]:
    """Whether a gate has a merged form. In eval mode, that is: a norm that stays in training mode has none."""
    if not isinstance(module, CompetitiveSE) or not module.kind.merges or not layers_say_what_it_does(module):
        return False
    norms = [layer for layer in module.children() if isinstance(layer, nn.BatchNorm2d)]
    return not any(norm.training or norm.running_mean is None or norm.running_var is None for norm in norms)


def _merge_gates(block: nn.Module, known: Calls) -> None:
    graph = None if is_rewritten(block) else known.graph(block)
    calls = [node for node in graph.nodes if node.op == "call_module"] if graph else []
    for child, gate in list(block.named_children()):
        if not _merges(gate):
            continue
        own = [call for call in calls if call.target == child]
        if graph is not None and len(own) == 1 and len(own[0].args) == 2 and known.is_own(gate) and known.once(gate):
            setattr(block, child, _merged_where_called(block, graph, own[0], gate))
        else:  # called in another way, as our own blocks do
            setattr(block, child, merge_gate(gate))
    if graph is not None and any(isinstance(value, fx.Node) for call in calls for value in call.kwargs.values()):
        replace_forward(block, graph)


def _merged_where_called(block: nn.Module, graph: fx.Graph, call: fx.Node, gate: CompetitiveSE) -> MergedGate:
    """The deploy form of a gate whose only call is known, which from now on gets its squeezes from outside."""
    operands = cast(tuple[fx.Node, fx.Node], call.args)
    convs = [_pointwise_behind(block, call, operand) for operand in operands]
    for flow, operand, conv in zip(("residual", "identity"), operands, convs, strict=True):
        if flow in gate.kind.reads:
            call.update_kwarg(f"{flow}_squeeze", _early_squeeze(block, graph, call, operand, conv))
    return merge_gate(gate, *(conv and conv[1] for conv in convs))


def _pointwise_behind(block: nn.Module, call: fx.Node, operand: fx.Node) -> tuple[fx.Node, Convolution] | None:
    """The convolution that makes an operand, and its input, where that stays as it is and is less to read."""
    while operand.op == "call_module" and passes_on(block.get_submodule(str(operand.target))):
        operand = operand.all_input_nodes[0]
    if operand.op != "call_module":
        return None
    conv = block.get_submodule(str(operand.target))
    if not is_pointwise(conv) or not will_always_do_so(conv) or conv.in_channels >= conv.out_channels:
        return None
    source = operand.all_input_nodes[0]
    return (source, conv) if _stays(block, call, source) else None


def _early_squeeze(
    block: nn.Module, graph: fx.Graph, call: fx.Node, operand: fx.Node, behind: tuple[fx.Node, Convolution] | None
) -> fx.Node:
    """The squeeze of an operand, or of the input of the convolution behind it, taken while that is still in the cache.

    That is right after it was made; but where something might write over it, no sooner than the gate.
    """
    source, conv = behind or (operand, None)
    reader = call
    if _stays(block, call, source):
        reader = source.next
        while reader.op == "placeholder":
            reader = reader.next
    with graph.inserting_before(reader):
        if conv is not None and (kept := kept_by_stride(conv)) is not None:
            source = graph.call_function(operator.getitem, (source, kept))
        return graph.call_function(squeeze, (source,))


def _stays(block: nn.Module, call: fx.Node, source: fx.Node) -> bool:
    """Whether nothing that uses a tensor, or another name of it, might write over it before the gate reads it."""

    def renames(node: fx.Node) -> bool:
        module = block.get_submodule(str(node.target)) if node.op == "call_module" else None
        return node.target is operator.getitem or (module is not None and passes_on(module))

    while renames(source):
        source = source.all_input_nodes[0]
    names = [source]
    while names:
        for user in names.pop().users:
            if renames(user):
                names.append(user)
                continue
            module = block.get_submodule(str(user.target)) if user.op == "call_module" else None
            reads = module is not None and is_plain_convolution(module)
            if user is not call and user.target is not squeeze and not reads:
                return False
    return True


def _refuse_training(merged: nn.Module, mode: bool = True) -> nn.Module:
    if mode and not _for_feature_extraction():
        raise UserError(
            f"a merged {type(merged).__name__} cannot be trained: its norms and gates are folded into other weights; "
            "train the network that it was merged from, and merge again"
        )
    return nn.Module.train(merged, False)


def is_merged(model: nn.Module) -> bool:
    """Whether some part of a network is in its deploy form."""
    return any(
        isinstance(module, MergedGate) or getattr(vars(module).get("train"), "func", None) is _refuse_training
        for module in model.modules()
    )


def _for_feature_extraction() -> bool:
    """Whether it is torchvision's (and timm's) feature extraction that asks for training mode.

    It traces a network in both modes, whichever it is used in.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_globals.get("__name__") in (__name__, nn.Module.train.__module__):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__") == feature_extraction.__name__
