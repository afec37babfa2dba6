"""Accuracies on corrupted images: by hand, from a cache, and in files that are read again."""

import csv
import json
from typing import get_type_hints

import pytest
import timm
import torch
from PIL import Image

import cmpe_se.networks  # noqa: F401 (timm learns our names)
from cmpe_se.data import load_data
from cmpe_se.data.corruptions import CORRUPTIONS, corrupt, corrupted_test_sets
from cmpe_se.errors import UserError
from cmpe_se.training.robustness import (
    CorruptionMetrics,
    CorruptionRecord,
    corruption_metrics,
    read_corruptions,
    write_corruptions,
)


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


@pytest.fixture(scope="module")
def network():
    """Untrained, and neither right nor wrong everywhere."""
    torch.manual_seed(2)
    return timm.create_model("cmpe_se_preact_resnet20", num_classes=10, in_chans=1).eval()


@pytest.fixture(scope="module")
def metrics(network, data):
    return corruption_metrics(network, data)


@torch.no_grad()
def test_accuracies_by_hand(network, data, metrics):
    pixels, labels = next(data.test_pixels(batch_size=360))
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in (data.mean, data.std))
    expected = {}
    for corruption in CORRUPTIONS:
        for severity in (1, 5):
            images = (corrupt(pixels, corruption, severity) / 255 - mean) / std
            expected[corruption, severity] = 100 * (network(images).argmax(1) == labels).double().mean().item()
    clean, _ = next(data.test_batches(batch_size=360))
    assert metrics["clean"] == pytest.approx(100 * (network(clean).argmax(1) == labels).double().mean().item())
    for (corruption, severity), accuracy in expected.items():
        assert metrics[corruption][severity - 1] == pytest.approx(accuracy, abs=0.3)  # an image that is on the border
    values = [value for corruption in CORRUPTIONS for value in metrics[corruption]]
    assert len(values) == 25
    assert metrics["mean"] == pytest.approx(sum(values) / 25)
    assert metrics.keys() == get_type_hints(CorruptionMetrics).keys()
    assert len(set(values)) > 5


@pytest.mark.parametrize(("batch_size", "from_cache"), [(100, True), (360, False)])
def test_a_cache_and_batches_make_no_difference(batch_size, from_cache, network, data, metrics):
    cached = list(corrupted_test_sets(data)) if from_cache else None
    found = corruption_metrics(network, data, corrupted=cached, batch_size=batch_size, channels_last=True)
    assert found.keys() == metrics.keys()
    for name in CORRUPTIONS:
        assert found[name] == pytest.approx(metrics[name], abs=0.6)


def test_a_batch_s_images_are_those_of_the_whole_set(data):
    shown = []

    def network(images):
        shown.append(images)
        return torch.zeros(len(images), 10)

    corruption_metrics(network, data, batch_size=250)
    clean_and_corrupted = zip(shown[:26], shown[26:], strict=True)  # two batches, each in all its corruptions
    next(clean_and_corrupted)
    for (*_, whole), parts in zip(corrupted_test_sets(data), clean_and_corrupted, strict=True):
        assert torch.equal(torch.cat(parts), data.preprocessing.normalise(whole))


def test_training_mode_is_refused(network, data):
    with pytest.raises(ValueError, match="eval"):
        corruption_metrics(torch.nn.Flatten().train(), data)


def test_files(metrics, data, tmp_path):
    folder = tmp_path / "run"
    write_corruptions(folder, metrics, data)
    assert sorted(path.name for path in folder.iterdir()) == [f"corruptions.{end}" for end in ("csv", "json", "png")]
    found = read_corruptions(folder, "digits")
    assert {name: found[name] for name in metrics} == metrics
    assert (found["data"], found["images"]) == ("digits", 360)
    assert {"versions", "commit", "hardware", "command"} <= found.keys() == get_type_hints(CorruptionRecord).keys()
    lines = (folder / "corruptions.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert len(rows) == 26
    assert rows[1] == {
        "corruption": "contrast", "severity": "1", "parameter": "0.75", "top1": str(round(metrics["contrast"][0], 4))
    }  # fmt: skip
    with Image.open(folder / "corruptions.png") as image:
        assert min(image.size) > 400


@pytest.mark.parametrize(
    "change", [{"data": "cifar10"}, {"parameters": {"blur": [1]}}, {"parameters": 3}, None], ids=str
)
def test_what_is_not_the_same_measure_is_not_read(change, metrics, data, tmp_path):
    assert read_corruptions(tmp_path, "digits") is None
    write_corruptions(tmp_path, metrics, data)
    path = tmp_path / "corruptions.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change) if change else "[")
    assert read_corruptions(tmp_path, "digits") is None


def test_a_folder_that_cannot_be_written(metrics, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write to"):
        write_corruptions(tmp_path / "file", metrics, data)
