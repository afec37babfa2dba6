"""Which folders are parts of a data set and which are classes, in training and for a hold-out."""

import shutil

import pytest

from cmpe_se.data import Listing
from cmpe_se.data.folders import scan_class_folders, scan_hold_out
from cmpe_se.errors import UserError


def parts(*names, extra=()):
    return {f"{part}/{name}": 2 for part in names for name in ("cat", "dog")} | dict(extra)


# Folders with their images, and the parts to train on and to test.
SPLITS = {
    "Training, Testing": (parts("Training", "Testing"), "Training", "Testing"),
    "TRAIN, TEST": (parts("TRAIN", "TEST"), "TRAIN", "TEST"),
    "Train, Val": (parts("Train", "Val"), "Train", "Val"),
    "train, valid": (parts("train", "valid"), "train", "valid"),
    "training, Validation": (parts("training", "Validation"), "training", "Validation"),
    "test before val": (parts("train", "val", "test"), "train", "test"),
    "test without class folders": (parts("train", "val", extra={"test": 3}), "train", "val"),
    "test of one folder": (parts("train", "val", extra={"test/unknown": 3}), "train", "val"),
    "val without class folders": (parts("train", "test", extra={"val/images": 3}), "train", "test"),
    "other folders": (parts("train", "test", extra={"docs": 1}), "train", "test"),
}


@pytest.mark.parametrize("case", SPLITS)
def test_splits(case, make_folder):
    counts, train, test = SPLITS[case]
    root = make_folder(counts)
    folders = scan_class_folders(root)
    assert folders.classes == ("cat", "dog")
    for name, files in ((train, folders.train), (test, folders.test)):
        assert [path for path, _ in files] == [f"{root}/{name}/{c}/{i:03d}.png" for c in ("cat", "dog") for i in (0, 1)]
    assert folders.tested == f"the images in {root / test}"
    assert not folders.drawn


def test_what_is_left_out_is_said(make_folder, caplog):
    scan_class_folders(make_folder(parts("train", "val", extra={"test": 3, "docs/more": 1})))
    assert "val is tested; not used: docs, test (no class folders in it)" in caplog.text


def test_named_splits(make_folder):
    root = make_folder(parts("A", "B", "C"))
    folders = scan_class_folders(root, train_split="C", test_split="A")
    assert [path.split("/")[-3] for path, _ in (folders.train[0], folders.test[0])] == ["C", "A"]
    with pytest.raises(UserError, match="has no folder D as the test split; choose one of A, B, C"):
        scan_class_folders(root, train_split="C", test_split="D")


REFUSED = {
    "two splits": (parts("A", "B"), "look like splits named A and B .*--train-split A --test-split B"),
    "folds": (parts("fold1", "fold2", "fold3"), "3 folders hold folders of the same names, cat, dog"),
    "one more folder": (parts("A", "B", extra={"samples": 2}), "look like splits named A and B"),
    "a level lower": (parts("A/images", "B/images"), "images/cat, images/dog, so they look like splits"),
    "a level too high": (parts("data/train", "data/test", extra={"docs": 1}), "give .*/data as data_dir"),
    "a level too high, alone": (parts("data/train", "data/test"), "for the data set in it, give .*/data"),
    "split inside the classes": (
        {f"{c}/{p}": 2 for c in "ab" for p in ("Train", "test")},
        "a, b are split inside",
    ),
    "two for one part": (parts("train", "val", "validation"), "several folders for one part, validation and val"),
    "two to train on": (parts("train", "Training", "test"), r"several folders for one part.*--train-split"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_the_likely_reason(case, make_folder):
    counts, message = REFUSED[case]
    with pytest.raises(UserError, match=message) as caught:
        scan_class_folders(make_folder(counts))
    assert "\n" not in str(caught.value)


def test_folders_below_a_class_need_not_be_splits(make_folder):
    one = {f"{name}/images": 3 for name in ("cat", "dog")}
    some = {"cat/2020": 3, "cat/2021": 3, "dog/2021": 3, "eel": 3, "fly": 3}
    assert scan_class_folders(make_folder(one, name="one")).classes == ("cat", "dog")
    assert scan_class_folders(make_folder(some, name="some")).classes == ("cat", "dog", "eel", "fly")
    named = parts("train/cat", "train/dog", "test/cat", "test/dog")  # the user has said what is a split
    assert scan_class_folders(make_folder(named, name="named")).classes == ("cat", "dog")


# Folders with their images, the folder that is tested, and how many images of cat and dog there are.
HOLD_OUTS = {
    "class folders": ({"cat": 20, "dog": 20}, ".", (20, 20)),
    "class folders, one class": ({"dog": 3}, ".", (0, 3)),
    "an empty class": ({"dog": 3, "cat": 0}, ".", (0, 3)),
    "test alone": (parts("test"), "test", (2, 2)),
    "Valid alone": (parts("Valid"), "Valid", (2, 2)),
    "train and test": (parts("train", "test"), "test", (2, 2)),
    "test without class folders": (parts("train", "val", extra={"test": 3}), "val", (2, 2)),
    "val, and a test that is another thing": (parts("val", extra={"test/unknown": 3}), "val", (2, 2)),
}


@pytest.mark.parametrize("case", HOLD_OUTS)
def test_hold_out(case, make_folder):
    counts, tested, number = HOLD_OUTS[case]
    root = make_folder({name: count for name, count in counts.items() if count})
    for name in counts:
        (root / name).mkdir(exist_ok=True, parents=True)
    folders = scan_hold_out(root, ("bird", "cat", "dog"))
    assert folders.classes == ("bird", "cat", "dog")
    assert folders.tested == f"all images in {root / tested}"
    assert not folders.train
    labels = [label for _, label in folders.test]
    assert (labels.count(1), labels.count(2), labels.count(0)) == (*number, 0)
    assert all(f"/{('bird', 'cat', 'dog')[label]}/" in path for path, label in folders.test)


def test_a_class_may_have_the_name_of_a_split(make_folder):
    root = make_folder({"car": 2, "train": 2, "train/more": 2})
    assert len(scan_hold_out(root, ("car", "plane", "train")).test) == 6


WRONG_HOLD_OUTS = {
    "unknown classes": (
        {"cat": 1, "zebra": 1, "lion": 1},
        {},
        "has images of lion, zebra, and the network was trained",
    ),
    "another case": ({"Cat": 1, "dog": 1}, {}, r"has images of Cat, and .* \(bird, cat, dog\)"),
    "no class folders": ({".": 2}, {}, "holds no class folders with images.*`cmpe-se predict` takes images"),
    "only train": (parts("train"), {}, "folder train but no folder for the test; name one by --test-split"),
    "no such part": ({"cat": 1}, {"test_split": "dev"}, "has no folder dev; choose one of cat"),
}


@pytest.mark.parametrize("case", WRONG_HOLD_OUTS)
def test_wrong_hold_outs(case, make_folder):
    counts, options, message = WRONG_HOLD_OUTS[case]
    with pytest.raises(UserError, match=message):
        scan_hold_out(make_folder(counts), ("bird", "cat", "dog"), **options)


def test_the_test_images_of_a_run_stay_when_the_folder_changes(make_folder, caplog):
    root = make_folder({"cat": 20, "dog": 11})
    before = scan_class_folders(root)
    kept = Listing(test_files=frozenset(before.test_names()))
    make_folder(
        {"cat": 30, "dog": 3}, suffix=".jpg", seed=1
    )  # more images, which a new split would mix with the others
    (root / "dog" / "000.png").unlink()
    gone = before.test[0][0]
    shutil.move(gone, root.parent)
    again = scan_class_folders(root, listing=kept)
    assert again.test == before.test[1:]
    assert scan_class_folders(root).test != before.test
    assert f"1 of the {len(before.test)} test images of the run are gone" in caplog.text
    with pytest.raises(UserError, match="none of the 1 images that the run was tested on is there any more"):
        scan_class_folders(root, listing=Listing(test_files=frozenset({"cat/x.png"})))


def test_a_run_from_before_lists_its_images_as_it_did(make_folder):
    root = make_folder({"cat": 12, "dog": 10})
    first = scan_class_folders(root, listing=Listing(version=1))
    assert first == scan_class_folders(root)
    make_folder({"cat": 9, "dog": 9}, suffix=".jfif", seed=1)
    (root / "cat" / "copy.png").symlink_to(root / "cat" / "000.png")
    linked = scan_class_folders(root, listing=Listing(version=1))
    assert len(linked.train + linked.test) == 23
    now = scan_class_folders(root)
    assert len(now.train + now.test) == 40
    (root / "cat" / "copy.png").unlink()
    assert scan_class_folders(root, listing=Listing(version=1)) == first


def test_a_run_from_before_is_tested_on_the_part_of_then(make_folder):
    of_then = make_folder(parts("train", "val", "validation", "Testing"))
    found = scan_class_folders(of_then, listing=Listing(version=1))
    assert found.tested == f"the images in {of_then / 'val'}"


def test_broken_links_are_refused_or_listed(make_folder):
    root = make_folder(parts("train", "test"))
    (root / "test" / "cat" / "gone.jpg").symlink_to("/nowhere/gone.jpg")
    with pytest.raises(UserError, match=r"gone\.jpg is a link to /nowhere/gone\.jpg, which is not there"):
        scan_class_folders(root)
    assert scan_class_folders(root, skip_broken=True).broken == [str(root / "test" / "cat" / "gone.jpg")]


def test_passed_over_files_are_counted(make_folder, caplog):
    root = make_folder({"cat": 4, "dog": 4})
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/notes.txt", "dog/.hidden.txt"):
        (root / name).write_bytes(b"x")
    shutil.copy(root / "cat" / "000.png", root / "stray.png")
    scan_class_folders(root)
    assert "3 files are no images that can be read here: 2 .heic (pip install pillow-heif), 1 .txt" in caplog.text
    assert "1 image is in no class folder, and not used" in caplog.text
