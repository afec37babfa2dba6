"""Numbers as people read them."""

import pytest

from cmpe_se.utils.text import duration, gate_words, in_one_line, in_points


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119.4, "119 s"), (120, "2 min"), (7200, "120 min"), (17_900, "298 min"), (18_000, "5.0 h")],
)
def test_duration(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(1, "1 point"), (1.0, "1 point"), (0.2, "0.2 points"), (10, "10 points")])
def test_in_points(value, words):
    assert in_points(value) == words


def test_gate_words():
    assert gate_words({}) == ""
    assert gate_words({"start": "one", "reduction": 4, "bias": True}) == ", start one, reduction 4, bias"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("two\n  lines\tof text "), "two lines of text"),
        (ValueError(), "ValueError"),
        (OSError(2, "No such file", "a/b"), "[Errno 2] No such file: 'a/b'"),
        (ValueError("x" * 400), "x" * 300),
    ],
)
def test_errors_in_one_line(error, words):
    assert in_one_line(error) == words


def test_long_errors_are_cut():
    assert in_one_line(ValueError("x" * 400), most=200) == "x" * 200
