"""Plots of the competition inside a network, each with its sentence and the numbers behind it."""
