"""The cache of decoded images where there is no place for it, or an end before it is written."""

import os
import pwd
import subprocess
import time
from pathlib import Path

import pytest
import torch

from cmpe_se.data import cache as module
from cmpe_se.data import load_data
from cmpe_se.data.cache import cache_folder


@pytest.fixture
def homeless(monkeypatch):
    """A user whom the system does not know, as in a container that was started with a number for a user."""

    def unknown(user):
        raise KeyError(f"getpwuid(): uid not found: {user}")

    for name in ("HOME", "CMPE_SE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.parametrize(
    ("variable", "place"), [("CMPE_SE_CACHE", ""), ("XDG_CACHE_HOME", "cmpe-se"), ("HOME", ".cache/cmpe-se")]
)
def test_no_home_is_needed_where_a_place_is_named(variable, place, homeless, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, str(tmp_path / "place"))
    assert cache_folder() == tmp_path / "place" / place


def images(data):
    return torch.cat([data.tensors[0], data.tensors[2]])


def test_without_a_home_images_are_decoded_each_time(homeless, two_classes, caplog):
    first, again = load_data("folder", two_classes), load_data("folder", two_classes)
    assert torch.equal(images(first), images(again))
    expected = "there is no home folder to cache decoded images in; set CMPE_SE_CACHE to a folder"
    assert [record.message for record in caplog.records] == [expected] * 2


def refused(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize("what", ["a file in its place", "no permission to look", "no permission to write", "full"])
def test_a_cache_that_cannot_be_used_stops_nothing(what, two_classes, cache_dir, monkeypatch, caplog):
    expected = images(load_data("folder", two_classes))
    for file in cache_dir.iterdir():
        file.unlink()
    if what == "a file in its place":
        cache_dir.rmdir()
        cache_dir.write_text("")
    elif what == "no permission to look":
        exists = Path.exists
        no = refused(PermissionError(13, "Permission denied"))
        monkeypatch.setattr(Path, "exists", lambda path: no() if path.parent == cache_dir else exists(path))
    elif what == "no permission to write":
        monkeypatch.setattr("pathlib.Path.mkdir", refused(PermissionError(13, "Permission denied")))
    else:
        monkeypatch.setattr(module, "save_tensors", refused(OSError(28, "No space left on device")))
    assert torch.equal(images(load_data("folder", two_classes)), expected)
    assert any("cache" in record.message for record in caplog.records)
    if what == "full":
        assert list(cache_dir.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", folder], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(tiny_disk, two_classes, monkeypatch, caplog):
    monkeypatch.setenv("CMPE_SE_CACHE", str(tiny_disk / "cache"))
    assert len(images(load_data("folder", two_classes))) == 24
    assert [record.message.split(" (")[0] for record in caplog.records] == [
        f"decoded images could not be cached in {tiny_disk / 'cache'}"
    ]
    assert list((tiny_disk / "cache").iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_an_interrupted_write(error, two_classes, cache_dir, monkeypatch):
    original = module.save_tensors

    def half(tensors, path):
        original(tensors, path)
        raise error

    monkeypatch.setattr(module, "save_tensors", half)
    with pytest.raises(error):
        load_data("folder", two_classes)
    assert list(cache_dir.iterdir()) == []


def test_what_earlier_versions_left_is_swept(two_classes, cache_dir):
    cache_dir.mkdir(parents=True)
    for name, hours in (("writing-abc", 48), ("writing-now", 0)):
        (cache_dir / name).write_bytes(bytes(1000))
        os.utime(cache_dir / name, (time.time() - 3600 * hours,) * 2)
    load_data("folder", two_classes)
    assert sorted(path.suffix or path.name for path in cache_dir.iterdir()) == [".safetensors", "writing-now"]
