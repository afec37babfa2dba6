"""A new gate takes one row of the table: the whole library then runs it, or says in one sentence what it lacks.

The gates here are added as ``docs/gates.md`` tells a contributor to, and taken out again.
"""

import io
import json
from dataclasses import replace

import pytest
import timm
import torch
from torch import Tensor, nn

import cmpe_se
from cmpe_se import CompetitiveSE, PreActResNet, WideResNet, convert, merge
from cmpe_se.commands.benchmark.contenders import build, check_contenders
from cmpe_se.commands.compare.grid import parse_entries
from cmpe_se.commands.explore.network import Network
from cmpe_se.commands.models import models
from cmpe_se.commands.report import report
from cmpe_se.errors import UserError
from cmpe_se.inspecting import can_hold, forced_gates
from cmpe_se.layers.gate_layers import Affine, GateLayers, GateSizes, SqueezeLayers, in_double
from cmpe_se.layers.map_gates import MapLayers
from cmpe_se.layers.merged_gate import MergedGate, merge_gate
from cmpe_se.layers.picture_layers import PictureLayers
from cmpe_se.layers.views import TABLE, View
from cmpe_se.networks.reference import reference_targets
from cmpe_se.networks.registry import PLAIN_NETWORKS
from cmpe_se.training import train
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.run_folder import RunFolder
from tests.networks.naive import naive_picture, randomise
from tests.tiers import long_but


class OneMap(GateLayers):
    """``sigmoid(W i)``: a gate of squeezes with no hidden layer, the least that a contributor writes."""

    def create(self, sizes: GateSizes, **factory) -> dict[str, nn.Module]:
        return {"fc2": nn.Linear(sizes.channels, sizes.channels, bias=sizes.bias, **factory)}

    def hidden(self, gate: CompetitiveSE, residual: Tensor, identity: Tensor) -> Tensor:
        return identity


class Difference(SqueezeLayers):
    """``sigmoid(W2 relu(W1 (r - i)))``, which says how it merges."""

    def hidden(self, gate: CompetitiveSE, residual: Tensor, identity: Tensor) -> Tensor:
        return gate.fc1(residual - identity).relu()

    def affine(self, gate: CompetitiveSE) -> Affine:
        weight, bias = in_double(gate.fc1)
        return Affine(weight, -weight, bias)


class OwnModule(nn.Module):
    """``u * sigmoid(K (u + s))`` with a convolution K at every position."""

    def __init__(self, channels: int, hidden: int, **factory):
        super().__init__()
        self.narrow = nn.Conv2d(channels, hidden, 1, **factory)
        self.widen = nn.Conv2d(hidden, channels, 1, **factory)
        self.gate = nn.Sigmoid()

    def forward(self, residual: Tensor, identity: Tensor) -> Tensor:
        return residual * self.gate(self.widen(self.narrow(residual + identity).tanh()))


class Unseen(nn.Module):
    """A module without a part that puts out its factors."""

    def __init__(self, channels: int, hidden: int, **factory):
        super().__init__()
        self.scale = nn.Conv2d(channels, channels, 1, groups=channels, **factory)

    def forward(self, residual: Tensor) -> Tensor:
        return residual * self.scale(residual.mean((2, 3), keepdim=True)).sigmoid()


BOTH = ("residual", "identity")
TOYS = {
    "toy_identity": View(("identity",), OneMap(), "toy", "one map of the identity", settings=("start", "bias", "mask")),
    "toy_difference": View(BOTH, Difference(), "toy", "SE that reads residual - identity"),
    "toy_folded_3x5": View(BOTH, PictureLayers((3, 5), folded=True), "toy", "3x5 convolution over the folded picture"),
    "toy_module": View(
        BOTH,
        MapLayers(OwnModule, last=("widen",)),
        "toy",
        "a gate for each position",
        by_position=True,
        settings=("start", "reduction", "min_hidden"),
    ),
}
MERGING = ("toy_difference", "toy_folded_3x5")
NETWORKS = {
    "bottleneck": lambda **settings: PreActResNet(11, **settings),
    "basic": lambda **settings: PreActResNet(8, block="basic", **settings),
    "wide": lambda **settings: WideResNet(10, 2, **settings),
    "converted": lambda dtype=None, **settings: convert(timm.create_model("test_resnet").to(dtype), **settings),
}
EVERY_TOY = pytest.mark.parametrize("view", TOYS)
EVERY_NETWORK = pytest.mark.parametrize("kind", NETWORKS)


@pytest.fixture(autouse=True)
def rows(monkeypatch):
    """The rows, for as long as a test lasts."""
    for name, row in TOYS.items():
        monkeypatch.setitem(TABLE, name, row)


def naive(gate: CompetitiveSE, u: Tensor, s: Tensor) -> Tensor:
    """Factors on the residual, (N, C, H, W) or (N, C, 1, 1), in eval mode."""
    r, i = u.mean((2, 3)), s.mean((2, 3))
    if gate.view == "toy_module":
        module, total = gate.map_gate, u + s
        hidden = torch.einsum("hc,ncyx->nhyx", module.narrow.weight[:, :, 0, 0], total)
        hidden = (hidden + module.narrow.bias[:, None, None]).tanh()
        logits = torch.einsum("ch,nhyx->ncyx", module.widen.weight[:, :, 0, 0], hidden)
        logits = logits + module.widen.bias[:, None, None]
        return gate.gain / (1 + torch.exp(-logits))
    if gate.view == "toy_identity":
        hidden = i
    elif gate.view == "toy_difference":
        hidden = ((r - i) @ gate.fc1.weight.T).relu()
    else:
        norm, picture = gate.map_norm, naive_picture(r, i, "folded_3x3", gate.picture_size[1])[:, None]
        maps = nn.functional.conv2d(picture, gate.map_conv.weight)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        maps = (maps - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]
        hidden = (maps.mean(1).flatten(1) @ gate.fc1.weight.T).relu()
    return (gate.gain / (1 + torch.exp(-hidden @ gate.fc2.weight.T)))[:, :, None, None]


def flows(channels: int = 48, dtype=torch.float64) -> Tensor:
    x = torch.randn(2, 4, channels, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (x + x.mean((3, 4), keepdim=True) * 6).to(dtype)


def make(view: str, **settings) -> CompetitiveSE:
    torch.manual_seed(0)
    settings = {"start": "one", "reduction": 4, "dtype": torch.float64} | settings
    return randomise(CompetitiveSE(48, view=view, **settings)).eval()


@torch.no_grad()
def network(kind: str, view: str) -> nn.Module:
    """In eval mode, in float64, nothing at its initial value."""
    torch.manual_seed(0)
    made = NETWORKS[kind](view=view, start="one", min_hidden=8, dtype=torch.float64)
    for name, tensor in randomise(made).named_parameters():
        if "map_gate" in name:
            tensor.add_(torch.randn_like(tensor) * tensor[0].numel() ** -0.5)
    return made.eval()


def images(dtype=torch.float64) -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def gates_of(model: nn.Module, kind: type = CompetitiveSE) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, kind)]


@EVERY_TOY
def test_gate_alone(view):
    gate, (u, s) = make(view), flows().requires_grad_()
    factors = naive(gate, u, s)
    assert factors.std() > 0.03
    y = gate(u, s)
    torch.testing.assert_close(y, s + factors * u, rtol=0, atol=1e-12)
    y.square().sum().backward()
    assert all(parameter.grad.abs().max() > 1e-6 for parameter in gate.parameters())
    assert f"view='{view}'" in repr(gate)
    if TABLE[view].takes_squeezes:
        torch.testing.assert_close(gate.gate(*flows().mean((3, 4))), factors[:, :, 0, 0], rtol=0, atol=1e-12)
    for start, expected in (("one", s + u), ("half", s + u / 2)):
        fresh = CompetitiveSE(48, view=view, start=start, dtype=torch.float64).eval()
        fresh.zero_last_layer()
        assert torch.equal(fresh(u, s), expected)


@EVERY_TOY
def test_precision(view):
    """Autocast rounds no gate that is made of squeezes, and halves go in and come out as halves."""
    gate, (u, s) = make(view, dtype=torch.float32), flows(dtype=torch.bfloat16)
    expected = gate.double()(u.double(), s.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = gate.float()(u, s)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=2**-6 * expected.abs().max().item())


@EVERY_TOY
def test_settings(view):
    assert CompetitiveSE(16, view=view, min_hidden=5).hidden == 5
    if "mask" in TABLE[view].settings:
        gate, (u, s) = make(view, mask=0.5).train(), flows()
        assert not torch.equal(gate(u, s), gate(u, s))
    else:
        with pytest.raises(ValueError, match=f"view '{view}' reads none; these views do: se, .*toy_identity"):
            CompetitiveSE(16, view=view, mask=0.5)


@EVERY_NETWORK
@EVERY_TOY
def test_in_networks(view, kind):
    model, x = network(kind, view), images()
    assert {gate.view for gate in gates_of(model)} == {view}
    with torch.no_grad():
        expected = model(x)
        seen = cmpe_se.inspect(model, x)
        for record in seen:
            assert (record.view, record.gain, record.neutral) == (view, 2, 1)
            assert record.gate.shape == record.residual_squeeze.shape == record.identity_squeeze.shape
            assert record.residual_share.shape == (3,)
            assert record.gate.std() > 0.003
            assert (record.picture is not None) == (view == "toy_folded_3x5")
            if view == "toy_identity":
                gate = gates_of(model.get_submodule(record.name))[0]
                torch.testing.assert_close(gate.gate(record.residual_squeeze, record.identity_squeeze), record.gate)
        merged = merge(model)
        assert (merged(x) - expected).abs().max() <= 1e-12 * expected.abs().max()
        assert len(gates_of(merged, MergedGate)) == (len(seen) if view in MERGING else 0)
        assert len(gates_of(merged)) == (0 if view in MERGING else len(seen))
        for record, again in zip(seen, cmpe_se.inspect(merged, x), strict=True):
            torch.testing.assert_close(again.gate, record.gate, rtol=0, atol=1e-10)
            assert again.name == record.name
    model.train()(x).sum().backward()
    assert all(parameter.grad is not None for gate in gates_of(model) for parameter in gate.parameters())


@pytest.mark.parametrize("view", [view for view in TOYS if view != "toy_module"])
def test_held(view):
    model = network("basic", view)
    block = "stages.1.blocks.0"
    with forced_gates(model, block, 0.5):
        assert cmpe_se.inspect(model, images())[1].gate.unique().tolist() == [0.5]


def test_gates_for_each_position_cannot_be_held():
    assert not can_hold(gates_of(network("basic", "toy_module"))[0])
    sentence = r"\(view toy_module\) rescale whole feature maps by themselves, and cannot be held"
    with pytest.raises(UserError, match=sentence), forced_gates(network("basic", "toy_module"), "stages.1.blocks.0", 0):
        pass


@EVERY_TOY
def test_a_conversion_begins_with_the_same_output(view):
    plain, x = timm.create_model("test_resnet").eval(), images(torch.float32)
    converted = convert(plain, view=view).eval()
    with torch.no_grad():
        assert torch.equal(converted(x), plain(x))
    assert view in str(cmpe_se.conversion_report(converted))


@pytest.mark.slow
@pytest.mark.parametrize("view", long_but(TOYS, ["toy_folded_3x5"]))
def test_saved_and_exported(view):
    model, x = network("basic", view), images()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = timm.create_model("preact_resnet20", view=view)
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(model.state_dict())
    other = NETWORKS["basic"](view=view, start="one", min_hidden=8, dtype=torch.float64).eval()
    other.load_state_dict(torch.load(file))
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(other(x), expected)
        for form in (model, merge(model)):
            exported = torch.export.export(form, (x[:2],), dynamic_shapes=dynamic).module()
            torch.testing.assert_close(exported(x), expected, rtol=0, atol=1e-9)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-9)


@EVERY_TOY
def test_commands_know_it(view):
    assert TrainingConfig(model="preact_resnet20", view=view).view == view
    assert TrainingConfig(model="resnet18", convert=view).convert == view
    entries = parse_entries(["preact_resnet20", f"preact_resnet20:{view}:start=one"], [])
    assert entries[1].view == view
    if "bias" not in TABLE[view].settings:
        with pytest.raises(UserError, match="bias makes no difference to this gate"):
            parse_entries(["preact_resnet20", f"preact_resnet20:{view}:bias=true"], [])
    check_contenders([view])
    assert {gate.view for gate in gates_of(build("preact_resnet20", view))} == {view}


def test_listed(monkeypatch, capsys):
    one = {"preact_resnet20": PLAIN_NETWORKS["preact_resnet20"]}
    monkeypatch.setattr("cmpe_se.commands.models.PLAIN_NETWORKS", one)
    models(view="toy_identity", as_json=True)
    assert {row["view"] for row in json.loads(capsys.readouterr().out)} == {None, "se", "toy_identity"}


@pytest.mark.long
@pytest.mark.parametrize("view", long_but(["toy_identity", "toy_module"], ["toy_module"]))
def test_a_run_and_its_pages(view, tmp_path):
    settings = {"model": "preact_resnet20", "view": view, "start": "one", "epochs": 1, "lr": 0.2, "device": "cpu"}
    train(**settings, output=tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert {gate.view for gate in gates_of(folder.load_model())} == {view}
    made = report(tmp_path / "run", output=tmp_path / "report")
    assert len(made["blocks"]) == 3
    assert view in (tmp_path / "report" / "report.html").read_text()
    Network(folder)  # the explore command's


# What is not there is said in a sentence.


def test_no_merged_form():
    sentence = "view 'toy_identity' has no merged form; OneMap.affine would be one"
    with pytest.raises(ValueError, match=sentence):
        merge_gate(make("toy_identity"))
    gate, (u, s) = make("toy_identity"), flows()
    merged = merge(gate)
    assert isinstance(merged, CompetitiveSE)
    assert torch.equal(merged(u, s), gate(u, s))
    assert not any(parameter.requires_grad for parameter in merged.parameters())


def test_factors_that_nothing_puts_out(monkeypatch):
    monkeypatch.setitem(TABLE, "toy_unseen", View(("residual",), MapLayers(Unseen, last=("scale",)), "toy", "unseen"))
    model, hooks = PreActResNet(8, block="basic", view="toy_unseen"), []
    merge(model)(images(torch.float32))
    with pytest.raises(
        UserError, match=r"stages.0.blocks.0: the module of view 'toy_unseen' has no part called 'gate'"
    ):
        cmpe_se.inspect(model, images(torch.float32))
    for module in model.modules():
        hooks += [*module._forward_hooks, *module._forward_pre_hooks]
    assert not hooks
    assert model.training


def test_the_reference_has_no_such_gate():
    with pytest.raises(ValueError, match="the reference has no view 'toy_difference'; it has se, double_fc, "):
        reference_targets(network("basic", "toy_difference"))


def test_a_view_that_is_gone(monkeypatch):
    """As in a program that loads a gate and lacks the code that added its row."""
    gate = make("toy_difference")
    monkeypatch.delitem(TABLE, "toy_difference")
    for use in (lambda: gate(*flows()), lambda: merge(gate), lambda: CompetitiveSE(16, view="toy_difference")):
        with pytest.raises(ValueError, match="unknown view 'toy_difference'; choose one of se, double_fc"):
            use()


def test_a_picture_that_is_too_small_for_the_kernel():
    with pytest.raises(ValueError, match="a 3x5 convolution cannot read the 4x4 picture of 8 channels"):
        CompetitiveSE(8, view="toy_folded_3x5")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"reads": ("identity", "residual")}, "a view reads .* both in this order"),
        ({"reads": ("image",)}, "a view reads"),
        ({"settings": ("start", "units")}, "'units' is no setting of a gate; these are: start, reduction"),
        ({"layers": type("Odd", (OneMap,), {"form": "odd"})()}, "unknown form 'odd' of Odd; one of squeezes, picture"),
    ],
)
def test_rows_that_cannot_be(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(TOYS["toy_identity"], **changes)
