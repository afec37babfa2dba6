"""Residual additions of a network, found without torch.fx: from the operations that one run of it dispatches.

Every tensor of the run knows which operations it was computed from. An addition of two tensors (N, C, ...) of one
shape, both of which come from one tensor and one of which has more convolutions behind it since then, is a residual
addition.
Nothing here is shared with ``cmpe_se.conversion``, which reads the code of forwards, so that the two can disagree.
"""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from benchmarks.census_parts.axes import CONVOLUTIONS, LINEAR, Channels, channels_after
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


class Sum(NamedTuple):
    """An addition of two feature maps that come from one tensor.

    Args:
        module: name of the module in whose forward it stands.
        shape: (N, C, ...) of each operand and of the sum.
        convolutions: behind the first and the second operand, since they parted. A residual addition has more behind
            one; of two branches with as many, one may still be a projection, which this does not decide.
        inside: whether both operands come from one input of that module's forward. Else it joins several inputs: a
            feature pyramid, the decoder of a U-Net, a shortcut that the caller computes.
    """

    module: str
    shape: tuple[int, ...]
    convolutions: tuple[int, int]
    inside: bool

    @property
    def residual(self) -> bool:
        """Whether one operand has more convolutions behind it."""
        return self.convolutions[0] != self.convolutions[1]


class Sums(NamedTuple):
    """What a run says.

    Args:
        found: additions; of each module as many as its forward made in one call at most.
        macs: multiply-adds of convolutions and matrix products.
    """

    found: list[Sum]
    macs: int


def watch(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sums:
    """Run a network once and list its additions of branches.

    Args:
        model: on any device; on the meta device nothing is computed.
        args: of its forward.
        kwargs: of its forward.

    Raises:
        Exception: what the network raises.
    """
    ledger = _Ledger((args, kwargs))
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    with torch.no_grad(), _frames(ledger, names), ledger:
        model(*args, **kwargs)
    most: dict[str, list[Sum]] = defaultdict(list)
    for call in ledger.calls:
        if len(call.sums) > len(most[call.module]):
            most[call.module] = call.sums
    return Sums([addition for sums in most.values() for addition in sums], ledger.macs)


class _Call:
    """One call of a module's forward."""

    def __init__(self, module: str, first: int):
        self.module = module
        self.first = first  # number of the first operation in it
        self.sums: list[Sum] = []


class _Ledger(TorchDispatchMode):
    """Operations by number, each with all that it depends on as a set of bits."""

    def __init__(self, inputs: Any) -> None:
        super().__init__()
        self.numbers: dict[int, int] = {}  # of the operation that made a tensor, by its identity
        self.kept: list[Tensor] = []  # an identity is a tensor's for as long as the tensor lives
        self.sources: list[tuple[int, ...]] = []
        self.behind: list[int] = []
        self.channels: list[Channels | None] = []
        self.convolutions = 0
        self.macs = 0
        self.running: list[_Call] = []
        self.calls: list[_Call] = []
        for value in tree_leaves(inputs):
            if isinstance(value, Tensor) and value.is_floating_point():
                self._write_down(value, (), Channels(1, value.shape[1], value.ndim) if value.ndim > 1 else None)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        if function in _ADDITIONS and self.running and len(tensors) == 2:
            self._note(*tensors)
        sources = tuple(dict.fromkeys(self.numbers[id(value)] for value in tensors if id(value) in self.numbers))
        known = [(tuple(value.shape), self._known(value)) for value in tensors]
        known = [(shape, channels) for shape, channels in known if channels]
        result = function(*args, **(kwargs or {}))
        name = str(function)
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and sources:  # what depends on no input is a constant
                self._write_down(value, sources, channels_after(name, args, known, tuple(value.shape)))
                if name in CONVOLUTIONS:
                    self.convolutions |= 1 << (len(self.sources) - 1)
        if name in CONVOLUTIONS:
            self.macs += result.numel() * math.prod(tensors[1].shape[1:])
        elif name in LINEAR:
            self.macs += result.numel() * tensors[-2].shape[-1]
        return result

    def enter(self, module: str) -> None:
        """A module's forward begins."""
        self.running.append(_Call(module, len(self.sources)))
        self.calls.append(self.running[-1])

    def leave(self) -> None:
        """A module's forward is over."""
        self.running.pop()

    def _write_down(self, tensor: Tensor, sources: tuple[int, ...], channels: Channels | None) -> None:
        behind = 1 << len(self.sources)
        for source in sources:
            behind |= self.behind[source]
        self.numbers[id(tensor)] = len(self.sources)
        self.sources.append(sources)
        self.behind.append(behind)
        self.channels.append(channels)
        self.kept.append(tensor)

    def _known(self, tensor: Tensor) -> Channels | None:
        number = self.numbers.get(id(tensor))
        return None if number is None else self.channels[number]

    def _note(self, one: Tensor, other: Tensor) -> None:
        first, second = self.numbers.get(id(one)), self.numbers.get(id(other))
        if first is None or second is None or first == second or one.shape != other.shape or one.ndim < 3:
            return
        known = [channels for channels in (self.channels[first], self.channels[second]) if channels]
        if {channels.axis for channels in known if not channels.hidden} != {1} or one.shape[1] == 1:
            return  # not (N, C, ...), or a map of one channel, as attention is made of
        common = self.behind[first] & self.behind[second]
        branches = [(self.behind[number] & ~common & self.convolutions).bit_count() for number in (first, second)]
        if common and any(branches):
            call = self.running[-1]
            inside = bool(self._entrances(call, first) & self._entrances(call, second))
            call.sums.append(Sum(call.module, tuple(one.shape), (branches[0], branches[1]), inside))

    def _entrances(self, call: _Call, number: int) -> set[int]:
        """What of before a call a tensor was computed from within it."""
        seen: set[int] = set()
        waiting = [number]
        while waiting:
            step = waiting.pop()
            if step not in seen:
                seen.add(step)
                waiting += self.sources[step] if step >= call.first else ()
        return {step for step in seen if step < call.first}


@contextmanager
def _frames(ledger: _Ledger, names: dict[nn.Module, str]) -> Iterator[None]:
    """Tell the ledger of each call of a module of the network."""

    def enter(module: nn.Module, args: Any) -> None:
        if module in names:
            ledger.enter(names[module])

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        if module in names:
            ledger.leave()

    handles = [
        hooks_of_all.register_module_forward_pre_hook(enter),
        hooks_of_all.register_module_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
