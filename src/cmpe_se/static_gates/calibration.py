"""Static gates in the place of trained ones: each the mean of the gate over calibration images.

A static gate disappears in the convolution or norm before it (:func:`cmpe_se.merge`), and costs nothing. What the
network loses with it differs from block to block, and a gate's spread over images tells little of it. So the network is
run with each gate frozen in turn, and what comes out is compared.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cmpe_se.errors import UserError
from cmpe_se.inspecting.inspect import look
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.merged_gate import MergedGate
from cmpe_se.layers.static_twin import dynamic_gates, put_gate, static_twin
from cmpe_se.utils.copying import copy_network
from cmpe_se.utils.wrappers import unwrapped

Images = Tensor | Iterable[Any]
"""Normalised images (N, C, H, W), or batches of them: tensors, or tuples whose first part is one."""
Progress = Callable[[Iterable[str], str], Iterable[str]]
"""Shows how far a loop is, of which it gets the values and a word for them."""


def _silent(values: Iterable[str], _: str) -> Iterable[str]:
    return values


def with_static_gates(
    model: nn.Module,
    static: str | int | Sequence[str] = "all",
    *,
    images: Images | None = None,
) -> nn.Module:
    """A copy in which some gates are static: the mean of each over calibration images, whatever the image.

    They are gates of the view ``static``, and can be trained further. :func:`cmpe_se.merge` makes them disappear.

    Args:
        model: a network with gates, of cmpe_se, converted, or with ``CompetitiveSE`` as a layer; not a merged one.
        static: ``all``; a number of gates, those whose freezing changes the output least, one by one
            (:meth:`Calibration.effects`); or names of blocks, in which ``*`` stands for anything.
        images: calibration images, at least two, normalised as for training: a tensor (N, C, H, W) (or what else the
            network takes), or batches of such, of which labels are ignored. Some hundred, as the network will see.

    Returns:
        The copy. Gates that are static already stay as they are.

    Raises:
        UserError: no images, no gate that depends on the image, a block that is not there, a merged network, or gates
            that differ from position to position (``timm_cbam``, ``aff``), which no static gate can stand for.
    """
    calibration = Calibration(model, images)
    return calibration.frozen(calibration.choose(static))


class Calibration:
    """A network, and what its gates are for calibration images.

    Args:
        model: as of :func:`with_static_gates`; it is copied, and left as it was.
        images: as there.

    Raises:
        UserError: as there.
    """

    def __init__(self, model: nn.Module, images: Images | None):
        self.model = copy_network(_with_gates(unwrapped(model)), "take a network that can be copied").eval()
        self._batches = _batches(images)
        gates = dynamic_gates(self.model)
        self.means: dict[str, Tensor] = {}
        """Names of the blocks whose gates can be static, in the network's order, to the means, (C,), float64."""
        sums: dict[str, Tensor] = {}
        counts: dict[str, int] = {}
        self._outputs = []
        for batch in self._batches:
            output, views = look(self.model, batch)
            self._outputs.append(_leaves(output))
            for view in views:
                if view.name in gates and not gates[view.name].kind.by_position:
                    sums[view.name] = sums.get(view.name, 0) + view.gate.double().sum(0)
                    counts[view.name] = counts.get(view.name, 0) + len(view.gate)
        self.means = {name: sums[name] / counts[name] for name in gates if name in sums}
        self._others = {name: gate.view for name, gate in gates.items() if gate.kind.by_position}
        self._uncalled = [name for name in gates if name not in sums and name not in self._others]

    def choose(self, static: str | int | Sequence[str], progress: Progress = _silent) -> list[str]:
        """Names of the blocks that ``static`` means, see :func:`with_static_gates`."""
        if isinstance(static, bool) or (isinstance(static, int) and not 1 <= static <= len(self.means)):
            raise UserError(f"static is {static}, should be from 1 to {len(self.means)}, the number of gates, or 'all'")
        if isinstance(static, int):
            effects = self.effects(progress)
            return sorted(effects, key=lambda name: effects[name])[:static]
        patterns = ["*"] if static == "all" else [static] if isinstance(static, str) else list(static)
        known = [*self.means, *self._others, *self._uncalled]
        chosen = {name for name in known if any(fnmatchcase(name, pattern) for pattern in patterns)}
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UserError(
                    f"static names no block with a gate that depends on the image: {pattern}; there are "
                    f"{', '.join(known)}"
                )
        if bad := next((name for name in self._others if name in chosen), None):
            raise UserError(
                f"the gate of {bad} (view '{self._others[bad]}') differs from position to position: no static gate can "
                "stand for it"
            )
        if bad := next((name for name in self._uncalled if name in chosen), None):
            raise UserError(f"the network did not call the gate of {bad}, so that its mean is not known")
        return [name for name in self.means if name in chosen]

    @torch.no_grad()
    def effects(self, progress: Progress = _silent) -> dict[str, float]:
        """What freezing each gate alone does to the output: its squared change over its variance from image to image.

        0 where nothing changes; 1 where the change is as large as the difference between images.

        Raises:
            UserError: outputs that cannot be compared, such as a detector's boxes.
        """
        effects = {}
        for name in progress(list(self.means), "freezing each gate in turn"):
            with self.freezing([name]) as frozen:
                effects[name] = self._change(frozen)
        return effects

    @contextmanager
    def freezing(self, blocks: Iterable[str]) -> Iterator[nn.Module]:
        """The network in eval mode, in which the gates of some blocks are static for the time being."""
        gates = dynamic_gates(self.model)
        twins = {name: static_twin(gates[name], self.means[name]) for name in blocks}
        try:
            for name, twin in twins.items():
                put_gate(self.model, gates[name], twin)
            yield self.model
        finally:
            for name, twin in twins.items():
                put_gate(self.model, twin, gates[name])

    def frozen(self, blocks: Iterable[str]) -> nn.Module:
        """A copy in eval mode in which the gates of some blocks are static."""
        with self.freezing(blocks) as network:
            return copy_network(network, "take a network that can be copied")

    def _change(self, network: nn.Module) -> float:
        changed, variance = 0.0, 0.0
        shapes = {tuple(tuple(leaf.shape[1:]) for leaf in leaves) for leaves in self._outputs}
        if len(shapes) != 1 or not all(self._outputs):
            raise UserError("the network's outputs for different images cannot be compared; name the blocks in static")
        number = sum(len(leaves[0]) for leaves in self._outputs)
        for part in range(len(self._outputs[0])):
            mean = sum(leaves[part].sum(0) for leaves in self._outputs) / number
            variance += sum((leaves[part] - mean).square().sum().item() for leaves in self._outputs)
        like = next(network.parameters())
        for batch, before in zip(self._batches, self._outputs, strict=True):
            after = _leaves(network(batch.to(like)))
            for old, new in zip(before, after, strict=True):
                changed += (old - new).square().sum().item()
        return changed / variance if variance else float(changed > 0)


def _with_gates(model: nn.Module) -> nn.Module:
    if any(isinstance(module, MergedGate) for module in model.modules()):
        raise UserError(
            f"this {type(model).__name__} is merged: its gates are two linear maps by now; make gates static in the "
            "network that it was merged from"
        )
    if isinstance(model, CompetitiveSE) or not dynamic_gates(model):
        raise UserError(
            f"{type(model).__name__} has no gate that depends on the image; give a network with gates (cmpe_se.convert "
            "adds them)"
        )
    return model


def _batches(images: Images | None) -> list[Tensor]:
    if images is None:
        raise UserError(
            "a static gate is the mean over calibration images, and there are none; give images=, a tensor "
            "(N, C, H, W) or batches of them"
        )
    given = [images] if isinstance(images, Tensor) else list(images)
    batches = []
    for batch in given:
        tensor = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(tensor, Tensor):
            raise UserError(
                f"calibration images are tensors (N, C, H, W) or batches of them, got {type(batch).__name__}"
            )
        batches.append(tensor)
    if (number := sum(map(len, batches))) < 2:
        raise UserError(
            f"{number} calibration image(s); the mean over images needs two at least, and some hundred are good"
        )
    return batches


def _leaves(output: Any) -> list[Tensor]:
    """The tensors (N, ...) of an output, float32 or wider."""
    leaves = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return [leaf.to(torch.promote_types(leaf.dtype, torch.float32)) for leaf in leaves]
