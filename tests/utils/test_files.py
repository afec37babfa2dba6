"""The system's refusals as one sentence."""

import os

import pytest

from cmpe_se.errors import UserError
from cmpe_se.utils import files
from cmpe_se.utils.files import os_errors_as, write_json, write_text, written_whole


@pytest.mark.parametrize(
    ("error", "advice", "message"),
    [
        (OSError(28, "No space left on device", "a/file"), "", "cannot write to a: No space left on device"),
        (OSError(28, "No space left on device"), "make room", "cannot write to a: No space left on device; make room"),
        (OSError("cannot identify image file"), "", "cannot write to a: cannot identify image file"),
    ],
)
def test_one_sentence(error, advice, message):
    with pytest.raises(UserError) as raised, os_errors_as("cannot write to a", advice=advice):
        raise error
    assert str(raised.value) == message
    assert raised.value.__suppress_context__


@pytest.mark.parametrize("error", [UserError("another"), KeyError("name")])
def test_other_errors_pass(error):
    with pytest.raises(type(error)) as raised, os_errors_as("cannot write to a"):
        raise error
    assert raised.value is error


def test_a_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    synced = []
    monkeypatch.setattr(files, "_sync", synced.append)
    write_json(path, {"a": 1})
    assert path.read_text() == '{\n  "a": 1\n}\n'
    assert synced == [
        tmp_path / f"a.unfinished-{os.getpid()}.json",
        tmp_path,
    ]  # before it takes the old one's place, and after
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        write_half_and_stop(temporary)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.json": '{\n  "a": 1\n}\n'}


def write_half_and_stop(path):
    path.write_text("half")
    raise KeyboardInterrupt


def test_what_is_synced_is_there(tmp_path):
    write_text(tmp_path / "a", "Größe")
    assert (tmp_path / "a").read_bytes() == "Größe".encode()
    with pytest.raises(UserError, match=r"cannot write .*/gone/a: No such file or directory"):
        write_text(tmp_path / "gone" / "a", "x")
