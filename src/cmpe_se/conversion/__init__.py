"""Competition for any residual network: ``convert`` and its report."""

from cmpe_se.conversion import registry as registry  # imported for its effect: timm learns the names
from cmpe_se.conversion import torchvision_names as torchvision_names  # and torchvision its own
from cmpe_se.conversion.convert import Where, convert
from cmpe_se.conversion.report import ConversionReport, Gate, conversion_report

__all__ = ["ConversionReport", "Gate", "Where", "conversion_report", "convert"]
