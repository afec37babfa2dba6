"""The paper's networks, on timm's model protocol and in timm's registry."""

from cmpe_se.networks import registry as registry  # imported for its effect: timm learns the names
from cmpe_se.networks.residual import PreActResNet, ResidualNetwork, WideResNet

__all__ = ["PreActResNet", "ResidualNetwork", "WideResNet"]
