"""A finished run's network with fewer multiply-adds: ``prune`` takes channels and blocks out, and trains on."""

from cmpe_se.commands.prune.prune import prune

__all__ = ["prune"]
