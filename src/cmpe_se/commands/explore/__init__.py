"""The ``explore`` command: an interactive page about finished runs and single images."""

from cmpe_se.commands.explore.explore import explore

__all__ = ["explore"]
