"""The benchmark: contenders compute what they should, statistics say no more than they may, and the command."""

import copy
import csv
import re
import statistics
import sys
import time
from importlib import import_module
from math import comb

import pytest
import torch
from torch import nn

from cmpe_se import CompetitiveSE
from cmpe_se.commands.benchmark import benchmark
from cmpe_se.commands.benchmark.contenders import NAIVE, PLAIN, build, check_contenders, contenders
from cmpe_se.errors import UserError
from cmpe_se.layers.views import PAPER_VIEWS
from cmpe_se.merging import merge
from cmpe_se.runtimes import engines
from cmpe_se.runtimes.engines import OUTSIDE
from cmpe_se.runtimes.timing import paired_ratio, peak_memory, percentile, take_turns
from cmpe_se_command import main
from tests.conversion.dimensions import EcgNet
from tests.networks.naive import randomise
from tests.tiers import long_but

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
    just_above = paired_ratio([1.0004] * 15, [1.0] * 15)
    assert just_above.resolved
    assert not just_above.rounded().resolved  # nothing is shown by what is printed as 1.000 to 1.000
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
        "preact_resnet20", contenders="timm_se,folded_3x3", batch_sizes="4,1", repeats=7, dtypes="float32,bfloat16",
        image_size=16, threads=1, device="cpu", output=str(folder),
    )  # fmt: skip
    torch.set_num_threads(threads)
    return rows, folder


@pytest.mark.slow
def test_rows(measured):
    rows, _ = measured
    groups = {(row["mode"], row["dtype"], row["merged"], row["batch_size"]) for row in rows}
    kinds = (("forward", False), ("forward", True), ("training", False))
    assert groups == {
        (mode, dtype, merged, size) for mode, merged in kinds for dtype in ("float32", "bfloat16") for size in (4, 1)
    }
    for row in rows:
        assert row["images_per_second"] == pytest.approx(1000 * row["batch_size"] / row["milliseconds"], rel=0.02)
        assert row["peak_mib"] > 0
        if row["contender"] == PLAIN:
            assert row["ratio"] == row["memory_ratio"] == 1
        else:
            assert row["low"] <= row["high"]
            assert (row["ratio"] is None) == (row["low"] <= 1 <= row["high"])
    training = next(row for row in rows if row["mode"] == "training" and row["contender"] == "folded_3x3")
    assert training["high"] > 1  # nine blocks with a picture each are not free; on a busy machine it is not shown


@pytest.mark.slow
def test_percentiles_are_of_single_images_in_forward(measured):
    for row in measured[0]:
        if row["mode"] == "forward" and row["batch_size"] == 1:
            assert row["steps"] == 100
            assert 0 < row["p50"] <= row["p90"] <= row["p99"]
            assert row["p50"] == pytest.approx(row["milliseconds"], rel=0.5)
        else:
            assert row["steps"] == 7
            assert row["p50"] is row["p90"] is row["p99"] is None


@pytest.mark.slow
def test_files(measured):
    rows, folder = measured
    (table,) = folder.glob("benchmark-preact_resnet20-b4-1-float32-bfloat16-eager_*-1-threads_*.csv")
    assert table.with_suffix(".png").stat().st_size > 10_000
    lines = table.read_text().splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("#")][-3:] == [
        "# network",
        "# turns",
        "# heap_kept",
    ]
    written = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["contender"] for row in written] == [row["contender"] for row in rows]


@pytest.mark.long
def test_compiled_and_converted(tmp_path):
    rows = benchmark(
        "test_resnet", contenders="pair_view_1x1", modes="forward", engines="compiled", merged=False, batch_sizes="1,2",
        image_size=32, repeats=3, device="cpu", output=str(tmp_path),
    )  # fmt: skip
    assert [(row["batch_size"], row["contender"]) for row in rows] == [
        (size, name) for size in (1, 2) for name in (PLAIN, "pair_view_1x1")
    ]


@pytest.mark.long
@pytest.mark.parametrize("engine", OUTSIDE)
def test_engines_outside_pytorch(engine, tmp_path, capsys):
    for package in ("onnxscript", engine):
        pytest.importorskip(package, reason="an extra")
    rows = benchmark(
        "test_resnet", contenders="folded_3x3", engines=engine, batch_sizes="1,2", image_size=32, repeats=3,
        device="cpu", output=str(tmp_path),
    )  # fmt: skip
    assert [(row["engine"], row["merged"], row["batch_size"]) for row in rows if row["contender"] == PLAIN] == [
        (engine, merged, size) for merged in (False, True) for size in (1, 2)
    ]
    assert f"{OUTSIDE[engine]} does not train" in capsys.readouterr().err
    (table,) = tmp_path.glob("*.csv")
    assert re.search(rf'^# {engine}: "\d', table.read_text(), re.M)  # its version


@pytest.mark.slow
@pytest.mark.parametrize("engine", long_but(OUTSIDE, ["onnxruntime"]))
def test_engines_run_what_is_exported(engine, monkeypatch):
    """Of one program with a free batch dimension, on as many threads as PyTorch has, in float32."""
    for package in ("onnxscript", engine):
        pytest.importorskip(package, reason="an extra")
    found = {}

    def keep(name, function):
        def kept(*arguments):
            found[name] = function(*arguments)
            return found[name]

        return kept

    for name in ("onnx_session", "openvino_network"):
        monkeypatch.setattr(engines, name, keep(name, getattr(engines, name)))
    network = merge(randomise(build("test_resnet", "folded_3x3")))
    runner = engines.make_runner(copy.deepcopy(network), (3, 32, 32), engine, "forward", "float32")
    for size in (1, 2, 5):
        batch = images().float()[:1].repeat(size, 1, 1, 1) * torch.linspace(1, 2, size)[:, None, None, None]
        runner(batch, torch.zeros(size, dtype=torch.long))()
        if engine == "onnxruntime":
            (logits,) = found["onnx_session"].run(None, {"images": batch.numpy()})
        else:
            logits = found["openvino_network"](batch.numpy())[0]
        with torch.no_grad():
            expected = network(batch)
        torch.testing.assert_close(torch.from_numpy(logits.copy()), expected, rtol=1e-4, atol=1e-4)
    if engine == "onnxruntime":
        options = found["onnx_session"].get_session_options()
        assert options.intra_op_num_threads == torch.get_num_threads()
    else:
        assert found["openvino_network"].get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()


@pytest.mark.parametrize("engine", OUTSIDE)
def test_a_missing_engine_is_named_before_anything_is_measured(engine, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, engine, None)
    arguments = ["--engines", f"eager,{engine}", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["benchmark", *arguments]) == 1
    complaint = capsys.readouterr().err.strip()
    assert "\n" not in complaint
    assert re.search(rf"measuring {OUTSIDE[engine]} needs .*cmpe-se\[export\]", complaint)
    assert not list(tmp_path.iterdir())


def test_old_name_of_the_batch_sizes(tmp_path, capsys):
    with pytest.warns(DeprecationWarning, match="batch_size is batch_sizes now"), pytest.raises(UserError, match="'0'"):
        benchmark("preact_resnet20", batch_size=0)
    with pytest.raises(TypeError, match="batch_size is batch_sizes now"):
        benchmark("preact_resnet20", batch_size=1, batch_sizes="1")
    assert main(["benchmark", "--batch-size", "0", "--output", str(tmp_path)]) == 1
    first, second = capsys.readouterr().err.strip().splitlines()
    assert first == "cmpe-se: --batch-size is --batch-sizes now"
    assert "batch_sizes '0' should be numbers of at least 1" in second


def test_percentile():
    times = [float(number) for number in range(200, 0, -1)]
    assert [percentile(times, percent) for percent in (0, 50, 90, 99, 100)] == [1, 100, 180, 198, 200]
    assert percentile([3.0], 99) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--contenders", "cmpe"], "unknown contender 'cmpe'"),
        (["--modes", "backward"], "unknown modes 'backward'; choose of forward, training"),
        (["--engines", "cudagraphs", "--device", "cpu"], "nothing is left to measure"),
        (["--repeats", "1"], "repeats 1 should be at least 3"),
        (["--batch-sizes", "1,no"], "batch_sizes '1,no' should be numbers of at least 1, separated by commas"),
        (["--batch-sizes", ","], "batch_sizes ',' should be numbers"),
        (["--engines", "tensorrt"], "unknown engines 'tensorrt'; choose of eager, compiled, cudagraphs, onnxruntime"),
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
    module = import_module("cmpe_se.commands.benchmark.benchmark")
    monkeypatch.setattr(module, "build", lambda *_, **__: network)
    with pytest.raises(UserError, match=r"EcgNet cannot take images of \(3, 32, 32\).*conv1d"):
        benchmark("ecg", contenders="se", repeats=3, device="cpu", output=str(tmp_path))
    assert not list(tmp_path.iterdir())
