"""Time and memory of the gates on this machine, in one run with the plain network."""

from cmpe_se.commands.benchmark.benchmark import benchmark

__all__ = ["benchmark"]
