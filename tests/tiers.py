"""The three tiers of tests; CONTRIBUTING.md says what each is for.

``pytest`` runs those without a mark, ``.ci/run`` those marked ``slow``, too, and ``pytest -m ""`` also the ``long``
ones: further members of a kind of which a quicker tier has one, and what takes most of a minute.
"""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def slow_but(values: Iterable[Any], now: Collection[Any]) -> list[Any]:
    """Parameters of a test: those of ``now`` in the test's own tier, all others in the slow one.

    Raises:
        AssertionError: one of ``now`` is no value, and would never run.
    """
    return _later(values, now, pytest.mark.slow)


def long_but(values: Iterable[Any], now: Collection[Any]) -> list[Any]:
    """As :func:`slow_but`, with all others in the long tier."""
    return _later(values, now, pytest.mark.long)


def _later(values: Iterable[Any], now: Collection[Any], mark: pytest.MarkDecorator) -> list[Any]:
    values = list(values)
    assert all(value in values for value in now), now
    return [value if value in now else pytest.param(value, marks=mark) for value in values]
