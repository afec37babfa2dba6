"""Converted networks of torchvision, under names of their own there: ``get_model("cmpe_se_resnet50")``."""

from contextlib import suppress
from inspect import signature
from typing import Any

from torch import nn
from torchvision.models import get_model_builder, list_models

from cmpe_se.conversion.convert import convert
from cmpe_se.conversion.registry import BASES, CONVERSION


def _register(base: str) -> None:
    name, original = f"cmpe_se_{base}", get_model_builder(base)

    def builder(*, weights: Any = None, progress: bool = True, **settings: Any) -> nn.Module:
        conversion = {key: settings.pop(key) for key in CONVERSION if key in settings}
        return convert(original(weights=weights, progress=progress, **settings), **conversion, inplace=True)

    builder.__name__ = builder.__qualname__ = name
    builder.__doc__ = f"torchvision's {base}, converted; takes what cmpe_se.convert and {base} take."
    builder.__signature__ = signature(original)  # type: ignore[attr-defined]  # where get_model_weights looks
    register_model(name)(builder)


with suppress(ImportError):  # a place that torchvision may change; all else works without it
    from torchvision.models._api import register_model

    for _base in BASES:
        if not list_models(include=f"cmpe_se_{_base}"):  # a module that is imported twice
            _register(_base)
