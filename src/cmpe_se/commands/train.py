"""The ``train`` command: a run, and the metrics that it ends with."""

import json
from typing import Any

from cmpe_se.training import train as train_network
from cmpe_se.training.launching import is_main_process

_SHOWN = ("test_top1", "test_top5", "test_loss", "train_seconds", "images_per_second", "params", "run")


def train(**settings: Any) -> dict[str, Any]:
    """Train a network, and leave a run folder with settings, metrics, curves and weights.

    Args:
        settings: of :func:`cmpe_se.training.train`.

    Returns:
        What that returns.
    """
    result = train_network(**settings)
    if is_main_process():
        print(json.dumps({name: result[name] for name in _SHOWN}, indent=2))
    return result
