"""Shapes of the tensors inside a block, from a run of its graph on the meta device."""

import copy
from collections import OrderedDict
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from cmpe_se.conversion.axes import AxisTracker, Layout
from cmpe_se.conversion.convolutions import convolution_axes
from cmpe_se.conversion.tracing import first_sentence
from cmpe_se.conversion.unconvertible import Unconvertible

_SIDES = {1: 1024, 2: 64, 3: 64}  # of the feature maps that shapes are found with; kernels of signals are long
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def find_shapes(
    block: nn.Module, graph: fx.Graph, alike: dict[fx.Node, tuple[fx.Node, fx.Node]]
) -> dict[fx.Node, Layout]:
    """Shape of each tensor of a block's graph, and what its axes hold.

    Args:
        block: the block.
        graph: of its forward.
        alike: additions whose second operand, of those given, is taken to have the shape of the first.

    Raises:
        Unconvertible: the block cannot be run on its first argument alone.
    """
    first = next(node for node in graph.nodes if node.op == "placeholder")
    channels, axes = _input_channels(block, first), _input_axes(block, first)
    try:
        stand_in = _on_meta(block, {}).eval()
        recorder = _ShapeRecorder(stand_in, graph, alike)
        dtype = tensor_like(block).dtype
        with torch.no_grad(), recorder.tracker as tracker:
            recorder.run(
                tracker.mark_maps(torch.zeros(1, channels, *[_SIDES[axes]] * axes, device="meta", dtype=dtype))
            )
    except Exception as error:  # whatever a layer does with such a tensor
        raise Unconvertible(f"its shapes cannot be found ({first_sentence(error)})") from None
    return recorder.shapes


def tensor_like(block: nn.Module) -> Tensor:
    """A tensor of the block's device and dtype: the first of its weights."""
    tensors = (tensor for tensor in chain(block.parameters(), block.buffers()) if tensor.is_floating_point())
    return next(tensors, torch.empty(0))


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps the shape of each tensor."""

    def __init__(self, module: nn.Module, graph: fx.Graph, alike: dict[fx.Node, tuple[fx.Node, fx.Node]]):
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.alike = alike
        self.tracker = AxisTracker()
        self.shapes: dict[fx.Node, Layout] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node in self.alike:
            known, unknown = self.alike[node]
            self.shapes[unknown] = self.shapes[known]
            return self.env[known]
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.shapes[node] = self.tracker.layout(result)
        return result


def _on_meta(module: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """A stand-in of a module without hooks and numbers. No deep copy, which not every layer allows."""
    if id(module) in made:
        return made[id(module)]
    if isinstance(module, torch.jit.ScriptModule):
        return copy.deepcopy(module).to("meta")
    stand_in = made[id(module)] = object.__new__(type(module))
    state = {name: _tensor_on_meta(value) for name, value in vars(module).items()}
    state |= {name: OrderedDict() for name in _HOOKS}
    for name in ("_parameters", "_buffers"):
        state[name] = {key: _tensor_on_meta(tensor) for key, tensor in state[name].items()}
    state["_modules"] = {name: child and _on_meta(child, made) for name, child in state["_modules"].items()}
    state.pop("forward", None)  # that of an instance may hold the module itself
    vars(stand_in).update(state, _compiled_call_impl=None)
    return stand_in


def _tensor_on_meta(value: Any) -> Any:
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().to("meta"), requires_grad=False)
    return value.detach().to("meta") if isinstance(value, Tensor) else value


def _input_axes(block: nn.Module, placeholder: fx.Node) -> int:
    """Axes of the positions of the block's input: those of the first convolution on its way, or else two."""
    behind = {placeholder}
    for node in placeholder.graph.nodes:
        if behind.intersection(node.all_input_nodes):
            behind.add(node)
            if found := convolution_axes(block, node):
                return found[0]
    return 2


def _input_channels(block: nn.Module, placeholder: fx.Node) -> int:
    """Channels of the block's input: those of the first layer on its way that has a number of them."""
    behind = {placeholder}
    for node in placeholder.graph.nodes:
        if not behind.intersection(node.all_input_nodes):
            continue
        behind.add(node)
        if node.op != "call_module":
            continue
        for layer in block.get_submodule(str(node.target)).modules():
            if isinstance(channels := getattr(layer, "in_channels", None), int):
                return channels
            if isinstance(layer, nn.modules.batchnorm._BatchNorm):
                return layer.num_features
            if isinstance(layer, nn.GroupNorm):
                return layer.num_channels
    raise Unconvertible("the number of its input's channels cannot be found")
