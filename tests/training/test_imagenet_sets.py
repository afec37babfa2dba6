"""A network of ImageNet's 1,000 classes on folders laid out as ImageNet-V2, -A, -R and -Sketch, and by ReaL labels."""

import csv
import json
import math
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo

from cmpe_se.commands.evaluate import evaluate
from cmpe_se.data import Preprocessing
from cmpe_se.data.imagenet import descriptions, imagenet_indices, subset_of
from cmpe_se.data.splits import places_of
from cmpe_se.errors import UserError
from cmpe_se.training.run_folder import RunFolder
from tests.training.written import write_run

INFO = ImageNetInfo()
SYNSETS, WORDS = INFO.label_names(), INFO.label_descriptions()


def listed(name: str) -> list[str]:
    return (files("timm.data") / "_info" / name).read_text().split()


@pytest.fixture(autouse=True)
def no_plot(monkeypatch):
    """A picture of a thousand classes takes a second."""
    monkeypatch.setattr("cmpe_se.commands.evaluate.plot_confusion", lambda *_: None)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose classes are ImageNet's synsets, in another order than their own."""
    order = np.random.default_rng(0).permutation(1000)
    how = Preprocessing.of_photos(tuple(SYNSETS[index] for index in order), 32)
    return write_run(tmp_path_factory.mktemp("run") / "run", "test_resnet", how, data="imagenet", data_dir="/gone").path


@pytest.fixture(scope="module")
def crops() -> list[Image.Image]:
    """Two hundred and thirty pieces of two photographs."""
    photos = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    random, pieces = np.random.default_rng(0), []
    for number in range(230):
        left, top = (int(place) for place in random.integers(300, size=2))
        pieces.append(photos[number % 2].crop((left, top, left + 60 + number % 40, top + 70)))
    return pieces


@pytest.fixture(scope="module")
def logits(run, crops) -> np.ndarray:
    """Of the crops, by hand: (230, 1000) in the order of ImageNet's indices."""
    folder = RunFolder(run)
    network, how = folder.load_model(), folder.preprocessing()
    with torch.no_grad():
        rows = network(torch.stack([how(crop) for crop in crops])).double().numpy()
    return rows[:, [how.classes.index(synset) for synset in SYNSETS]]


def write(root: Path, crops, names) -> Path:
    """A crop in each folder of ``names``, in that order; as PNG, which changes no pixel."""
    for number, (crop, name) in enumerate(zip(crops, names, strict=False)):
        (root / name).mkdir(parents=True, exist_ok=True)
        crop.save(root / name / f"{number:03d}.png")
    return root


def figures(logits: np.ndarray, labels: list[int], among: list[int]) -> tuple[float, float, float]:
    """Top-1, top-5 and loss, image by image."""
    first = first_five = loss = 0.0
    for row, label in zip(logits, labels, strict=True):
        ranked = sorted(among, key=lambda index, row=row: -row[index])
        first += ranked[0] == label
        first_five += label in ranked[:5]
        loss += math.log(sum(math.exp(row[index] - row[label]) for index in among))
    return 100 * first / len(labels), 100 * first_five / len(labels), loss / len(labels)


def found(metrics) -> tuple[float, float, float]:
    return metrics["test_top1"], metrics["test_top5"], metrics["test_loss"]


def test_folders_of_class_indices_as_in_imagenet_v2(run, crops, logits, tmp_path, caplog):
    labels = [*map(int, logits[:8].argmax(1)), 0, 1, 2, 9, 10, 11, 99, 100, 999]  # as text 10 and 100 are before 2
    root = write(tmp_path / "v2", crops, map(str, labels))
    metrics = evaluate(str(run), data_dir=str(root), workers=0, output=str(tmp_path / "out"))
    assert found(metrics) == pytest.approx(figures(logits[: len(labels)], labels, range(1000)), rel=1e-5)
    assert metrics["test_top1"] >= 100 * 8 / 17
    assert metrics["classes"] == "all"
    assert "its classes are read as ImageNet's class indices" in caplog.text
    assert set(metrics["per_class"]) == {SYNSETS[label] for label in labels}
    rows = list(csv.reader((tmp_path / "out" / "per_class.csv").read_text().splitlines()))
    assert rows[0] == ["class", "images", "top1", "words"]
    assert {(row[0], row[3]) for row in rows[1:]} == {(SYNSETS[label], WORDS[label]) for label in labels}


@pytest.mark.parametrize("subset", ["a", "r"])
def test_imagenet_a_and_r_are_among_their_classes(subset, run, crops, logits, tmp_path, capsys):
    indices = [int(line) for line in listed(f"imagenet_{subset}_indices.txt")]
    labels = [*indices, *(indices[place] for place in logits[200:, indices].argmax(1))]
    root = write(tmp_path / "images", crops, (SYNSETS[label] for label in labels))
    metrics = evaluate(str(run), data_dir=str(root), workers=0, output=str(tmp_path / "out"))
    among, over_all = figures(logits, labels, indices), figures(logits, labels, range(1000))
    assert among[0] > over_all[0]
    assert (metrics["classes"], metrics["classes_present"]) == ("present", 200)
    assert found(metrics) == pytest.approx(among, rel=1e-5)
    kept = json.loads((tmp_path / "out" / "evaluation.json").read_text())["among"]
    assert found(kept["present"]) == pytest.approx(among, rel=1e-5)
    assert found(kept["all"]) == pytest.approx(over_all, rel=1e-5)
    said = " ".join(capsys.readouterr().out.split())
    assert "predictions are among the 200 classes that are present" in said
    assert f"all 1,000 classes of the network: top-1 {over_all[0]:.2f} %" in said
    metrics = evaluate(str(run), data_dir=str(root), workers=0, output=str(tmp_path / "out"), classes="all")
    assert found(metrics) == pytest.approx(over_all, rel=1e-5)


def test_fewer_than_five_classes(run, crops, logits, tmp_path):
    """Of a part of ImageNet-Sketch's folders."""
    labels = [3, 500, 500]
    root = write(tmp_path / "sketch", crops, (SYNSETS[label] for label in labels))
    metrics = evaluate(str(run), data_dir=str(root), workers=0, classes="present")
    assert found(metrics) == pytest.approx(figures(logits[:3], labels, [3, 500]), rel=1e-5)
    assert metrics["test_top5"] == 100


def test_corruptions_are_among_the_same_classes(run, crops, tmp_path):
    root = write(tmp_path / "two", crops, [SYNSETS[3], SYNSETS[500]])
    metrics = evaluate(str(run), data_dir=str(root), workers=0, classes="present", corruptions=True)
    assert metrics["corruptions"]["clean"] == pytest.approx(metrics["test_top1"])


def test_real_labels(run, crops, logits, tmp_path, capsys):
    """The first images of the validation set: some have several labels, some none."""
    labels = json.loads((files("timm.data") / "_info" / "imagenet_real_labels.json").read_text())
    best = logits.argsort(1)[:, ::-1]
    numbers: list[int] = []
    for place, ranks in enumerate([1, 1, 5, 0, 0, 0]):
        likely = set(best[place, :ranks].tolist())
        numbers.append(
            next(
                number
                for number, right in enumerate(labels)
                if number not in numbers and (likely & set(right) if ranks else bool(right) == (place == 3))
            )
        )
    for place, (crop, number) in enumerate(zip(crops, numbers, strict=False)):
        folder = tmp_path / "val" / SYNSETS[place % 3]
        folder.mkdir(parents=True, exist_ok=True)
        crop.save(folder / f"ILSVRC2012_val_{number + 1:08d}.JPEG", format="PNG")  # no pixel changes
    (tmp_path / "val" / SYNSETS[0] / "ILSVRC2012_val_00050000.JPEG").write_bytes(b"half")
    metrics = evaluate(str(run), data_dir=str(tmp_path), workers=0, real_labels=True)
    crop_of = dict(zip(numbers, range(6), strict=True))
    counted = [number for number in crop_of if labels[number]]
    for key, ranks in (("top1", 1), ("top5", 5)):
        hits = [bool(set(labels[number]) & set(best[crop_of[number], :ranks].tolist())) for number in counted]
        assert metrics["real"][key] == pytest.approx(100 * sum(hits) / len(hits))
    assert metrics["real"]["images"] == len(counted)
    assert metrics["real"]["without_labels"] == 2 == len(crop_of) - len(counted)
    assert "without a label left out" in " ".join(capsys.readouterr().out.split())
    assert len(metrics["unreadable"]) == 1


def refusal(run, **settings) -> str:
    with pytest.raises(UserError) as raised:
        evaluate(str(run), workers=0, **settings)
    return str(raised.value)


def test_what_real_labels_are_not_for(run, crops, tmp_path):
    root = write(tmp_path / "images", crops, [SYNSETS[0], SYNSETS[1]])
    said = refusal(run, data_dir=str(root), real_labels=True)
    assert "found by the file names ILSVRC2012_val_00000001.JPEG to " in said
    two = Preprocessing.of_photos((SYNSETS[0], SYNSETS[1]), 32)
    small = write_run(tmp_path / "run", "test_resnet", two, data="imagenet", data_dir="/gone").path
    assert "networks with ImageNet's 1,000 classes" in refusal(small, data_dir=str(root), real_labels=True)


def test_other_names_are_said(run, crops, tmp_path):
    root = write(tmp_path / "images", crops, ["cat", SYNSETS[1]])
    assert "has images of cat, and the network was" in refusal(run, data_dir=str(root))
    (root / "cat").rename(root / "1000")
    assert "has images of 1000, and the network was" in refusal(run, data_dir=str(root))
    assert "should be auto, present or all" in refusal(run, data_dir=str(root), classes="some")


INDICES = tuple(map(str, range(1000)))
KINDS = {
    "synsets to indices": ([SYNSETS[7], SYNSETS[100]], INDICES, [7, 100]),
    "indices to synsets": (["7", "100"], SYNSETS, [7, 100]),
    "padded indices": (["007", "100"], SYNSETS, [7, 100]),
    "words to synsets": ([WORDS[7], WORDS[100]], SYNSETS, [7, 100]),
    "synsets to words": ([SYNSETS[134], SYNSETS[517]], WORDS, [134, 517]),  # both are called crane
    "synsets to some synsets' words": ([SYNSETS[7]], WORDS[5:9], [2]),
    "numbers that are names": (["7", "1"], ("1", "7", "10"), [1, 0]),
    "one class twice": (["7", "07"], SYNSETS, None),
    "numbers to some synsets": (["0", "1"], SYNSETS[:2], None),
    "synsets to numbers that are no indices": ([SYNSETS[0]], INDICES[:10], None),
    "both kinds": (["7", SYNSETS[100]], SYNSETS, None),
    "a word of two classes": (["crane"], SYNSETS, None),
    "a synset of no class": (["n00004475"], SYNSETS, None),
}


@pytest.mark.parametrize("case", KINDS)
def test_what_names_stand_for(case):
    names, known, places = KINDS[case]
    if places is None:
        with pytest.raises(UserError, match="test on the same classes"):
            places_of(names, known, "data")
    else:
        assert places_of(names, known, "data") == places


def test_labels_without_names_are_no_class_indices():
    """As of shards of ImageNet-A, whose labels 0 to 199 are its own numbers, or of any other data."""
    for known in (SYNSETS, INDICES):
        with pytest.raises(UserError, match="data has 200 classes without names, numbered from 0, and the network has"):
            places_of(INDICES[:200], known, "data")
        assert places_of(INDICES, known, "data") == list(range(1000))
        assert places_of(INDICES[:200], known, "data", of_folders=True) == list(range(200))


def test_numbers_are_hinted_at():
    with pytest.raises(UserError, match="only for a network of ImageNet's 1,000 classes"):
        places_of(["0", "1"], ["cat", "dog"], "data")


def test_words_and_subsets():
    assert descriptions(SYNSETS[:2]) == (WORDS[0], WORDS[1])
    assert descriptions(INDICES) is descriptions(("cat", "dog")) is descriptions(("n00004475",)) is None
    assert imagenet_indices([]) is None
    synsets = listed("imagenet_a_synsets.txt")
    assert subset_of(synsets, SYNSETS) == "ImageNet-A"
    assert subset_of(listed("imagenet_r_indices.txt"), INDICES) == "ImageNet-R"
    assert subset_of(synsets[1:], SYNSETS) is subset_of(synsets, synsets) is None
