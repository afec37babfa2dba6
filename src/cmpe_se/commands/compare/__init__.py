"""The ``compare`` command: networks under one recipe, paired by seed, from a question to a table."""

from cmpe_se.commands.compare.compare import compare

__all__ = ["compare"]
