"""The ``report`` command: a finished run on one page, and the competition inside its network in plots."""

from cmpe_se.commands.report.report import report

__all__ = ["report"]
