"""Inspection of the competition in a network: squeezes, pictures and gates of every block, also with gates held.

``inspect`` is the earlier name of :func:`inspect_gates`.
"""

from cmpe_se.inspecting.forcing import can_hold, forced_gates, held_one_by_one
from cmpe_se.inspecting.inspect import BlockView, find_gates, gated_blocks, inspect_gates, look

inspect = inspect_gates

__all__ = [
    "BlockView",
    "can_hold",
    "find_gates",
    "forced_gates",
    "gated_blocks",
    "held_one_by_one",
    "inspect",
    "inspect_gates",
    "look",
]
