"""One network on two processes: FSDP2 against DDP, compressed gradients, synchronised batch norms."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

import cmpe_se  # noqa: F401 (names of networks)
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.parallel import create_accelerator, with_synchronised_norms
from tests.training.processes import complaint_of, succeed
from tests.training.runs import assert_same_tensors, checkpoint, result, weights
from tests.training.test_nodes import NETWORK, alone, assert_close
from tests.training.test_processes import WARM

SHORT = ("train", *NETWORK, "--epochs=1", "--batch-size=128", "--clip-grad=1", "--ema=0.9", "--accumulate=2")


def train_two(folder: Path, *settings) -> Path:
    """A short run on two processes, with a moving average, clipped gradients and a chosen epoch."""
    succeed(*SHORT, "--validation=0.1", *settings, "--output", folder, program=alone(2), **WARM)
    return folder


@pytest.fixture(scope="module")
def ddp(tmp_path_factory) -> Path:
    return train_two(tmp_path_factory.mktemp("ddp") / "run")


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory) -> Path:
    return train_two(tmp_path_factory.mktemp("fsdp") / "run", "--parallel=fsdp")


@pytest.mark.long
def test_fsdp_trains_as_ddp(ddp, fsdp):
    assert result(fsdp)["processes"] == 2
    assert result(fsdp)["test_images"] == 360
    assert_close(weights(fsdp), weights(ddp), most=1e-5)
    sharded, whole = checkpoint(fsdp), checkpoint(ddp)
    for part in ("network", "ema"):
        assert_close(sharded[part], whole[part], most=1e-5)
    assert sharded["optimizer"]["param_groups"] == whole["optimizer"]["param_groups"]
    for index, state in whole["optimizer"]["state"].items():
        assert_close(sharded["optimizer"]["state"][index], state, most=1e-4)


@pytest.mark.long
def test_a_checkpoint_of_either_resumes_as_the_other(ddp, fsdp, tmp_path):
    """States are saved whole: FSDP's on one process, and DDP's on two of FSDP."""
    ended = []
    for name, begun, processes, parallel in (("one", fsdp, 1, "ddp"), ("two", ddp, 2, "fsdp")):
        folder = shutil.copytree(begun, tmp_path / name)
        settings = ("--resume", folder, "--epochs=2", "--parallel", parallel)
        succeed("train", *settings, program=alone(processes), **WARM)
        ended.append(weights(folder))
    assert_close(*ended, most=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("hook", ["fp16", "bf16"])
def test_compressed_gradients_train_nearly_the_same(hook, ddp, tmp_path):
    folder = train_two(tmp_path / "run", "--gradient-compression", hook)
    different = [name for name, tensor in weights(folder).items() if not torch.equal(tensor, weights(ddp)[name])]
    assert different
    assert_close(weights(folder), weights(ddp), most=0.05)


@pytest.mark.long
def test_powersgd_begins_after_a_thousand_steps(ddp, tmp_path):
    folder = train_two(tmp_path / "run", "--gradient-compression", "power_sgd")
    assert_same_tensors(weights(folder), weights(ddp))


def test_batched_powersgd_needs_accelerators():
    with pytest.raises(UserError, match="on CPUs take power_sgd"):
        create_accelerator(TrainingConfig(gradient_compression="batched_power_sgd"), cpu=True, processes=2)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"precision": "float16"}, "precision float16: take bfloat16"),
        ({"compile": True}, "compile"),
        ({"freeze_epochs": 1}, "freeze_epochs"),
        ({"sync_batchnorm": True}, "sync_batchnorm"),
        ({"gradient_compression": "bf16"}, "gradient_compression"),
        ({"optimizer": "muon"}, "optimizer muon: take one of adamw, "),
    ],
)
def test_fsdp_refuses_what_it_does_not_go_with(settings, word):
    with pytest.raises(UserError, match=f"^parallel fsdp does not go with {word}.*--parallel ddp$"):
        create_accelerator(TrainingConfig(parallel="fsdp", **settings), cpu=not torch.cuda.is_available(), processes=2)


@pytest.mark.parametrize(
    ("environment", "settings", "words"),
    [
        ({"ACCELERATE_USE_FSDP": "true"}, {}, "asks for FSDP; give --parallel fsdp too"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, {}, "asks for DeepSpeed"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {}, "asks for bf16, and .* give --precision bfloat16"),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"precision": "bfloat16"}, "asks for fp8, .* choose no mixed"),
    ],
)
def test_accelerates_configuration_is_heeded_or_refused(environment, settings, words, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=words):
        create_accelerator(TrainingConfig(**settings), cpu=True, processes=1)


@pytest.mark.parametrize(("setting", "value"), [("parallel", "dp"), ("gradient_compression", "zip")])
def test_words_that_are_not_known(setting, value):
    flag = f"--{setting.replace('_', '-')}"
    assert f"unknown {setting} '{value}'; choose one of" in complaint_of("train", flag, value)


def processes(number: int, device: str) -> SimpleNamespace:
    return SimpleNamespace(num_processes=number, device=torch.device(device))


def test_synchronised_norms_keep_names_and_activations():
    network = timm.create_model("cmpe_se_preact_resnet20", num_classes=10, in_chans=1).eval()
    images = torch.randn(2, 1, 8, 8)
    names, before = list(network.state_dict()), network(images)
    assert with_synchronised_norms(network, processes(1, "cpu")) is network
    changed = with_synchronised_norms(network, processes(2, "cuda"))
    norms = [type(one).__name__ for one in changed.modules() if "Norm" in type(one).__name__]
    assert norms
    assert all(name.startswith("SyncBatchNorm") for name in norms)
    assert list(changed.state_dict()) == names
    assert torch.equal(changed(images), before)


def test_synchronised_norms_need_accelerators():
    with pytest.raises(UserError, match="on CPUs leave --sync-batchnorm out"):
        with_synchronised_norms(torch.nn.BatchNorm2d(2), processes(2, "cpu"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="SyncBatchNorm between processes needs two GPUs")
def test_synchronised_norms_on_two_gpus(tmp_path):
    settings = ("--model=test_resnet", "--epochs=1", "--sync-batchnorm", "--output", tmp_path / "run")
    succeed("train", *settings, program=alone(2), before=WARM["before"])
    assert result(tmp_path / "run")["test_images"] == 360
