"""Static gates for a finished run's network: ``freeze`` chooses them, and trains on."""

from cmpe_se.commands.freeze.freeze import freeze

__all__ = ["freeze"]
