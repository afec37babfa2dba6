"""Converted networks under names of their own in timm, with the base network's pretrained weights.

``cmpe_se_resnet50`` and its like are there by name. ``cmpe_se_converted`` takes any ``base``; saved converted networks
name it as their architecture, so that ``timm.create_model("local-dir:...")`` and hub names build them again. Libraries
that know a network by its name alone get the base as a tag: ``cmpe_se_converted.regnetx_002``.
"""

from collections.abc import Sequence
from typing import Any, cast

import timm
import torch
from timm.models import PretrainedCfg, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureDictNet, FeatureGetterNet, FeatureHookNet, FeatureInfo
from torch import Tensor, nn

from cmpe_se.conversion.convert import GATE_KEY, convert
from cmpe_se.conversion.report import hand_on
from cmpe_se.layers.static_twin import make_static
from cmpe_se.layers.views import GATE_SETTINGS

BASES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "wide_resnet50_2")
"""Networks of timm that have a name with the prefix ``cmpe_se_``."""


CONVERSION = ("view", *GATE_SETTINGS, "where", "fallback")
"""Keywords of :func:`cmpe_se.convert`; all others are for the base network."""


def _converted(base: str, conversion: dict[str, Any], static: Sequence[str], **settings: Any) -> nn.Module:
    if "checkpoint_path" in settings:  # which a stranger's config.json may have
        raise ValueError(f"checkpoint_path {settings['checkpoint_path']!r} cannot be a setting of a converted network")
    network = convert(timm.create_model(base, **settings), **conversion, inplace=True)
    make_static(network, static)
    return network


def _with_new_gates(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights of the base network, with the gates as they start; those of a converted one as they are."""
    if any(GATE_KEY.search(key) for key in state):
        return state
    return state | {key: value for key, value in model.state_dict().items() if GATE_KEY.search(key)}


class _FeatureSettings(FeatureHookNet):
    """Stands where a network gets its feature extractor, and takes down the settings that it would get."""

    def __init__(self, model: nn.Module, **settings: Any):
        nn.Module.__init__(self)
        self.settings = settings


def _features_of(base: str) -> dict[str, Any]:
    """How timm takes features from a network: ``feature_cfg`` of ``build_model_with_cfg``, each family has its own.

    Families whose features are a network of another class (EfficientNet, HRNet) get timm's extractor by
    ``forward_intermediates``, which gives the same maps.
    """
    with torch.device("meta"):
        usual = timm.create_model(base, features_only=True)
        if isinstance(usual, (FeatureDictNet, FeatureGetterNet, FeatureHookNet)):
            asked = timm.create_model(base, features_only=True, feature_cls=_FeatureSettings)
            return cast(_FeatureSettings, asked).settings | {"feature_cls": type(usual)}
    levels = cast(FeatureInfo, usual.feature_info).channels()
    return {"feature_cls": FeatureGetterNet, "out_indices": tuple(range(len(levels)))}


def _build(name: str, base: str, pretrained: bool = False, **settings: Any) -> nn.Module:
    conversion = {key: settings.pop(key) for key in CONVERSION if key in settings}
    static = settings.pop("static", None) or ()  # blocks whose gate is of the view static, as in our own networks
    whole: list[nn.Module] = []

    def network(**settings: Any) -> nn.Module:
        whole.append(_converted(base, conversion, static, **settings))
        return whole[0]

    features = _features_of(base) if settings.get("features_only") else None
    model = build_model_with_cfg(
        network, name, pretrained, feature_cfg=features, pretrained_filter_fn=_with_new_gates, **settings
    )
    hand_on(whole[0], model)  # timm's extractors keep some layers of the network, and not the network
    return model


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
    entrypoint.__doc__ = f"timm's {base}, converted; takes what cmpe_se.convert and {base} take, and static."
    globals()[name] = register_model(entrypoint)


for _base in BASES:
    _register(_base)


@register_model
def cmpe_se_converted(pretrained: bool = False, *, base: str | None = None, **settings: Any) -> nn.Module:
    """Any network of timm, converted; takes what cmpe_se.convert and the network take, and ``static``.

    Args:
        pretrained: start from the base network's pretrained weights, or load those of a saved converted network.
        base: name of the network; may be given as a tag of this name too, ``cmpe_se_converted.resnet18``.
        settings: for the conversion and the network.
    """
    by_tag = base is None and isinstance(settings.get("pretrained_cfg"), str)
    if by_tag:
        base = settings.pop("pretrained_cfg")
    # A stranger's config.json may name the base: what has a source, such as hf-hub:, would be loaded from there.
    if not (isinstance(base, str) and timm.is_model(base.partition(".")[0])):
        raise ValueError(f"the base {base!r} of a converted network is no network of timm's own; name one by base=")
    if settings.get("pretrained_cfg") is None:
        settings["pretrained_cfg"] = timm.get_pretrained_cfg(base)
    model = _build("cmpe_se_converted", base.partition(".")[0], pretrained, **settings)
    cast(dict[str, Any], model.pretrained_cfg)["architecture"] = "cmpe_se_converted"  # what a saved config.json names
    if by_tag:
        cast(Any, model)._model_args = {"base": base}  # where timm keeps what it builds a saved network from
    return model
