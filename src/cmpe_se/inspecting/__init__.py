"""A look at the competition inside a network: squeezes, pictures and gates of every block."""

from cmpe_se.inspecting.inspect import BlockView, inspect, look

__all__ = ["BlockView", "inspect", "look"]
