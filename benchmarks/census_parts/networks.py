"""The networks of a census: how each is built, without weights from anywhere, and what it takes."""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[int, int, torch.device], tuple[tuple[Any, ...], dict[str, Any]]]
"""Arguments of a forward, by place or by name: ``args, kwargs = inputs(batch, side, device)``, one of them empty."""


def maps(channels: int = 3, dimensions: int = 2, depth: int | None = None) -> Inputs:
    """Inputs of one tensor (N, C, side, ...); of clips and volumes (N, C, depth, side, side)."""

    def inputs(batch: int, side: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        sides = [depth or side] * (dimensions == 3) + [side] * min(dimensions, 2)
        return (normal((batch, channels, *sides), device),), {}

    return inputs


def normal(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Numbers that are the same at each call."""
    if device.type == "meta":
        return torch.zeros(shape, device=device)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Network:
    """One network of a library.

    Args:
        library: that it comes from.
        name: in that library, with what else is needed to build it.
        family: of the networks that share its code.
        build: makes it, on the default device of the moment.
        side: of the inputs that it is made for, in pixels or samples.
        small: sides to try for a run with numbers, the first that it takes, before ``side``.
        inputs: what its forward takes.
        knows_its_input: whether ``convert`` is to find the size of the inputs by itself; else it is given them.
        merged_part: name of the part whose outputs are compared after merging, where what follows sorts or thresholds.
        loss: of the network in training mode, where its output is none that could be summed.
    """

    library: str
    name: str
    family: str
    build: Callable[[], nn.Module]
    side: int = 224
    small: tuple[int, ...] = (64, 96, 128)
    inputs: Inputs = field(default_factory=maps)
    knows_its_input: bool = False
    merged_part: str = ""
    loss: Callable[[nn.Module], Tensor] | None = None


def networks(libraries: list[str]) -> Iterator[Network]:
    """All networks of some libraries, in an order that is always the same.

    Raises:
        ImportError: a library that is not installed.
    """
    for library in libraries:
        yield from LIBRARIES[library]()


def _timm() -> Iterator[Network]:
    import timm

    for name in timm.list_models():
        module = timm.model_entrypoint(name).__module__
        if not module.startswith("timm."):
            continue  # of this project
        config = timm.get_pretrained_cfg(name)
        fixed = config is not None and config.fixed_input_size
        channels, side = (config.input_size[0], config.input_size[-1]) if config else (3, 224)
        yield Network(
            "timm",
            name,
            module.rpartition(".")[2],
            partial(timm.create_model, name),
            side=side,
            small=() if fixed else (64, 96, 128),
            inputs=maps(channels),
            knows_its_input=True,
        )


def _torchvision() -> Iterator[Network]:
    from torchvision import models

    for name in models.list_models():
        builder = models.get_model_builder(name)
        kind, _, module = builder.__module__.removeprefix("torchvision.models.").rpartition(".")
        family = f"{kind} {module}".strip()
        settings: dict[str, Any] = {"weights": None}
        if kind in ("detection", "segmentation"):
            settings["weights_backbone"] = None
        if kind == "detection":
            fixed = name.startswith("ssd")
            settings |= {} if fixed else {"min_size": 128, "max_size": 160}
            yield Network(
                "torchvision",
                name,
                family,
                partial(builder, **settings),
                side=320 if fixed else 128,
                small=(),
                inputs=_pictures,
                merged_part="backbone",
                loss=_detection_loss,
            )
        elif kind == "video":
            frames, side = (16, 224) if name.startswith(("mvit", "swin3d")) else (16, 112)
            fixed = name.startswith("mvit")
            small = () if fixed else (64,)
            yield Network(
                "torchvision", name, family, partial(builder, **settings), side, small, maps(3, 3, frames), True
            )
        elif kind == "optical_flow":
            yield Network("torchvision", name, family, partial(builder, **settings), 128, (), _two_pictures)
        else:
            fixed = name.startswith(("vit", "maxvit", "inception", "quantized_inception"))
            side = 299 if "inception" in name else 224
            small = () if fixed else (64, 96, 128)
            yield Network("torchvision", name, family, partial(builder, **settings), side, small, maps(), True)


def _pictures(batch: int, side: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ([normal((3, side, side), device).sigmoid() for _ in range(batch)],), {}


def _two_pictures(batch: int, side: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pictures = normal((2 * batch, 3, side, side), device)
    return (), {"image1": pictures[:batch], "image2": pictures[batch:], "num_flow_updates": 2}


def _detection_loss(model: nn.Module) -> Tensor:
    """Of images that each have one object."""
    boxes = torch.tensor([[8.0, 8.0, 72.0, 72.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 128, 128, dtype=torch.uint8)}
    target["keypoints"] = torch.tensor([[[24.0, 24.0, 1.0]] * 17])
    (images,), _ = _pictures(2, 128, torch.device("cpu"))
    return torch.stack([loss.sum() for loss in model(images, [dict(target) for _ in images]).values()]).sum()


def _pytorchcv() -> Iterator[Network]:
    from pytorchcv import model_provider

    for name, builder in sorted(model_provider._models.items()):
        family = builder.__module__.rpartition(".")[2]
        yield Network("pytorchcv", name, family, partial(_build_pytorchcv, builder), *_size_of_pytorchcv(name))


def _build_pytorchcv(builder: Callable[..., nn.Module]) -> nn.Module:
    return builder(pretrained=False)


def _size_of_pytorchcv(name: str) -> tuple[int, tuple[int, ...], Inputs]:
    """Side, small sides and inputs by the data set in a network's name."""
    if re.search("cifar|svhn", name):
        return 32, (), maps()
    if re.search("cub|voc|ade20k|coco|cityscapes|celebamaskhq|hpatches", name):
        return 480 if re.search("voc|ade20k|coco|cityscapes|celebamaskhq", name) else 224, (), maps()
    if re.search("inception|xception|nasnet|polynet", name):
        return 299, (), maps()
    return 224, (64, 96, 128), maps()


def _smp() -> Iterator[Network]:
    import segmentation_models_pytorch as smp

    every = ("resnet18", "mobilenet_v2", "efficientnet-b0", "tu-regnetx_002", "tu-convnextv2_atto")
    with_unet = (
        *("resnext50_32x4d", "dpn68", "vgg11_bn", "se_resnet50", "se_resnext50_32x4d", "densenet121", "inceptionv4"),
        *("inceptionresnetv2", "xception", "timm-efficientnet-b0", "timm-tf_efficientnet_lite0", "timm-skresnet18"),
        *("mit_b0", "mobileone_s0", "tu-resnetv2_50", "tu-mobilenetv3_small_050", "tu-hrnet_w18_small", "tu-dla34"),
        *("tu-edgenext_xx_small", "tu-coatnet_nano_rw_224", "tu-efficientvit_b0", "tu-res2net50_26w_4s"),
    )
    for decoder, kind in smp.MODEL_ARCHITECTURES_MAPPING.items():
        encoders = every + (with_unet if decoder == "unet" else ())
        for encoder in ("tu-vit_tiny_patch16_224",) if decoder == "dpt" else encoders:
            build = partial(kind, encoder, encoder_weights=None)
            side, small = (224, ()) if decoder in ("dpt", "pan") else (128, (64,))
            yield Network("segmentation_models_pytorch", f"{decoder} {encoder}", kind.__name__, build, side, small)


def _transformers() -> Iterator[Network]:
    from benchmarks.census_parts.transformers_networks import transformers_networks

    yield from transformers_networks()


def _monai() -> Iterator[Network]:
    from benchmarks.census_parts.monai_networks import monai_networks

    yield from monai_networks()


LIBRARIES: Mapping[str, Callable[[], Iterator[Network]]] = {
    "timm": _timm,
    "torchvision": _torchvision,
    "pytorchcv": _pytorchcv,
    "segmentation_models_pytorch": _smp,
    "transformers": _transformers,
    "monai": _monai,
}
