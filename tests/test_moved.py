"""Module paths of 0.1.0 lead to the modules of today."""

import importlib
import sys

import pytest

from cmpe_se.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_gives_the_module_itself(old):
    sys.modules.pop(f"cmpe_se.{old}", None)
    with pytest.warns(DeprecationWarning, match=rf"cmpe_se\.{old} is cmpe_se\.{MOVED[old]} now"):
        found = importlib.import_module(f"cmpe_se.{old}")
    assert found is importlib.import_module(f"cmpe_se.{MOVED[old]}")


def test_what_lies_below_an_old_path_is_not_imported_twice():
    from cmpe_se.comparing.statistics import holm

    from cmpe_se.commands.compare.statistics import holm as now

    assert holm is now
