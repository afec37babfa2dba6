"""The ground floor, which knows nothing of the rest: cost of a network, plots, optional packages, text."""
