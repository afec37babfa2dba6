"""A bar on a terminal, and nothing elsewhere."""

import io

import pytest
from rich.console import Console

from cmpe_se.utils.progress import with_progress


@pytest.mark.parametrize(
    ("terminal", "description", "shown"), [(True, "testing", True), (False, "testing", False), (True, None, False)]
)
def test_a_bar_is_for_terminals(terminal, description, shown):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=80)
    assert list(with_progress(iter("abc"), description, 3, console=console)) == ["a", "b", "c"]
    assert ("testing" in file.getvalue()) == shown
    assert bool(file.getvalue()) == shown


def test_stderr_is_the_place(capsys):
    assert list(with_progress(range(3), "testing")) == [0, 1, 2]
    assert capsys.readouterr().out == ""
