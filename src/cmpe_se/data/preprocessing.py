"""From a decoded image to the tensor that a network was trained on."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import Tensor


def preprocessing(config: dict[str, Any]) -> Callable[[Image.Image], Tensor]:
    """From a PIL image to the tensor that the network was trained on: timm's test transform, centre crop and all."""
    return create_transform(
        tuple(config["input_size"]),
        is_training=False,
        mean=config["mean"],
        std=config["std"],
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
    )
