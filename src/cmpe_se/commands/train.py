"""The ``train`` command: a run, and the metrics that it ends with."""

import json
from collections.abc import Mapping
from typing import Any

from cmpe_se.training import train as train_network
from cmpe_se.training.launching import is_main_process
from cmpe_se.training.summary import RunResult

_SHOWN = ("test_top1", "test_top5", "test_loss", "train_seconds", "images_per_second", "params", "run")


def train(**settings: Any) -> RunResult:
    """Train a network, and leave a run folder with settings, metrics, curves and weights.

    Args:
        settings: of :func:`cmpe_se.training.train`.

    Returns:
        What that returns.
    """
    result = train_network(**settings)
    if is_main_process():
        every: Mapping[str, Any] = result
        print(json.dumps({name: every[name] for name in _SHOWN}, indent=2))
    return result
