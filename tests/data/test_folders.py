import re
from collections import Counter

import pytest

from cmpe_se.data.folders import common_size, scan_class_folders
from cmpe_se.errors import UserError


@pytest.mark.parametrize("test", ["test", "val", "validation"])
def test_layouts(test, make_folder):
    root = make_folder({"train/cat": 3, "train/dog": 2, f"{test}/cat": 1, f"{test}/dog": 2})
    folders = scan_class_folders(root)
    assert folders.classes == ("cat", "dog")
    assert [label for _, label in folders.train] == [0, 0, 0, 1, 1]
    assert [path for path, _ in folders.test] == [
        f"{root}/{test}/cat/000.png",
        f"{root}/{test}/dog/000.png",
        f"{root}/{test}/dog/001.png",
    ]


def test_test_comes_before_val(make_folder):
    root = make_folder({f"{part}/{name}": 1 for part in ("train", "val", "test") for name in "ab"})
    assert all(path.startswith(f"{root}/test/") for path, _ in scan_class_folders(root).test)


def test_classes_in_natural_order_and_images_in_folders_below(make_folder):
    root = make_folder({f"{part}/{name}/below": 2 for part in ("train", "test") for name in ("10", "9", "1")})
    folders = scan_class_folders(root)
    assert folders.classes == ("1", "9", "10")
    assert [label for _, label in folders.train] == [0, 0, 1, 1, 2, 2]


def test_stray_files_are_passed_over(two_classes):
    before = scan_class_folders(two_classes)
    for stray in ("README.txt", ".DS_Store", "train/.DS_Store", "train/cat/._001.png", "train/cat/labels.csv"):
        (two_classes / stray).write_bytes(b"stray")
    for folder in ("__MACOSX", ".git", "train/.cache", "train/cat/.ipynb_checkpoints"):
        (two_classes / folder).mkdir()
        (two_classes / folder / "x.png").write_bytes(b"stray")
    assert scan_class_folders(two_classes) == before


def test_fixed_split(make_folder, caplog):
    root = make_folder({"cat": 20, "dog": 11, "eel": 2})
    folders = scan_class_folders(root)
    assert Counter(label for _, label in folders.test) == {0: 4, 1: 2, 2: 1}
    assert Counter(label for _, label in folders.train) == {0: 16, 1: 9, 2: 1}
    assert not {path for path, _ in folders.train} & {path for path, _ in folders.test}
    assert scan_class_folders(root) == folders
    assert "a fixed fifth of each class becomes the test part, 7 of 33 images" in caplog.text


def test_classes_may_be_called_train_and_test(make_folder):
    assert scan_class_folders(make_folder({"car": 5, "train": 5, "plane": 5})).classes == ("car", "plane", "train")


WRONG = {
    "empty folder": ({}, (), "images holds no class folders: expected .*/train/<class>/"),
    "no test part": ({"train/a": 1, "train/b": 1}, (), r"folder train but no folder for the test: .*test\|val"),
    "no training part": ({"val/a": 1, "val/b": 1}, (), "folder val but no folder train"),
    "no classes": ({"train": 3, "test": 3}, (), "train holds no class folders"),
    "one class": ({"train/a": 3, "test/a": 3}, (), "train holds only the class folder a: expected at least two"),
    "one class, unsplit": ({"a": 3}, (), "holds only the class folder a"),
    "empty class": ({"train/a": 2, "train/b": 0, "test/a": 1, "test/b": 1}, (), "no images .* in the class folder b;"),
    "class of other files": ({"a": 2, "b": 0}, ("b/notes.txt",), "no images .* in the class folder b;"),
    "other classes": (
        {"train/a": 1, "train/b": 1, "train/d": 1, "val/a": 1, "val/c": 1},
        (),
        "only train has b, d, and only val has c",
    ),
    "a class less": (
        {"train/a": 1, "train/b": 1, "train/c": 1, "val/a": 1, "val/b": 1},
        (),
        "c, and only val has none",
    ),
    "class of one image, unsplit": ({"a": 2, "b": 1}, (), "the class b has one image"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_folders(case, make_folder, tmp_path):
    counts, others, message = WRONG[case]
    (tmp_path / "images").mkdir()
    root = make_folder(counts)
    for name in others:
        (root / name).write_text("x")
    with pytest.raises(UserError, match=message) as caught:
        scan_class_folders(root)
    assert re.match(rf"{root}", str(caught.value))
    assert "\n" not in str(caught.value)


def test_many_names_are_cut_short(make_folder):
    counts = {f"train/{index}": 1 for index in range(10)} | {"test/0": 1, "test/1": 1}
    with pytest.raises(UserError, match="only train has 2, 3, 4, 5, 6 and 3 more"):
        scan_class_folders(make_folder(counts))


def test_common_size(make_folder):
    root = make_folder({"a": 3, "b": 3}, size=(20, 30))
    files = scan_class_folders(root).train
    assert common_size(files) == (30, 20)
    make_folder({"b": 1}, size=(20, 31))
    assert common_size(scan_class_folders(root).train + scan_class_folders(root).test) is None


def test_common_size_without_a_readable_image(make_folder):
    root = make_folder({"a": 3, "b": 3})
    for path in root.rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(UserError, match="not an image"):
        common_size(scan_class_folders(root).train)
