"""``--pretrained`` with files as people have them: all of the body is loaded, or it is refused; what is new is said."""

import argparse
import collections
import logging
import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.network import create_network

MODEL = "test_resnet"


class Shape:
    classes, in_chans = tuple("abcd"), 3


class Grey(Shape):
    in_chans = 1


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    """Weights of a network for four classes."""
    torch.manual_seed(1)
    return timm.create_model(MODEL, num_classes=4).state_dict()


def body(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}


def load(path, content, shape=Shape, **settings) -> nn.Module:
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)
    torch.manual_seed(0)
    network, _ = create_network(TrainingConfig(**{"model": MODEL, "pretrained": str(path)} | settings), shape)
    return network


def named(state: dict, prefix: str) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


PREFIXES = ("", "module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module.")
PREFIXES += ("module.module.", "model._orig_mod.", "net.model.", "backbone.")
WHOLE = {prefix or "plain": lambda state, prefix=prefix: named(state, prefix) for prefix in PREFIXES} | {
    "compiled inside": lambda state: {name.replace("layer1.", "layer1._orig_mod."): t for name, t in state.items()},
    "state_dict": lambda state: {"state_dict": named(state, "model."), "epoch": 3, "optimizer": {"state": {}}},
    "model": lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)},
    "model_ema": lambda state: {"model": named(body(state), "wrong."), "model_ema": named(state, "module.")},
    "state_dict_ema": lambda state: {"state_dict": {"x": torch.zeros(1)}, "state_dict_ema": state},
    "model_state_dict": lambda state: {"model_state_dict": state},
    "two levels": lambda state: {"model": {"state_dict": state}},
    "ordered": collections.OrderedDict,
    "parameters": lambda state: {n: nn.Parameter(t) if t.is_floating_point() else t for n, t in state.items()},
    "float64": lambda state: {n: t.double() if t.is_floating_point() else t for n, t in state.items()},
    "no counters": lambda state: {n: t for n, t in state.items() if "num_batches_tracked" not in n},
}


@pytest.mark.parametrize("make", WHOLE.values(), ids=WHOLE)
def test_all_of_it(make, state, tmp_path, caplog):
    network = load(tmp_path / "weights.pth", make(state))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == state[name].dtype
    assert "77 of 77 tensors loaded" in caplog.text


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".th", ".bin", ".ckpt", ".pth.tar"])
def test_suffixes(suffix, state, tmp_path):
    network = load(tmp_path / f"weights{suffix}", named(state, "module."))
    assert torch.equal(network.fc.weight, state["fc.weight"])


def test_the_old_form_of_pytorch_files(state, tmp_path):
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    network, _ = create_network(TrainingConfig(model=MODEL, pretrained=str(tmp_path / "old.pth")), Shape)
    assert torch.equal(network.fc.weight, state["fc.weight"])


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_folders(name, state, tmp_path):
    load(tmp_path / name, state)
    network, _ = create_network(TrainingConfig(model=MODEL, pretrained=str(tmp_path)), Shape)
    assert torch.equal(network.fc.weight, state["fc.weight"])


SAID = {
    "other classes": (
        lambda state: named(timm.create_model(MODEL, num_classes=9).state_dict() | body(state), "module."),
        "75 of 77 tensors loaded; classifier fc re-initialised: 4 classes, not 9",
    ),
    "no classifier": (body, "75 of 77 tensors loaded; classifier fc re-initialised: the file has none"),
    "more": (
        lambda state: state | {"aux.weight": torch.zeros(1), "aux.bias": torch.zeros(1)},
        "77 of 77 tensors loaded; left out, since the network has no such tensors: aux.weight, aux.bias",
    ),
    "averaged": (lambda state: {"model_ema": state, "model": state}, r"\(its model_ema\): 77 of 77 tensors loaded"),
    "float64": (WHOLE["float64"], "77 of 77 tensors loaded, float64 converted to float32"),
}


@pytest.mark.parametrize(("make", "message"), SAID.values(), ids=SAID)
def test_what_is_said(make, message, state, tmp_path, caplog):
    network = load(tmp_path / "weights.pth", make(state))
    assert torch.equal(network.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    start = f"{MODEL} starts from {tmp_path}/weights.pth"
    assert record.message.startswith(start)
    assert re.search(message + "$", record.message), record.message


def test_half_precision(state, tmp_path, caplog):
    network = load(tmp_path / "weights.pth", {n: t.half() if t.is_floating_point() else t for n, t in state.items()})
    assert torch.equal(network.fc.weight, state["fc.weight"].half().float())
    assert "float16 converted to float32" in caplog.text


def test_the_classifier_is_drawn_as_without_weights(state, tmp_path):
    """A run is a function of its settings: new parts come from the seed as in a network from the start."""
    network = load(tmp_path / "weights.pth", body(state))
    torch.manual_seed(0)
    fresh = timm.create_model(MODEL, num_classes=4)
    assert torch.equal(network.fc.weight, fresh.fc.weight)
    following = torch.rand(3)
    load(tmp_path / "weights.pth", body(state))
    assert torch.equal(torch.rand(3), following)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_converted_network_from_a_plain_one(prefix, state, tmp_path, caplog):
    network = load(tmp_path / "weights.pth", named(state, prefix), convert="se")
    assert torch.equal(network.layer4[0].conv1.weight, state["layer4.0.conv1.weight"])
    assert "the gates begin anew, as the file has none" in caplog.text
    torch.manual_seed(0)
    fresh, _ = create_network(TrainingConfig(model=MODEL, convert="se"), Shape)
    gate = fresh.layer4[0].competition.fc1.weight
    assert torch.equal(network.layer4[0].competition.fc1.weight, gate)


def test_other_channels(state, tmp_path, caplog):
    network = load(tmp_path / "weights.pth", named(state, "module."), Grey)
    assert torch.allclose(network.conv1[0].weight, state["conv1.0.weight"].sum(1, keepdim=True))
    assert "conv1.0.weight adapted from 3 to 1 channels" in caplog.text


def without_a_stage(state: dict) -> dict:
    return {name: tensor for name, tensor in state.items() if not name.startswith("layer2.")}


REFUSED = {
    "part of the body": (
        without_a_stage,
        r"test_resnet cannot start from .*pth: 15 of its 77 tensors are not there: layer2.0.conv1.weight, .* 12 more",
    ),
    "part of the body, other classes": (
        lambda state: without_a_stage(body(state)) | {"fc.weight": torch.zeros(9, 160), "fc.bias": torch.zeros(9)},
        "15 of its 77 tensors are not there",
    ),
    "nothing of it": (
        lambda state: {"x": torch.zeros(1)},
        "75 of its 77 tensors are not there: .* others: x",
    ),
    "unknown prefix": (lambda state: named(state, "teacher."), "the file has others: teacher.conv1.0.weight"),
    "another network's": (
        lambda state: timm.create_model("test_resnet", channels=(32, 32, 32, 32)).state_dict(),
        r"have another shape \(layer\d.* is \(.*\), should be \(.*\)\)",
    ),
    "two networks": (
        lambda state: named(state, "model.") | named(state, "net."),
        "has conv1.0.weight twice, as model.conv1.0.weight and net.conv1.0.weight",
    ),
    "whole numbers": (
        lambda state: {name: tensor.int() for name, tensor in state.items()},
        r"conv1.0.weight in .* is int32, should be float32",
    ),
    "complex numbers": (
        lambda state: state | {"fc.bias": torch.zeros(4, dtype=torch.complex64)},
        "fc.bias .*complex",
    ),
    "sparse": (lambda state: state | {"fc.weight": state["fc.weight"].to_sparse()}, "fc.weight in .* is sparse or"),
    "nan": (
        lambda state: state | {"layer1.0.bn1.running_var": torch.full((32,), float("nan"))},
        "layer1.0.bn1.running_var in .* holds values that are not finite",
    ),
    "a list": (lambda state: [1, 2], "holds no state dict; save one"),
    "empty": (lambda state: {}, "holds no state dict; save one"),
    "other keys": (lambda state: {"epoch": 3, "lr": 0.1}, "holds no state dict, but epoch, lr; save one"),
    "a network": (
        lambda state: {"model": timm.create_model(MODEL)},
        r"holds more than tensors \(timm\..*\), which is not unpickled since it may run any code; save the state dict",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused(make, message, state, tmp_path):
    with pytest.raises(UserError, match=message) as raised:
        load(tmp_path / "weights.pth", make(state))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04" + b"x" * 200, b"\x80\x02}q\x00."])
def test_what_is_no_such_file(content, tmp_path):
    (tmp_path / "weights.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"weights.pth (cannot be read as a state dict of PyTorch|holds no state dict)"):
        create_network(TrainingConfig(model=MODEL, pretrained=str(tmp_path / "weights.pth")), Shape)


class Touch:
    """A pickle that makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("suffix", [".pth", ".bin", ".ckpt"])
def test_nothing_is_unpickled(suffix, state, tmp_path):
    with pytest.raises(UserError, match=r"holds more than tensors \(_io.open|io.open\)"):
        load(tmp_path / f"weights{suffix}", {"state_dict": state, "more": Touch(tmp_path / "touched")})
    assert not (tmp_path / "touched").exists()


def test_a_name_on_the_hub(state, tmp_path, monkeypatch, caplog):
    """Of a repository only the file of weights is looked at; its configuration could name another loader."""
    asked = []

    def download(repository, file, *, revision, library_name):
        from huggingface_hub.errors import EntryNotFoundError

        asked.append((repository, file, revision))
        if file == "model.safetensors":
            raise EntryNotFoundError("none")
        return tmp_path / "weights.bin"

    torch.save(named(state, "module."), tmp_path / "weights.bin")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    network, _ = create_network(TrainingConfig(model=MODEL, pretrained="hf-hub:someone/network@v1"), Shape)
    assert torch.equal(network.fc.weight, state["fc.weight"])
    assert asked == [("someone/network", name, "v1") for name in ("model.safetensors", "pytorch_model.bin")]


def test_what_the_network_has_not_is_no_reason_to_refuse(state, tmp_path, caplog):
    more = {"mask": torch.full((2,), float("-inf")), "angles": torch.zeros(2, dtype=torch.complex64)}
    network = load(tmp_path / "weights.pth", state | more)
    assert torch.equal(network.fc.weight, state["fc.weight"])
    assert "left out, since the network has no such tensors: mask, angles" in caplog.text
