"""Tests of the network between epochs, now and then instead of always."""

import json
import shutil

import pytest

from cmpe_se.errors import UserError
from cmpe_se.training import train
from tests.training.processes import SHORT, succeed
from tests.training.runs import result

RECORD = ("test_images", "test_loss", "test_top1", "test_top5")


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_every_second_epoch_and_the_last_one_are_tested(tmp_path):
    small = {"model": "test_resnet", "convert": "pair_view_1x1", "device": "cpu"}
    result = train(epochs=3, test_interval=2, output=tmp_path / "run", **small)
    tested = [record["epoch"] for record in records(tmp_path / "run") if record["test_top1"] is not None]
    assert tested == [2, 3]
    assert all(records(tmp_path / "run")[0][name] is None for name in RECORD)
    assert result["test_top1"] == records(tmp_path / "run")[-1]["test_top1"] > 50
    assert (tmp_path / "run" / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_tests_do_not_touch_the_training(short_run, tmp_path):
    """The shared run has been tested after each of its two epochs."""
    assert [record["test_top1"] is not None for record in records(short_run)] == [True, True]
    succeed("train", *SHORT, "--test-interval=2", "--output", tmp_path / "run")
    often, rarely = result(short_run), result(tmp_path / "run")
    assert [record["test_top1"] is not None for record in records(tmp_path / "run")] == [False, True]
    assert (often["test_top1"], often["test_loss"]) == (rarely["test_top1"], rarely["test_loss"])


def test_an_interval_below_one_is_refused(tmp_path):
    with pytest.raises(UserError, match="test_interval is 0, should be at least 1"):
        train(test_interval=0, output=tmp_path / "run")


def test_what_was_measured_on_corrupted_images_goes_when_training_goes_on(short_run, tmp_path):
    shutil.copytree(short_run, tmp_path / "run")
    record = tmp_path / "run" / "corruptions.json"
    record.write_text("{}")
    train(resume=tmp_path / "run")  # it has finished
    assert record.exists()
    train(resume=tmp_path / "run", epochs=3)
    assert not record.exists()
