"""Folders that are no run, or only what is left of one; and what a saved network keeps."""

import errno
import os
import shutil

import pytest
import torch
from filelock import FileLock

from cmpe_se import CompetitiveSE
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.network import create_network
from cmpe_se.training.run_folder import RunFolder
from tests.training.runs import everything_in


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


LEFT = {
    "model": lambda run: (run.model.mkdir(), (run.model / "model.safetensors").write_bytes(b"")),
    "metrics.jsonl": lambda run: run.write_metrics([]),
    "result.json": lambda run: run.write_result({"test_top1": 1.0, "epochs": 9}),
    "curves.png": lambda run: run.curves.write_bytes(b""),
    "corruptions.json": lambda run: run.corruptions.write_text("{}"),
    "tensorboard": lambda run: run.logs.mkdir(),
    "gates.jsonl": lambda run: run.gates.write_text(""),
    "trackers.json": lambda run: run.trackers.write_text("{}"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_left_of_another_run_is_refused(name, tmp_path):
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    LEFT[name](run)
    before = everything_in(run.path)
    with pytest.raises(UserError) as caught:
        train(epochs=1, device="cpu", output=run.path)
    advice = "delete that, or name another --output"
    assert str(caught.value) == f"{run.path} holds what is left of another run ({name}); {advice}"
    assert everything_in(run.path) == before


def test_a_locked_and_an_analysed_folder_are_new(tmp_path):
    for name in (".lock", "log.txt", "evaluation.json"):
        (tmp_path / name).write_text("")
    assert RunFolder.new(tmp_path).path == tmp_path


@pytest.mark.parametrize("more", [{"epochs": 3}, {}])
def test_finished_epochs_without_a_checkpoint_are_not_trained_again(more, short_run, tmp_path):
    run = RunFolder(shutil.copytree(short_run, tmp_path / "run"))
    shutil.rmtree(run.path / "state")
    if not more:  # interrupted
        run.result.unlink()
    before = everything_in(run.path)
    with pytest.raises(UserError, match=r"has finished epochs but no checkpoint in state/ to continue from; put state"):
        train(resume=run.path, **more)
    assert everything_in(run.path) == before


@pytest.fixture
def meanwhile(monkeypatch):
    """Something that happens after a command has looked at a run folder, and before it has the lock."""
    original, happens = RunFolder.locked, []

    def locked(self):
        happens.pop()(self)
        return original(self)

    monkeypatch.setattr(RunFolder, "locked", locked)
    return happens


def test_a_new_folder_is_looked_at_again_under_its_lock(meanwhile, tmp_path):
    meanwhile.append(lambda run: run.write_config(TrainingConfig(epochs=7)))
    with pytest.raises(UserError, match="holds a run already; resume it with"):
        train(epochs=1, device="cpu", output=tmp_path / "run")
    assert RunFolder(tmp_path / "run").read_config().epochs == 7
    assert not RunFolder(tmp_path / "run").checkpoints.exist()


def test_a_runs_settings_are_looked_at_again_under_its_lock(meanwhile, short_run, tmp_path):
    run = RunFolder(shutil.copytree(short_run, tmp_path / "run"))
    meanwhile.append(lambda run: run.write_config(run.read_config().changed(epochs=9, lr=0.7)))
    with pytest.raises(UserError, match="has got other settings meanwhile, by another command; give this one again"):
        train(resume=run.path, epochs=3)
    assert run.read_config().lr == 0.7


def test_a_result_file_that_cannot_be_written_is_named(short_run, tmp_path):
    run = RunFolder(shutil.copytree(short_run, tmp_path / "run"))
    run.result.unlink()
    run.curves.unlink()
    run.curves.mkdir()
    with pytest.raises(UserError, match=rf"cannot write {run.curves}: Is a directory"):
        train(resume=run.path)
    run.curves.rmdir()
    assert train(resume=run.path)["epochs"] == 2
    assert run.curves.read_bytes().startswith(b"\x89PNG")


def test_a_run_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make the run folder .*file/run: Not a directory"):
        train(epochs=1, device="cpu", output=tmp_path / "file" / "run")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_run_folder_that_cannot_be_written(code, tmp_path, monkeypatch, caplog):
    def refuse(*_, **__):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(UserError, match=f"cannot write to {tmp_path / 'run'}: {os.strerror(code)}"):
        train(epochs=1, device="cpu", output=tmp_path / "run")
    assert not caplog.records


def test_the_result_counts_the_gates_that_were_trained(plain, folded, converted):
    found = [RunFolder(path).read_result()["gates"] for path in (plain, folded, converted)]
    model = RunFolder(converted).load_model()
    number = sum(isinstance(module, CompetitiveSE) for module in model.modules())
    assert found == [{}, {"folded_3x3": 9}, {"pair_view_1x1": number}]
    assert number > 1
