"""The parts of ``benchmarks/census.py``: which networks there are, what is asked of each, and the page that says it."""
