"""A validation split chooses the epoch that a run keeps, and ends it early; the test images choose nothing."""

import shutil
import signal

import pytest
import torch

from cmpe_se.commands.evaluate import evaluate
from cmpe_se.commands.report.facts import facts_of
from cmpe_se.training import train
from cmpe_se.training.run_folder import RunFolder
from tests.training.processes import complaint_of, succeed, trained_run
from tests.training.runs import assert_same_run, assert_same_tensors, checkpoint, metrics, result, start_until, weights

pytestmark = pytest.mark.slow

# A high constant rate, so that accuracies go up and down.
SETTINGS = ("--validation=0.25", "--epochs=4", "--schedule=constant", "--lr=0.4", "--ema=0.5")


@pytest.fixture(scope="module")
def validated():
    return trained_run(*SETTINGS)


def facts(folder) -> dict[str, str]:
    run = RunFolder.open(folder)
    classes = run.preprocessing().classes
    return dict(facts_of(run, result(folder)["test_top1"], classes, torch.arange(len(classes))))


def best(folder) -> dict:
    return max(metrics(folder), key=lambda record: (record["validation_top1"], -record["validation_loss"]))


def test_the_best_epoch_is_kept(validated):
    said = result(validated)
    assert said["best_epoch"] == best(validated)["epoch"]
    assert said["validation_top1"] == best(validated)["validation_top1"]
    assert said["trained_epochs"] == 4
    assert_same_tensors(checkpoint(validated)["best"]["weights"], weights(validated))


def test_only_the_kept_epoch_is_tested(validated, tmp_path):
    assert [record["epoch"] for record in metrics(validated) if record["test_top1"] is not None] == [
        result(validated)["best_epoch"]
    ]
    alone = evaluate(str(validated), output=str(tmp_path))
    assert result(validated)["test_top1"] == pytest.approx(alone["test_top1"], abs=1e-9)
    assert result(validated)["test_loss"] == pytest.approx(alone["test_loss"], rel=1e-5)


def test_what_images_were_used_for(validated, short_run):
    said, without = result(validated), result(short_run)
    assert said["train_images"] + said["validation_images"] == without["train_images"]
    assert said["validation_images"] == pytest.approx(without["train_images"] / 4, abs=5)
    assert said["test_images"] == without["test_images"]
    assert "validation_images" not in without
    seen = facts(validated)
    assert f"{said['validation_images']} validation (held out, they chose the epoch)" in seen["Data"]
    assert f"4 epochs of which epoch {said['best_epoch']} is kept" in seen["Training"]


@pytest.mark.long
def test_killed_and_resumed(validated, tmp_path):
    start_until(tmp_path / "run", 1, 5, *SETTINGS).send(signal.SIGKILL)
    succeed("train", "--resume", tmp_path / "run")
    assert_same_run(validated, tmp_path / "run")
    assert_same_tensors(checkpoint(validated)["best"]["weights"], checkpoint(tmp_path / "run")["best"]["weights"])


@pytest.fixture(scope="module")
def patient(plain, tmp_path_factory):
    """A run whose network does not change, so that the first epoch stays the best: it waits two more of nine."""
    folder = tmp_path_factory.mktemp("patient") / "run"
    flags = ["--validation=0.2", "--patience=2", "--batch-size=256"]
    still = ["--model=preact_resnet20", f"--pretrained={plain}", "--freeze-epochs=9", "--lr=0", "--epochs=9"]
    return folder, succeed("train", *flags, *still, "--output", folder)


def test_patience(patient):
    folder, done = patient
    assert (result(folder)["best_epoch"], result(folder)["trained_epochs"], result(folder)["epochs"]) == (1, 3, 9)
    assert len(RunFolder(folder).read_metrics()) == 3
    assert "stopped early, after epoch 3: none since epoch 1 has a better validation accuracy" in done.err
    seen = facts(folder)
    assert "3 epochs, stopped early of 9, of which epoch 1 is kept" in seen["Training"]


def test_more_patience(patient, tmp_path):
    folder = shutil.copytree(patient[0], tmp_path / "run")
    assert train(resume=folder)["trained_epochs"] == 3  # it has finished
    assert train(resume=folder, patience=3)["trained_epochs"] == 4
    complaint = complaint_of("train", "--resume", folder, "--validation", "0.3")
    assert f"{folder} was trained with --validation 0.2: another share would validate images that it" in complaint


def test_no_patience_without_validation():
    assert "no image is held out: give --validation 0.1 too" in complaint_of("train", "--patience", "3")


@pytest.mark.parametrize("share", ["1", "-0.1"])
def test_shares_that_cannot_be(share):
    complaint = complaint_of("train", "--validation", share)
    assert f"validation is {float(share)}, should be at least 0 and below 1" in complaint
