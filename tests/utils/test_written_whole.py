"""Files that are written whole or not at all, and what a killed writer leaves."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from cmpe_se.errors import UserError
from cmpe_se.utils.files import replaced, sweep, whole_path, written_whole
from cmpe_se.utils.plots import save_figure

_FORK = multiprocessing.get_context("fork")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_at_the_end(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with replaced(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
        assert unfinished.suffix == ".csv"
    assert path.read_text() == "after"
    assert names(tmp_path) == ["table.csv"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, OSError])
def test_nothing_is_left_of_a_write_that_fails(error, tmp_path):
    path = tmp_path / "table.csv"
    path.write_text("before")
    with pytest.raises(error if error is not OSError else UserError), replaced(path) as unfinished:  # noqa: PT012
        unfinished.write_text("half")
        raise error
    assert path.read_text() == "before"
    assert names(tmp_path) == ["table.csv"]


def write_and_wait(path: Path, ready) -> None:
    with written_whole(path) as unfinished:
        unfinished.write_bytes(bytes(1000))
        ready.set()
        time.sleep(60)


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing ``cache.bin``."""
    ready = _FORK.Event()
    process = _FORK.Process(target=write_and_wait, args=(tmp_path / "cache.bin", ready))
    process.start()
    assert ready.wait(30)
    yield process
    process.kill()
    process.join()


def test_a_live_writers_file_is_left_alone(writer, tmp_path):
    before = names(tmp_path)
    assert len(before) == 2  # the file and its lock
    sweep(tmp_path)
    with written_whole(tmp_path / "cache.bin") as unfinished:
        unfinished.write_bytes(b"whole")
    assert names(tmp_path) == ["cache.bin", *before]


@pytest.mark.parametrize("how", ["sweep", "write"])
def test_a_killed_writers_file_is_swept(how, writer, tmp_path):
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert len(names(tmp_path)) == 2
    if how == "sweep":
        sweep(tmp_path)
        assert names(tmp_path) == []
    else:
        with written_whole(tmp_path / "cache.bin") as unfinished:
            unfinished.write_bytes(b"whole")
        assert names(tmp_path) == ["cache.bin"]


def test_without_a_lock_age_decides(tmp_path):
    for name, hours in (("writing-old", 48), ("writing-new", 1), ("other-old", 48)):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (time.time() - 3600 * hours,) * 2)
    (tmp_path / "writing-folder").mkdir()
    (tmp_path / "writing-folder" / "file").write_bytes(bytes(10))
    os.utime(tmp_path / "writing-folder", (time.time() - 3600 * 48,) * 2)
    sweep(tmp_path, "writing-*")
    assert names(tmp_path) == ["other-old", "writing-new"]
    sweep(tmp_path / "not there")


def test_a_figure_that_cannot_be_written_is_named(tmp_path):
    figure = Figure()
    save_figure(figure, tmp_path / "curves.png", dpi=20)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*file/curves\.png: Not a directory"):
        save_figure(figure, tmp_path / "file" / "curves.png", dpi=20)


def test_a_home_folder_that_nobody_has(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert whole_path("~/images") == Path("/home/me/images")
    assert whole_path("images") == Path("images")
    with pytest.raises(UserError, match=r"^~nobody-knows-them/images: there is no home folder to put in"):
        whole_path("~nobody-knows-them/images")
