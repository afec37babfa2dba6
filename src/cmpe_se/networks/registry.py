"""The networks' names in timm: plain, ``se_`` and ``cmpe_se_`` (folded) of each, and ``view=`` on all of them."""

from collections import deque
from typing import Any

from timm.models import DefaultCfg, PretrainedCfg, build_model_with_cfg, register_model

from cmpe_se import shipped
from cmpe_se.networks.residual import PreActResNet, ResidualNetwork, WideResNet

# "b" is for bottleneck blocks, where the depth alone would not tell.
PLAIN_NETWORKS: dict[str, tuple[type[ResidualNetwork], dict[str, Any]]] = {
    "preact_resnet20": (PreActResNet, {"depth": 20, "block": "basic"}),
    "preact_resnet56": (PreActResNet, {"depth": 56, "block": "basic"}),
    "preact_resnet110": (PreActResNet, {"depth": 110, "block": "basic"}),
    "preact_resnet20b": (PreActResNet, {"depth": 20, "block": "bottleneck"}),
    "preact_resnet56b": (PreActResNet, {"depth": 56, "block": "bottleneck"}),
    "preact_resnet164": (PreActResNet, {"depth": 164, "block": "bottleneck"}),
    "wrn16_4": (WideResNet, {"depth": 16, "width": 4}),
    "wrn16_8": (WideResNet, {"depth": 16, "width": 8}),
    "wrn22_10": (WideResNet, {"depth": 22, "width": 10}),
    "wrn28_10": (WideResNet, {"depth": 28, "width": 10}),
}
PREFIXES: dict[str, str | None] = {"": None, "se_": "se", "cmpe_se_": "folded_3x3"}
"""Prefix of a name to the view that it stands for."""

_OURS = {prefix + base: view for prefix, view in PREFIXES.items() for base in PLAIN_NETWORKS}


def is_ours(name: str) -> bool:
    """Whether a name of timm is one of ours, a converted network's with our prefix among them, and takes ``view=``."""
    return name.partition(".")[0] in _OURS or name.startswith("cmpe_se_")


def view_of(name: str, view: str | None = None) -> str | None:
    """View of the gates of a network of ours or of a converted one; None of a plain or a foreign one.

    Args:
        name: of the network in timm.
        view: what it is made with besides, if anything.
    """
    own = shipped.timm_configs().get(name, {}).get("model_args", {}).get("view")
    return view or own or _OURS.get(name.partition(".")[0], PREFIXES["cmpe_se_"] if is_ours(name) else None)


default_cfgs: dict[str, DefaultCfg] = {}  # timm looks for this name when a model is registered


def _settings_of_weights(name: str, tag: str) -> dict[str, Any]:
    """Keywords that a network is made with to take the weights of a tag; none for a tag that is not ours."""
    own = ("num_classes", "in_chans", "global_pool")  # which timm knows from its configuration
    config = shipped.timm_configs().get(f"{name}.{tag}", {})
    return {key: value for key, value in config.get("model_args", {}).items() if key not in own}


def _register(name: str, network: type[ResidualNetwork], settings: dict[str, Any]) -> None:
    plain: dict[str, Any] = {
        "url": "",
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "mean": (0.4914, 0.4822, 0.4465),  # of CIFAR-10
        "std": (0.2470, 0.2435, 0.2616),
        # No "first_conv": timm would adapt or redraw it for other channels, and the input norm would not follow.
        "classifier": "head.fc",
    }
    known = PretrainedCfg.__dataclass_fields__
    cfgs = {"": PretrainedCfg(**plain)}  # first, so that a network without weights is not said to have been trained
    for tagged, config in shipped.timm_configs().items():
        if tagged.partition(".")[0] == name:
            words = {
                key: value for key, value in config["pretrained_cfg"].items() if key in known and value is not None
            }
            source = {"file": str(shipped.weights_of(tagged)), "first_conv": None, "license": "apache-2.0"}
            cfgs[tagged.partition(".")[2]] = PretrainedCfg(**(plain | words | source))
    default_cfgs[name] = DefaultCfg(tags=deque(cfgs), cfgs=cfgs, is_pretrained=len(cfgs) > 1)

    def entrypoint(pretrained: bool = False, **kwargs: Any) -> ResidualNetwork:
        features = {"out_indices": (0, 1, 2, 3), "feature_cls": "getter"}
        if pretrained and kwargs.get("pretrained_cfg") is None and len(tags := default_cfgs[name].tags) > 1:
            kwargs["pretrained_cfg"] = tags[1]
        tag = kwargs.get("pretrained_cfg")
        trained = _settings_of_weights(name, tag) if isinstance(tag, str) else {}
        return build_model_with_cfg(network, name, pretrained, feature_cfg=features, **(settings | trained | kwargs))

    entrypoint.__name__ = entrypoint.__qualname__ = name
    entrypoint.__doc__ = f"{network.__name__} with {', '.join(f'{key}={value!r}' for key, value in settings.items())}."
    globals()[name] = register_model(entrypoint)


for _base, (_network, _settings) in PLAIN_NETWORKS.items():
    for _prefix, _view in PREFIXES.items():
        _register(_prefix + _base, _network, _settings | {"view": _view})
