"""Shapes of records, and JSON that is strict."""

from typing import Any, TypedDict

import pytest

from cmpe_se.errors import UserError
from cmpe_se.utils.records import check_shape, parse_json, read_json


class Inner(TypedDict):
    name: str | None


class Later(TypedDict, total=False):
    extra: bool


class Record(Later):
    count: int
    share: float
    inner: Inner
    pair: tuple[int, str]
    many: list[Inner] | None


RIGHT = {"count": 3, "share": 1, "inner": {"name": None}, "pair": [1, "a"], "many": [{"name": "x"}]}


@pytest.mark.parametrize("change", [{}, {"many": None}, {"extra": True}, {"unknown": object()}, {"share": -0.5}])
def test_right(change):
    value = RIGHT | change
    assert check_shape(value, Record) is value


WRONG = {
    "missing": ({"count": ...}, "it lacks count"),
    "text for a number": ({"count": "x"}, "count is 'x', should be a whole number"),
    "fraction for a whole number": ({"count": 1.5}, "count is 1.5, should be a whole number"),
    "truth for a number": ({"count": True}, "count is True, should be a whole number"),
    "truth for a fraction": ({"share": False}, "share is False, should be a number"),
    "not finite": ({"share": float("inf")}, "share is inf, should be a number"),
    "null": ({"share": None}, "share is None, should be a number"),
    "list for an object": ({"inner": []}, r"inner is \[\], should be an object with names"),
    "inside": ({"inner": {"name": 7}}, "inner.name is 7, should be text or null"),
    "missing inside": ({"inner": {}}, "inner lacks name"),
    "in a list": ({"many": [{"name": "x"}, {}]}, r"many\[1\] lacks name"),
    "union": ({"many": 7}, "many is 7, should be a list or null"),
    "too few": ({"pair": [1]}, "pair has 1 values, should have 2"),
    "in a pair": ({"pair": [1, 2]}, r"pair\[1\] is 2, should be text"),
    "optional": ({"extra": 0}, "extra is 0, should be true or false"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong(change, message):
    value = {key: part for key, part in (RIGHT | change).items() if part is not ...}
    with pytest.raises(ValueError, match=f"^{message}$"):
        check_shape(value, Record)


@pytest.mark.parametrize("value", [None, [], 7, "x"])
def test_no_object(value):
    with pytest.raises(ValueError, match=r"^its content is .*, should be an object with names$"):
        check_shape(value, Record)


JSON = {
    "NaN": ('{"a": NaN}', "it holds NaN, which is no number"),
    "infinity": ("[-Infinity]", "it holds -Infinity"),
    "twice": ('{"a": 1, "b": {"c": 1, "c": 2}}', "it has c twice"),
    "large": ("9" * 30, "it holds the number '9999.*9', which is too large"),
    "larger": ("9" * 5000, "which is too large"),
    "64 bits": (str(2**63), "which is too large"),
    "levels": ("[" * 100_000 + "]" * 100_000, "it has too many levels"),
    "cut": ('{"a": ', "Expecting value"),
    "empty": ("", "Expecting value"),
}


@pytest.mark.parametrize(("text", "message"), JSON.values(), ids=JSON)
def test_no_json(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_json():
    assert parse_json('{"a": [1, -2.5, null, true, 9223372036854775807]}') == {"a": [1, -2.5, None, True, 2**63 - 1]}
    assert parse_json("[Infinity]", finite=False) == [float("inf")]


def test_a_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"a": "Größe"}', encoding="utf-8")
    assert read_json(path, dict[str, Any], advice="") == {"a": "Größe"}
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=rf"^{path} cannot be read: 'utf-8' codec .*; delete it$"):
        read_json(path, dict[str, Any], advice="delete it")
    with pytest.raises(UserError, match=r"gone.json cannot be read: .*No such file"):
        read_json(tmp_path / "gone.json", dict[str, Any], advice="delete it")
