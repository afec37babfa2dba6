"""Input and output of every gate of a network, for some images.

Nothing is computed a second time that the network computes itself: hooks listen while the images go through it, and are
gone afterwards. A gate is called in two ways. In converted networks, and wherever ``CompetitiveSE`` stands as a layer,
it gets residual and identity whole. Our own blocks hand it squeezes alone; there the gated residual is what the block
added to its shortcut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from cmpe_se.conversion.convolutions import axes_of
from cmpe_se.errors import UserError
from cmpe_se.inspecting.listening import in_eval_mode, listen_to_factors, mean_factor
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.gated_addition import squeeze
from cmpe_se.layers.merged_gate import MergedGate
from cmpe_se.layers.picture_layers import map_size
from cmpe_se.layers.static_twin import by_block
from cmpe_se.layers.views import find_view
from cmpe_se.networks.blocks import PreActBlock


@dataclass(frozen=True, eq=False)
class BlockView:
    """One gate, and what it did for N images; C is the number of its channels.

    Args:
        name: of the block, as ``model.get_submodule`` takes it (of the gate itself where a block has several).
        view: how the gate reads the squeezes, one of :data:`cmpe_se.VIEWS`.
        gain: the largest value of its gates: 1, or 2 where they start at one (4 of ``timm_cbam``).
        residual_squeeze: r, (N, C); None where only a merged gate of a foreign block knows it.
        identity_squeeze: i, (N, C), also where the gate does not look at it; None likewise.
        picture: what the map convolution read, (N, 1, height, width); None for views without one, and for merged gates.
        map: the mean over the maps, (N, height', width'), which the excitation read; None likewise.
        gate: a, (N, C) in (0, gain); its mean over the positions where it differs between them (``timm_cbam``,
            ``aff``).
        attentional_picture: the picture after gating, drawn from a * r and i; None where there is no picture.
        identity_energy: mean of s squared over all positions, (N, C); None where the gate was not seen adding.
        residual_energy: the same of a * u, what the residual adds to it. (``aff`` scales the identity too; both
            energies are then those of the scaled flows.)
    """

    name: str
    view: str
    gain: float
    residual_squeeze: Tensor | None
    identity_squeeze: Tensor | None
    picture: Tensor | None
    map: Tensor | None
    gate: Tensor
    attentional_picture: Tensor | None
    identity_energy: Tensor | None
    residual_energy: Tensor | None

    @property
    def neutral(self) -> float:
        """Value of a gate whose logits are 0, where all begin: 1/2 or, in networks that start at one, 1."""
        return self.gain * find_view(self.view).half

    @property
    def residual_share(self) -> Tensor | None:
        """Part of residual and identity that is residual, (N,) from 0 to 1, by energy over all channels and pixels."""
        if self.residual_energy is None or self.identity_energy is None:
            return None
        residual, identity = self.residual_energy.sum(1), self.identity_energy.sum(1)
        return residual / (residual + identity).clamp(min=torch.finfo(residual.dtype).tiny)


def inspect_gates(model: nn.Module, images: Tensor) -> list[BlockView]:
    """Squeezes, picture, map and gate of every competitive block, for some images.

    The network is looked at as it is in eval mode, whatever mode it is in, and is left as it was: weights, statistics,
    modes and hooks. A batch's own statistics, which a norm uses in training, are nothing that one image has.

    Args:
        model: a network with gates: of cmpe_se, converted, merged, or any that has ``CompetitiveSE`` as a layer.
        images: normalised as for training, (N, channels, H, W), or the signals (N, channels, L), volumes or clips
            (N, channels, D, H, W) that the network takes; they are brought to its device and dtype.

    Returns:
        A view of each gate in the order in which they ran, on the network's device, without gradients.

    Raises:
        UserError: a network without gates, or images that are none.
    """
    return look(model, images)[1]


def gated_blocks(model: nn.Module) -> list[str]:
    """Names of the blocks that :func:`inspect_gates` shows, in the network's order; UserError where there are none."""
    return list(find_gates(model))


@torch.no_grad()
def look(model: nn.Module, images: Tensor) -> tuple[Any, list[BlockView]]:
    """What the network puts out for the images, and what :func:`inspect_gates` returns."""
    model = getattr(model, "_orig_mod", model)  # of a compiled network, which would not call what listens
    gates = find_gates(model)
    if not isinstance(images, Tensor) or images.ndim < 2 or not images.is_floating_point() or not len(images):
        raise _not_images(model, images)
    like = next(model.parameters())
    seen: list[dict[str, Any]] = []
    handles = []
    try:
        for name, gate in gates.items():
            ours = gate.takes_squeezes and isinstance(model.get_submodule(name), PreActBlock)
            handles += _listen(name, gate, seen, called=not ours)
        for name, block in model.named_modules():
            if isinstance(block, PreActBlock) and name in gates and gates[name].takes_squeezes:
                made: dict[str, Tensor] = {}
                kind = find_view(gates[name].view)
                if kind.mixed or "residual" not in kind.reads:  # r by itself is nowhere but where the residual is made
                    handles.append(block.last_conv.register_forward_hook(partial(_keep_squeeze, made)))
                handles.append(block.register_forward_hook(partial(_after_block, seen, gates[name], made)))
        with in_eval_mode(model):
            output = model(images.to(like))
    except Exception as error:
        if images.ndim == _usual_axes(model) + 2 or isinstance(error, torch.OutOfMemoryError):
            raise
        raise _not_images(model, images) from error  # such as one image without a batch
    finally:
        for handle in handles:
            handle.remove()
    return output, [_view(record) for record in seen]


def _usual_axes(model: nn.Module) -> int:
    """Axes of the positions that the first convolution of a network takes; two where it has none."""
    inside = {part for gate in find_gates(model).values() for part in gate.modules()}  # pictures of gates are images
    return next((axes for layer in model.modules() if layer not in inside and (axes := axes_of(layer))), 2)


def _not_images(model: nn.Module, images: object) -> UserError:
    got = f"{images.dtype} {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
    sizes = {1: "L", 2: "H, W", 3: "D, H, W"}[_usual_axes(model)]
    return UserError(f"images have to be a float tensor (N, channels, {sizes}) of at least one image, got {got}")


def find_gates(model: nn.Module) -> dict[str, CompetitiveSE | MergedGate]:
    """Block names to gates, in the network's order; raises UserError where there are none."""
    if not isinstance(model, nn.Module):
        raise UserError(f"inspect looks into a network (torch.nn.Module), got {type(model).__name__}")
    full = {name: module for name, module in model.named_modules() if isinstance(module, (CompetitiveSE, MergedGate))}
    if "" in full:
        raise UserError(
            "inspect looks into a network, and this is a gate by itself; its gate() and picture() are public"
        )
    if not full:
        raise UserError(f"{type(model).__name__} has no gates; cmpe_se.convert adds them")
    return {block: full[name] for block, name in by_block(full).items()}


def _listen(name: str, gate: CompetitiveSE | MergedGate, seen: list[dict[str, Any]], *, called: bool) -> list[Any]:
    """Hooks on a gate and its layers; each call of it leaves one record in ``seen``.

    A gate that is not ``called`` gets none itself: a block of our own networks hands squeezes to its layers, and would
    call it only for the hook.
    """
    parts: dict[str, Tensor] = {}  # of the current call

    def keep(part: str) -> Callable:
        return lambda _, inputs: parts.update({part: inputs[0].detach()})

    def keep_flows(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        residual, identity = inputs[:2]
        parts.update(r=squeeze(residual), i=squeeze(identity), residual=_energy(residual), identity=_energy(identity))

    def decided(_: nn.Module, __: object, logits: Tensor) -> None:
        decision = gate.gain * logits.detach().sigmoid()
        record: dict[str, Any] = {"name": name, "module": gate, "gate": decision, **parts}
        if "residual" in parts:
            record["residual"] = decision.square() * parts["residual"]
        parts.clear()
        seen.append(record)

    if hasattr(gate, "map_gate"):
        heard = _listen_to_maps(name, gate, seen, parts)
        return [gate.register_forward_pre_hook(keep_flows), *heard]
    handles = [gate.register_forward_pre_hook(keep_flows)] if called else []
    for child, layer in gate.named_children():
        if child in ("fc2", "excite"):
            handles.append(layer.register_forward_hook(decided))
        elif child != "map_norm":
            handles.append(layer.register_forward_pre_hook(keep(child)))
    return handles


def _listen_to_maps(
    name: str, gate: CompetitiveSE | MergedGate, seen: list[dict[str, Any]], parts: dict[str, Tensor]
) -> list[Any]:
    """Hooks on a gate that takes whole maps."""
    layers = find_view(gate.view).layers
    factors: list[Tensor] = []

    def added(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        kept = inputs[1]
        if layers.scales_identity:
            kept = (gate.gain * (1 - factors[0]).flatten(2) * kept.flatten(2)).unflatten(2, kept.shape[2:])
        record: dict[str, Any] = {"name": name, "module": gate, "gate": gate.gain * mean_factor(factors), **parts}
        seen.append(record | {"identity": _energy(kept), "residual": _energy(output - kept)})
        parts.clear()
        factors.clear()

    return [*listen_to_factors(name, gate, factors), gate.register_forward_hook(added)]


def _keep_squeeze(made: dict[str, Tensor], _: nn.Module, __: object, output: Tensor) -> None:
    made["residual_squeeze"] = squeeze(output)


def _after_block(
    seen: list[dict[str, Any]],
    gate: CompetitiveSE | MergedGate,
    made: dict[str, Tensor],
    block: PreActBlock,
    inputs: tuple,
    output: tuple,
) -> None:
    """Split what one of our own blocks returned into the shortcut and what was added to it."""
    x, y = inputs[0], output[0]
    # The layers' own forwards: other hooks must not run a second time.
    shortcut = x if block.shortcut is None else block.shortcut.forward(torch.relu(block.bn1.forward(x)))
    record = next(record for record in reversed(seen) if record["module"] is gate)
    added = y - shortcut
    record.update(shortcut=squeeze(shortcut), identity=_energy(shortcut), residual=_energy(added), **made)


def _view(record: dict[str, Any]) -> BlockView:
    gate, module = record["gate"], record["module"]
    residual, identity = _squeezes(record)
    picture = record.get("map_conv") if find_view(module.view).form == "picture" else None
    return BlockView(
        name=record["name"],
        view=module.view,
        gain=module.gain,
        residual_squeeze=residual,
        identity_squeeze=identity,
        picture=picture,
        map=None if picture is None else record["fc1"].unflatten(1, map_size(module)),
        gate=gate,
        attentional_picture=None if picture is None else module.picture(residual * gate, identity),
        identity_energy=record.get("identity"),
        residual_energy=record.get("residual"),
    )


def _squeezes(record: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """r and i of a call: as the gate read them or, where it does not look at both, from the flows themselves."""
    gate, kind = record["module"], find_view(record["module"].view)
    merged = isinstance(gate, MergedGate)
    if "r" in record and (merged or kind.form != "picture"):
        return record["r"], record["i"]
    if merged:
        residual, identity = _told_by_merged(gate, record["read"])
    else:
        residual, identity = kind.layers.told(kind.reads, record)
    return (
        record.get("residual_squeeze") if residual is None else residual,
        record.get("shortcut") if identity is None else identity,
    )


def _told_by_merged(gate: MergedGate, read: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The squeezes that a merged gate of one of our own blocks reads side by side."""
    if gate.reads_residual and gate.competitive:
        channels = gate.excite.out_features
        if read.shape[1] != 2 * channels:
            return None, None
        residual, identity = read.chunk(2, dim=1)
        return residual, identity
    return (read, None) if gate.reads_residual else (None, read)


def _energy(x: Tensor) -> Tensor:
    """Mean square over all positions, (N, C, ...) to (N, C)."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().mean(dim=tuple(range(2, x.ndim)))
