"""What an image file is, and which of them a folder holds."""

import os
from collections import Counter

import pytest
from PIL import Image

from cmpe_se.data import image_files, read_image
from cmpe_se.data.image_files import describe_passed_over, find_images, image_suffixes
from cmpe_se.data.reading import image_files as files_to_predict
from cmpe_se.errors import UserError


def found(root, *folders):
    """Paths in ``root`` of the images that are found in each of its folders."""
    return [[os.path.relpath(path, root) for path in paths] for paths in search(root, *folders).images]


def search(root, *folders):
    return find_images([str(root / folder) for folder in folders])


SUFFIXES = (
    "png",
    "jpg",
    "JPG",
    "jpeg",
    "JPEG",
    "jfif",
    "jpe",
    "webp",
    "avif",
    "jp2",
    "tif",
    "tiff",
    "bmp",
    "gif",
    "ppm",
)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_kind_that_pillow_reads_is_found_and_read(suffix, tmp_path):
    Image.new("RGB", (16, 16), (200, 10, 10)).save(tmp_path / f"x.{suffix}")
    assert found(tmp_path, ".") == [[f"x.{suffix}"]]
    assert read_image(tmp_path / f"x.{suffix}").size == (16, 16)


def test_documents_video_and_data_are_no_images(tmp_path):
    for name in ("a.pdf", "a.eps", "a.ps", "a.mpg", "a.h5", "a.grib", "a.wmf", "a.txt", "a"):
        (tmp_path / name).write_bytes(b"%PDF-1.4")
    assert found(tmp_path, ".") == [[]]
    assert search(tmp_path, ".").passed_over.total() == 9


def test_a_plug_in_s_kind_counts_once_it_is_registered(tmp_path, monkeypatch):
    (tmp_path / "x.heic").write_bytes(b"photo")
    for table in ("OPEN", "EXTENSION", "ID"):
        monkeypatch.setattr(Image, table, getattr(Image, table).copy())
    for suffix in (".heic", ".HEIC"):
        Image.EXTENSION.pop(suffix, None)
    assert found(tmp_path, ".") == [[]]
    Image.register_open("HEIF", lambda file, name: None)
    Image.register_extension("HEIF", ".heic")
    assert found(tmp_path, ".") == [["x.heic"]]


def test_what_is_passed_over_is_said_with_what_would_read_it():
    counts = Counter({".heic": 12, ".txt": 3, "": 1})
    assert describe_passed_over(counts) == (
        "16 files are no images that can be read here: 12 .heic (pip install pillow-heif), 3 .txt, 1 without a suffix"
    )
    assert describe_passed_over(Counter({".txt": 1})) == "1 file is no image that can be read here: 1 .txt"
    many = Counter({f".{letter}": 2 for letter in "abcdefghijklm"})
    assert describe_passed_over(many).endswith("2 .j and 3 other kinds")


HIDDEN = (".x.png", "._000.png", ".cache/x.png", "__MACOSX/._000.png", "__MACOSX/x.png", "@eaDir/000.png/THUMB.jpg")


@pytest.mark.parametrize("name", HIDDEN)
def test_hidden_files_are_no_images_anywhere(name, make_folder):
    root = make_folder({"cat": 2})
    (root / "cat" / name).parent.mkdir(parents=True, exist_ok=True)
    (root / "cat" / name).write_bytes((root / "cat" / "000.png").read_bytes())
    assert found(root, "cat") == [["cat/000.png", "cat/001.png"]]
    assert not search(root, "cat").passed_over
    assert len(files_to_predict(root)) == 2


def test_links_that_loop_end(make_folder):
    root = make_folder({"a": 3, "a/below": 2, "b": 2})
    os.symlink("../a", root / "a" / "self")
    os.symlink(".", root / "a" / "dot")
    os.symlink("../..", root / "a" / "below" / "up")
    os.symlink(root, root / "b" / "root")
    os.symlink("x.png", root / "b" / "x.png")
    result = search(root, "a", "b")
    assert [len(paths) for paths in result.images] == [5, 2]
    assert result.repeated == 4
    assert result.broken == [str(root / "b" / "x.png")]
    assert len(files_to_predict(root)) == 8  # with the broken link, which is not to be passed over


def test_one_real_file_counts_once_and_at_its_own_place(make_folder):
    root = make_folder({"a": 2, "b": 3})
    os.symlink("../b", root / "a" / "all")
    os.symlink("../b/000.png", root / "a" / "soft.png")
    os.link(root / "a" / "000.png", root / "b" / "hard.png")
    result = search(root, "a", "b")
    assert [[os.path.basename(path) for path in paths] for paths in result.images] == [
        ["000.png", "001.png"],
        ["000.png", "001.png", "002.png"],
    ]
    assert result.repeated == 3


def test_links_to_images_elsewhere_are_followed(make_folder):
    root, store = make_folder({"a": 1}), make_folder({"one": 2, "two": 1}, name="store")
    os.symlink(store / "one", root / "a" / "more")
    os.symlink(store / "two" / "000.png", root / "a" / "z.png")
    os.symlink(store / "two", root / "b")
    assert found(root, "a", "b") == [["a/000.png", "a/more/000.png", "a/more/001.png"], ["b/000.png"]]


def test_what_is_no_regular_file_is_passed_over(make_folder):
    root = make_folder({"a": 1, "a/folder.png": 1})
    os.mkfifo(root / "a" / "pipe.png")
    assert found(root, "a") == [["a/000.png", "a/folder.png/000.png"]]


def test_a_folder_without_permission_is_said(make_folder, monkeypatch):
    root = make_folder({"a": 1, "a/below": 1})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("below"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(image_files.os, "scandir", refuse)
    with pytest.raises(UserError, match=r"the folder .*/a/below cannot be read \(Permission denied\)"):
        search(root, "a")


def test_a_broken_link_is_read_with_a_sentence_on_it(tmp_path):
    os.symlink("/nowhere/y.png", tmp_path / "x.png")
    with pytest.raises(UserError, match=r"x\.png is a link to /nowhere/y\.png, which is not there"):
        read_image(tmp_path / "x.png")


def test_suffixes_are_lower_case_and_have_their_dot():
    assert {".png", ".jpg", ".avif", ".jp2", ".mpo"} <= image_suffixes()
    assert not {".pdf", ".eps", ".h5", ".mpg"} & image_suffixes()
