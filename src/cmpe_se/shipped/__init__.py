"""Trained networks that come with the package: finished runs on CIFAR-10, without their images.

Each is a run folder that is named as timm calls its weights, such as ``cmpe_se_preact_resnet20.cifar10``. Commands take
that name in the place of a run folder.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

SHIPPED = "cmpe_se_preact_resnet20.cifar10"
"""The one that commands take where no run is named: PreActResNet-20 with folded gates."""
WEIGHTS = "model.safetensors"
_FOLDER = Path(__file__).parent


def shipped_names() -> list[str]:
    """Names of the networks, :data:`SHIPPED` first."""
    found = sorted(path.parent.parent.name for path in _FOLDER.glob("*/model/config.json"))
    return sorted(found, key=lambda name: name != SHIPPED)


def shipped_folder(name: str) -> Path | None:
    """The run folder of a network, or None if none is called so."""
    return _FOLDER / name if name in shipped_names() else None


@cache
def timm_configs() -> dict[str, dict[str, Any]]:
    """What ``model/config.json`` says of each network, by name: ``pretrained_cfg`` in timm's words, ``model_args``."""
    return {
        name: json.loads((_FOLDER / name / "model/config.json").read_text(encoding="utf-8")) for name in shipped_names()
    }


def weights_of(name: str) -> Path:
    """The file of a network's weights."""
    return _FOLDER / name / "model" / WEIGHTS
