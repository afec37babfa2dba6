"""Every file that a run reads back, damaged in many ways: it is refused in a sentence, or what it says is used."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cmpe_se.commands.compare import latency
from cmpe_se.commands.push import push
from cmpe_se.commands.report.facts import facts_of
from cmpe_se.data import load_data
from cmpe_se.data.corruptions import CORRUPTIONS
from cmpe_se.errors import UserError
from cmpe_se.inspecting.gathering import gather
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.network import create_network
from cmpe_se.training.pretrained import saved_network
from cmpe_se.training.robustness import read_corruptions
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.training.trainer import Trainer
from cmpe_se.utils.tensor_files import CHECKSUM, save_tensors
from tests.training.processes import complaint_of, empty_folder
from tests.training.runs import everything_in

_WHOLE = {
    "null": "null",
    "list": "[]",
    "number": "7",
    "text": '"x"',
    "object": "{}",
    "levels": "[" * 1000,
    "objects in objects": '{"a":' * 1000,
    "empty": "",
    "NaN": "NaN",
    "no text": "\ufffe\0",
}
_VALUES = (None, [], 7, "x", {}, True, -1, 1.5, 10**30, [[[[[[[[None]]]]]]]], math.inf)
REMOVED = object()


@pytest.fixture
def folder(plain) -> RunFolder:
    """A run to damage."""
    return RunFolder(shutil.copytree(plain, empty_folder() / "run"))


def variants(value: Any, replacements: Iterable[Any] = _VALUES) -> Iterator[tuple[str, Any]]:
    """Copies of a value, each with one part removed or replaced, down to the third level."""

    def places(inner: Any, path: tuple = ()) -> Iterator[tuple]:
        keys = inner if isinstance(inner, dict) else range(min(len(inner), 1)) if isinstance(inner, list) else ()
        for key in keys:
            yield (*path, key)
            if len(path) < 2:
                yield from places(inner[key], (*path, key))

    for path in places(value):
        for new in (REMOVED, *replacements):
            changed = copy.deepcopy(value)
            place = changed
            for key in path[:-1]:
                place = place[key]
            if new is REMOVED:
                del place[path[-1]]
            else:
                place[path[-1]] = new
            yield f"{'.'.join(map(str, path))} {'removed' if new is REMOVED else repr(new)}", changed


def assert_answered(what: str, *readers: Callable) -> None:
    """Each reader returns, or complains in one line that is not an echo of the file."""
    for reader in readers:
        try:
            reader()
        except UserError as error:
            sentence = str(error)
        except Exception as error:
            raise AssertionError(f"{what}: {reader} raised {error!r}") from error
        else:
            continue
        assert "\n" not in sentence, what
        assert 20 < len(sentence) < 700, f"{what}: {sentence}"


def pushed(run: RunFolder) -> None:
    """``push`` into a folder that is gone afterwards."""
    target = run.path / "pushed"
    try:
        push(str(run.path), str(target))
    finally:
        shutil.rmtree(target, ignore_errors=True)


def readers_of(run: RunFolder, name: str) -> list[Callable]:
    """What reads a file of a run."""
    return {
        "result.json": [run.read_result, lambda: facts_of(run, 50.0, "ab", torch.arange(2)), lambda: pushed(run)],
        "metrics.jsonl": [run.read_metrics],
        "config.yaml": [run.read_config, lambda: run.read_config(as_written=True), run.preprocessing],
        "model/config.json": [run.preprocessing, run.model_config, lambda: saved_network(str(run.path))],
        "corruptions.json": [lambda: read_corruptions(run.path, "digits")],
        "network": [run.load_model],
    }[name]


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "config.yaml", "model/config.json"])
def test_other_content(name, folder, capsys):
    path = folder.path / name
    whole = path.read_text()
    texts = _WHOLE | {f"cut at {part}": whole[: int(len(whole) * part)] for part in (0.1, 0.5, 0.9)}
    for what, text in texts.items():
        path.write_text(text)
        for reader in readers_of(folder, name)[:1]:
            with pytest.raises(UserError) as raised:
                reader()
            assert str(raised.value).startswith(str(path)), what
        assert_answered(what, *readers_of(folder, name))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["result.json", "model/config.json"])
def test_other_values(name, folder, capsys):
    path = folder.path / name
    for what, value in variants(json.loads(path.read_text())):
        path.write_text(json.dumps(value))
        assert_answered(f"{name}: {what}", *readers_of(folder, name))


@pytest.mark.parametrize("name", ["architecture", "model_args", "num_classes", "label_names", "pretrained_cfg"])
def test_networks_of_other_values(name, folder):
    path = folder.path / "model/config.json"
    config = json.loads(path.read_text())
    for what, value in variants(config):
        if what.split()[0].split(".")[-1] == name:
            path.write_text(json.dumps(value))
            assert_answered(what, *readers_of(folder, "network"))


def test_other_values_in_metrics(folder):
    record = json.loads(folder.metrics.read_text().splitlines()[0])
    for what, value in variants(record):
        folder.metrics.write_text(json.dumps(value) + "\n")
        assert_answered(what, folder.read_metrics)


@pytest.mark.slow
def test_other_values_in_settings(folder):
    values = yaml.safe_load(folder.config.read_text())
    for what, value in variants(values, (None, [], "x")):
        folder.config.write_text(yaml.safe_dump(value))
        assert_answered(what, folder.read_config)


def test_other_values_in_corruptions(folder):
    five = {name: [1.0] * 5 for name in CORRUPTIONS}
    source = {"versions": {}, "commit": None, "hardware": {"cpu": "x", "threads": 1, "gpu": None}, "command": "x"}
    record = {"clean": 1.0, "mean": 1.0, **five, "data": "digits", "images": 3, "parameters": CORRUPTIONS, **source}
    path = folder.corruptions
    path.write_text(json.dumps(record))
    assert read_corruptions(folder.path, "digits") is not None
    for what, value in variants(json.loads(json.dumps(record))):
        path.write_text(json.dumps(value))
        assert_answered(what, lambda: read_corruptions(folder.path, "digits"))
    for text in _WHOLE.values():
        path.write_text(text)
        assert read_corruptions(folder.path, "digits") is None


def test_other_values_in_latencies(tmp_path):
    path = tmp_path / "latency.json"
    hardware = {"cpu": "x", "threads": 1, "gpu": None}
    path.write_text(json.dumps({"hardware": hardware, "networks": ["a"], "latencies": {"a": [1, 2, 3.5, 4]}}))
    assert latency._read(path)["networks"] == ["a"]
    for text in [*_WHOLE.values(), '{"latencies": {"a": [1, 2, 3]}, "networks": [], "hardware": {}}']:
        path.write_text(text)
        assert latency._read(path) == {}


def test_other_values_in_a_checkpoint(folder):
    newest = folder.checkpoints.newest
    with safe_open(newest, framework="pt") as file:
        tree = file.metadata()["tree"]
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    values = json.loads(tree)
    texts = {**_WHOLE, "no pairs": '{"x": 1}', "a list as a key": '{"__pairs__": [[[1], 2]]}'}
    texts |= {"no such tensor": '{"__tensor__": "x"}', "a tensor's name": '{"__tensor__": [1]}'}
    texts |= {what: json.dumps(value) for what, value in variants({"__pairs__": values["__pairs__"][4:]})}
    for what, text in texts.items():
        save_tensors(tensors, newest, {"tree": text})
        with pytest.raises(UserError, match="no checkpoint can be read"):
            folder.checkpoints.load()
        assert_answered(what, folder.checkpoints.load, lambda: folder.checkpoints.load(tensors=False))


DAMAGE = {
    "result.json": (lambda run: run.result.write_text("[]"), ("push", "report", "explore", "train --resume")),
    "config.yaml": (
        lambda run: run.config.write_text(""),
        ("push", "evaluate", "train --resume"),
    ),
    "model/config.json": (
        lambda run: (run.model / "config.json").write_text("null"),
        ("push", "report", "explore", "evaluate", "predict", "export"),
    ),
    "model/model.safetensors": (
        lambda run: flip(run.model / "model.safetensors"),
        ("push", "report", "explore", "evaluate", "predict", "export"),
    ),
}


def flip(path: Path) -> None:
    """One bit of the last tensor."""
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", DAMAGE)
def test_commands_answer_in_a_line(name, folder):
    damage, commands = DAMAGE[name]
    damage(folder)
    for command in commands:
        more = {"push": [folder.path / "new"], "predict": [folder.curves]}.get(command, [])
        assert str(folder.path / name) in complaint_of(*command.split(), folder.path, *more)


def test_a_base_that_reaches_for_the_network(folder, monkeypatch):
    """A stranger's config.json may name what to load: only names of timm's own networks are."""
    asked = []
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *names, **_: asked.append(names))
    monkeypatch.setattr("timm.models._factory.load_model_config_from_path", asked.append)
    monkeypatch.setattr("timm.models._factory.load_checkpoint", lambda *names: asked.append(names))
    path = folder.model / "config.json"
    config = json.loads(path.read_text())
    arguments = config["model_args"] | {"view": "se"}
    for base in ("hf-hub:someone/network", f"local-dir:{folder.path}", "someone/network", "", 7):
        with pytest.raises(ValueError, match="of a converted network is no network of timm's own"):
            timm.create_model("cmpe_se_converted", base=base, view="se")
    for more in ({"base": "hf-hub:someone/network"}, {"base": "test_resnet", "checkpoint_path": str(folder.curves)}):
        changed = config | {"architecture": "cmpe_se_converted", "model_args": arguments | more}
        path.write_text(json.dumps(changed))
        # local-dir itself is read by timm, from the file that was looked at before
        monkeypatch.setattr("timm.models._factory.load_model_config_from_path", loaded_from(changed))
        with pytest.raises(UserError, match=r"is no network of timm's own|checkpoint_path '.*' cannot be a setting"):
            folder.load_model()
    assert asked == []


def loaded_from(config: dict) -> Callable:
    """What timm makes of a config.json."""
    return lambda _: (dict(config["pretrained_cfg"]), config["architecture"], dict(config["model_args"]))


@pytest.mark.parametrize("damage", [lambda model: flip(model / "model.safetensors"), lambda m: shutil.rmtree(m)])
def test_the_advice_brings_the_network_back(damage, folder):
    expected = folder.load_model().state_dict()
    damage(folder.model)
    with pytest.raises(UserError, match="resume"):
        folder.load_model()
    folder.result.unlink()
    train(resume=folder.path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in folder.load_model().state_dict().items())


# Weights.


def other_weights(run: RunFolder, change: Callable) -> None:
    """Change the tensors of a saved network, with the right checksum."""
    path = run.model / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_tensors(tensors, path)


WEIGHTS = {
    "nan": (lambda t: t["head.fc.weight"].fill_(math.nan), "head.fc.weight holds values that are not finite"),
    "infinity in a buffer": (lambda t: t["norm.running_var"].fill_(math.inf), "norm.running_var holds values that are"),
    "half": (
        lambda t: t.update({"head.fc.bias": t["head.fc.bias"].half()}),
        "bias is float16, should be float32",
    ),
    "whole": (
        lambda t: t.update({"head.fc.bias": t["head.fc.bias"].int()}),
        "bias is int32, should be float32",
    ),
    "shape": (lambda t: t.update({"head.fc.bias": t["head.fc.bias"][:9].clone()}), r"shape \(9,\), should be \(10,\)"),
    "missing": (lambda t: t.pop("norm.weight"), "1 of 1.. weights are not there, the first norm.weight"),
    "another": (lambda t: t.update(more=torch.zeros(1)), "1 weights that the network has not, the first more"),
}


@pytest.mark.parametrize(("change", "message"), WEIGHTS.values(), ids=WEIGHTS)
def test_other_weights_are_refused(change, message, folder):
    other_weights(folder, change)
    with pytest.raises(UserError, match=message):
        folder.load_model()


def test_a_network_of_before_there_were_checksums(folder):
    path = folder.model / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert CHECKSUM in file.metadata()
    expected = folder.load_model().state_dict()
    save_file(load_file(path), path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in folder.load_model().state_dict().items())


def test_values_too_large_for_the_network(folder, tmp_path):
    other_weights(folder, lambda tensors: tensors["head.fc.weight"].fill_(3e38))
    assert "gives no finite values for 360 of 360 images" in complaint_of("evaluate", folder.path)
    assert not (folder.path / "evaluation").exists()
    complaint = complaint_of("predict", folder.path, folder.curves, "--as-json")
    assert f"has no finite probabilities for {folder.curves}" in complaint


def test_values_too_large_for_a_report():
    data = load_data("digits")
    network, _ = create_network(TrainingConfig(model="se_preact_resnet20"), data)
    network.head.fc.weight.data.fill_(3e38)
    with pytest.raises(UserError, match="gives no finite values for some test images"):
        gather(network, data.test_batches(batch_size=90), 10)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(folder, capsys):
    tree, newest = folder.checkpoints.load()
    folder.checkpoints.save({**tree, "batch": 0})  # now there are two
    flip(newest)
    folder.result.unlink()
    before = folder.load_model().state_dict()
    result = train(resume=folder.path)
    said = capsys.readouterr().err
    assert f"damaged checkpoint passed over: {newest}: its content is not what was saved: the checksum differs" in said
    assert f"resuming after step {tree['history'][-1]['step']}" in said
    assert "previous.safetensors" in said
    assert result["epochs"] == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in folder.load_model().state_dict().items())


def test_a_damaged_checkpoint_alone(folder):
    flip(folder.checkpoints.newest)
    folder.result.unlink()
    before = everything_in(folder.path)
    complaint = complaint_of("train", "--resume", folder.path)
    assert "no checkpoint can be read" in complaint
    assert "the checksum differs" in complaint
    assert everything_in(folder.path) == before


def test_statistics_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    step = Trainer._train_step

    def spoil(trainer: Trainer, images: torch.Tensor, labels: torch.Tensor) -> None:
        step(trainer, images, labels)
        if trainer.step == 7:
            trainer.network.norm.running_var.fill_(math.inf)

    monkeypatch.setattr(Trainer, "_train_step", spoil)
    sentence = (
        r"some weights are not finite, of norm.running_var at step 10 .*; last good checkpoint: .*checkpoint\.saf"
    )
    with pytest.raises(UserError, match=sentence):
        train(epochs=1, model="preact_resnet20", checkpoint_steps=5, output=tmp_path / "run", device="cpu")
    run = RunFolder(tmp_path / "run")
    assert run.checkpoints.load()[0]["batch"] == 5
    assert not run.result.exists()


def test_a_network_that_is_not_finite_is_not_saved(folder):
    model, before = folder.load_model(), everything_in(folder.path)
    model.norm.running_mean.fill_(math.nan)
    with pytest.raises(UserError, match=r"cannot save .*model: norm.running_mean holds values that are not finite"):
        folder.save_model(model, model_args={}, data=load_data("digits"))
    assert everything_in(folder.path) == before


PLACES = {
    "batch": (lambda tree: tree.update(batch=10**6), "1000000 batches into epoch 2, with records of 1 epochs"),
    "epoch": (lambda tree: tree.update(epoch=3), "into epoch 4, with records of 1 epochs"),
    "nan": (lambda tree: tree["network"]["norm.running_var"].fill_(math.nan), "norm.running_var holds values that are"),
    "half": (
        lambda tree: tree["network"].update({"norm.bias": tree["network"]["norm.bias"].half()}),
        "norm.bias is float16, should be float32",
    ),
    "optimizer": (lambda tree: tree.update(optimizer={"state": [], "param_groups": {"x": 1}}), "does not fit"),
    "no optimizer": (lambda tree: tree.update(optimizer={}), "does not fit"),
}


@pytest.mark.parametrize(("change", "message"), PLACES.values(), ids=PLACES)
def test_a_checkpoint_that_cannot_be(change, message, folder):
    tree, _ = folder.checkpoints.load()
    change(tree)
    folder.checkpoints.save(tree)
    folder.checkpoints.previous.unlink()
    folder.result.unlink()
    with pytest.raises(UserError, match=message):
        train(resume=folder.path)
