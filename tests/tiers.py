"""The two tiers of tests: ``pytest`` runs what a change needs to know in minutes, ``pytest -m ""`` everything."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], now: Collection[Any]) -> list[Any]:
    """Parameters of a test: those of ``now`` in the default tier, all others in the slow one.

    Raises:
        AssertionError: one of ``now`` is no value, and would never run.
    """
    values = list(values)
    assert all(value in values for value in now), now
    return [value if value in now else pytest.param(value, marks=pytest.mark.slow) for value in values]
