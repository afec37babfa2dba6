"""Pruned networks under a name of their own in timm: ``cmpe_se_pruned``, any network of timm with given widths.

Saved pruned networks name it as their architecture, so that ``timm.create_model("local-dir:...")`` and hub names build
them again, without torch-pruning.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from cmpe_se.pruning.widths import resize
from cmpe_se.utils.text import in_one_line

NAME = "cmpe_se_pruned"
"""Name of the architecture in timm."""

default_cfgs: dict[str, dict[str, Any]] = {}  # timm looks for this name when a model is registered


@register_model
def cmpe_se_pruned(
    pretrained: bool = False,
    *,
    network: str | None = None,
    widths: Mapping[str, Sequence[int]] | None = None,
    **settings: Any,
) -> nn.Module:
    """Any network of timm, with fewer channels and blocks; takes what that network takes.

    Args:
        pretrained: load the weights of a saved pruned network.
        network: name of the whole network.
        widths: names of layers to their channels in and out, as :class:`cmpe_se.Pruned` and config.json have them.
        settings: for the network.

    Raises:
        ValueError: no network of timm's own, a layer that it has not got, or a width that cannot be.
    """
    # A stranger's config.json may name it: what has a source, such as hf-hub:, would be loaded from there.
    if not (isinstance(network, str) and timm.is_model(network) and network != NAME):
        raise ValueError(f"the network {network!r} of a pruned one is no network of timm's own; name one by network=")
    if "checkpoint_path" in settings:
        raise ValueError(f"checkpoint_path {settings['checkpoint_path']!r} cannot be a setting of a pruned network")
    if settings.get("pretrained_cfg") is None:
        own = timm.get_pretrained_cfg(settings.get("base") or network)
        settings["pretrained_cfg"] = own or {"num_classes": settings.get("num_classes", 1000)}

    def build(**settings: Any) -> nn.Module:
        whole = timm.create_model(network, **settings)
        resize(whole, widths or {})
        try:
            _note_features(whole)
        except Exception as error:  # a forward of sizes that do not fit
            raise ValueError(f"these widths are not those of {network} with {settings}: {in_one_line(error)}") from None
        return whole

    features = None
    if settings.get("features_only"):
        with torch.device("meta"):
            usual: Any = timm.create_model(network, features_only=True, **_for_the_network(settings))
        levels = usual.feature_info.channels()
        features = {"feature_cls": FeatureGetterNet, "out_indices": tuple(range(len(levels)))}
    model = build_model_with_cfg(build, NAME, pretrained, feature_cfg=features, **settings)
    cast(dict[str, Any], model.pretrained_cfg)["architecture"] = NAME  # what a saved config.json names
    return model


def _for_the_network(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in ("features_only", "pretrained_cfg")}


def _note_features(model: Any) -> None:
    """Let the network's list of its feature maps say how many channels these have; a forward pass shows it."""
    information = getattr(model, "feature_info", None)
    modules = dict(model.named_modules())
    entries = [entry for entry in information or () if isinstance(entry, dict) and entry.get("module") in modules]
    shell = copy.deepcopy(model).to("meta").eval()
    found: dict[str, int] = {}

    def note(name: str) -> Any:
        def after(_: nn.Module, __: object, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, Tensor) and output.ndim > 1:
                found[name] = output.shape[1]

        return after

    for name in {entry["module"] for entry in entries}:
        shell.get_submodule(name).register_forward_hook(note(name))
    size = (
        (model.pretrained_cfg or {}).get("input_size", (3, 224, 224))[1:] if hasattr(model, "pretrained_cfg") else None
    )
    with torch.no_grad():
        shell(torch.zeros(1, _channels(model), *(size or (224, 224)), device="meta"))
    for entry in entries:
        entry["num_chs"] = found.get(entry["module"], entry["num_chs"])


def _channels(model: nn.Module) -> int:
    """Channels of the images that a network takes."""
    first = next((layer for layer in model.modules() if isinstance(layer, nn.modules.conv._ConvNd)), None)
    return first.in_channels if first is not None else 3
