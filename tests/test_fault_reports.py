"""The page on reports of faults names tests that exist."""

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "fault-reports.md"


def test_every_test_that_the_page_names_exists():
    there = {name for path in TESTS.rglob("test_*.py") for name in re.findall(r"def (test_\w+)", path.read_text())}
    there |= {path.stem for path in TESTS.rglob("test_*.py")}
    named = set(re.findall(r"\btest_\w+", PAGE.read_text()))
    assert len(named) > 100
    assert sorted(named - there) == []
