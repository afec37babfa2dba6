"""The exact deploy form: ``merge``."""

from cmpe_se.layers.merged_gate import MergedGate
from cmpe_se.merging.merge import merge

__all__ = ["MergedGate", "merge"]
