"""A run on class folders, tested on its own images and on others: which images count, and what cannot be read."""

import json
import os
import shutil
from pathlib import Path

import pytest

from cmpe_se.commands.evaluate import complaint, evaluate
from cmpe_se.commands.predict import complaint as complaint_of_predictions
from cmpe_se.commands.predict import predict
from cmpe_se.data import LargeImages, Preprocessing, load_data
from cmpe_se.errors import UserError
from cmpe_se.training import run_data, train
from cmpe_se.training.robustness import corruption_metrics
from cmpe_se.training.run_data import load_run_data, load_tested
from cmpe_se.training.run_folder import RunFolder
from tests.training.conftest import write_digits
from tests.training.processes import complaint_of


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Class folders of four digits: part/DIGIT/NUMBER.png, 30 of each in ``own`` and 10 others in ``other``."""
    return write_digits(tmp_path_factory.mktemp("images"), {"own": 30, "other": 10})


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> Path:
    """A run of one epoch on ``own``, which has no part for the test; one image of a 0 is there twice."""
    shutil.copy(images / "own" / "0" / "001.png", images / "own" / "0" / "copy.png")
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMPE_SE_CACHE", str(folder.parent / "cache"))
        train(data="folder", data_dir=str(images / "own"), epochs=1, output=folder, workers=0)
    return folder


@pytest.fixture
def run(finished, images, tmp_path) -> Path:
    """The run and its images, to be changed: tmp_path/run, tmp_path/own and tmp_path/other."""
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    folder = shutil.copytree(finished, tmp_path / "run")
    moved = RunFolder(folder)
    config = moved.read_config()
    moved.write_config(config.changed(data_dir=config.data_dir.replace(str(images), str(tmp_path))))
    return folder


def paths_of_test(run, *arguments, **options) -> list[str]:
    """Paths of the images that a run is tested on."""
    data = load_tested(RunFolder(run), *arguments, workers=0, **options)
    assert data.test_size == len(data.folders.test)
    return [path for path, _ in data.folders.test]


def spoil(folder: Path) -> list[str]:
    """Three files that cannot be read in a class folder, in their order."""
    (folder / "bad.png").write_bytes(b"hello")
    (folder / "gone.png").symlink_to("/nowhere/x.png")
    (folder / "half.png").write_bytes((folder / "000.png").read_bytes()[:50])
    return [str(folder / name) for name in ("bad.png", "gone.png", "half.png")]


def test_all_images_of_a_hold_out_are_tested(finished, images, tmp_path, capsys):
    metrics = evaluate(str(finished), data_dir=str(images / "other"), workers=0, output=str(tmp_path))
    said = f"{finished}: 40 images tested, all images in {images / 'other'}"
    assert said in capsys.readouterr().out
    assert json.loads((tmp_path / "evaluation.json").read_text()) == metrics
    assert (metrics["images"], metrics["unreadable"], complaint(metrics)) == (40, [], None)
    records = predict(str(finished), str(images / "other"), top=1)
    right = [record["classes"][0]["class"] == Path(record["image"]).parent.name for record in records]
    assert metrics["test_top1"] == pytest.approx(100 * sum(right) / 40)


def test_a_hold_out_of_some_classes_counts_them_by_name(run, tmp_path):
    for name in ("0", "2"):
        shutil.rmtree(tmp_path / "other" / name)
    data = load_tested(RunFolder(run), data_dir=str(tmp_path / "other"), workers=0)
    assert data.classes == ("0", "1", "2", "3")
    assert next(data.test_batches(batch_size=20))[1].tolist() == [1] * 10 + [3] * 10
    metrics = evaluate(str(run), data_dir=str(tmp_path / "other"), workers=0)
    assert set(metrics["per_class"]) == {"1", "3"}
    assert metrics["test_top1"] == pytest.approx(sum(metrics["per_class"].values()) / 2)
    rows = (run / "evaluation" / "per_class.csv").read_text().splitlines()
    assert [row.split(",")[:2] for row in rows[1:]] == [["1", "10"], ["3", "10"]]


def test_an_unknown_class_of_a_hold_out_is_named(run, tmp_path):
    (tmp_path / "other" / "3").rename(tmp_path / "other" / "three")
    said = complaint_of("evaluate", run, "--data-dir", tmp_path / "other")
    assert "has images of three, and the network was trained on 4 other classes (0, 1, 2, 3)" in said


def test_of_its_own_folder_a_run_is_never_tested_on_training_images(run, tmp_path, monkeypatch):
    own = paths_of_test(run)
    kept = json.loads((run / "data.json").read_text())
    assert [os.path.relpath(path, tmp_path / "own") for path in own] == kept["test_files"]
    assert len(own) == kept["test_images"] == 24
    (tmp_path / "link").symlink_to(tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    for place in (tmp_path / "own", tmp_path / "link", "own", "other/../own"):
        assert paths_of_test(run, "folder", str(place)) == own


def test_a_folder_that_has_changed_since_leaves_the_test_images_as_they_were(run, tmp_path):
    own = paths_of_test(run)
    for number in range(7):
        shutil.copy(tmp_path / "other" / "1" / f"00{number}.png", tmp_path / "own" / "1" / f"new{number}.png")
    assert paths_of_test(run) == own
    train(resume=run, epochs=2, workers=0)
    data = load_tested(RunFolder(run), workers=0)
    assert [path for path, _ in data.folders.test] == own
    assert data.train_size == 97 + 7


def test_a_run_from_before_is_tested_on_the_images_of_then(run, tmp_path):
    own = paths_of_test(run)
    (run / "data.json").unlink()
    for number in range(7):  # kinds that were passed over, and files that were counted again
        shutil.copy(tmp_path / "other" / "1" / f"00{number}.png", tmp_path / "own" / "1" / f"new{number}.jfif")
    assert paths_of_test(run) == own
    assert paths_of_test(run, data_dir=str(tmp_path / "own")) == own
    assert load_run_data(RunFolder(run)).test_size == len(own)
    shutil.copy(tmp_path / "other" / "1" / "000.png", tmp_path / "own" / "1" / "new.png")
    for load in (load_tested, load_run_data):  # now another fifth would be drawn, with training images in it
        with pytest.raises(UserError, match=r"(has 122 images, and had 121 when .* cannot be told|has other images)"):
            load(RunFolder(run))


@pytest.mark.parametrize("text", ["", "[]", "null", "7", "{}", '{"listing": 2}', '{"listing": 3, "test_files": null}'])
def test_a_damaged_record_of_the_test_images_is_said(text, run):
    (run / "data.json").write_text(text)
    assert "data.json cannot be used" in complaint_of("evaluate", run)


PLACES = {
    "other shards": ("wds/one", "wds/two", None),
    "other parquet files": ("hfds/one", "hfds/two", "/kept"),
    "other images of torchvision": ("cifar10", "cifar100", "/kept"),
    "class folders": ("cifar10", "folder", None),
}


@pytest.mark.parametrize("case", PLACES)
def test_other_data_are_looked_for_in_the_run_s_folder_only_where_they_share_it(case, run, monkeypatch):
    own, other, expected = PLACES[case]
    config = RunFolder(run).read_config().changed(data=own, data_dir="/kept")
    RunFolder(run).write_config(config)
    asked = []

    def load(name, data_dir, **options):
        asked.append((name, data_dir, options["hold_out"]))
        raise UserError("enough")

    monkeypatch.setattr(run_data, "load_data", load)
    with pytest.raises(UserError, match="enough"):
        load_tested(RunFolder(run), other)
    assert asked == [(other, expected, True)]


def test_training_images_in_a_hold_out_are_counted(run, tmp_path, caplog):
    shutil.copytree(tmp_path / "own", tmp_path / "copy")
    assert len(paths_of_test(run, data_dir=str(tmp_path / "copy"))) == 121
    count = 97 + sum("001.png" in path or "copy.png" in path for path in paths_of_test(run) if "/0/" in path)
    assert f"{count} of 121 images were trained on, byte for byte" in caplog.text
    caplog.clear()
    paths_of_test(run, data_dir=str(tmp_path / "other"))
    assert not caplog.text


def test_copies_between_training_and_test_are_counted_before_training(tmp_path, caplog):
    root = write_digits(tmp_path / "images", {"train": 8, "test": 4})
    for number in range(3):
        shutil.copy(root / "train" / "2" / f"00{number}.png", root / "test" / "2" / f"again{number}.png")
    (root / "test" / "3" / "link.png").symlink_to(root / "train" / "3" / "000.png")
    train(data="folder", data_dir=str(root), epochs=1, output=tmp_path / "run", workers=0)
    assert f"{root}: 4 of 20 test images are in the training part too, byte for byte" in caplog.text
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert (kept["test_images_in_training"], kept["test_files"]) == (4, None)


def test_evaluate_goes_on_past_files_that_cannot_be_read(run, tmp_path, capsys):
    bad = spoil(tmp_path / "other" / "2")
    metrics = evaluate(str(run), data_dir=str(tmp_path / "other"), workers=0)
    assert metrics["images"] == 40
    assert sorted(image["image"] for image in metrics["unreadable"]) == bad
    assert json.loads((run / "evaluation" / "evaluation.json").read_text())["unreadable"] == metrics["unreadable"]
    said = capsys.readouterr().err
    assert all(f"not tested: {path}" in said for path in bad)
    clean = evaluate(str(run), data_dir=str(tmp_path / "other"), workers=0, output=str(tmp_path / "again"))
    assert clean["test_top1"] == metrics["test_top1"]


def test_evaluate_ends_with_status_1_and_the_count(run, tmp_path):
    spoil(tmp_path / "other" / "2")
    said = complaint_of("evaluate", run, "--data-dir", tmp_path / "other", "--workers", 0)
    assert said.startswith("cmpe-se: error: 3 of 43 images cannot be read, listed above; the first: ")
    assert (run / "evaluation" / "confusion.png").is_file()
    said = complaint_of("evaluate", run, "--data-dir", tmp_path / "other", "--workers", 0, "--fail-fast")
    assert "gone.png is a link" in said or "of 42 images in" in said


def test_a_run_s_own_test_images_may_have_become_unreadable(run, tmp_path):
    own = paths_of_test(run)
    Path(own[0]).write_bytes(b"spoilt")
    metrics = evaluate(str(run), workers=0)
    assert [image["image"] for image in metrics["unreadable"]] == own[:1]
    assert metrics["images"] == len(own) - 1


def test_nothing_that_can_be_read_is_an_error(run, tmp_path):
    for path in (tmp_path / "other").rglob("*.png"):
        path.write_bytes(b"spoilt")
    assert "none of all images in" in complaint_of("evaluate", run, "--data-dir", tmp_path / "other", "--workers", 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_large_images_that_cannot_be_read_are_no_test_images_any_more(workers, run, tmp_path):
    bad = spoil(tmp_path / "other" / "2")
    photos = Preprocessing.of_photos(("0", "1", "2", "3"), 16)
    options = {"preprocessing": photos, "hold_out": True, "workers": workers}
    data = load_data("folder", tmp_path / "other", skip_unreadable=True, **options)
    assert isinstance(data, LargeImages)
    assert data.test_size == 42
    for _ in range(2):
        labels = [label for _, batch in data.test_batches(batch_size=4) for label in batch.tolist()]
        assert labels == sorted(10 * [0, 1, 2, 3])
        assert data.test_size == 40
        assert sorted(image.image for image in data.unreadable) == bad
    always_2 = corruption_metrics(lambda images: images.new_tensor([[0.0, 0.0, 1.0, 0.0]]).expand(len(images), 4), data)
    assert always_2["clean"] == always_2["mean"] == 25
    with pytest.raises(UserError, match=r"(bad|half)\.png"):
        list(load_data("folder", tmp_path / "other", **options).test_batches(batch_size=4))


def test_training_says_at_once_which_images_cannot_be_read(run, tmp_path):
    spoil(tmp_path / "own" / "2")
    said = complaint_of("train", "--data", "folder", "--data-dir", tmp_path / "own", "--output", tmp_path / "new")
    assert "gone.png is a link to /nowhere/x.png, which is not there" in said
    (tmp_path / "own" / "2" / "gone.png").unlink()
    said = complaint_of("train", "--data", "folder", "--data-dir", tmp_path / "own", "--output", tmp_path / "new")
    assert "2 of 123 images in" in said
    assert not (tmp_path / "new").exists()


def test_predict_goes_on_past_files_that_cannot_be_read(run, tmp_path, capsys):
    folder = tmp_path / "other" / "2"
    bad = spoil(folder)
    records = predict(str(run), str(folder), batch_size=4)
    assert [record["image"] for record in records] == sorted(map(str, folder.iterdir()))
    assert [record["image"] for record in records if "error" in record] == bad
    assert sum("classes" in record for record in records) == 10
    assert capsys.readouterr().err.count("not predicted: ") == 3
    assert complaint_of_predictions(records).startswith(
        f"3 of 13 images cannot be read, listed above; the first: {bad[0]}"
    )
    with pytest.raises(UserError, match=r"bad\.png is not an image"):
        predict(str(run), str(folder), fail_fast=True)


def test_predict_ends_with_status_1_and_has_the_errors_in_json(run, tmp_path, capsys):
    spoil(tmp_path / "other" / "2")
    assert "3 of 43 images cannot be read" in complaint_of("predict", run, "--as-json", tmp_path / "other")
    assert "not an image" in complaint_of("predict", run, "--fail-fast", tmp_path / "other")


@pytest.mark.parametrize("arguments", [("train",), ("evaluate", "--data", "digits")])
def test_a_folder_that_would_not_be_looked_at_is_said(arguments, run, tmp_path):
    command, *options = arguments
    named = [run] if command == "evaluate" else []
    said = complaint_of(command, *named, *options, "--data-dir", tmp_path / "own")
    assert "digits come with scikit-learn and the folder would not be looked at; add --data folder" in said
