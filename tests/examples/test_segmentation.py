"""The example of segmentation trains pairs of networks alike, resumes, and measures what it says."""

import csv
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmpe_se
from cmpe_se.errors import UserError

pytest.importorskip("segmentation_models_pytorch", reason="its U-Net comes from segmentation-models-pytorch")
pytest.importorskip("skimage", reason="the photographs come with scikit-image")
EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--size", "32", "--steps", "5", "--batch-size", "4", "--seeds", "2"]


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)  # where it finds pasted_objects
    return runpy.run_path(str(EXAMPLES / "segmentation.py"))


@pytest.fixture
def own_folder(tmp_path):
    """Dark and light halves, and a class for each; the middle column is ignored."""
    for number in range(10):
        edge = 8 + number
        labels = np.zeros((40, 32), dtype=np.uint8)
        labels[:, edge:], labels[:, edge] = 1, 255
        for kind, pixels in (("images", (labels > 0) * np.uint8(200)), ("masks", labels)):
            (tmp_path / "own" / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "own" / kind / f"{number}.png")
    return tmp_path / "own"


@pytest.mark.slow
def test_both_arms_begin_alike_and_the_gates_move(example):
    data = example["pasted"]("digits", [], 12, 32)
    plain, converted = (example["build"](arm, 11, "folded_3x3", 3) for arm in example["ARMS"])
    with torch.no_grad():
        x = example["normalised"](data.train.images[:2])
        assert torch.equal(plain.eval()(x), converted.eval()(x))
    losses = [
        example["train"](model, data.train, steps=12, batch_size=4, seed=0, mirror=False, say=lambda _: None)
        for model in (plain, converted)
    ]
    assert losses[0][0] == losses[1][0]
    assert losses[0] != losses[1]
    assert sum(losses[1][-3:]) < 0.9 * sum(losses[1][:3])
    blocks = cmpe_se.inspect_gates(converted, x)
    assert len(blocks) == 6
    assert all((block.gate - 1).abs().max() > 0 for block in blocks)


def test_mean_iou_is_that_of_all_pixels(example, monkeypatch):
    """By hand: absent classes do not count, and neither do ignored pixels."""
    truth = torch.tensor([[[0, 0, 1, 255]], [[0, 1, 1, 3]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1, 3]], [[0, 1, 0, 3]]])
    scenes = example["Scenes"](torch.zeros(2, 3, 1, 4, dtype=torch.uint8), truth)
    monkeypatch.setitem(example["evaluate"].__globals__, "predict", lambda model, images: predicted)
    miou, ious = example["evaluate"](torch.nn.Identity(), scenes, 4)
    assert ious == pytest.approx([100 * 2 / 4, 100 * 2 / 4, 0, 100])  # class 2 is nowhere
    assert miou == pytest.approx((50 + 50 + 100) / 3)


def test_scenes_are_exact_and_their_classes_follow_the_background(example):
    data = example["pasted"]("digits", ["3", "8"], 9, 64)
    assert data.classes == ("background", "3", "8")
    assert not data.mirror
    assert data.train.images.shape == (9, 3, 64, 64)
    assert set(data.train.masks.unique().tolist()) == {0, 1, 2}
    assert ((data.train.masks > 0).flatten(1).sum(1) >= 3 * 12**2).all()  # a disc of 24 pixels, or more


@pytest.mark.long
def test_own_folder_interrupted_and_resumed(example, own_folder, tmp_path, capsys):
    output = tmp_path / "runs" / "first"
    arguments = ["--data-dir", str(own_folder), "--output", str(output), *QUICK]
    example["main"](arguments)
    table = (output / "results.csv").read_text()
    rows = list(csv.DictReader(line for line in table.splitlines() if not line.startswith("#")))
    assert [(row["arm"], row["seed"]) for row in rows] == [
        (arm, seed) for seed in "01" for arm in ("plain", "converted")
    ]
    found = json.loads((output / "summary.json").read_text())["miou"]
    by_arm = [[float(row["miou"]) for row in rows if row["arm"] == arm] for arm in ("converted", "plain")]
    assert found["difference"]["mean"] == pytest.approx(np.subtract(*by_arm).mean(), abs=0.01)
    with Image.open(output / "predictions.png") as image:
        assert image.width > 300

    (output / "converted-seed1.json").unlink()
    before = (output / "converted-seed1.safetensors").read_bytes()
    capsys.readouterr()
    example["main"](arguments)
    printed = capsys.readouterr().out
    assert printed.count("finished before") == 3
    assert (output / "converted-seed1.safetensors").read_bytes() == before  # the same run again
    with pytest.raises(UserError, match="is of a run with other settings; remove it, or give another --output"):
        example["main"]([*arguments, "--view", "double_fc"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--size", "40"], "--size is 40, should be a multiple of 16, such as 32"),
        (["--steps", "1"], "--steps is 1, should be at least 5"),
        (["--seeds", "0"], "--seeds is 0, should be at least 1"),
        (["--data-dir", "nowhere"], "nowhere is no folder"),
        (["--objects", "nowhere"], "nowhere does not exist"),
        (["--classes", "cat"], "has no class 'cat'"),
    ],
)
def test_wrong_options(example, arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        example["main"]([*arguments, "--output", str(tmp_path)])
