"""Networks of MONAI, small, in one, two and three dimensions."""

from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.census_parts.networks import Network, maps

_RESNET = {"layers": [1, 1, 1, 1], "block_inplanes": [16, 32, 64, 128], "n_input_channels": 1, "num_classes": 3}
_UNET = {"in_channels": 1, "out_channels": 2, "channels": (16, 32, 64), "strides": (2, 2)}
_DIFFUSION = {"in_channels": 1, "out_channels": 1, "channels": (16, 32), "norm_num_groups": 8}


def _settings(n: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Networks of ``n`` dimensions: name to class and arguments."""
    channels = {"in_channels": 1, "out_channels": 2}
    dims, size = {"spatial_dims": n}, (32,) * n
    networks: dict[str, tuple[str, dict[str, Any]]] = {
        "ResNet basic": ("ResNet", {"block": "basic", **dims, **_RESNET}),
        "ResNet basic shortcut A": ("ResNet", {"block": "basic", **dims, **_RESNET, "shortcut_type": "A"}),
        "ResNet bottleneck": ("ResNet", {"block": "bottleneck", **dims, **_RESNET}),
        "SegResNetDS": ("SegResNetDS", {**dims, "init_filters": 8, **channels}),
        "UNet": ("UNet", {**dims, **_UNET, "num_res_units": 0}),
        "UNet residual": ("UNet", {**dims, **_UNET, "num_res_units": 2}),
        "AttentionUnet": ("AttentionUnet", {**dims, **_UNET}),
        "BasicUNet": ("BasicUNet", {**dims, **channels, "features": (16, 16, 32, 32, 48, 16)}),
        "HighResNet": ("HighResNet", {**dims, **channels}),
        "VarAutoEncoder": (
            "VarAutoEncoder",
            {**dims, "in_shape": (1, *size), "out_channels": 1, "latent_size": 8, "num_res_units": 2}
            | {"channels": (16, 32), "strides": (2, 2)},
        ),
        "AutoEncoder": (
            "AutoEncoder",
            {**dims, **channels, "channels": (16, 32), "strides": (2, 2), "num_res_units": 2, "num_inter_units": 2}
            | {"inter_channels": (16, 16)},
        ),
        "DenseNet121": ("DenseNet121", {**dims, **channels}),
        "SEResNet50": ("SEResNet50", {**dims, "in_channels": 1, "num_classes": 2}),
        "EfficientNetBN": (
            "EfficientNetBN",
            {"model_name": "efficientnet-b0", **dims, "in_channels": 1, "pretrained": False},
        ),
    }
    if n > 1:
        networks |= {
            "SegResNet": ("SegResNet", {**dims, "init_filters": 8, **channels}),
            "DynUNet residual": (
                "DynUNet",
                {**dims, **channels, "kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2)}
                | {"filters": (16, 32, 48), "res_block": True},
            ),
            "AHNet": ("AHNet", {**dims, **channels, "layers": (1, 1, 1, 1)}),
            "VNet": ("VNet", {**dims, **channels}),
            "SegResNetVAE": ("SegResNetVAE", {**dims, "init_filters": 8, **channels, "input_image_size": size}),
            "RegUNet": ("RegUNet", {**dims, "in_channels": 1, "num_channel_initial": 8, "depth": 2, "out_channels": n}),
            "UNETR": (
                "UNETR",
                {**dims, **channels, "img_size": size, "feature_size": 8, "hidden_size": 32, "mlp_dim": 32}
                | {"num_heads": 2},
            ),
            "SwinUNETR": ("SwinUNETR", {**dims, **channels, "feature_size": 12}),
            "AutoencoderKL": (
                "AutoencoderKL",
                {**dims, "in_channels": 1, "out_channels": 1, "channels": (16, 32), "num_res_blocks": 1}
                | {"attention_levels": (False, False), "latent_channels": 2, "norm_num_groups": 8},
            ),
            "VQVAE": (
                "VQVAE",
                {**dims, "in_channels": 1, "out_channels": 1, "channels": (16, 32), "num_res_channels": (16, 32)}
                | {"num_res_layers": 1, "num_embeddings": 16, "embedding_dim": 8}
                | {"downsample_parameters": ((2, 4, 1, 1),) * 2, "upsample_parameters": ((2, 4, 1, 1, 0),) * 2},
            ),
            "MedNeXt": ("MedNeXt", {**dims, "init_filters": 8, **channels}),
        }
    if n == 2:
        networks["FlexibleUNet"] = ("FlexibleUNet", {**channels, "backbone": "efficientnet-b0", "pretrained": False})
        networks["Quicknat"] = ("Quicknat", {"num_classes": 2, "num_channels": 1, "num_filters": 16})
    return networks


def monai_networks() -> Iterator[Network]:
    """The networks of each number of dimensions."""
    from monai.networks import nets

    for n in (1, 2, 3):
        for name, (kind, settings) in _settings(n).items():
            fixed = kind == "VarAutoEncoder" or {"img_size", "input_image_size"} & settings.keys()
            side = 128 if kind == "AHNet" else 32 if fixed or n == 3 else 64
            yield Network(
                "monai", f"{name} {n}-D", kind, partial(getattr(nets, kind), **settings), side, (), maps(1, n, side)
            )
