"""A trained network in use: ``cmpe-se evaluate`` and ``cmpe-se predict``."""

import csv
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from cmpe_se.commands.evaluate import evaluate
from cmpe_se.commands.predict import predict
from cmpe_se.data import load_data
from tests.training.conftest import write_digits
from tests.training.processes import complaint_of, succeed
from tests.training.runs import result


@pytest.fixture(scope="module")
def evaluation(digits_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    done = succeed("evaluate", digits_run, "--output", folder)
    return folder, json.loads((folder / "evaluation.json").read_text()), done


def test_figures_are_the_run_s(digits_run, evaluation):
    _, figures, done = evaluation
    for name in ("test_top1", "test_top5"):
        assert figures[name] == pytest.approx(result(digits_run)[name])
    assert figures["test_loss"] == pytest.approx(result(digits_run)["test_loss"], rel=1e-5)
    assert figures["images"] == 360
    assert f"{figures['test_top1']:.2f}" in done.out


def probabilities(run_folder):
    """Of the run's network on the test images, by hand: (360, 10), and the labels."""
    import timm

    import cmpe_se  # noqa: F401

    model = timm.create_model(f"local-dir:{run_folder / 'model'}", pretrained=True).eval()
    images, labels = next(load_data("digits").test_batches(batch_size=360))
    with torch.no_grad():
        return model(images).softmax(1).double().numpy(), labels.numpy()


def test_confusion_and_classes_by_hand(digits_run, evaluation):
    folder, figures, _ = evaluation
    found, labels = probabilities(digits_run)
    confusion = np.zeros((10, 10), int)
    for label, row in zip(labels, found, strict=True):
        confusion[label, row.argmax()] += 1
    rows = list(csv.reader((folder / "confusion.csv").open()))
    assert rows[0][1:] == [str(digit) for digit in range(10)]
    assert np.array([row[1:] for row in rows[1:]], int).tolist() == confusion.tolist()
    for digit, line in enumerate(csv.DictReader((folder / "per_class.csv").open())):
        accuracy = 100 * confusion[digit, digit] / confusion[digit].sum()
        assert line["class"] == str(digit)
        assert int(line["images"]) == confusion[digit].sum()
        assert float(line["top1"]) == pytest.approx(accuracy, abs=0.005)
        assert figures["per_class"][str(digit)] == pytest.approx(accuracy)


def test_calibration_error_by_hand(digits_run, evaluation):
    found, labels = probabilities(digits_run)
    confidence, right = found.max(1), found.argmax(1) == labels
    error = 0.0
    for bin_number in range(15):
        inside = (confidence > bin_number / 15) & (confidence <= (bin_number + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert evaluation[1]["calibration_error"] == pytest.approx(100 * error, abs=1e-3)


def test_confusion_picture(evaluation):
    with Image.open(evaluation[0] / "confusion.png") as image:
        assert image.format == "PNG"
        assert min(image.size) > 400


def test_python_and_command_agree(digits_run, evaluation, tmp_path):
    figures = evaluate(str(digits_run), output=str(tmp_path), batch_size=7)
    assert figures["test_top1"] == evaluation[1]["test_top1"]


@pytest.mark.slow
def test_corruptions_are_tested_and_left_in_the_folder(digits_run, evaluation, tmp_path):
    done = succeed("evaluate", "--corruptions", digits_run, "--output", tmp_path)
    figures = json.loads((tmp_path / "corruptions.json").read_text())
    assert figures["clean"] == pytest.approx(evaluation[1]["test_top1"])
    assert "contrast" in done.out
    assert f"{figures['mean']:.2f}" in done.out
    assert (tmp_path / "corruptions.csv").exists()
    assert (tmp_path / "corruptions.png").stat().st_size > 10_000


def test_other_classes(digits_run, tmp_path):
    folder = write_digits(tmp_path, {"test": 1})
    (folder / "test" / "3").rename(folder / "test" / "three")
    complaint = complaint_of("evaluate", digits_run, "--data", "folder", "--data-dir", folder)
    assert "has images of three" in complaint
    assert "test on the same classes" in complaint


@pytest.mark.long
def test_other_images_at_the_trained_size(digit_folder, tmp_path):
    succeed("train", "--data=folder", "--data-dir", digit_folder, "--epochs=1", "--output", tmp_path / "run")
    large = write_digits(tmp_path / "large", {"train": 2, "test": 2}, side=120)
    figures = evaluate(str(tmp_path / "run"), data_dir=str(large), corruptions=True)
    assert figures["images"] == 8
    assert figures["corruptions"]["clean"] == pytest.approx(figures["test_top1"])
    # Of other images than the run's own: compare, which looks into the run's folder, is not to find it.
    assert not (tmp_path / "run" / "corruptions.json").exists()
    assert (tmp_path / "run" / "evaluation" / "corruptions.json").is_file()


def test_unfinished_run(tmp_path, digits_run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((digits_run / "config.yaml").read_text())
    for command in (["evaluate", tmp_path / "run"], ["predict", tmp_path / "run", tmp_path]):
        assert re.search(r"--resume .*run", complaint_of(*command))


def test_weights_that_are_none(tmp_path, digits_run):
    import shutil

    folder = shutil.copytree(digits_run, tmp_path / "run")
    (folder / "model" / "model.safetensors").write_bytes(b"half")
    assert "cannot load" in complaint_of("evaluate", folder)


@pytest.fixture(scope="module")
def digit_images(tmp_path_factory):
    """Ten images of each digit, scaled up, in colour folders: nothing like the 8x8 arrays of training."""
    return write_digits(tmp_path_factory.mktemp("digits"), {"some": 10}, digits=range(10), side=32) / "some"


def test_predict_folder_as_json(digits_run, digit_images):
    done = succeed("predict", digits_run, "--top", 3, "--as-json", digit_images)
    records = [json.loads(line) for line in done.out.splitlines()]
    assert len(records) == 100
    assert sum(record["classes"][0]["class"] == record["image"].split("/")[-2] for record in records) >= 80
    for record in records:
        found = [entry["probability"] for entry in record["classes"]]
        assert len(found) == 3
        assert found == sorted(found, reverse=True)
        assert 0 < sum(found) <= 1.00001


def test_predict_table_and_colours(digits_run, digit_images, tmp_path):
    original = digit_images / "3" / "000.png"
    Image.open(original).convert("RGB").save(tmp_path / "three.jpg", quality=95)
    done = succeed("predict", digits_run, tmp_path / "three.jpg", original)
    assert len(re.findall(r"3 \d+\.\d %", done.out)) >= 2


def test_predict_passes_over_other_files(digits_run, digit_images, tmp_path):
    (tmp_path / "data.h5").write_bytes(b"numbers")
    Image.open(digit_images / "3" / "000.png").save(tmp_path / "three.png")
    assert [record["image"] for record in predict(str(digits_run), str(tmp_path))] == [str(tmp_path / "three.png")]


def test_predict_from_python(digits_run, digit_images):
    record = predict(str(digits_run), [str(digit_images / "7" / "001.png")], top=1)[0]
    assert record["classes"][0]["class"] == "7"


PREDICT_MISTAKES = {
    "missing": (lambda folder: folder / "none.png", "no image at .*none.png"),
    "corrupt": (lambda folder: _write(folder / "bad.png", b"\x89PNG\r\n\x1a\nhalf"), r"bad\.png"),
    "no image": (lambda folder: _write(folder / "notes.txt", b"hello"), r"notes\.txt"),
    "empty folder": (lambda folder: _make(folder / "empty"), "empty.* holds no images"),
}


@pytest.mark.parametrize(("make", "message"), PREDICT_MISTAKES.values(), ids=PREDICT_MISTAKES)
def test_predict_mistakes(make, message, digits_run, tmp_path):
    assert re.search(message, complaint_of("predict", digits_run, make(tmp_path)))


def _write(path, content):
    path.write_bytes(content)
    return path


def _make(path):
    path.mkdir()
    return path
