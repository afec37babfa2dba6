"""The gates of a network for some images, and nothing else about them: what watching a training can afford."""

from typing import Any

import torch
from torch import Tensor, nn

from cmpe_se.inspecting.inspect import BlockView, find_gates
from cmpe_se.inspecting.listening import in_eval_mode, listen_to_factors, mean_factor, uncompiled
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.merged_gate import MergedGate


@torch.no_grad()
def gate_values(model: nn.Module, images: Tensor) -> list[BlockView]:
    """Gates as :func:`cmpe_se.inspect_gates` has them, in eval mode; all that is not a gate is None.

    Compiled networks run eagerly here. The network is left as it was.

    Args:
        model: with gates.
        images: (N, channels, ...), on the network's device and in its dtype.

    Raises:
        UserError: a network without gates, or with one whose factors cannot be seen.
    """
    seen: list[BlockView] = []
    handles: list[Any] = []
    try:
        for name, gate in find_gates(model).items():
            handles += _listen(name, gate, seen)
        with in_eval_mode(model), uncompiled(model):
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _listen(name: str, gate: CompetitiveSE | MergedGate, seen: list[BlockView]) -> list[Any]:
    def keep(values: Tensor) -> None:
        nothing = (None,) * 4
        seen.append(BlockView(name, gate.view, gate.gain, *nothing, gate.gain * values.float(), None, None, None))

    if not hasattr(gate, "map_gate"):
        last = gate.get_submodule("excite" if hasattr(gate, "excite") else "fc2")
        return [last.register_forward_hook(lambda _, __, logits: keep(logits.detach().sigmoid()))]
    factors: list[Tensor] = []

    def added(_: nn.Module, __: object, ___: Tensor) -> None:
        keep(mean_factor(factors))
        factors.clear()

    return [*listen_to_factors(name, gate, factors), gate.register_forward_hook(added)]
