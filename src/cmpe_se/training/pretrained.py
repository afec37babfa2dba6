"""Weights to start from: a run, a folder or file of safetensors, or a name on a hub."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cmpe_se.errors import UserError
from cmpe_se.utils.files import whole_path

HUB = "hf-hub:"
"""Prefix of a name on the Hugging Face hub, as timm has it."""


def weights_source(pretrained: str, classifier: str | None) -> dict[str, Any]:
    """What to lay over timm's ``pretrained_cfg`` so that a network loads these weights.

    Args:
        pretrained: a run folder, a folder that ``timm.models.save_for_hf`` wrote, a .safetensors file, ``hf-hub:NAME``,
            or ``timm`` for the weights that timm names for the network.
        classifier: name of the network's classifier, whose size in the file says how many classes it was trained on;
            with another number of classes it is re-initialised.

    Raises:
        UserError: nothing there that can be read.
    """
    if pretrained == "timm":
        return {}
    if pretrained.startswith(HUB):
        return {"source": "hf-hub", "hf_hub_id": pretrained.removeprefix(HUB)}
    path = _file(pretrained)
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"no weights at {pretrained}; give a finished run folder, a folder with model.safetensors, a .safetensors "
            "file, hf-hub:NAME, or timm for the network's own"
        )
    return {"source": "file", "file": str(path), "custom_load": False} | _classes_in(path, classifier)


def saved_network(pretrained: str) -> tuple[str, dict[str, Any]] | None:
    """Name of the network whose weights these are, and the keywords that timm made it with; None where nothing says.

    Args:
        pretrained: as of :func:`weights_source`.

    Raises:
        UserError: a config.json that cannot be read.
    """
    if pretrained == "timm" or pretrained.startswith(HUB):
        return None
    file = _file(pretrained).with_name("config.json")
    if not file.is_file():
        return None
    try:
        config = json.loads(file.read_text())
        name = config.get("architecture")
        return (name, config.get("model_args") or {}) if name else None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read: {error}; give the model.safetensors in a folder by itself") from None


def _file(pretrained: str) -> Path:
    """The file of weights in a run folder or a folder; other paths as they are."""
    path = whole_path(pretrained)
    for folder in (path / "model", path):
        if (folder / "model.safetensors").is_file():
            return folder / "model.safetensors"
    return path


def _classes_in(path: Path, classifier: str | None) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            weight = f"{classifier}.weight"
            if weight in file.keys():  # noqa: SIM118 (not a dict)
                return {"num_classes": file.get_slice(weight).get_shape()[0]}
            return {}
    except (SafetensorError, OSError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}; give another file of weights") from None
