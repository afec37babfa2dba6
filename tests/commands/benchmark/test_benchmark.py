"""The benchmark: contenders compute what they should, statistics say no more than they may, and the command."""

import csv
import statistics
import time
from math import comb

import pytest
import torch
from torch import nn

from cmpe_se import CompetitiveSE
from cmpe_se.commands.benchmark import benchmark
from cmpe_se.commands.benchmark.contenders import NAIVE, PLAIN, build, check_contenders, contenders
from cmpe_se.errors import UserError
from cmpe_se.layers.views import PAPER_VIEWS
from cmpe_se.runtimes.timing import paired_ratio, peak_memory, take_turns
from cmpe_se_command import main
from tests.conversion.dimensions import EcgNet
from tests.networks.naive import randomise

CPU = torch.device("cpu")


def images(side=32):
    return torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("view", PAPER_VIEWS)
@pytest.mark.parametrize("model", ["wrn16_4", "preact_resnet20", "test_resnet"])
def test_the_naive_form_computes_the_same(model, view):
    ours, naive = (randomise(build(model, name).double()) for name in (view, view + NAIVE))
    naive.load_state_dict(ours.state_dict(), strict=False)
    gates = [module for module in ours.modules() if isinstance(module, CompetitiveSE)]
    naive_gates = [module for module in naive.modules() if isinstance(module, CompetitiveSE)]
    for gate, other in zip(gates, naive_gates, strict=True):
        nn.init.normal_(gate.fc2.weight)
        other.load_state_dict(gate.state_dict())
    with torch.no_grad():
        for training in (False, True):
            expected, actual = (network.train(training)(images()) for network in (ours, naive))
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_gates_are_as_asked_for():
    networks = [build(model, "se", start="one", reduction=4, bias=True) for model in ("preact_resnet20", "resnet18")]
    for gate in (module for network in networks for module in network.modules() if isinstance(module, CompetitiveSE)):
        assert (gate.start, gate.hidden, gate.fc1.bias is None) == ("one", gate.channels // 4, False)


def test_contenders_are_checked():
    check_contenders(list(contenders()))
    with pytest.raises(UserError, match="unknown contender 'se2'; choose of plain, se, double_fc"):
        check_contenders(["se2"])
    with pytest.raises(UserError, match="no network 'resnet19'"):
        build("resnet19", PLAIN)


def test_ratios_and_their_intervals():
    ratio = paired_ratio([2.0] * 15, [1.0] * 15)
    assert ratio == (2, 2, 2)
    assert ratio.resolved
    own = [1.0 + 0.01 * k for k in range(-7, 8)]
    ratio = paired_ratio(own, [1.0] * 15)
    # Of 15 values the 4th from either end: an interval of 96.5 %, where the 5th would be one of 88.2 %.
    assert ratio == pytest.approx((1, 0.96, 1.04))
    assert not ratio.resolved
    assert paired_ratio([3.0, 1.0, 2.0], [1.0] * 3) == (2, 1, 3)  # too few: from the smallest to the largest


@pytest.mark.parametrize("count", range(6, 41))
def test_interval_is_the_narrowest_of_order_statistics_that_holds(count):
    """The k-th value from either end, k as large as leaves at most 5 % outside; here by adding up the binomials."""
    ratios = [1 + 0.37 * (17 * index % 41) / 41 for index in range(count)]
    outside = [2 * sum(comb(count, below) for below in range(rank)) / 2**count for rank in range(count // 2 + 1)]
    rank = max(rank for rank, left_out in enumerate(outside) if left_out <= 0.05)
    median, low, high = paired_ratio(ratios, [1.0] * count)
    assert (low, high) == (sorted(ratios)[rank - 1], sorted(ratios)[-rank])
    assert median == statistics.median(ratios)


@pytest.mark.parametrize("count", range(1, 6))
def test_too_few_turns_have_the_whole_range(count):
    ratios = [1.5, 0.5, 1.25, 0.75, 1.0][:count]
    assert paired_ratio(ratios, [1.0] * count) == (statistics.median(ratios), min(ratios), max(ratios))


def test_turns():
    order = []
    steps = {name: lambda name=name: (order.append(name), time.sleep(0.002 if name == "b" else 0)) for name in "abc"}
    seconds = take_turns(steps, range(4), CPU)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert all(len(times) == 4 for times in seconds.values())
    assert min(seconds["b"]) >= 0.002


def test_peak_memory():
    def step():
        for _ in range(3):
            first = torch.ones(1000, 250)  # a million bytes, freed in each round
            (first + 1).sum()

    assert 2_000_000 <= peak_memory(step, CPU) < 2_100_000


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    folder = tmp_path_factory.mktemp("results")
    threads = torch.get_num_threads()
    rows = benchmark(
        "preact_resnet20", contenders="timm_se,folded_3x3", batch_size=4, repeats=7, dtypes="float32,bfloat16",
        threads=1, device="cpu", output=str(folder),
    )  # fmt: skip
    torch.set_num_threads(threads)
    return rows, folder


def test_rows(measured):
    rows, _ = measured
    groups = {(row["mode"], row["dtype"], row["merged"]) for row in rows}
    kinds = (("forward", False), ("forward", True), ("training", False))
    assert groups == {(mode, dtype, merged) for mode, merged in kinds for dtype in ("float32", "bfloat16")}
    for row in rows:
        assert row["images_per_second"] == pytest.approx(4000 / row["milliseconds"], rel=0.02)
        assert row["peak_mib"] > 0
        if row["contender"] == PLAIN:
            assert row["ratio"] == row["memory_ratio"] == 1
        else:
            assert row["low"] <= row["high"]
            assert (row["ratio"] is None) == (row["low"] <= 1 <= row["high"])
    training = next(row for row in rows if row["mode"] == "training" and row["contender"] == "folded_3x3")
    assert training["ratio"] > 1  # nine blocks with a picture each are not free, and clearer than noise


def test_files(measured):
    rows, folder = measured
    (table,) = folder.glob("benchmark-preact_resnet20-b4-float32-bfloat16-eager_*-1-threads_*.csv")
    assert table.with_suffix(".png").stat().st_size > 10_000
    lines = table.read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("#")][-3:] == [
        "# network",
        "# turns",
        "# heap_kept",
    ]
    written = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["contender"] for row in written] == [row["contender"] for row in rows]


@pytest.mark.slow
def test_compiled_and_converted(tmp_path):
    rows = benchmark(
        "resnet18", contenders="pair_view_1x1", modes="forward", engines="compiled", merged=False, batch_size=2,
        image_size=32, repeats=3, device="cpu", output=str(tmp_path),
    )  # fmt: skip
    assert [row["contender"] for row in rows] == [PLAIN, "pair_view_1x1"]


@pytest.mark.slow
def test_onnxruntime(tmp_path, capsys):
    pytest.importorskip("onnxruntime", reason="ONNX Runtime is an extra")
    rows = benchmark(
        "preact_resnet20", contenders="folded_3x3", engines="onnxruntime", batch_size=2, repeats=3, device="cpu",
        output=str(tmp_path),
    )  # fmt: skip
    assert {row["engine"] for row in rows} == {"onnxruntime"}
    assert "ONNX Runtime does not train" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "cmpe"], "unknown contender 'cmpe'"),
        (["--modes", "backward"], "unknown modes 'backward'; choose of forward, training"),
        (["--engines", "cudagraphs", "--device", "cpu"], "nothing is left to measure"),
        (["--repeats", "1"], "repeats 1 should be at least 3"),
        (["--model", "no_such_network"], "no network 'no_such_network'"),
    ],
)
def test_refusals(arguments, message, capsys, tmp_path):
    assert main(["benchmark", *arguments, "--output", str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_network_of_signals_is_refused(monkeypatch, tmp_path):
    network = EcgNet()
    network.default_cfg = {"input_size": (3, 32, 32)}
    monkeypatch.setitem(benchmark.__globals__, "build", lambda *_, **__: network)
    with pytest.raises(UserError, match=r"EcgNet cannot take images of \(3, 32, 32\).*conv1d"):
        benchmark("ecg", contenders="se", repeats=3, device="cpu", output=str(tmp_path))
    assert not list(tmp_path.iterdir())
