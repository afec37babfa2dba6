"""Folders that are no run, or only what is left of one; and what a saved network keeps."""

import pytest
import torch

from cmpe_se import CompetitiveSE
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.network import create_network
from cmpe_se.training.run_folder import RunFolder


@pytest.fixture
def orphaned(tmp_path):
    """A run's checkpoints without its settings."""
    run = RunFolder(tmp_path / "run")
    run.checkpoints.save({"step": 3})
    return run


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [("output", "name another --output"), ("resume", "train again with another --output")],
)
def test_checkpoints_without_settings(arguments, advice, orphaned):
    before = orphaned.checkpoints.newest.read_bytes()
    with pytest.raises(UserError) as caught:
        train(epochs=1, device="cpu", **{arguments: orphaned.path})
    message = str(caught.value)
    assert message.startswith(f"{orphaned.path} holds checkpoints in state/, but no config.yaml")
    assert message.endswith(advice)
    assert "\n" not in message
    assert orphaned.checkpoints.newest.read_bytes() == before
    assert not orphaned.config.exists()


def test_a_new_folder_may_exist(tmp_path):
    (tmp_path / "state").mkdir()
    assert RunFolder.new(tmp_path).path == tmp_path


GATES = {"start": "half", "reduction": 4, "min_hidden": 3, "bias": True, "mask": 0.25}
SAVED = {
    "ours": {"model": "preact_resnet20", "view": "se_sum", "start": "one"},
    "converted": {"model": "test_resnet", "convert": "double_fc"},
}


@pytest.mark.parametrize("settings", SAVED.values(), ids=SAVED)
def test_a_saved_network_has_its_gates_settings(settings, tmp_path):
    data, config = load_data("digits"), TrainingConfig(**GATES | settings)
    model, model_args = create_network(config, data)
    RunFolder(tmp_path).save_model(model, model_args=model_args, data=data)
    loaded = RunFolder(tmp_path).load_model()
    assert str(loaded) == str(model)
    gates = [module for module in loaded.modules() if isinstance(module, CompetitiveSE)]
    assert {(gate.start, gate.mask, gate.fc2.bias is not None) for gate in gates} == {(config.start, 0.25, True)}
    images, _ = next(data.test_batches(batch_size=4))
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
