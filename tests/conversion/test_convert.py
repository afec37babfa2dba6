"""Conversion: the same output bit for bit, every key kept, and all that the original did."""

import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

from cmpe_se import VIEWS, CompetitiveSE, PreActResNet, conversion_report, convert
from cmpe_se.errors import UserError
from tests.conversion.networks import FAMILIES, NAMES, build, expected_additions, randomise, shorten
from tests.tiers import long_but


def images(batch=2, side=64):
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(1))


def assert_same(first: nn.Module, second: nn.Module, x=None):
    """Equal outputs, bit for bit."""
    x = images() if x is None else x
    with torch.no_grad():
        assert torch.equal(first(x), second(x))


def gates(model: nn.Module) -> dict[str, CompetitiveSE]:
    return {name: module for name, module in model.named_modules() if isinstance(module, CompetitiveSE)}


@torch.no_grad()
def move_gates(model: nn.Module) -> nn.Module:
    """Gates as training might leave them."""
    for gate in gates(model).values():
        gate.fc2.weight.normal_(0, 0.5)
    return model


WHOLE = ["timm test_resnet", "timm test_byobnet", "timm test_convnext2"]
COMPILED_ELSEWHERE = {*WHOLE, "timm mobilenetv2_100", "timm regnetx_002", "timm resnet50", "timm resnet50d"}
"""Those that are whole, and those whose blocks' classes efficientnet_b0, regnety_004, seresnet50 and ecaresnet50d have
with attention besides."""


def inputs_of_forwards(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first block of each converted forward of a network, and what it gets: nothing is compiled twice."""
    seen, found = set(), {}
    for name in gates(model):
        block = model.get_submodule(name.removesuffix(".competition"))
        code = type(block).forward.__code__
        if (code.co_code, code.co_names) not in seen:
            seen.add((code.co_code, code.co_names))
            block.register_forward_pre_hook(lambda _, args, name=name: found.setdefault(name, args[0].clone()))
    with torch.no_grad():
        model(x)
    for module in model.modules():
        module._forward_pre_hooks.clear()
    return found


@pytest.mark.parametrize("name", NAMES)
def test_architectures(name):
    """Whole in the default tier; in the slow one each block once, which is what takes the others their time."""
    whole = name in FAMILIES
    original = build(name) if whole else shorten(build(name))
    before = {key: value.clone() for key, value in original.state_dict().items()}
    converted = convert(original)
    report = conversion_report(converted)
    assert len(report.gates) == expected_additions(name, whole)
    assert not gates(original)
    assert_same(original, converted)

    after = converted.state_dict()
    for key, value in before.items():
        assert torch.equal(after[key], value), key
    assert all(".competition." in key for key in after.keys() - before.keys())
    assert report.params == sum(p.numel() for key, p in converted.named_parameters() if ".competition." in key)

    converted.train()(images()).square().sum().backward()
    for block, gate in gates(converted).items():
        assert gate.fc2.weight.grad.abs().sum() > 0, block
    with torch.no_grad():  # and the gates do something
        assert not torch.equal(move_gates(converted).eval()(images()), original(images()))
    if name not in COMPILED_ELSEWHERE:
        torch.compiler.reset()
        for block, x in inputs_of_forwards(converted, images(batch=3)).items():
            assert_compiles_and_exports(converted.get_submodule(block.removesuffix(".competition")), x)


@pytest.mark.parametrize("view", VIEWS)
def test_views(view):
    original = build("timm test_resnet")
    converted = convert(original, view=view)
    assert {gate.view for gate in gates(converted).values()} == {view}
    assert_same(original, converted)


def test_by_hand():
    """A moved gate does what the method says, on the tensors that met in the addition."""
    converted = move_gates(convert(build("timm resnet18")))
    block, seen = converted.layer2[0], {}
    block.bn2.register_forward_hook(lambda _, __, output: seen.update(residual=output.clone()))
    block.downsample.register_forward_hook(lambda _, __, output: seen.update(identity=output.clone()))
    x = torch.randn(2, 64, 16, 16)
    y = block(x)
    r, i = seen["residual"].mean((2, 3)), seen["identity"].mean((2, 3))
    gate = block.competition._excite(r, i)[:, :, None, None]
    assert 0 < gate.min() < gate.max() < 2
    torch.testing.assert_close(y, (seen["identity"] + gate * seen["residual"]).relu())


def test_in_place():
    model = build("timm resnet18")
    assert convert(model, inplace=True) is model
    assert len(gates(model)) == 8


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(duplicate):
    converted = move_gates(convert(build("timm test_convnext2")))
    again = duplicate(duplicate(converted))
    assert_same(converted, again)
    move_gates(again)
    with torch.no_grad():
        assert not torch.equal(again(images()), converted(images()))
    assert str(again) == str(converted)


def test_it_stays_the_same_class():
    original = build("timm resnet50")
    block = convert(original).layer1[0]
    assert isinstance(block, timm.models.resnet.Bottleneck)
    assert type(block).__name__ == "Bottleneck"


def test_state_dicts():
    original = build("torchvision resnet18")
    converted = move_gates(convert(original))
    other = convert(build("torchvision resnet18"))
    other.load_state_dict(converted.state_dict())
    assert_same(other, converted)
    missing, surplus = convert(build("torchvision resnet18")).load_state_dict(original.state_dict(), strict=False)
    assert surplus == []
    assert all(".competition." in key for key in missing)


def test_protocol_of_timm():
    original = build("timm resnet18")
    converted = convert(original)
    (y, features), (y_converted, features_converted) = (
        model.forward_intermediates(images()) for model in (original, converted)
    )
    for one, two in zip([y, *features], [y_converted, *features_converted], strict=True):
        assert torch.equal(one, two)
    converted.set_grad_checkpointing(True)
    converted.train()(images()).sum().backward()
    converted.reset_classifier(7)
    assert converted(images()).shape == (2, 7)
    features = timm.create_model("resnet18", features_only=True).eval()
    for one, two in zip(features(images()), convert(features)(images()), strict=True):
        assert torch.equal(one, two)


def test_stochastic_depth_stays_on_the_residual():
    model = convert(build("timm resnet18", drop_path_rate=0.999), where="layer4.1").train()
    model.layer4[1].drop_path.scale_by_keep = False
    block, x = model.layer4[1], torch.randn(64, 512, 2, 2)
    dropped = (block(x) == x.relu()).flatten(1).all(1)
    assert dropped.float().mean() > 0.9


def assert_compiles_and_exports(module: nn.Module, x: torch.Tensor) -> None:
    """No graph break, and a graph for any batch, both of which give what the module itself gives."""
    with torch.no_grad():
        expected = module(x)
        torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), expected)
        batch = torch.export.Dim("batch", min=2)
        exported = torch.export.export(module, (x[:2],), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(exported.module()(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", long_but(WHOLE, ["timm test_resnet"]))
def test_compile_and_export(name):
    torch.compiler.reset()  # networks of one class share their code, and the compiler's limit for it
    assert_compiles_and_exports(move_gates(convert(shorten(build(name)))), images(batch=3))


@pytest.mark.long
def test_compiled_training():
    torch.compiler.reset()
    converted = convert(build("timm test_resnet")).train()
    torch.compile(converted, fullgraph=True, backend="aot_eager")(images()).sum().backward()
    assert all(gate.fc2.weight.grad is not None for gate in gates(converted).values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_bfloat16_and_layouts(layout):
    converted = move_gates(convert(build("timm test_convnext2"))).to(memory_format=layout)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = converted(images().to(memory_format=layout))
    with torch.no_grad():
        expected = converted(images())
    assert (y.float() - expected).norm() < 0.05 * expected.norm()


def test_segmentation():
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None)
    original = randomise(model).eval()
    converted = convert(original)
    with torch.no_grad():
        assert torch.equal(original(images())["out"], converted(images())["out"])


WHERE = {
    "a block": ("layer1.0", ["layer1.0"]),
    "a stage": ("layer4", ["layer4.0", "layer4.1"]),
    "a pattern": ("layer*.0", ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]),
    "several": (["layer1", "layer4.1"], ["layer1.0", "layer1.1", "layer4.1"]),
    "a function": (lambda name, block: block.downsample is not None, ["layer2.0", "layer3.0", "layer4.0"]),
}


@pytest.mark.parametrize(("where", "blocks"), WHERE.values(), ids=WHERE)
def test_where(where, blocks):
    converted = convert(build("timm resnet18"), where=where)
    report = conversion_report(converted)
    assert [gate.block for gate in report.gates] == blocks
    assert {name for name, reason in report.skipped.items() if reason == "not in where"} == {
        f"layer{stage}.{number}" for stage in range(1, 5) for number in range(2)
    } - set(blocks)


class Flat(nn.Module):
    """A network whose own forward has residual additions behind a convolution, as people write small ones."""

    def __init__(self, width=12):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.first = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
        self.second = nn.Conv2d(width, width, 1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        return torch.add(self.second(x), x)


class DependsOnData(Flat):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


class DependsOnMode(Flat):
    def forward(self, x):
        y = super().forward(x)
        return y * 2 if self.training else y


class Equal(Flat):
    def forward(self, x):
        return self.stem(x) + self.stem(x)


class Holder(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x)[:, :3]
        return x


def test_two_additions_in_one_forward():
    original = randomise(Flat()).eval()
    converted = convert(original)
    assert set(gates(converted)) == {"competition", "competition_2"}
    assert "unused.weight" in converted.state_dict()
    assert_same(original, converted)


@pytest.mark.parametrize(
    ("block", "reason"),
    [(DependsOnData, "torch.fx cannot trace it"), (DependsOnMode, "in training differs"), (Equal, "both operands")],
)
def test_what_cannot_be_converted_is_reported(block, reason):
    original = Holder(Flat(), block()).eval()
    converted = convert(original)
    assert reason in conversion_report(converted).skipped["parts.1"]
    assert len(gates(converted)) == 2
    assert_same(original, converted)
    with pytest.raises(UserError, match=f"{block.__name__} has no residual addition.*{reason}"):
        convert(block())


@pytest.mark.parametrize(
    ("name", "settings"),
    [("vgg11", {}), ("vit_tiny_patch16_224", {"depth": 2}), ("densenet121", {"block_config": (2, 2, 2, 2)})],
)
def test_networks_without_residual_additions(name, settings):
    with torch.device("meta"):
        model = timm.create_model(name, **settings)
    with pytest.raises(UserError, match="has no residual addition"):
        convert(model)


def test_refusals():
    original = build("timm resnet18")
    with pytest.raises(UserError, match=r"has competition already, at layer1\.0"):
        convert(convert(original))
    with pytest.raises(UserError, match="has competition already"):
        convert(PreActResNet(11, view="se"))
    with pytest.raises(UserError, match=r"unknown view 'folded'.*folded_3x3"):
        convert(original, view="folded")
    with pytest.raises(UserError, match=r"where='layer9' matches no block.*layer1\.0"):
        convert(original, where="layer9")
    with pytest.raises(UserError, match="has no gates"):
        conversion_report(original)


def test_channels_that_do_not_fold():
    model = randomise(Holder(Flat(12), Flat(13))).eval()
    before = set(model.state_dict())
    words = r"block parts\.1: .*cannot fold 13 channels.*12 or 14.*where=.*fallback='pair_view_1x1'"
    with pytest.raises(UserError, match=words):
        convert(model, fallback="refuse", inplace=True)
    assert set(model.state_dict()) == before  # nothing half-made
    assert type(model.parts[0]) is Flat
    assert len(gates(convert(model, where="parts.0", fallback="refuse"))) == 2
    assert len(gates(convert(model, view="pair_view_1x1", fallback="refuse"))) == 4
    with pytest.raises(UserError, match="unknown fallback 'se'; choose one of pair_view_1x1, refuse"):
        convert(model, fallback="se")

    converted = convert(model)
    report = conversion_report(converted)
    assert [gate.view for gate in report.gates] == ["folded_3x3"] * 2 + ["pair_view_1x1"] * 2
    assert report.notes == {"parts.1": "folded_3x3 cannot fold 13 channels, so that pair_view_1x1 reads them"}
    assert "note on parts.1: folded_3x3 cannot fold 13 channels" in str(report)


def test_plain_networks_of_ours():
    original = randomise(PreActResNet(11)).eval()
    converted = convert(original)
    assert len(gates(converted)) == 3
    assert_same(original, converted)


def test_report():
    report = conversion_report(convert(build("timm resnet18"), where="layer1.0"))
    (gate,) = report.gates
    # Picture 8x16 to 6x14 by one 3x3 map, then 84 to 4 to 64: multiply-adds by hand.
    assert gate.macs == 9 * 6 * 14 + 84 * 4 + 4 * 64
    assert gate.params == 9 + 2 + 84 * 4 + 4 * 64
    assert (gate.channels, gate.view, gate.picture) == (64, "folded_3x3", (8, 16))
    text = str(report)
    assert "layer1.0" in text
    assert "skipped layer4.1: not in where" in text
