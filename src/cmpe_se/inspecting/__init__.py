"""A look at the competition inside a network: squeezes, pictures and gates of every block."""

from cmpe_se.inspecting.inspect import BlockView, gated_blocks, inspect, look

__all__ = ["BlockView", "gated_blocks", "inspect", "look"]
