"""Widths of a network's layers: channels taken out of it, and a network of given widths made from the whole one.

Widths are what a pruned network is built again from: names of layers to their numbers of channels in and out,
``{"layer1.0.conv1": [64, 40]}``; a block that is gone has ``[0, 0]``. They stand in config.json as they are.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.static_twin import put_gate
from cmpe_se.networks.blocks import PreActBlock, RemovedBlock

Widths = dict[str, list[int]]
"""Name of a layer to its channels in and out; ``[0, 0]`` for a block that is gone."""
GONE = [0, 0]


def channels_of(layer: nn.Module) -> list[int] | None:
    """Channels that a layer takes and gives; None of a module whose channels are not known here."""
    if is_parametrized(layer):
        return None
    if isinstance(layer, _ConvNd):
        return None if layer.transposed else [layer.in_channels, layer.out_channels]
    if isinstance(layer, nn.Linear):
        return [layer.in_features, layer.out_features]
    if isinstance(layer, _BatchNorm):
        return [layer.num_features] * 2
    if isinstance(layer, nn.LayerNorm):
        return [layer.normalized_shape[0]] * 2 if len(layer.normalized_shape) == 1 else None
    if isinstance(layer, CompetitiveSE):
        return [layer.channels] * 2
    return None


def is_grouped(layer: nn.Module) -> bool:
    """Whether a convolution is in groups that are neither one nor as many as its channels."""
    return isinstance(layer, _ConvNd) and layer.groups > 1 and not is_depthwise(layer)


def is_depthwise(layer: nn.Module) -> bool:
    """Whether a convolution looks at each channel by itself, and gives as many."""
    return isinstance(layer, _ConvNd) and layer.groups > 1 and layer.in_channels == layer.out_channels == layer.groups


@torch.no_grad()
def narrow(layer: nn.Module, *, inputs: Tensor | None = None, outputs: Tensor | None = None) -> None:
    """Keep some channels of a layer, and let go of the others.

    Args:
        layer: a convolution (not one in groups, but depthwise ones), linear layer, batch norm or layer norm.
        inputs: numbers of the channels to keep of those that it takes; all if left out. One that gives what it takes
            (a norm, a depthwise convolution) keeps the same on both sides.
        outputs: of those that it gives.
    """
    taken, given = channels_of(layer) or GONE
    if isinstance(layer, (_BatchNorm, nn.LayerNorm)) or is_depthwise(layer):
        inputs, outputs = None, inputs if outputs is None else outputs
    for name, tensor in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        kept = tensor
        if outputs is not None and tensor.ndim and len(tensor) == given:
            kept = kept.index_select(0, outputs.to(tensor.device))
        if inputs is not None and tensor.ndim > 1 and tensor.shape[1] == taken:
            kept = kept.index_select(1, inputs.to(tensor.device))
        if kept is tensor:
            continue
        if isinstance(tensor, nn.Parameter):
            setattr(layer, name, nn.Parameter(kept, tensor.requires_grad))
        else:
            setattr(layer, name, kept)
    _set_channels(layer, None if inputs is None else len(inputs), None if outputs is None else len(outputs))


def _set_channels(layer: Any, inputs: int | None, outputs: int | None) -> None:
    if isinstance(layer, _BatchNorm):
        layer.num_features = layer.num_features if outputs is None else outputs
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = layer.normalized_shape if outputs is None else (outputs,)
    elif isinstance(layer, nn.Linear):
        layer.in_features = layer.in_features if inputs is None else inputs
        layer.out_features = layer.out_features if outputs is None else outputs
    elif isinstance(layer, _ConvNd):
        if is_depthwise(layer) and outputs is not None:
            layer.groups = layer.in_channels = outputs
        layer.in_channels = layer.in_channels if inputs is None else inputs
        layer.out_channels = layer.out_channels if outputs is None else outputs


def gate_of(old: CompetitiveSE, channels: int) -> CompetitiveSE:
    """A fresh gate for another number of channels, at its start, with the settings of an older one.

    The picture and its maps follow the general rules for that number of channels.

    Raises:
        ValueError: channels that do not fold.
    """
    like = next(old.parameters())
    new = CompetitiveSE(
        channels,
        view=old.view,
        start=old.start,
        reduction=old.reduction,
        min_hidden=old.min_hidden,
        bias=old.sizes.bias,
        mask=old.mask,
        device=like.device,
        dtype=like.dtype,
    )
    new.gain = old.gain  # which in a converted network may hold a factor of its addition
    return new.train(old.training)


def remove_block(model: nn.Module, name: str) -> None:
    """Take the residual branch of a block away, so that the block hands on what it gets."""
    block = model.get_submodule(name)
    put_gate(model, block, RemovedBlock() if isinstance(block, PreActBlock) else nn.Identity())


def resize(model: Any, widths: Mapping[str, Sequence[int]]) -> None:
    """Give a fresh network the widths of a pruned one; the network is changed.

    The classifier's outputs and the channels of the images stay its own: it may be made for other classes or images.

    Args:
        model: the whole network, as its name builds it.
        widths: of the layers that differ from it, see :data:`Widths`.

    Raises:
        ValueError: a layer that is not there or cannot have such a width.
    """
    modules = dict(model.named_modules())
    classifier = classifier_of(model)
    stem = next((layer for layer in modules.values() if isinstance(layer, _ConvNd)), None)
    for name, pair in widths.items():
        layer = modules.get(name)
        if layer is None or not name:
            raise ValueError(f"widths names no layer of this {type(model).__name__}: {name!r}")
        if not _is_pair(pair):
            raise ValueError(f"widths of {name} are {pair!r}, should be two numbers, of channels in and out")
        if list(pair) == GONE:
            remove_block(model, name)
            continue
        if layer is classifier and isinstance(layer, nn.Identity):  # of a network for features
            if hasattr(model, "num_features"):
                model.num_features = model.head_hidden_size = pair[0]
            continue
        whole = channels_of(layer)
        if whole is not None:
            pair = [whole[0] if layer is stem else pair[0], whole[1] if layer is classifier else pair[1]]
        if whole is None or is_grouped(layer):
            raise ValueError(f"widths names a layer that has none: {name} ({type(layer).__name__})")
        if not all(1 <= new <= old for new, old in zip(pair, whole, strict=True)):
            raise ValueError(f"widths of {name} are {list(pair)}, should be from 1 to {whole}")
        if isinstance(layer, CompetitiveSE):
            put_gate(model, layer, gate_of(layer, pair[0]))
            continue
        narrow(layer, inputs=torch.arange(pair[0]), outputs=torch.arange(pair[1]))
    tell_features(model)


def classifier_of(model: Any) -> nn.Module | None:
    """What timm's ``get_classifier`` returns; None where there is no such method, or no single layer."""
    ask = getattr(model, "get_classifier", None)
    found = ask() if callable(ask) else None
    return found if isinstance(found, nn.Module) else None


def tell_features(model: Any) -> None:
    """Let a network's own notes of its width say what it has."""
    classifier = classifier_of(model)
    if classifier is not None and hasattr(model, "num_features") and (channels := channels_of(classifier)) is not None:
        model.num_features = model.head_hidden_size = channels[0]


def _is_pair(pair: object) -> bool:
    return isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(number) is int for number in pair)


def widths_of(pruned: nn.Module, whole: nn.Module) -> Widths:
    """Widths that make the one network from the other.

    Args:
        pruned: made from a network like ``whole``.
        whole: as its name builds it.
    """
    modules = dict(pruned.named_modules())
    widths: Widths = {}
    closed: list[str] = []  # blocks that are gone, and gates, whose layers follow from their channels
    for name, layer in whole.named_modules():
        if any(name.startswith(f"{other}.") for other in closed):
            continue
        if isinstance(layer, CompetitiveSE):
            closed.append(name)
        own = modules.get(name)
        if name and isinstance(own, (RemovedBlock, nn.Identity)) and type(own) is not type(layer):
            closed.append(name)
            widths[name] = list(GONE)
        elif own is not None and (now := channels_of(own)) is not None and now != channels_of(layer):
            widths[name] = now
    return widths
