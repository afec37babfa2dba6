"""Trained networks for other runtimes: ``export`` writes a file and verifies it, ``load_exported`` runs one."""

from cmpe_se.commands.export.export import export
from cmpe_se.runtimes.exported import Exported, is_exported, load_exported

__all__ = ["Exported", "export", "is_exported", "load_exported"]
