import os
import shutil
from pathlib import Path

import pytest

from cmpe_se.data import copies
from cmpe_se.data.copies import find_copies


@pytest.fixture
def files(make_folder):
    """Paths of 12 training images, and of 8 test images of which three have the bytes of a training image."""
    root = make_folder({"train": 12, "test": 5}, suffix=".bmp")  # all of one size in bytes
    shutil.copy(root / "train" / "003.bmp", root / "test" / "another name.bmp")
    os.symlink(root / "train" / "004.bmp", root / "test" / "soft.bmp")
    os.link(root / "train" / "005.bmp", root / "test" / "hard.bmp")
    return tuple(sorted(map(str, (root / part).iterdir())) for part in ("train", "test"))


def test_same_bytes_under_any_name(files):
    train, test = files
    found = find_copies(train, test)
    assert (found.number, found.looked_at) == (3, 8)
    assert [os.path.basename(path) for path in found.example] == ["another name.bmp", "003.bmp"]
    assert find_copies(train, [path for path in test if path[-7:-4].isdigit()]) == (0, 5, None)


def test_files_that_differ_in_the_last_byte_are_not_the_same(files):
    train, test = files
    with open(test[0], "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    known = {Path(path).read_bytes() for path in train}
    expected = sum(Path(path).read_bytes() in known for path in test)
    assert expected in (2, 3)  # the first file is a copy, or is not
    assert find_copies(train, test).number == expected


def test_only_files_of_equal_size_are_opened(make_folder, monkeypatch):
    root = make_folder({"train": 3, "test": 3})
    for index, path in enumerate(sorted(root.rglob("*.png"))):
        path.write_bytes(bytes(100 + index))
    monkeypatch.setattr(copies._Digests, "of_head", None)
    train, test = (sorted(map(str, (root / part).iterdir())) for part in ("train", "test"))
    assert find_copies(train, test) == (0, 3, None)


def test_of_very_many_a_part_is_looked_for(files, monkeypatch):
    train, test = files
    monkeypatch.setattr(copies, "_MOST_FILES", 16)
    assert find_copies(train, test).looked_at == 4
    monkeypatch.setattr(copies, "_MOST_FILES", 5)
    assert find_copies(train, test) == (0, 0, None)


def test_files_that_are_gone_or_empty_are_copies_of_none(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(b"")
    assert (
        find_copies([str(tmp_path / "a"), str(tmp_path / "x")], [str(tmp_path / "b"), str(tmp_path / "x")]).number == 0
    )
