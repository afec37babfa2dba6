"""Weights to start from: a run, a folder or file of safetensors, or a name on a hub."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from cmpe_se.errors import UserError

HUB = "hf-hub:"
"""Prefix of a name on the Hugging Face hub, as timm has it."""


def weights_source(pretrained: str, classifier: str | None) -> dict[str, Any]:
    """What to lay over timm's ``pretrained_cfg`` so that a network loads these weights.

    Args:
        pretrained: a run folder, a folder that ``timm.models.save_for_hf`` wrote, a .safetensors file, ``hf-hub:NAME``,
            or ``timm`` for the weights that timm names for the network.
        classifier: name of the network's classifier, whose size in the file says how many classes it was trained on;
            with another number of classes it starts anew.

    Raises:
        UserError: nothing there that can be read.
    """
    if pretrained == "timm":
        return {}
    if pretrained.startswith(HUB):
        return {"source": "hf-hub", "hf_hub_id": pretrained.removeprefix(HUB)}
    path = Path(pretrained).expanduser()
    for folder in (path / "model", path):
        if (folder / "model.safetensors").is_file():
            path = folder / "model.safetensors"
    if path.suffix != ".safetensors" or not path.is_file():
        raise UserError(
            f"no weights at {pretrained}; give a finished run folder, a folder with model.safetensors, a .safetensors "
            "file, hf-hub:NAME, or timm for the network's own"
        )
    return {"source": "file", "file": str(path), "custom_load": False} | _classes_in(path, classifier)


def _classes_in(path: Path, classifier: str | None) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            weight = f"{classifier}.weight"
            if weight in file.keys():  # noqa: SIM118 (not a dict)
                return {"num_classes": file.get_slice(weight).get_shape()[0]}
            return {}
    except (SafetensorError, OSError, RuntimeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}; give another file of weights") from None
