"""``gates.jsonl``: what it says of gates, and which gates are called dead."""

import json
import math

import pytest
import timm
import torch

import cmpe_se
from cmpe_se.inspecting import find_gates
from cmpe_se.inspecting.gate_values import gate_values
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.views import TABLE
from cmpe_se.training import train
from cmpe_se.training.watching.gates import ASLEEP, NO_GRADIENT, NO_NUMBERS, GateWatch, read_records, warning_of
from tests.training.processes import SMALL, start, succeed
from tests.training.runs import metrics, place

QUICK = {"model": "test_resnet", "convert": "pair_view_1x1", "device": "cpu", "batch_size": 256}


def records_of(run):
    return [json.loads(line) for line in (run / "gates.jsonl").read_text().splitlines()]


@pytest.fixture
def images():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(0))


NETWORKS = {
    **{view: lambda view=view: cmpe_se.PreActResNet(20, block="basic", view=view, bias=True) for view in TABLE},
    "bottleneck": lambda: cmpe_se.PreActResNet(29, block="bottleneck", view="folded_3x3"),
    "converted": lambda: cmpe_se.convert(timm.create_model("test_resnet", num_classes=10), view="timm_eca"),
    "aff, converted": lambda: cmpe_se.convert(timm.create_model("test_resnet", num_classes=10), view="aff"),
    "compiled": lambda: compiled(cmpe_se.PreActResNet(20, block="basic", view="se")),
}


def compiled(network):
    network.compile(backend="eager")
    network(torch.randn(2, 3, 32, 32))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_values_are_those_of_inspect(name, images):
    torch.manual_seed(0)
    network = NETWORKS[name]().train()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2) if parameter.ndim == 1 else None
    before = {key: value.clone() for key, value in network.state_dict().items()}
    modes = [module.training for module in network.modules()]
    seen = gate_values(network, images)
    assert [module.training for module in network.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not any(module._forward_hooks for module in network.modules())
    network._compiled_call_impl = None  # which inspect cannot see through
    expected = cmpe_se.inspect_gates(network, images)
    assert [view.name for view in seen] == [view.name for view in expected]
    for view, other in zip(seen, expected, strict=True):
        torch.testing.assert_close(view.gate, other.gate)
        assert (view.gain, view.view) == (other.gain, other.view)


def measured(network, images, *, backward=True, before=None):
    watch = GateWatch(network, 1000)
    if backward:
        network.train()(images).square().mean().backward()
        watch.see_gradients(1, last=True)
    gradients = watch.take_gradients(torch.device("cpu")).tolist()
    return watch.measure(images, gradients, before=before or {}, autocast=torch.no_grad())


def test_statistics_of_known_gates(images):
    network = cmpe_se.PreActResNet(20, block="basic", view="se", bias=True, start="one")
    first = measured(network, images)["stages.0.blocks.0"]
    (view, *_) = cmpe_se.inspect_gates(network, images)
    gate = view.gate.double()
    assert first["mean"] == pytest.approx(gate.mean().item())
    assert first["spread"] == pytest.approx(gate.std(0, unbiased=False).mean().item(), rel=1e-4)
    assert first["channel_spread"] == pytest.approx(gate.mean(0).std(unbiased=False).item(), rel=1e-4)
    assert first["dead"] is None


def close_all(gate):
    gate.fc2.weight.zero_()
    gate.fc2.bias.fill_(-9)


def open_half(gate):
    gate.fc2.weight.zero_()
    gate.fc2.bias[: len(gate.fc2.bias) // 2] = 9
    gate.fc2.bias[len(gate.fc2.bias) // 2 :] = 1


def put_to_sleep(gate):
    """No hidden unit is ever awake, and the last layer has no bias: it stays at its start."""
    gate.fc1.weight.fill_(-1)
    gate.fc1.bias.fill_(-100)
    gate.fc2.bias.zero_().requires_grad_(False)


DEATHS = {
    "closed": (close_all, ASLEEP, {"closed": 1.0, "open": 0.0, "same": 1.0, "sleeping": 1.0}),
    "half open, and the same": (open_half, ASLEEP, {"closed": 0.0, "open": 0.5, "same": 1.0, "sleeping": 1.0}),
    "no gradient": (put_to_sleep, NO_GRADIENT, {"sleeping": 0.0, "spread": 0.0}),
    "not finite": (lambda gate: gate.fc2.bias.fill_(math.nan), NO_NUMBERS, {"mean": None, "sleeping": None}),
}


@pytest.mark.parametrize("name", DEATHS)
def test_dead_gates(name, images):
    kill, reason, expected = DEATHS[name]
    network = cmpe_se.PreActResNet(20, block="basic", view="se", bias=True)
    with torch.no_grad():
        kill(network.get_submodule("stages.1.blocks.1.attention"))
    sleepy = measured(network, images)
    assert (sleepy["stages.1.blocks.1"]["dead"] is None) == (reason == ASLEEP)  # after a single epoch
    before = {"stages.1.blocks.1": sleepy["stages.1.blocks.1"]}
    found = measured(network, images, before=before)
    dead = found["stages.1.blocks.1"]
    assert dead["dead"] == reason
    assert {key: dead[key] for key in expected} == pytest.approx(expected, nan_ok=True)
    if reason != NO_NUMBERS:  # which all that follows is, too
        assert [block for block, each in found.items() if each["dead"]] == ["stages.1.blocks.1"]
    warning = warning_of("stages.1.blocks.1", dead, 3)
    assert warning.startswith("the gate of stages.1.blocks.1 is dead after epoch 3: ")


def test_what_is_not_dead(images):
    """Constants by design, gates that are frozen on purpose, a fresh conversion, and gradients nobody looked at."""
    static = cmpe_se.PreActResNet(20, block="basic", view="static")
    frozen = cmpe_se.PreActResNet(20, block="basic", view="se")
    for module in frozen.modules():
        if isinstance(module, CompetitiveSE):
            module.requires_grad_(False)
    plain = timm.create_model("test_resnet", num_classes=10, zero_init_last=False)  # or residuals are 0 for a step
    fresh = cmpe_se.convert(plain, view="folded_3x3")
    for network in (static, frozen, fresh):
        assert {each["dead"] for each in measured(network, images).values()} == {None}
    assert {each["dead"] for each in measured(fresh, images, backward=False).values()} == {None}


@pytest.mark.parametrize(
    "settings",
    [
        {"ema": 0.9, "accumulate": 2, "mixup": 0.2},
        pytest.param({"precision": "bfloat16", "clip_grad": 1.0}, marks=pytest.mark.slow),  # which a CPU emulates
        {"validation": 0.2, "channels_last": False},
        {"test_interval": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_every_epoch_whatever_the_settings(settings, tmp_path):
    train(**QUICK, epochs=2, output=tmp_path / "run", **settings)
    records = records_of(tmp_path / "run")
    assert [record["epoch"] for record in records] == [1, 2]
    for record in records:
        assert len(record["gates"]) == 4
        assert all(0 < each["mean"] < 2 and each["dead"] is None for each in record["gates"].values())


def test_a_network_without_gates_has_no_file(plain):
    assert not (plain / "gates.jsonl").exists()


def test_a_dead_gate_is_told_once(tmp_path, capsys, monkeypatch):
    def with_a_dead_gate(config, data):
        network, arguments = create_network(config, data)
        with torch.no_grad():
            put_to_sleep(find_gates(network)["layer2.0"])
        return network, arguments

    from cmpe_se.training import run

    create_network = run.create_network
    monkeypatch.setattr(run, "create_network", with_a_dead_gate)
    settings = {**QUICK, "convert": "se", "bias": True}
    train(**settings, epochs=2, output=tmp_path / "run")
    warning = "the gate of layer2.0 is dead after epoch 1: none of its parameters gets a gradient"
    err = capsys.readouterr().err
    assert warning in err
    assert err.count("is dead after epoch") == 1
    train(resume=tmp_path / "run", epochs=3)
    assert "is dead" not in capsys.readouterr().err
    assert [record["gates"]["layer2.0"]["dead"] for record in records_of(tmp_path / "run")] == [NO_GRADIENT] * 3


@pytest.mark.long
def test_a_killed_run_has_the_same_statistics(short_run, tmp_path):
    flags = ("--epochs=2", *SMALL, "--checkpoint-steps=5", "--output", tmp_path / "run")
    start("train", *flags).until(lambda: place(tmp_path / "run") >= (1, 5)).send(9)
    succeed("train", "--resume", tmp_path / "run")
    assert metrics(short_run) == metrics(tmp_path / "run")
    assert records_of(tmp_path / "run") == records_of(short_run)


def test_resumed_at_the_end_of_an_epoch(short_run, tmp_path, monkeypatch):
    """Its last images come again."""
    from cmpe_se.training.watching.watch import Watch

    monkeypatch.setattr(Watch, "before_step", lambda *_, **__: None)
    train(epochs=2, **{key: QUICK[key] for key in ("model", "convert", "device")}, output=tmp_path / "run")
    for one, other in zip(records_of(tmp_path / "run"), records_of(short_run), strict=True):
        assert one["gates"].keys() == other["gates"].keys()
        for block, each in one["gates"].items():
            assert each["mean"] == pytest.approx(other["gates"][block]["mean"], rel=1e-6)


def test_records_that_are_read(tmp_path, capsys):
    train(**QUICK, epochs=2, output=tmp_path / "run")
    path = tmp_path / "run" / "gates.jsonl"
    assert [record["epoch"] for record in read_records(path, 1)] == [1]
    assert read_records(tmp_path / "nothing", 3) == []
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ValueError):  # noqa: PT011
        read_records(path, 2)
    train(resume=tmp_path / "run", epochs=3)
    assert "gates.jsonl cannot be read and begins anew" in capsys.readouterr().err
    assert [record["epoch"] for record in records_of(tmp_path / "run")] == [3]
