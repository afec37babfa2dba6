"""Shapes of the tensors inside a block, from a run of its graph on the meta device."""

import inspect
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx, nn

from cmpe_se.conversion.axes import ChannelAxes, Seen
from cmpe_se.conversion.recording import BlockCall, Recording
from cmpe_se.conversion.tracing import first_sentence
from cmpe_se.conversion.unconvertible import Unconvertible

_SIDE = 64  # pixels of the images that shapes are found with where no run of the network shows others


def find_shapes(
    block: nn.Module,
    graph: fx.Graph,
    alike: dict[fx.Node, tuple[fx.Node, fx.Node]],
    recording: Recording,
) -> dict[fx.Node, Seen]:
    """Shape and channels' axis of each tensor of a block's graph.

    Args:
        block: the block.
        graph: of its forward.
        alike: additions whose second operand, of those given, is taken to have the shape of the first.
        recording: of a run of the network; a block that it did not call is tried with its first argument alone.

    Raises:
        Unconvertible: the block cannot be run on that.
    """
    stand_in, call, axes = recording.stand_in(block), recording.call(block), recording.axes
    recorder = _ShapeRecorder(stand_in, graph, alike, axes)
    try:
        inputs = _guess(block, graph) if call is None else _in_order(stand_in, graph, call)
        with torch.no_grad(), axes:
            recorder.run(*inputs)
    except Unconvertible:
        raise
    except Exception as error:  # whatever a layer does with such a tensor
        raise Unconvertible(f"its shapes cannot be found ({first_sentence(error)})") from None
    return recorder.seen


def _guess(block: nn.Module, graph: fx.Graph) -> list[Any]:
    first = next(node for node in graph.nodes if node.op == "placeholder")
    channels = _input_channels(block, first)
    return [torch.zeros(1, channels, _SIDE, _SIDE, device="meta", dtype=tensor_like(block).dtype)]


def _in_order(stand_in: nn.Module, graph: fx.Graph, call: BlockCall) -> list[Any]:
    """What a block gets, in the order of its graph's arguments."""
    bound = inspect.signature(stand_in.forward).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    names = [str(node.target) for node in graph.nodes if node.op == "placeholder"]
    inputs = [given[name] for name in names if not name.startswith("*")]
    return [*inputs, *(value for name in names if name[:1] == "*" != name[1:2] for value in given[name[1:]])]


def tensor_like(block: nn.Module) -> Tensor:
    """A tensor of the block's device and dtype: the first of its weights."""
    tensors = (tensor for tensor in chain(block.parameters(), block.buffers()) if tensor.is_floating_point())
    return next(tensors, torch.empty(0))


class _ShapeRecorder(fx.Interpreter):
    """Runs a graph and keeps what is known of each tensor."""

    def __init__(
        self, module: nn.Module, graph: fx.Graph, alike: dict[fx.Node, tuple[fx.Node, fx.Node]], axes: ChannelAxes
    ):
        super().__init__(module, garbage_collect_values=True, graph=graph)
        self.alike, self.axes = alike, axes
        self.seen: dict[fx.Node, Seen] = {}

    def run_node(self, node: fx.Node) -> Any:
        if node in self.alike:
            known, unknown = self.alike[node]
            if self.seen[unknown].shape != self.seen[known].shape:
                self.seen[unknown] = self.seen[known]
                return self.env[known]
        result = super().run_node(node)
        if isinstance(result, Tensor):
            self.seen[node] = self.axes.seen(result)
        return result


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
