"""One forward of a whole network on the meta device, which shows what each of its blocks really gets."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from cmpe_se.conversion.axes import ChannelAxes
from cmpe_se.conversion.stand_ins import StandIns, on_meta
from cmpe_se.errors import UserError
from cmpe_se.utils.randomness import random_states_kept
from cmpe_se.utils.text import in_one_line

ExampleInputs = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
"""What a network's forward takes: its one tensor, its positional arguments, or its arguments by name."""

_SIZES = {
    1: ((1024,), (5000,), (256,)),
    2: ((224,) * 2, (256,) * 2, (64,) * 2, (32,) * 2),
    3: ((16, 112, 112), (64,) * 3),
}
"""Sizes that networks are tried with, by dimension, where they do not say which they take."""
_BATCH = 2  # of one, a batch norm in training mode may refuse to take a mean


class BlockCall(NamedTuple):
    """What a block's forward got, on the meta device."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Recording:
    """What the modules of a network get in one forward in eval mode.

    Args:
        model: the network; it is left untouched.
        example_inputs: what its forward takes, of which shapes and dtypes alone are used. If left out, images of its
            own input size, as timm and transformers write it down, or of usual sizes.

    Raises:
        UserError: the network cannot take the example inputs.
    """

    def __init__(self, model: nn.Module, example_inputs: ExampleInputs | None = None):
        self._stand_ins = StandIns(model)
        self._calls: dict[int, list[BlockCall]] = {}
        self.axes = ChannelAxes()
        """Which axis of each tensor of the runs holds its channels; to be entered by runs of parts of the network."""
        self.stopped: str | None = None
        """Why the forward did not reach its end; None where it did."""
        if example_inputs is not None:
            self._calls, error = self._run(model, _as_call(example_inputs))
            if error is not None and not _lacks_numbers(error):
                raise UserError(f"{type(model).__name__} cannot take example_inputs: {in_one_line(error)}") from None
            self.stopped = _words(error)
            return
        for call in _possible_inputs(model):
            calls, error = self._run(model, call)
            if len(calls) > len(self._calls) or error is None:
                self._calls, self.stopped = calls, _words(error)
            if error is None or _lacks_numbers(error):
                break

    def call(self, module: nn.Module) -> BlockCall | None:
        """What a module got when it was first called; None if it was not."""
        calls = self._calls.get(id(self._stand_ins.of(module)))
        return calls[0] if calls else None

    def count(self, module: nn.Module) -> int:
        """How often a module was called."""
        return len(self._calls.get(id(self._stand_ins.of(module)), ()))

    def ran_inside(self, module: nn.Module) -> bool:
        """Whether some layer inside a module was called."""
        return any(self.call(layer) for layer in module.modules() if layer is not module)

    def stand_in(self, module: nn.Module) -> nn.Module:
        """The module's stand-in on the meta device."""
        return self._stand_ins.of(module)

    def _run(self, model: nn.Module, call: BlockCall) -> tuple[dict[int, list[BlockCall]], Exception | None]:
        calls: dict[int, list[BlockCall]] = defaultdict(list)

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Lists and dictionaries are copied: a forward may put other tensors into them.
            calls[id(module)].append(BlockCall(*tree_map(lambda value: value, (args, kwargs))))

        network, handles = self._stand_ins.of(model), []
        for module in network.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
        try:
            with torch.no_grad(), random_states_kept(), self.axes:
                network(*call.args, **call.kwargs)
        except Exception as error:  # whatever a network does with inputs that are not its own
            return calls, error
        finally:
            for handle in handles:
                handle.remove()
        return calls, None


def _as_call(inputs: ExampleInputs) -> BlockCall:
    given = on_meta(inputs)
    if isinstance(given, Mapping):
        return BlockCall((), dict(given))
    return BlockCall(tuple(given) if isinstance(given, (tuple, list)) else (given,), {})


def _words(error: Exception | None) -> str | None:
    return None if error is None else in_one_line(error)


def _lacks_numbers(error: Exception) -> bool:
    """Whether a forward stopped because it asks for values of tensors, which have none on the meta device."""
    return "meta" in str(error).lower()


def _possible_inputs(model: nn.Module) -> Iterator[BlockCall]:
    """Images, series or volumes, alone and in a list as detectors take them, the likeliest first."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)), None)
    if first is None:
        return
    dimension, usual = len(first.kernel_size), first.in_channels
    own = list(_own_sizes(model, dimension, usual))
    for shape in dict.fromkeys((*own, *((usual, *size) for size in _SIZES[dimension]))):
        batch = torch.zeros(_BATCH, *shape, device="meta", dtype=first.weight.dtype)
        yield BlockCall((batch,), {})
        yield BlockCall((list(batch),), {})


def _own_sizes(model: nn.Module, dimension: int, channels: int) -> Iterator[tuple[int, ...]]:
    """Channels and sizes that a network, or a part of it, says it is made for.

    Its first convolution knows best how many channels there are, unless something stands before it.
    """
    for module in model.modules():
        config = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None) or {}
        size = getattr(config, "input_size", None) or (
            config.get("input_size") if isinstance(config, Mapping) else None
        )
        if isinstance(size, (tuple, list)) and len(size) == dimension + 1:
            yield channels, *size[1:]
            yield tuple(size)
        side = getattr(module, "image_size", None) or getattr(getattr(module, "config", None), "image_size", None)
        if isinstance(side, int):
            yield channels, *((side,) * dimension)
        elif isinstance(side, (tuple, list)) and len(side) == dimension:
            yield channels, *side
