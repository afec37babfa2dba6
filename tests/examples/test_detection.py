"""The detection example learns, continues with finished runs, and writes its results."""

import csv
import json
import runpy
import sys
from pathlib import Path

import pytest

from cmpe_se.errors import UserError
from tests.data.detection.test_folders import coco_content, write_coco

pytest.importorskip("skimage", reason="the photographs come with scikit-image")
pytest.importorskip("faster_coco_eval", reason="mean average precision needs faster-coco-eval")
EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(EXAMPLES))  # where Python looks when the example is a script
    try:
        yield runpy.run_path(str(EXAMPLES / "detection.py"))
    finally:
        sys.path.remove(str(EXAMPLES))


@pytest.mark.slow
def test_both_detectors_start_with_the_same_losses_and_learn(example):
    options = example["parse"](["--steps", "30", "--batch-size", "4", "--test-images", "2"])
    classes, images, _ = example["load"](options)
    losses = {}
    for view in (None, "folded_3x3"):
        model = example["detector"](len(classes), 64, view=view)
        losses[view] = example["train"](model, images, steps=30, batch_size=4, say=lambda text: None)
    assert losses[None][0] == pytest.approx(losses["folded_3x3"][0], rel=1e-5)
    assert losses[None] != losses["folded_3x3"]
    assert all(sum(each[-5:]) < 0.9 * sum(each[:5]) for each in losses.values())


@pytest.mark.slow
def test_runs_are_kept_and_compared(example, tmp_path, capsys):
    command = [
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--test-images",
        "3",
        "--seeds",
        "0",
        "1",
        "--output",
        str(tmp_path),
    ]
    example["main"](example["parse"](command))
    result = json.loads((tmp_path / "detection.json").read_text())
    assert [(each["arm"], each["seed"]) for each in result["runs"]] == [
        *(("plain", 0), ("converted", 0)),
        *(("plain", 1), ("converted", 1)),
    ]
    lines = (tmp_path / "detection.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1"]
    assert (tmp_path / "detection.png").stat().st_size > 10_000
    assert "mAP" in result["sentence"]

    (tmp_path / "plain-seed1.json").unlink()
    capsys.readouterr()
    example["main"](example["parse"](command))
    assert capsys.readouterr().out.count("finished before") == 3
    with pytest.raises(UserError, match="is a run with other settings; give another --output"):
        example["main"](example["parse"]([*command, "--learning-rate", "0.1"]))


def test_a_folder_of_ones_own(example, tmp_path):
    file, images = write_coco(tmp_path, coco_content())
    (tmp_path / "annotations").mkdir()
    for part in ("train", "val"):
        (tmp_path / "annotations" / f"instances_{part}.json").write_bytes(file.read_bytes())
        (tmp_path / part).symlink_to(images)
    options = ["--steps", "1", "--batch-size", "2", "--seeds", "0", "--data-dir", str(tmp_path)]
    result = example["main"](example["parse"]([*options, "--output", str(tmp_path / "runs")]))
    assert result["difference"]["count"] == 1
    assert result["difference"]["low"] is None


def test_sentence(example):
    pairs = ((10, 12), (11, 13.2), (9, 11.1))
    records = [{"arm": arm, "map": value} for pair in pairs for arm, value in zip(example["ARMS"], pair, strict=True)]
    result = example["compare_arms"](records, "map")
    assert "+2.10 points" in example["sentence"](result)
    assert "the interval leaves 0 out" in example["sentence"](result)
