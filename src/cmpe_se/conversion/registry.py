"""Converted networks under names of their own in timm, with the base network's pretrained weights.

``cmpe_se_resnet50`` and its like are there by name. ``cmpe_se_converted`` takes any ``base``; saved converted networks
name it as their architecture, so that ``timm.create_model("local-dir:...")`` and hub names build them again.
"""

from functools import partial
from typing import Any, cast

import timm
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from cmpe_se.conversion.convert import CHILD, convert
from cmpe_se.layers.views import GATE_SETTINGS

BASES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
"""Networks of timm that have a name with the prefix ``cmpe_se_``."""


_CONVERSION = ("view", *GATE_SETTINGS, "where")
"""Keywords of :func:`cmpe_se.convert`; all others are for the base network."""

_WEIGHTS = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Keywords of timm's functions that make networks, which say what pretrained weights are and where."""


def _converted(base: str, conversion: dict[str, Any], **settings: Any) -> nn.Module:
    if "checkpoint_path" in settings:  # which a stranger's config.json may have
        raise ValueError(f"checkpoint_path {settings['checkpoint_path']!r} cannot be a setting of a converted network")
    return convert(timm.create_model(base, **settings), **conversion, inplace=True)


def _with_new_gates(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of the base network, with the gates as they start; those of a converted one as they are."""
    if any(f".{CHILD}." in key for key in state):
        return state
    return state | {key: value for key, value in model.state_dict().items() if f".{CHILD}." in key}


def _build(name: str, base: str, pretrained: bool = False, **settings: Any) -> nn.Module:
    if settings.get("features_only") and "feature_cls" not in settings:
        return _features(name, base, pretrained, **settings)
    network = partial(_converted, base, {key: settings.pop(key) for key in _CONVERSION if key in settings})
    return build_model_with_cfg(network, name, pretrained, pretrained_filter_fn=_with_new_gates, **settings)


def _features(name: str, base: str, pretrained: bool, **settings: Any) -> nn.Module:
    """The base network's feature maps as timm takes them, which many networks do in a way of their own, with gates."""
    conversion = {key: settings.pop(key) for key in _CONVERSION if key in settings}
    only = {key: settings.pop(key) for key in ("features_only", "out_indices", "output_fmt") if key in settings}
    weights = {key: settings.pop(key) for key in _WEIGHTS if key in settings}
    features = _converted(base, conversion, **only, **settings)
    if pretrained:
        whole = _build(name, base, pretrained, **weights, **conversion, **settings).state_dict()
        by_name = {_without_nesting(key): value for key, value in whole.items()}
        state = {key: by_name[_without_nesting(key)] for key in features.state_dict()}
        features.load_state_dict(state)
    return features


def _without_nesting(key: str) -> str:
    """What a weight's name has in common in a network and in its feature maps, where timm unpacks sequences."""
    return key.removeprefix("model.").replace(".", "_")


def _pretrained_cfg(name: str) -> PretrainedCfg:
    config = timm.get_pretrained_cfg(name)
    if config is None:
        raise RuntimeError(f"timm has no configuration of {name}")
    return config


def _weights_of(base: str) -> dict[str, Any]:
    """timm's configuration of each of the base network's sets of weights, by the name of the converted network."""
    default = f"{base}.{_pretrained_cfg(base).tag}"
    tagged = sorted(timm.list_models(f"{base}.*", pretrained=True), key=lambda name: name != default)  # it comes first
    return {f"cmpe_se_{name}": _pretrained_cfg(name).to_dict() for name in tagged}


default_cfgs = generate_default_cfgs({name: cfg for base in BASES for name, cfg in _weights_of(base).items()})


def _register(base: str) -> None:
    name = f"cmpe_se_{base}"

    def entrypoint(pretrained: bool = False, **settings: Any) -> nn.Module:
        return _build(name, base, pretrained, **settings)

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"timm's {base}, converted; takes what cmpe_se.convert and {base} take."
    globals()[name] = register_model(entrypoint)


for _base in BASES:
    _register(_base)


@register_model
def cmpe_se_converted(pretrained: bool = False, *, base: str, **settings: Any) -> nn.Module:
    """Any network of timm, converted; takes what cmpe_se.convert and the network take.

    Args:
        pretrained: start from the base network's pretrained weights, or load those of a saved converted network.
        base: name of the network.
        settings: for the conversion and the network.
    """
    # A stranger's config.json may name the base: what has a source, such as hf-hub:, would be loaded from there.
    if not (isinstance(base, str) and timm.is_model(base.partition(".")[0])):
        raise ValueError(f"the base {base!r} of a converted network is no network of timm's own; name one")
    if settings.get("pretrained_cfg") is None:
        settings["pretrained_cfg"] = timm.get_pretrained_cfg(base)
    model = _build("cmpe_se_converted", base.partition(".")[0], pretrained, **settings)
    cast(dict[str, Any], model.pretrained_cfg)["architecture"] = "cmpe_se_converted"  # what a saved config.json names
    return model
