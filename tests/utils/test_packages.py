"""Modules that commands import because the environment names them."""

import sys

import pytest

from cmpe_se.errors import UserError
from cmpe_se.layers.views import TABLE
from cmpe_se.utils.packages import import_asked_for

ROW = """
from cmpe_se.layers.gate_layers import SqueezeLayers
from cmpe_se.layers.views import TABLE, View
TABLE["asked_for"] = View(("residual",), SqueezeLayers(), "ours", "a gate")
"""


def test_a_gate_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "gates_asked_for.py").write_text(ROW)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("CMPE_SE_IMPORT", "gates_asked_for, json")
    try:
        import_asked_for()
        assert TABLE["asked_for"].summary == "a gate"
    finally:
        TABLE.pop("asked_for", None)
        sys.modules.pop("gates_asked_for", None)


def test_what_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "broken_gates.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name, reason in (("no_such_gates", "No module named 'no_such_gates'"), ("broken_gates", "division by zero")):
        monkeypatch.setenv("CMPE_SE_IMPORT", name)
        with pytest.raises(UserError, match=f"CMPE_SE_IMPORT names {name}, which cannot be imported: {reason}; put"):
            import_asked_for()


def test_nothing_is_asked_for(monkeypatch):
    monkeypatch.delenv("CMPE_SE_IMPORT", raising=False)
    import_asked_for()
