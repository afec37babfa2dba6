"""Gates as a file of their own: what is loaded is what was saved, or the network stays as it is."""

import json

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

import cmpe_se
from cmpe_se import conversion_report, convert, load_gates, save_gates, strip_gates
from cmpe_se.errors import UserError
from cmpe_se.utils.tensor_files import load_tensors, save_tensors
from tests.finetuning.networks import NETWORKS, build, equal, gated, gates, images, moved, snapshot
from tests.finetuning.test_stripping import Own, looks
from tests.tiers import long_but

VIEWS = ("folded_3x3", "double_fc", "static", "timm_cbam")


@pytest.fixture
def file(tmp_path):
    return tmp_path / "gates.safetensors"


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_network_without_gates_gets_them(kind, view, file):
    model, x = gated(kind, view), images()
    save_gates(model, file)
    plain = build(kind)
    assert load_gates(plain, file) is plain
    assert equal(plain.state_dict(), model.state_dict())
    assert [(name, type(module)) for name, module in plain.named_modules()] == [
        (name, type(module)) for name, module in model.named_modules()
    ]
    assert torch.equal(plain(x), model(x))
    assert [(gate.gain, gate.sizes, gate.extra_repr()) for gate in gates(plain)] == [
        (gate.gain, gate.sizes, gate.extra_repr()) for gate in gates(model)
    ]
    assert getattr(plain, "view", None) == getattr(model, "view", None)


@pytest.mark.parametrize("kind", ["cifar", "preact"])
def test_sets_of_gates_share_a_backbone(kind, file, tmp_path):
    x, outputs = images(), {}
    backbone = build(kind)
    for seed in (1, 2, 3):
        model = moved(gated(kind), seed)
        save_gates(model, tmp_path / f"{seed}.safetensors")
        outputs[seed] = model(x)
    for seed in (2, 1, 3):
        load_gates(backbone, tmp_path / f"{seed}.safetensors")
        assert torch.equal(backbone(x), outputs[seed])
    assert not torch.equal(outputs[1], outputs[2])
    assert torch.equal(strip_gates(backbone)(x), build(kind)(x))


def test_an_exchange_keeps_the_parameters(file):
    model, other = gated("cifar"), moved(gated("cifar"), 2)
    save_gates(other, file)
    parameters = list(model.parameters())
    load_gates(model, file)
    assert all(one is two for one, two in zip(parameters, model.parameters(), strict=True))
    assert equal(model.state_dict(), other.state_dict())


def test_settings_of_gates(file):
    settings = {"start": "half", "reduction": 4, "min_hidden": 3, "bias": True, "mask": 0.2}
    model = moved(convert(build("bottleneck"), view="double_fc", **settings))
    save_gates(model, file)
    other = load_gates(build("bottleneck").train(), file)
    assert {(gate.start, gate.mask, gate.fc2.bias is None, gate.training) for gate in gates(other)} == {
        ("half", 0.2, False, True)
    }
    assert torch.equal(other.eval()(images()), model.eval()(images()))
    own = moved(cmpe_se.CompetitiveSE(32, columns=8, maps=3, start="one"))
    save_gates(nn.Sequential(own), file)
    with pytest.raises(UserError, match=r"gate 0 has maps None, the file's has maps 3"):
        load_gates(nn.Sequential(cmpe_se.CompetitiveSE(32, columns=8, start="one")), file)
    assert load_gates(nn.Sequential(cmpe_se.CompetitiveSE(32, columns=8, maps=3, start="one")), file)


def test_some_blocks(file):
    model = moved(convert(build("bottleneck"), where=["layer2", "layer4"]).eval())
    save_gates(model, file)
    other = load_gates(build("bottleneck"), file)
    assert [gate.block for gate in conversion_report(other).gates] == [
        gate.block for gate in conversion_report(model).gates
    ]
    assert conversion_report(other).skipped == conversion_report(model).skipped
    assert torch.equal(other(images()), model(images()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_networks_dtype_stays(dtype, file):
    model = gated("cifar")
    save_gates(model, file)
    plain, with_gates = (
        load_gates(build("cifar").to(dtype), file),
        load_gates(gated("cifar", "folded_3x3").to(dtype), file),
    )
    for other in (plain, with_gates):
        expected = {
            name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in snapshot(model).items()
        }
        assert equal(other.state_dict(), expected)
    save_gates(plain, file)
    exact = load_gates(build("cifar"), file)
    assert {parameter.dtype for parameter in exact.parameters()} == {torch.float32}
    assert torch.equal(gates(exact)[0].fc2.weight, gates(plain)[0].fc2.weight.float())


@pytest.mark.parametrize("wrap", ["compile", "ema", "part"])
def test_wrapped(wrap, file):
    model, x = gated("cifar"), images()

    def wrapped(network):
        if wrap == "compile":
            return torch.compile(network, backend="eager")
        if wrap == "ema":
            return timm.utils.ModelEmaV3(network)
        network.layer1[0] = torch.compile(network.layer1[0], backend="eager")
        return network

    expected = model(x)
    save_gates(wrapped(model), file)
    plain = build("cifar")
    load_gates(plain, file)
    assert torch.equal(plain(x), expected)
    if wrap != "part":  # convert names a compiled block in its own way
        plain = build("cifar")
        other = wrapped(plain)
        assert load_gates(other, file) is other
        assert torch.equal(other(x), expected)
    other = wrapped(moved(gated("cifar"), 5))
    load_gates(other, file)
    assert torch.equal(other(x), expected)


def test_the_file(file):
    save_gates(convert(timm.create_model("resnet18", num_classes=2)), file)
    assert file.stat().st_size < 500_000
    with safe_open(file, framework="pt") as opened:
        texts, names = opened.metadata(), list(opened.keys())
    record = json.loads(texts["cmpe_se_gates"])
    assert (record["format"], record["version"], record["network"]) == (
        1,
        cmpe_se.__version__,
        "timm.models.resnet.ResNet",
    )
    assert next(iter(record["gates"])) == "layer1.0.competition"
    assert record["gates"]["layer4.1.competition"] == {
        "channels": 512,
        "view": "folded_3x3",
        "start": "one",
        "hidden": 32,
        "bias": False,
        "maps": None,
        "picture": [32, 32],
        "mask": 0.0,
        "gain": 2.0,
    }
    assert len(texts["cmpe_se_sha256"]) == 64
    assert "layer1.0.competition.map_norm.running_var" in names
    assert all(".competition." in name for name in names)


def rewritten(change):
    """A file whose description or tensors are others, with a checksum that is right."""

    def rewrite(path):
        tensors, texts = load_tensors(path)
        record = json.loads(texts["cmpe_se_gates"])
        change(record, tensors)
        save_tensors(tensors, path, {"cmpe_se_gates": json.dumps(record)})

    return rewrite


def bytes_changed(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(bytes(data))


FIRST = "layer1.0.competition"
BAD_FILES = {
    "damaged": (bytes_changed, "its content is not what was saved: the checksum differs"),
    "torn": (lambda path: path.write_bytes(path.read_bytes()[:-100]), "cannot be read as a set of gates: "),
    "empty": (lambda path: path.write_bytes(b""), "cannot be read as a set of gates: "),
    "text": (lambda path: path.write_text("gates"), "cannot be read as a set of gates: "),
    "gone": (lambda path: path.unlink(), "cannot be read: No such file or directory"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
    "of torch.save": (lambda path: torch.save({"a": torch.ones(1)}, path), "is a pickle or of torch.save; give a file"),
    "other tensors": (
        lambda path: save_tensors({"a": torch.ones(1)}, path, {"format": "pt"}),
        "holds tensors, but no set of gates; give a file that cmpe_se.save_gates wrote",
    ),
    "no JSON": (lambda path: save_tensors({}, path, {"cmpe_se_gates": "{"}), "cannot be read as a set of gates: "),
    "later version": (
        rewritten(lambda record, _: record.update(format=2, version="9.0")),
        r"is of a later version of cmpe-se \(9.0\); update to read it",
    ),
    "lacking": (rewritten(lambda record, _: record["gates"][FIRST].pop("view")), f"gates.{FIRST} lacks view"),
    "unknown view": (
        rewritten(lambda record, _: record["gates"][FIRST].update(view="fly")),
        "unknown view 'fly'; choose one of se, ",
    ),
    "impossible": (rewritten(lambda record, _: record["gates"][FIRST].update(picture=[4, 5])), "cannot be read as"),
    "huge": (rewritten(lambda record, _: record["gates"][FIRST].update(hidden=2**62)), "cannot be read as"),
    "missing tensor": (
        rewritten(lambda _, tensors: tensors.pop(f"{FIRST}.fc2.weight")),
        f"1 of .* weights are not there, the first {FIRST}.fc2.weight",
    ),
    "extra tensor": (
        rewritten(lambda _, tensors: tensors.update({"layer1.0.conv1.weight": torch.ones(1)})),
        "it has 1 weights that the network has not, the first layer1.0.conv1.weight",
    ),
    "other shape": (
        rewritten(lambda _, tensors: tensors.update({f"{FIRST}.fc2.weight": torch.ones(3, 3)})),
        rf"{FIRST}.fc2.weight is of shape \(3, 3\), should be \(16, 2\)",
    ),
    "not finite": (
        rewritten(lambda _, tensors: tensors[f"{FIRST}.fc2.weight"].fill_(float("nan"))),
        f"{FIRST}.fc2.weight holds values that are not finite",
    ),
    "missing block": (
        rewritten(lambda record, tensors: rename(record, tensors, "layer9.0.competition")),
        "does not fit CifarResNet: it has no block layer9.0|does not fit .* the file has a gate layer9.0.competition",
    ),
    "other place": (
        rewritten(lambda record, tensors: rename(record, tensors, "layer1.0.conv1.competition")),
        "convert puts no gate at layer1.0.conv1.comp|CifarResNet has no residual|the file has a gate layer1.0.conv1",
    ),
    "other name": (
        rewritten(lambda record, tensors: rename(record, tensors, "layer1.0.add")),
        "does not fit CifarResNet: convert puts no gate at layer1.0.add|the file has a gate layer1.0.add",
    ),
    "scaled": (
        rewritten(lambda record, _: record["gates"][FIRST].update(gain=0.6)),
        f"{FIRST} is for a residual scaled by 0.3, its block scales by 1|gate {FIRST} has gain 2.0, .* gain 0.6",
    ),
}


def rename(record, tensors, name):
    record["gates"][name] = record["gates"].pop(FIRST)
    for key in [key for key in tensors if key.startswith(FIRST)]:
        tensors[key.replace(FIRST, name)] = tensors.pop(key)


@pytest.mark.parametrize("case", BAD_FILES)
@pytest.mark.parametrize("with_gates", long_but([False, True], [True]))
def test_bad_files(case, with_gates, file):
    damage, sentence = BAD_FILES[case]
    save_gates(gated("cifar"), file)
    damage(file)
    model = moved(gated("cifar"), 2) if with_gates else build("cifar")
    before, state, output = looks(model), snapshot(model), model(images())
    with pytest.raises(UserError, match=sentence) as error:
        load_gates(model, file)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert looks(model) == before
    assert equal(model.state_dict(), state)
    assert torch.equal(model(images()), output)


OTHER_NETWORKS = {
    "other view": (
        lambda: gated("bottleneck", "se"),
        r"gate layer1.0.competition has view se, the file's has view folded_3x3; cmpe_se.strip_gates takes",
    ),
    "fewer": (
        lambda: convert(build("bottleneck"), where="layer1"),
        "the file has a gate layer2.0.competition, the network has none there",
    ),
    "merged": (lambda: cmpe_se.merge(gated("bottleneck")), "this ResNet is merged"),
    "a gate": (lambda: cmpe_se.CompetitiveSE(16), "this is a gate by itself"),
    "meta": (lambda: build("bottleneck").to("meta"), "is on the meta device, where a tensor has no values"),
    "gates on meta": (lambda: gated("bottleneck").to("meta"), "is on the meta device, where a tensor has no values"),
    "channels": (
        lambda: timm.create_model("resnet18", num_classes=2),
        r"layer\d.0.competition is of \d+ channels, its block has \d+",
    ),
    "nothing to convert": (
        lambda: nn.ModuleDict({f"layer{i}": nn.Sequential(nn.Conv2d(3, 3, 1)) for i in range(1, 5)}),
        "ModuleDict has no residual addition",
    ),
}


@pytest.mark.parametrize("case", OTHER_NETWORKS)
def test_other_networks(case, file):
    make, sentence = OTHER_NETWORKS[case]
    save_gates(gated("bottleneck"), file)
    model = make()
    before = looks(model)
    with pytest.raises(UserError, match=sentence) as error:
        load_gates(model, file)
    assert "\n" not in str(error.value)
    assert looks(model) == before


def test_a_gate_that_the_file_lacks(file):
    save_gates(convert(build("bottleneck"), where="layer1"), file)
    with pytest.raises(UserError, match=r"the network has a gate layer2.0.competition, the file has none for it"):
        load_gates(gated("bottleneck"), file)


def test_gates_of_a_block_of_ones_own(file):
    model = nn.Sequential(Own())
    save_gates(moved(model), file)
    other = nn.Sequential(Own())
    load_gates(other, file)
    assert torch.equal(other[0].add.fc2.weight, model[0].add.fc2.weight)


def test_not_saved(tmp_path):
    model = gated("cifar")
    gates(model)[1].fc2.weight.data[0, 0] = float("inf")
    for network, path, sentence in (
        (build("cifar"), "a.safetensors", "CifarResNet has no gates"),
        (cmpe_se.merge(gated("cifar")), "a.safetensors", "is merged"),
        (model, "a.safetensors", "layer2.0.competition.fc2.weight holds values that are not finite"),
        (gated("cifar").to("meta"), "a.safetensors", "on the meta device"),
        (gated("cifar"), "no/folder.safetensors", "cannot write .*folder.safetensors: No such file or directory"),
    ):
        with pytest.raises(UserError, match=sentence):
            save_gates(network, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_a_number_that_half_precision_has_not(file):
    model = gated("cifar", "se")
    gates(model)[0].fc2.weight.data.fill_(1e6)
    save_gates(model, file)
    half = build("cifar").half()
    before = looks(half)
    with pytest.raises(UserError, match=r"fc2.weight is not finite in float16"):
        load_gates(half, file)
    assert looks(half) == before
