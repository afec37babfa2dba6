"""Structural pruning: channels and whole blocks out of a network, and a network of given widths built again."""

from cmpe_se.pruning import registry as registry  # timm knows the name of pruned networks
from cmpe_se.pruning.prune import Pruned, prune

__all__ = ["Pruned", "prune"]
