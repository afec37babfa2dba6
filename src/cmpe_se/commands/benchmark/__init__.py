"""What attention costs on this machine, in one run against the plain network."""

from cmpe_se.commands.benchmark.benchmark import benchmark

__all__ = ["benchmark"]
