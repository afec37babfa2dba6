"""A backbone that is frozen for the first epochs."""

import shutil

import pytest
import timm
import torch

from cmpe_se.errors import UserError
from cmpe_se.training.checkpoint import Checkpoints
from cmpe_se.training.freezing import Backbone
from tests.training.processes import complaint_of, succeed
from tests.training.runs import weights
from tests.training.test_processes import launch


def settings(pretrained) -> list[str]:
    return [
        "--model=test_resnet",
        "--convert=pair_view_1x1",
        f"--pretrained={pretrained}",
        "--lr=0.01",
        "--batch-size=256",
    ]


def changed(before: dict, after: dict) -> set[str]:
    """What trained: parts of the network, by their names' beginning."""
    names = {name for name in before if before[name].shape == after[name].shape}
    different = {name for name in names if not torch.equal(before[name], after[name])} | (before.keys() - names)
    return {"gate" if ".competition." in name else name.split(".")[0] for name in different}


@pytest.mark.slow
def test_classifier_and_gates_train_first(converted, tmp_path):
    flags = settings(converted)
    succeed("train", *flags, "--freeze-epochs=1", "--epochs=1", "--output", tmp_path / "frozen")
    assert changed(weights(converted), weights(tmp_path / "frozen")) == {"fc", "gate"}
    succeed("train", *flags, "--freeze-epochs=1", "--epochs=2", "--output", tmp_path / "thawed")
    assert changed(weights(converted), weights(tmp_path / "thawed")) > {"fc", "gate", "conv1", "bn1", "layer1"}


@pytest.mark.long
def test_two_processes(converted, tmp_path):
    """After an epoch, which is the checkpoint before the last one, and after two."""
    done = launch("train", *settings(converted), "--freeze-epochs=1", "--epochs=2", "--output", tmp_path / "run")
    assert done.status == 0, done.err
    (tmp_path / "first").mkdir()
    shutil.copy(tmp_path / "run" / "state" / "previous.safetensors", tmp_path / "first")
    first = Checkpoints(tmp_path / "first").load()[0]
    assert (first["epoch"], first["batch"]) == (1, 0)
    assert changed(weights(converted), first["network"]) == {"fc", "gate"}
    assert changed(weights(converted), weights(tmp_path / "run")) > {"fc", "gate", "conv1", "bn1", "layer1"}


def test_nothing_to_freeze():
    complaint = complaint_of("train", "--freeze-epochs", "1")
    assert "freeze_epochs freezes what pretrained weights are loaded into, and there are none" in complaint


def test_no_classifier():
    with pytest.raises(UserError, match="trains the classifier first, and it has none"):
        Backbone(timm.create_model("preact_resnet20", num_classes=0), "it")
