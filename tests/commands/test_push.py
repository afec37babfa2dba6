"""``cmpe-se push``: a run's network in timm's format."""

import re
import shutil

import pytest
import timm
import torch

from cmpe_se.commands.push import push
from tests.training.processes import complaint_of, run, succeed
from tests.training.runs import result, weights


def test_push_to_a_folder_and_pull(short_run, tmp_path):
    address = succeed("push", short_run, tmp_path / "shared" / "network").out.strip()
    assert address == f"local-dir:{tmp_path}/shared/network"
    model = timm.create_model(address, pretrained=True)
    for name, tensor in weights(short_run).items():
        assert torch.equal(model.state_dict()[name], tensor), name
    card = (tmp_path / "shared" / "network" / "README.md").read_text()
    figures = result(short_run)
    for shown in (f"{figures['test_top1']:.2f} %", f"{figures['params']:,}", address, figures["versions"]["torch"]):
        assert shown in card
    assert card.startswith("---\ntags:")


def test_a_folder_with_something_in_it(short_run, tmp_path):
    (tmp_path / "mine").write_text("mine")
    assert "not an empty folder" in complaint_of("push", short_run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", ["somebody/network", "no such name"])
def test_a_hub_out_of_reach(name, short_run):
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_TOKEN": "none"}
    complaint = run("push", short_run, f"hf-hub:{name}", env=env).complaint
    assert re.search(rf"cannot push to {name} .*or push to a folder", complaint)


def test_unfinished_run(tmp_path, short_run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text((short_run / "config.yaml").read_text())
    assert "has not finished" in complaint_of("push", tmp_path / "run", tmp_path / "out")


def files_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["full", "Ctrl-C"])
@pytest.mark.parametrize("existed", [True, False])
def test_all_files_or_none(existed, error, short_run, tmp_path, monkeypatch):
    target, original = tmp_path / "network", shutil.copyfile
    if existed:
        target.mkdir()

    def second_fails(source, draft):
        original(source, draft)
        if source.name == "model.safetensors":
            raise error

    monkeypatch.setattr(shutil, "copyfile", second_fails)
    complaint = complaint_of("push", short_run, target)
    if isinstance(error, OSError):
        assert complaint == f"cmpe-se: error: cannot write to {target}: No space left on device"
    else:
        assert complaint == "cmpe-se: stopped"
    assert files_in(tmp_path) == ["network"] * existed
    assert not existed or files_in(target) == []
    monkeypatch.undo()
    push(str(short_run), str(target))
    assert files_in(target) == ["README.md", "config.json", "model.safetensors"]


def test_what_a_killed_push_left_is_no_content(short_run, tmp_path):
    (tmp_path / "model.unfinished-7.safetensors").write_bytes(bytes(1000))
    (tmp_path / "model.unfinished-7.safetensors.lock").write_bytes(b"")
    push(str(short_run), str(tmp_path))
    assert files_in(tmp_path) == ["README.md", "config.json", "model.safetensors"]
