"""Backbones with a feature pyramid for torchvision's detectors, from networks of timm and of this package."""

from collections import OrderedDict
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import pairwise
from typing import Any

import timm
import torch
from timm.layers import freeze_batch_norm_2d
from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import (
    ExtraFPNBlock,
    FeaturePyramidNetwork,
    LastLevelMaxPool,
    LastLevelP6P7,
)

from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.utils.text import in_one_line

_FIRST_STRIDE = 4  # of the pyramids of torchvision's detectors
_SOURCES = ("hf-hub:", "hf_hub:", "local-dir:")  # of networks that are not in timm's list


class FeaturePyramidBackbone(nn.Module):
    """Feature maps of a network with a pyramid on them: torchvision's ``BackboneWithFPN``, for networks of timm.

    Its parts have torchvision's names: ``body``, ``fpn`` and ``out_channels``. ``strides`` are those of the maps.

    Args:
        body: images to a list of feature maps, as ``timm.create_model(..., features_only=True)`` makes it.
        out_channels: channels of each level of the pyramid.
        extra_blocks: levels behind the deepest one.
        maps: positions in the list of the maps that the pyramid is made of; all if left out.
    """

    def __init__(
        self,
        body: nn.Module,
        out_channels: int = 256,
        extra_blocks: ExtraFPNBlock | None = None,
        maps: Sequence[int] | None = None,
    ):
        super().__init__()
        info: Any = body.feature_info
        channels, strides = info.channels(), info.reduction()
        self.maps = tuple(range(len(channels)) if maps is None else maps)
        self.body = body
        self.fpn = FeaturePyramidNetwork([channels[index] for index in self.maps], out_channels, extra_blocks)
        self.out_channels, self.strides = out_channels, tuple(strides[index] for index in self.maps)

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        """Images (N, C, H, W) to maps (N, out_channels, h, w) by name: from "0", the finest, to the extra levels."""
        features = self.body(x)
        if getattr(self.body, "output_fmt", None) == "NHWC":  # Swin and its like
            features = [each.permute(0, 3, 1, 2) for each in features]
        return self.fpn(OrderedDict((str(level), features[index]) for level, index in enumerate(self.maps)))


def fpn_backbone(
    name: str,
    *,
    pretrained: bool = False,
    convert: str | None = None,
    out_indices: Sequence[int] | None = None,
    out_channels: int = 256,
    extra_blocks: str | ExtraFPNBlock | None = "pool",
    trainable_stages: int | None = None,
    frozen_norms: bool | None = None,
    **settings: Any,
) -> FeaturePyramidBackbone:
    """A backbone with a feature pyramid, for torchvision's FasterRCNN, MaskRCNN, RetinaNet and FCOS.

    ``fpn_backbone("resnet50")`` is timm's network as it is. It has gates under a name of this package
    (``cmpe_se_resnet50``, which takes ``view=`` and the like) or with ``convert=``.

    Args:
        name: network of timm or of this package.
        pretrained: start from timm's weights of the network.
        convert: view of the gates that a network without gates gets, one of :data:`cmpe_se.VIEWS`.
        out_indices: numbers of the feature maps in the pyramid, as timm counts them. Each has twice the stride of the
            one before. By default the deepest map of each stride from 4 up, or of each stride where only one is left.
        out_channels: channels of each level.
        extra_blocks: levels behind the pyramid: ``pool`` (one, for FasterRCNN and MaskRCNN), ``p6p7`` (two, for
            RetinaNet and FCOS), a block of torchvision's kind, or None.
        trainable_stages: number of the network's stages, from the deepest one up, that learn, their gates included. The
            layers before them are frozen. By default 3 of a pretrained network, and otherwise all. timm counts the stem
            as a stage where it gives a feature map.
        frozen_norms: whether the batch norms keep their statistics and factors, as detectors with few images to a batch
            need it. By default those of a pretrained network do. Norms inside gates always learn.
        settings: for ``timm.create_model``, such as ``in_chans=4`` or ``view="se"``.

    Returns:
        The backbone in training mode.

    Raises:
        UserError: an unknown name, a network without feature maps, maps of which no pyramid can be made, weights that
            are not there, settings that the network does not take, what :func:`cmpe_se.convert` refuses.
    """
    if not name.startswith(_SOURCES) and not timm.is_model(name):
        close = get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() has the names"
        raise UserError(f"no network '{name}'; {hint}")
    if convert is not None:
        name, settings = "cmpe_se_converted", settings | {"base": name, "view": convert}
    chosen = {} if out_indices is None else {"out_indices": _numbers(out_indices)}
    body = _features(name, pretrained=pretrained, **chosen, **settings)
    strides = body.feature_info.reduction()
    maps = range(len(strides)) if chosen else _usual_maps(strides)
    _check_strides(settings.get("base", name), [strides[index] for index in maps])
    if trainable_stages is not None or pretrained:
        _freeze_stages(body, 3 if trainable_stages is None else trainable_stages, name, settings)
    if pretrained if frozen_norms is None else frozen_norms:
        _freeze_norms(body)
    return FeaturePyramidBackbone(body, out_channels, _extra_block(extra_blocks, out_channels), maps)


def _features(name: str, **settings: Any) -> Any:
    """The network as timm makes it for its feature maps."""
    shown = settings.get("base", name)
    try:
        return timm.create_model(name, features_only=True, **settings)
    except UserError:
        raise
    except Exception as error:  # timm, torch and the hub raise many kinds
        raise UserError(f"cannot make feature maps of {shown}: {in_one_line(error)}") from None


def _numbers(out_indices: Sequence[int]) -> tuple[int, ...]:
    numbers = tuple(out_indices)
    if not numbers or any(one >= other for one, other in pairwise(numbers)):
        raise UserError(f"out_indices is {numbers}, should be increasing numbers of feature maps, such as (1, 2, 3, 4)")
    return numbers


def _usual_maps(strides: Sequence[int]) -> list[int]:
    """The last map of each stride from 4 up, or of each stride if that leaves one map or none."""
    last = [index for index, stride in enumerate(strides) if stride not in strides[index + 1 :]]
    usual = [index for index in last if strides[index] >= _FIRST_STRIDE]
    return usual if len(usual) > 1 else last


def _check_strides(name: str, strides: Sequence[int]) -> None:
    # What torchvision's MultiScaleRoIAlign needs in order to find the level of a box, which it does not check.
    if any(2 * one != other for one, other in pairwise(strides)) or len(strides) < 2:
        raise UserError(
            f"strides of the feature maps of {name}: {', '.join(map(str, strides))}; a pyramid needs two or more, "
            "each of twice the stride of the one before (out_indices chooses among them)"
        )


def _extra_block(extra: str | ExtraFPNBlock | None, channels: int) -> ExtraFPNBlock | None:
    if extra is None or isinstance(extra, ExtraFPNBlock):
        return extra
    if extra not in ("pool", "p6p7"):
        raise UserError(f"extra_blocks is {extra!r}, should be 'pool', 'p6p7', a block of torchvision's kind, or None")
    return LastLevelMaxPool() if extra == "pool" else LastLevelP6P7(channels, channels)


def _freeze_stages(body: nn.Module, trainable: int, name: str, settings: dict[str, Any]) -> None:
    """Let the parameters that stages before the ``trainable`` deepest ones depend on take no gradients."""
    info: Any = body.feature_info
    stages = len(info.info)
    if not 0 <= trainable <= stages:
        raise UserError(f"trainable_stages is {trainable}, should be from 0 to {stages}, the number of stages")
    if trainable == 0:
        body.requires_grad_(False)
    elif trainable < stages:
        # Which ones these are, the gradient of the deepest frozen feature map says, whatever the layers are called.
        with torch.device("meta"):
            part = _features(name, out_indices=(stages - trainable - 1,), **settings).eval()
            names, parameters = zip(*part.named_parameters(), strict=True)
            channels, *size = part.default_cfg["input_size"]
            (features,) = part(torch.zeros(1, settings.get("in_chans", channels), *size))
        gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        frozen = {key for key, gradient in zip(names, gradients, strict=True) if gradient is not None}
        for key, parameter in body.named_parameters():
            parameter.requires_grad_(key not in frozen)


def _freeze_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm2d, nn.SyncBatchNorm)):
            module.add_module(name, freeze_batch_norm_2d(child).train(child.training))
        elif not isinstance(child, CompetitiveSE):
            _freeze_norms(child)
