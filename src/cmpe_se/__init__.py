"""Competitive inner-imaging squeeze-and-excitation (CMPE-SE), arXiv 1807.08920, for PyTorch and timm."""

from cmpe_se import moved
from cmpe_se.conversion import conversion_report, convert
from cmpe_se.inspecting import inspect
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import VIEWS
from cmpe_se.merging import merge
from cmpe_se.networks import PreActResNet, WideResNet, reference

moved.install()

__version__ = "0.1.0"
__all__ = [
    "VIEWS",
    "CompetitiveSE",
    "PreActResNet",
    "WideResNet",
    "__version__",
    "conversion_report",
    "convert",
    "inspect",
    "merge",
    "reference",
]
