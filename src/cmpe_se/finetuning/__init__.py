"""What comes after converting: gates in an optimizer, in a file of their own, and out of the network again."""

from cmpe_se.finetuning.freezing import freeze_backbone, unfreeze_backbone
from cmpe_se.finetuning.gate_files import load_gates, save_gates
from cmpe_se.finetuning.optimizer import add_gates_to_optimizer
from cmpe_se.finetuning.stripping import strip_gates

__all__ = [
    "add_gates_to_optimizer",
    "freeze_backbone",
    "load_gates",
    "save_gates",
    "strip_gates",
    "unfreeze_backbone",
]
