"""The ``explore`` command: a page on this machine to play with finished runs and single images."""

from cmpe_se.commands.explore.explore import explore

__all__ = ["explore"]
