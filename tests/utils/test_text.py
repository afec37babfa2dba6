"""Numbers as people read them."""

import pytest

from cmpe_se.utils.text import duration, gate_words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (7200, "120 min"), (17_900, "298 min"), (18_000, "5.0 h")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


def test_gate_words():
    assert gate_words({}) == ""
    assert gate_words({"start": "one", "reduction": 4, "bias": True}) == ", start one, reduction 4, bias"
