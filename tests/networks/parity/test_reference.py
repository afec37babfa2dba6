"""What we compute is what the paper's code computes: every view, both families, blocks and whole networks."""

import numpy as np
import pytest
import torch
from torch import nn

from cmpe_se import PreActResNet, WideResNet
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.layers.folding import fold
from cmpe_se.layers.gated_addition import squeeze
from cmpe_se.networks.blocks import PreActBasic, PreActBottleneck
from cmpe_se.networks.reference import load_reference_parameters, reference_targets
from cmpe_se.networks.residual import ResidualNetwork
from tests.networks.parity.conftest import FIXTURES, VIEW_OF, Fixture, assert_near, check_statistics, load_fixtures

BLOCKS = [case for file in ("blocks_resnet", "blocks_wrn") for case in load_fixtures(file)]
NETWORKS = [case for file in ("resnet20_3x3", "resnet20_se", "wrn16_2_2x1") for case in load_fixtures(file)]
STORED = 1e-6  # relative rounding of what the fixtures store as float32
EXACT = 1e-9


def build_block(case: Fixture) -> nn.Module:
    planes, stride, _ = case.meta["args"]
    view = VIEW_OF[case.meta["case"].split("_")[0]]
    bottleneck = "Bottleneck" in case.meta["block"]

    def attention(channels, **factory):
        columns = 16 if bottleneck else channels // case.meta["reimage_k"]
        maps = max(1, channels // (64 if bottleneck else 16))
        return CompetitiveSE(channels, view=view, columns=columns, maps=maps, **factory)

    block_type = PreActBottleneck if bottleneck else PreActBasic
    return block_type(
        case.meta["in_channels"],
        planes,
        stride=stride,
        drop_rate=0.0,
        drop_path=0.0,
        attention=attention,
        dtype=torch.float64,
    )


def build_network(case: Fixture) -> ResidualNetwork:
    view, depth, classes = VIEW_OF[case.meta["variant"]], case.meta["depth"], case.meta["classes"]
    if case.meta["family"] == "wrn":
        return WideResNet(depth, case.meta["width"], view=view, num_classes=classes, dtype=torch.float64)
    return PreActResNet(depth, view=view, num_classes=classes, dtype=torch.float64)


class Recorder:
    """Records what one attention computes, and how many values each batch norm averages over."""

    def __init__(self, block: nn.Module):
        self.seen: dict[str, torch.Tensor] = {}
        attention = block.attention
        original = attention.gate

        def gate(residual, identity):
            self.seen["residual_squeeze"], self.seen["identity_squeeze"] = residual, identity
            self.seen["attention"] = original(residual, identity)
            return self.seen["attention"]

        attention.gate = gate
        block.register_forward_hook(lambda _, __, output: self.seen.update(out_gap=squeeze(output[0])))
        for child, key in (("map_conv", "map_conv"), ("map_norm", "multi_map")):
            if hasattr(attention, child):
                getattr(attention, child).register_forward_hook(self._keep(key))
        if hasattr(attention, "map_conv"):
            attention.map_conv.register_forward_hook(lambda _, inputs, __: self.seen.update(reimaged=inputs[0]))
        for child, key in (("fc1", "hidden"), ("fc_residual", "hidden_residual"), ("fc_identity", "hidden_identity")):
            if hasattr(attention, child):
                getattr(attention, child).register_forward_hook(self._keep(key, torch.relu))

    def _keep(self, key, transform=lambda x: x):
        return lambda _, __, output: self.seen.update({key: transform(output)})

    def check(self, expected: dict[str, np.ndarray]) -> None:
        assert expected
        if "multi_map" in self.seen:
            self.seen["one_map"] = self.seen["multi_map"].mean(1, keepdim=True)
        for key, value in expected.items():
            actual = self.seen[key]
            assert_near(actual.reshape(value.shape), value, STORED, floor=1e-2)


def count_samples(model: nn.Module, targets: dict) -> dict[str, int]:
    """Values per channel in each batch norm's input during the next forward, by reference path."""
    norms = {module.running_var.data_ptr(): module for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
    counts = {}
    for path, target in targets.items():
        if path.endswith("running_var"):
            name = path.removesuffix(".running_var")

            def keep(_, inputs, name=name):
                counts[name] = inputs[0].numel() // inputs[0].shape[1]

            norms[target.tensor.data_ptr()].register_forward_pre_hook(keep)
    return counts


def check_gradients(case: Fixture, targets: dict, x: torch.Tensor) -> None:
    expected = case.numbers("grad")
    assert_near(x.grad, expected.pop("x"), STORED)
    trainable = [path for path, target in targets.items() if isinstance(target.tensor, nn.Parameter)]
    assert sorted(trainable) == sorted(expected)  # every parameter gradient, and nothing else
    largest = max(float(np.abs(value).max()) for value in expected.values())
    for path, value in expected.items():
        # Some true gradients are zero up to rounding (a norm follows the layer), hence the floor.
        assert_near(targets[path].tensor.grad.reshape(value.shape), value, STORED, floor=1e-6 * largest)


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: f"{case.meta['block']}-{case.meta['case']}")
def test_block(case):
    block = build_block(case)
    parameters = case.numbers("param")
    load_reference_parameters(block, parameters)
    targets = reference_targets(block)
    recorder = Recorder(block)

    block.eval()
    out, out_squeeze = block(case["x"])
    assert_near(out, case["eval/out_f64"], EXACT)
    recorder.check(case.numbers("mid/eval"))
    if out_squeeze is not None:
        assert_near(out_squeeze, squeeze(out).detach(), 1e-12)

    block.train()
    samples = count_samples(block, targets)
    x = case["x"].requires_grad_()
    out, _ = block(x)
    assert_near(out, case["train/out_f64"], EXACT)
    recorder.check(case.numbers("mid/train"))
    (out * case["cotangent"]).sum().backward()
    check_gradients(case, targets, x)
    check_statistics(case.numbers("stat_after"), parameters, targets, samples)


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.meta["name"])
def test_network(case):
    model = build_network(case)
    parameters = case.numbers("param")
    load_reference_parameters(model, parameters)
    targets = reference_targets(model)
    recorders = [Recorder(stage.blocks[0]) for stage in model.stages]

    def check_intermediates(mode: str) -> None:
        for number, recorder in enumerate(recorders, start=1):
            recorder.check(case.numbers(f"mid/{mode}/stage{number}"))

    model.eval()
    assert_near(model(case["x"]), case["eval/out_f64"], EXACT)
    check_intermediates("eval")

    model.train()
    samples = count_samples(model, targets)
    x = case["x"].requires_grad_()
    logits = model(x)
    assert_near(logits, case["train/out_f64"], EXACT)
    check_intermediates("train")
    nn.functional.cross_entropy(logits, case["y"].long(), reduction="sum").backward()
    check_gradients(case, targets, x)
    check_statistics(case.numbers("stat_after"), parameters, targets, samples)


@pytest.mark.parametrize("case", NETWORKS, ids=lambda case: case.meta["name"])
def test_network_in_float32(case):
    model = build_network(case).float().eval()
    load_reference_parameters(model, case.numbers("param"))
    assert_near(model(case["x"].float()), case["eval/out"], 1e-5)
    model.to(memory_format=torch.channels_last)
    assert_near(model(case["x"].float().to(memory_format=torch.channels_last)), case["eval/out"], 1e-5)


def test_fold_permutations():
    file = np.load(FIXTURES / "fold.npz")
    assert len(file.files) == 15
    for key in file.files:
        family, sizes = key.split("/")
        channels, k = (int(part[1:]) for part in sizes.split("_"))
        columns = k if family == "resnet" else channels // k
        entries = 2 * torch.arange(channels)[None]
        picture = fold(entries, entries + 1, columns)
        assert torch.equal(picture[0, 0], torch.from_numpy(file[key]).long()), key


def reference_like(model: ResidualNetwork, names=None) -> dict[str, np.ndarray]:
    return {
        path: np.full(target.shape, target.frozen_value)
        if target.tensor is None
        else target.tensor.detach().numpy().reshape(target.shape) + 0.5
        for path, target in reference_targets(model, names).items()
    }


SMALL_NETWORKS = {
    "bottleneck": lambda view: PreActResNet(11, view=view, num_classes=7),
    "basic": lambda view: PreActResNet(8, block="basic", view=view, num_classes=7),
    "wide": lambda view: WideResNet(10, 3, view=view, num_classes=7),
}


@pytest.mark.parametrize("view", [None, *VIEW_OF.values()])
@pytest.mark.parametrize("family", SMALL_NETWORKS)
def test_every_parameter_and_statistic_is_loaded(family, view):
    model = SMALL_NETWORKS[family](view)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    load_reference_parameters(model, reference_like(model))
    for name, tensor in model.state_dict().items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(tensor, before[name] + 0.5, msg=name)


def test_basic_projection_by_either_name():
    model = PreActResNet(8, block="basic")
    parameters = reference_like(model, {f"features.{stage}.0.shortcut.0.weight": None for stage in (3, 4)})
    assert "features.3.0.shortcut.0.weight" in parameters
    load_reference_parameters(model, parameters)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda p: p.pop("features.2.0.bn1.gamma"), r"missing: features\.2\.0\.bn1\.gamma"),
        (lambda p: p.update({"features.2.0.bn9.gamma": np.ones(3)}), r"surplus: features\.2\.0\.bn9\.gamma"),
        (lambda p: p.update({"output.bias": np.ones(3)}), r"misshapen: output\.bias is \(3,\), should be \(7,\)"),
        (lambda p: p.update({"features.0.beta": np.ones(3)}), r"not frozen: features\.0\.beta must be 0"),
        (lambda p: p.update({"output.bias": np.full(7, "x")}), r"not real numbers: output\.bias of <U1"),
        (lambda p: p.update({"output.bias": np.ones(7) * 1j}), r"not real numbers: output\.bias of complex128"),
    ],
)
def test_refusals_name_the_entry_and_change_nothing(change, sentence):
    model = SMALL_NETWORKS["bottleneck"]("folded_3x3")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = reference_like(model)
    change(parameters)
    with pytest.raises(ValueError, match=sentence):
        load_reference_parameters(model, parameters)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "form",
    [torch.from_numpy, lambda a: torch.from_numpy(a).bfloat16(), lambda a: a.astype(">f4"), lambda a: a[::-1][::-1]],
    ids=["tensor", "bfloat16", "big-endian", "view"],
)
def test_numbers_in_any_form(form):
    model = SMALL_NETWORKS["wide"]("double_fc")
    parameters = {path: form(np.ones_like(array)) for path, array in reference_like(model).items() if ".0." not in path}
    parameters |= {path: array for path, array in reference_like(model).items() if path not in parameters}
    load_reference_parameters(model, parameters)
    assert torch.equal(model.head.fc.weight, torch.ones_like(model.head.fc.weight))


def test_networks_without_a_classifier():
    model = PreActResNet(11, view="se", num_classes=0)
    parameters = reference_like(model)
    assert "output.weight" not in parameters
    load_reference_parameters(model, parameters)
    with pytest.raises(ValueError, match=r"surplus: output\.bias"):
        load_reference_parameters(model, parameters | {"output.bias": np.ones(3)})


def test_other_modules_are_refused():
    with pytest.raises(ValueError, match="give a PreActResNet or a WideResNet"):
        load_reference_parameters(nn.Linear(2, 2), {})
