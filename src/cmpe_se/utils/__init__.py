"""Utilities that import nothing else of the package: cost of a network, plots, optional packages, text."""
