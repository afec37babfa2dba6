"""Gates in ONNX Runtime's operators: the same numbers, and no reordering of feature maps."""

from collections import Counter

import pytest
import torch

from cmpe_se.commands.benchmark.contenders import build
from cmpe_se.layers.views import TABLE
from cmpe_se.merging import merge
from cmpe_se.runtimes import programs
from tests.networks.naive import randomise
from tests.tiers import long_but

for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason="an extra")
import onnx  # noqa: E402
import onnxruntime  # noqa: E402

SIDE = 64


def network(model, view):
    """A merged network in float64 whose norms and gates are far from where they begin."""
    return merge(randomise(build(model, view).double()))


def kinds(model):
    return Counter(node.op_type for node in model.graph.node)


def exported(merged):
    """The exporter's model and ours."""
    with torch.no_grad():
        program = programs.trace(merged.float(), (3, SIDE, SIDE))
    before, after = programs._as_exported(program), programs.to_onnx(program)
    onnx.checker.check_model(after, full_check=True)
    return before, after


def session(model, optimised=None):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    if optimised:
        options.optimized_model_filepath = str(optimised)
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def check(merged, before, after):
    """No farther from float64 than four times as far as the exporter's own form is, or than rounding is."""
    images = torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = merged.double()(images)
    exporters, ours = session(before), session(after)
    for batch, right in zip(images.split([1, 2, 5]), expected.split([1, 2, 5]), strict=True):
        one, other = (
            (torch.from_numpy(runs.run(None, {"images": batch.float().numpy()})[0]).double() - right).abs().max().item()
            for runs in (exporters, ours)
        )
        assert other <= max(4 * one, 2e-5 * right.abs().max().item())


@pytest.mark.long
def test_squeezes_gates_and_additions_keep_the_layout(tmp_path):
    """Of a bottleneck network with gates as wide as the layout's blocks, strided projections among them."""
    merged = network("resnet26", "folded_3x3")
    before, after = exported(merged)
    assert kinds(before)["Slice"] == 6  # rows and columns that the three strided projections skip
    count = kinds(before)["Sigmoid"]
    assert count == 8
    new = kinds(after)
    assert (new["ReduceMean"], new["Slice"], new["Unsqueeze"], new["Gemm"]) == (1, 0, 0, 1)  # the classifier's
    assert (new["GlobalAveragePool"], new["Resize"], new["Mul"]) == (2 * count, count, count)
    session(after, tmp_path / "optimised.onnx")
    optimised = kinds(onnx.load(tmp_path / "optimised.onnx"))
    if optimised["ReorderOutput"]:  # where processors have the layout: the classifier's
        assert (optimised["ReorderOutput"], optimised["ReorderInput"]) == (1, 0)
        assert optimised["Relu"] == optimised["Add"] == 0
    check(merged, before, after)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "view"),
    [
        ("test_resnet", "pair_view_1x1"),
        *[
            pytest.param(model, view, marks=pytest.mark.long)
            for model in ("preact_resnet20", "test_resnet", "wrn16_4", "preact_resnet20b")
            for view in ("se", "se_identity", "double_fc", "folded_3x3")
        ],
    ],
)
def test_the_numbers_stay_the_same(model, view):
    merged = network(model, view)
    before, after = exported(merged)
    assert TABLE[view].merges
    assert kinds(after)["Gemm"] < kinds(before)["Gemm"]  # the gates' linear maps
    check(merged, before, after)


@pytest.mark.slow
@pytest.mark.parametrize("view", long_but(["plain", "timm_se"], ["timm_se"]))
def test_what_has_no_merged_gate_stays_as_it_is(view):
    before, after = exported(network("test_resnet", view))
    assert kinds(after) == kinds(before)
    assert [node.input for node in after.graph.node] == [node.input for node in before.graph.node]
