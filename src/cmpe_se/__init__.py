"""Competitive inner-imaging squeeze-and-excitation (CMPE-SE), arXiv 1807.08920, for PyTorch and timm.

``train``, ``evaluate``, ``predict``, ``compare`` and ``export`` are imported at their first use, and need the extra
``train`` (``export`` needs ``export``). ``inspect`` is the earlier name of :func:`inspect_gates`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cmpe_se import early, moved  # noqa: F401  # the first one before PyTorch is imported
from cmpe_se.conversion import conversion_report, convert
from cmpe_se.detection import fpn_backbone
from cmpe_se.finetuning import (
    add_gates_to_optimizer,
    freeze_backbone,
    load_gates,
    save_gates,
    strip_gates,
    unfreeze_backbone,
)
from cmpe_se.inspecting import forced_gates, inspect, inspect_gates
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import VIEWS
from cmpe_se.merging import merge
from cmpe_se.networks import PreActResNet, WideResNet, reference
from cmpe_se.pruning import Pruned, prune
from cmpe_se.static_gates import with_static_gates
from cmpe_se.utils.packages import has_train, require_train

if TYPE_CHECKING:
    from cmpe_se.commands.compare.compare import compare as compare
    from cmpe_se.commands.evaluate import evaluate as evaluate
    from cmpe_se.commands.export.export import export as export
    from cmpe_se.commands.predict.predict import predict as predict
    from cmpe_se.commands.train import train as train

moved.install()

__version__ = "0.2.0"
__all__ = [
    "VIEWS",
    "CompetitiveSE",
    "PreActResNet",
    "Pruned",
    "WideResNet",
    "__version__",
    "add_gates_to_optimizer",
    "conversion_report",
    "convert",
    "forced_gates",
    "fpn_backbone",
    "freeze_backbone",
    "inspect",
    "inspect_gates",
    "load_gates",
    "merge",
    "prune",
    "reference",
    "save_gates",
    "strip_gates",
    "unfreeze_backbone",
    "with_static_gates",
]

_COMMANDS = ("train", "evaluate", "predict", "compare", "export")
"""Functions of ``cmpe_se.commands``. They are not in ``__all__``: ``import *`` would import them, and fail without the
extra that they need."""


def __getattr__(name: str) -> Any:
    if name not in _COMMANDS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    require_train(f"cmpe_se.{name}", command=name)
    return getattr(import_module(f"cmpe_se.commands.{name}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *(_COMMANDS if has_train() else ())})
