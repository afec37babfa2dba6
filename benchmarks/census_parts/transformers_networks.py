"""Convolutional models of transformers, small, from their configurations."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from benchmarks.census_parts.networks import Inputs, Network, maps, normal
from torch import nn

_STAGES = {"hidden_sizes": [16, 32, 48, 64], "depths": [2, 2, 2, 2]}
_CONVNEXT = {"num_stages": 4, **_STAGES}
_VIT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64, "image_size": 64}
_HEADLESS: dict[str, dict[str, Any]] = {
    "resnet": {"embedding_size": 16, **_STAGES, "layer_type": "bottleneck"},
    "resnet basic": {"embedding_size": 16, **_STAGES, "layer_type": "basic"},
    "regnet": {"embedding_size": 16, **_STAGES, "groups_width": 8},
    "regnet x": {"embedding_size": 16, **_STAGES, "groups_width": 8, "layer_type": "x"},
    "convnext": _CONVNEXT,
    "convnextv2": _CONVNEXT,
    "dinov3_convnext": _STAGES,
    "bit": {"embedding_size": 32, "hidden_sizes": [32, 64, 96, 128], "depths": [2, 2, 2, 2], "num_groups": 8},
    "bit bottleneck": {"embedding_size": 32, "layer_type": "bottleneck", "hidden_sizes": [64, 128, 256, 512]}
    | {"depths": [2, 2, 2, 2], "num_groups": 8},
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.5},
    "efficientnet": {"width_coefficient": 0.5, "depth_coefficient": 1.0, "hidden_dim": 640},
    "levit": {"image_size": 64, "hidden_sizes": [32, 48, 64], "num_attention_heads": [2, 3, 4], "depths": [2, 2, 2]},
    "poolformer": _STAGES,
    "focalnet": {"embed_dim": 16, "depths": [2, 2], "focal_levels": [2, 2], "focal_windows": [3, 3], "image_size": 64}
    | {"hidden_sizes": [16, 32]},
    "focalnet convolutional": {"embed_dim": 16, "depths": [2, 2], "focal_levels": [2, 2], "focal_windows": [3, 3]}
    | {"hidden_sizes": [16, 32], "use_conv_embed": True, "use_layerscale": True, "image_size": 64},
    "swiftformer": {"depths": [2, 2, 2, 2], "embed_dims": [16, 32, 48, 64], "image_size": 64},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64], "image_size": 64},
    "mobilevitv2": {"width_multiplier": 0.5, "image_size": 64},
    "hgnet_v2": {},
    "rt_detr_resnet": {"embedding_size": 16, **_STAGES},
    "cvt": {"embed_dim": [16, 32, 64], "num_heads": [1, 2, 4], "depth": [1, 2, 3]},
    "segformer": {"hidden_sizes": [16, 32, 48, 64], "num_attention_heads": [1, 2, 3, 4], "depths": [1, 1, 1, 1]}
    | {"decoder_hidden_size": 32},
    "pvt": {"image_size": 64, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    | {"num_attention_heads": [1, 2, 3, 4], "sequence_reduction_ratios": [8, 4, 2, 1]},
    "pvt_v2": {"image_size": 64, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    | {"num_attention_heads": [1, 2, 3, 4]},
}
"""Model type, with a word for a variant, to its configuration; inputs of 64x64 pixels."""


def transformers_networks() -> Iterator[Network]:
    """The models, of images, of depth and of sound."""
    import transformers  # noqa: F401  # so that a missing library says so before the first network

    for name, settings in _HEADLESS.items():
        kind = name.split()[0]
        loader = "AutoBackbone" if kind in ("hgnet_v2", "rt_detr_resnet") else "AutoModel"
        yield _network(name, kind, partial(_from_configuration, loader, kind, settings))
    yield _network("resnet classifier", "resnet", partial(_classifier, "resnet", _HEADLESS["resnet"]))
    yield _network("convnext classifier", "convnext", partial(_classifier, "convnext", _HEADLESS["convnext"]))
    yield _network("timm_backbone", "timm_backbone", _timm_backbone)
    yield _network("upernet", "upernet", _upernet)
    yield _network(
        "dpt", "dpt", partial(_depth, "dpt", neck_hidden_sizes=[16, 16, 16, 16], backbone_out_indices=[0, 1, 2, 3])
    )
    yield _network("detr", "detr", _detr, side=96)
    yield _network(
        "superpoint", "superpoint", partial(_from_configuration, "AutoModelForKeypointDetection", "superpoint", {})
    )
    sound = {"hidden_size": 32, "num_filters": 8, "upsampling_ratios": [4, 2], "codebook_dim": 32, "codebook_size": 16}
    yield _sound("encodec", partial(_from_configuration, "AutoModel", "encodec", sound))
    small = {"encoder_hidden_size": 8, "downsampling_ratios": [2, 4], "decoder_hidden_size": 64, "hidden_size": 32}
    small |= {"n_codebooks": 2, "codebook_size": 16, "codebook_dim": 4, "upsampling_ratios": [4, 2]}
    yield _sound("dac", partial(_from_configuration, "AutoModel", "dac", small))
    yield _sound("speecht5_hifigan", _hifigan, inputs=_spectrograms)


def _network(name: str, family: str, build: Callable[[], nn.Module], side: int = 64) -> Network:
    return Network("transformers", name, family, build, side, (), maps())


def _sound(name: str, build: Callable[[], nn.Module], inputs: Inputs | None = None) -> Network:
    return Network("transformers", name, name, build, 512, (), inputs or maps(1, 1))


def _spectrograms(batch: int, side: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return (normal((batch, side // 16, 80), device),), {}


def _from_configuration(loader: str, kind: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    return getattr(transformers, loader).from_config(transformers.AutoConfig.for_model(kind, **settings))


def _classifier(kind: str, settings: dict[str, Any]) -> nn.Module:
    return _from_configuration("AutoModelForImageClassification", kind, {**settings, "num_labels": 5})


def _timm_backbone() -> nn.Module:
    from transformers import TimmBackbone, TimmBackboneConfig

    return TimmBackbone(TimmBackboneConfig("resnet18", use_pretrained_backbone=False))


def _upernet() -> nn.Module:
    from transformers import ConvNextConfig, UperNetConfig, UperNetForSemanticSegmentation

    backbone = ConvNextConfig(**_CONVNEXT, out_features=["stage1", "stage2", "stage3", "stage4"])
    return UperNetForSemanticSegmentation(UperNetConfig(backbone, hidden_size=16, auxiliary_in_channels=48))


def _depth(kind: str, **settings: Any) -> nn.Module:
    configuration = {**_VIT, "patch_size": 8, "fusion_hidden_size": 16, **settings}
    return _from_configuration("AutoModelForDepthEstimation", kind, configuration)


def _detr() -> nn.Module:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone = ResNetConfig(**_HEADLESS["resnet"], out_features=["stage4"])
    settings = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    return DetrForObjectDetection(
        DetrConfig(use_timm_backbone=False, backbone_config=backbone, backbone=None, num_queries=5, **settings)
    )


def _hifigan() -> nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    return SpeechT5HifiGan(SpeechT5HifiGanConfig(upsample_initial_channel=64))
