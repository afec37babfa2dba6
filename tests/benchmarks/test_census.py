"""The census: its oracle on networks whose additions are known, its rows, its processes, its page."""

import copy
import json
import os
import time

import pytest
import torch
from benchmarks.census_parts import checks, processes
from benchmarks.census_parts.networks import LIBRARIES, Network, maps, networks
from benchmarks.census_parts.oracle import watch
from benchmarks.census_parts.page import page, read_table
from torch import nn

from benchmarks import census

META = torch.device("meta")


def conv(width=12, kernel=3):
    return nn.Conv2d(width, width, kernel, padding=kernel // 2)


class Block(nn.Module):
    """A basic block; ``norm`` and ``shortcut`` vary it."""

    def __init__(self, norm=nn.BatchNorm2d, shortcut=None, width=12):
        super().__init__()
        self.branch = nn.Sequential(conv(width), norm(width), nn.ReLU(), conv(width))
        self.shortcut = shortcut or nn.Identity()

    def forward(self, x):
        return (self.branch(x) + self.shortcut(x)).relu()


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, x):
        return self.block(self.block(x))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(conv() for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x


class ChannelsLast(nn.Module):
    """A block of maps (N, H, W, C), as MambaOut has them."""

    def __init__(self):
        super().__init__()
        self.layer = conv()

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        return x + self.layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class Attention(nn.Module):
    """Positions of a sequence, with a linear layer: no convolution behind either operand."""

    def __init__(self):
        super().__init__()
        self.stem, self.layer = conv(), nn.Linear(12, 12)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        return x + self.layer(x)


class Pyramid(nn.Module):
    """Features of two depths, added by a module that gets both."""

    def __init__(self):
        super().__init__()
        self.stem, self.deep, self.top = conv(), Block(), Join()

    def forward(self, x):
        x = self.stem(x)
        return self.top(x, self.deep(x))


class Join(nn.Module):
    def __init__(self):
        super().__init__()
        self.lateral = conv(kernel=1)

    def forward(self, x, y):
        return self.lateral(x) + y


class Both(nn.Module):
    """Two branches of one convolution each."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv(), conv(kernel=1)

    def forward(self, x):
        return self.one(x) + self.two(x)


class InPlace(Block):
    def forward(self, x):
        out = self.branch(x)
        out += self.shortcut(x)
        return out


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Block(), [("", (2, 0), True)]),
        (Block(shortcut=conv(kernel=1)), [("", (2, 1), True)]),
        (Block(norm=nn.InstanceNorm2d), [("", (2, 0), True)]),  # reshapes (N, C, H, W) to (1, N * C, H, W) and back
        (Block(norm=lambda width: nn.ChannelShuffle(3)), [("", (2, 0), True)]),
        (InPlace(), [("", (2, 0), True)]),
        (Twice(), [("block", (2, 0), True)]),
        (Loop(), [("", (0, 1), True)] * 3),
        (Both(), [("", (1, 1), True)]),
        (ChannelsLast(), []),
        (Attention(), []),
        (Block(width=1), []),  # a map of one channel
        (Pyramid(), [("deep", (2, 0), True), ("top", (1, 2), False)]),
        (nn.Sequential(conv(), nn.ReLU(), conv()), []),
    ],
)
def test_oracle(model, expected):
    width = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d)).in_channels
    sums = watch(model.to(META).eval(), (torch.zeros(2, width, 8, 8, device=META),), {})
    assert [(found.module, found.convolutions, found.inside) for found in sums.found] == expected
    assert all(found.shape == (2, width, 8, 8) for found in sums.found)


def test_oracle_in_one_and_three_dimensions():
    for n, layer in ((1, nn.Conv1d), (3, nn.Conv3d)):
        model = Block()
        model.branch = nn.Sequential(layer(4, 4, 3, padding=1), layer(4, 4, 1))
        (found,) = watch(model.to(META), (torch.zeros(2, 4, *[8] * n, device=META),), {}).found
        assert found.convolutions == (2, 0)


def test_multiply_adds():
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(6 * 36, 5)).to(META)
    macs = watch(model, (torch.zeros(2, 4, 8, 8, device=META),), {}).macs
    assert macs == 2 * (6 * 36 * 4 * 9 + 6 * 36 * 5)


def network(build, name="own", side=16, **settings) -> Network:
    return Network("own", name, "family", build, side, (), maps(12), **settings)


def test_a_row():
    row = checks.row_of(network(lambda: nn.Sequential(Block(), Block())), checks.Limits())
    assert (row["additions"], row["gates"], row["left"], row["unlisted"], row["false"]) == (2, 2, 0, 0, 0)
    assert [row[check] for check in ("run", "equal", "keys", "gradient", "copies")] == ["real", *["yes"] * 4]
    assert float(row["merged"]) <= checks.TOLERANCE
    assert row["fault"] == ""
    assert tuple(row) == checks.COLUMNS


def test_large_networks_have_no_run_with_numbers():
    row = checks.row_of(network(Block), checks.Limits(parameters=1e-6))
    assert (row["run"], row["gates"], row["keys"], row["equal"]) == ("meta", 1, "yes", "")


def test_nothing_is_at_its_initial_value():
    own = network(Block)
    model = checks._randomised(Block(), own, 16)
    norm = model.branch[1]
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        assert tensor.unique().numel() == 12
    assert norm.momentum == 0.1
    assert not any(module.training for module in model.modules())


def test_a_network_that_is_refused():
    row = checks.row_of(network(lambda: nn.Sequential(conv(), nn.ReLU())), checks.Limits())
    assert (row["gates"], row["additions"], row["left"], row["reasons"], row["fault"]) == (0, 0, 0, "", "")


def with_lambda():
    model = nn.Sequential(Block())
    model.own = lambda x: x
    return model


def test_a_network_that_cannot_be_pickled():
    row = checks.row_of(network(with_lambda), checks.Limits())
    assert (row["copies"], row["fault"]) == ("deepcopy", "")


class Untraceable(Block):
    def forward(self, x):
        return super().forward(x) if x.shape[0] and bool(self.shortcut(x).sum() > -1e9) else x


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        raise RuntimeError("no such thing")


def test_what_is_left_is_named():
    row = checks.row_of(network(lambda: nn.Sequential(Block(), Untraceable())), checks.Limits())
    assert (row["additions"], row["gates"], row["left"], row["unlisted"]) == (2, 1, 1, 0)
    assert "torch.fx cannot trace it" in row["reasons"]
    assert row["reasons"].endswith("[1, 1]")


@pytest.mark.parametrize(("skipped", "unlisted"), [({}, 2), ({"a": "why"}, 1)])
def test_disagreements(skipped, unlisted):
    from benchmarks.census_parts.oracle import Sum

    from cmpe_se.conversion import ConversionReport, Gate

    sums = [Sum(name, (1, 4, 8, 8), (0, 2), True) for name in ("a", "b", "b")]
    gates = tuple(Gate(name, 4, "se", None, 1, 1) for name in ("b", "c"))
    cells = checks._compared_with_oracle(sums, ConversionReport(gates, skipped))
    assert (cells["left"], cells["unlisted"], cells["false"]) == (2, unlisted, 1)
    assert "not listed [" in cells["reasons"]


def test_a_network_that_cannot_be_built():
    row = checks.row_of(network(Broken), checks.Limits())
    assert row["fault"] == "built: RuntimeError in __init__: no such thing"


class Doubled(nn.Sequential):
    def forward(self, x):
        return 2 * super().forward(x)


def test_checks_find_what_is_wrong(monkeypatch):
    """Each check fails where it should: the converted network is another, or its gates do nothing."""
    true = checks.convert

    def other(model, **settings):
        converted = true(model, **settings)
        with torch.no_grad():
            converted[0].branch[0].weight.add_(0.1)
        for parameter in converted[1].competition.parameters():
            parameter.requires_grad_(False)
        return converted

    monkeypatch.setattr(checks, "convert", other)
    monkeypatch.setattr(checks, "merge", lambda model: Doubled(copy.deepcopy(model)))
    row = checks.row_of(network(lambda: nn.Sequential(Block(), Block())), checks.Limits())
    assert (row["equal"], row["keys"], row["gradient"]) == ("NO", "NO", "1 without, 1.competition")
    assert row["merged"].endswith("NOT EQUAL")


def exits():
    os._exit(3)


def sleeps():
    time.sleep(60)


def grows():
    torch.zeros(2**31)


def counts():
    while True:
        pass


@pytest.mark.slow
def test_no_network_ends_the_census(monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 4)
    chosen = [network(build, build.__name__) for build in (exits, Block, grows, Block, counts)]
    rows = list(processes.rows_of(chosen, checks.Limits(), seconds=3, gigabytes=4))
    assert [row["network"] for row in rows] == ["exits", "Block", "grows", "Block", "counts"]
    faults = [row["fault"] for row in rows]
    assert faults[0] == "its process ended with status 3"
    assert faults[1] == faults[3] == ""
    assert "memory" in faults[2]
    assert faults[4].endswith(("SIGXCPU: too much processor time", "no row after 12 s"))
    (row, _) = processes.rows_of([network(sleeps), network(exits)], checks.Limits(), seconds=0.5, gigabytes=4)
    assert row["fault"] == "no row after 2 s"


@pytest.fixture
def small(monkeypatch):
    """A library of three networks."""

    def own():
        for name in ("first", "second"):
            yield network(Block, name)
        yield network(lambda: nn.Sequential(conv()), "third")

    monkeypatch.setitem(LIBRARIES, "own", own)
    monkeypatch.setattr(census, "_versions", lambda: {"own": "1"})


def test_it_goes_on_where_it_ended(small, tmp_path, capsys):
    census.main(["--output", str(tmp_path), "--library", "own", "--only", "sec*"])
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["network"] for line in lines[1:]] == ["second"]
    with open(tmp_path / "rows.jsonl", "a") as file:
        file.write('{"library": "own", "netw')  # a kill
    census.main(["--output", str(tmp_path), "--library", "own"])
    output = capsys.readouterr()
    assert "3 networks, 1 of them done before" in output.err
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["network"] for line in lines[1:]] == ["second", "first", "third"]
    head, rows = read_table(tmp_path / output.out.split("/")[-1].strip())
    assert [row["network"] for row in rows] == ["first", "second", "third"]
    assert head["libraries"] == {"own": "1"}
    text = page("table.csv", head, rows)
    assert "| every residual addition has a gate | 2 |" in text
    assert "| family | 2 |  |  | 1 |  |" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--library", "own", "--macs", "1"], "was begun with another macs"),
        (["--library", "ours"], "--library: unknown ours; choose from timm, torchvision"),
        (["--library", "own", "--only", "fourth"], "--only fourth matches none of 3 networks"),
    ],
)
def test_mistakes(small, tmp_path, arguments, message):
    census.main(["--output", str(tmp_path), "--library", "own", "--only", "first"])
    with pytest.raises(SystemExit, match=message):
        census.main(["--output", str(tmp_path), *arguments])


def test_some_of_each_family(small, tmp_path, capsys):
    census.main(["--output", str(tmp_path), "--library", "own", "--per-family", "1"])
    head, rows = read_table(tmp_path / capsys.readouterr().out.split("/")[-1].strip())
    assert [row["network"] for row in rows] == ["first"]
    words = "The table is a selection, 1 of 3 networks, of each family the 1 with the shortest names."
    assert head["selection"] == words
    assert words in page("table.csv", head, rows)


def test_without_a_folder():
    with pytest.raises(SystemExit, match="--output needs a folder"):
        census.main(["--library", "timm"])


def test_the_page_is_what_the_table_says():
    text = census.PAGE.read_text(encoding="utf-8")
    (table,) = (census.ROOT / "results" / "census").glob("census_*.csv")
    assert text == page(f"../results/census/{table.name}", *read_table(table))


SAMPLE = {  # of each way to write a block one, with small networks where there are such
    "timm": [
        *("test_resnet", "test_byobnet", "test_convnext", "test_nfnet", "test_coatnet", "test_vit", "dla34"),
        *("repvgg_a0", "hrnet_w18_small", "mobilenetv3_small_050"),
    ],
    "torchvision": ["resnet18", "regnet_y_400mf", "lraspp_mobilenet_v3_large", "raft_small"],
    "pytorchcv": ["resnet20_cifar10", "preresnet20_cifar10", "shufflenet_g1_wd4"],
    "segmentation_models_pytorch": ["unet resnet18", "linknet mobilenet_v2"],
    "transformers": ["resnet", "convnextv2", "poolformer"],
    "monai": ["ResNet basic 2-D", "UNet 2-D"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "name"),
    [
        pytest.param(library, name, marks=[pytest.mark.long] if index else [])
        for library, names in SAMPLE.items()
        for index, name in enumerate(names)
    ],
)
def test_sample(library, name):
    """Nothing is overlooked, nothing is taken for an addition, and what has gates is what it was."""
    pytest.importorskip(library, reason=f"{library} is no dependency of the tests")
    (chosen,) = (each for each in networks([library]) if each.name == name)
    row = checks.row_of(chosen, checks.Limits(parameters=20))
    assert (row["fault"], row["unlisted"], row["false"]) == ("", 0, 0), row
    assert row["left"] == 0 or row["reasons"]
    if row["gates"]:
        assert [row[check] for check in ("equal", "keys", "gradient")] == ["yes"] * 3, row
        assert row["copies"] in ("yes", "deepcopy"), row
        assert "NOT" not in row["merged"], row
