"""The ``compare`` command: networks under one recipe, paired by seed."""

from cmpe_se.commands.compare.compare import compare

__all__ = ["compare"]
