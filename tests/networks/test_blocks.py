"""Blocks in which the squeezes flow: facts 2 and 3, stochastic depth and dropout, and recomputed blocks."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from cmpe_se import CompetitiveSE
from cmpe_se.layers.gated_addition import squeeze
from cmpe_se.networks.blocks import PreActBasic, PreActBottleneck
from tests.networks.naive import (
    COMPETING_VIEWS,
    SMALL_NETWORKS,
    SQUEEZE_VIEWS,
    naive_block,
    naive_flows,
    naive_gate,
    randomise,
)

MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
BLOCKS = {"bottleneck": (PreActBottleneck, 6), "basic": (PreActBasic, 24)}  # with the planes that make 24 channels
SHORTCUTS = {"identity": (24, 1), "wider": (16, 1), "strided": (24, 2), "wider and strided": (16, 2)}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}  # of the largest number


def make_block(kind="bottleneck", shortcut="identity", view="folded_3x3", *, training=False, **kwargs):
    torch.manual_seed(0)
    block_type, planes = BLOCKS[kind]
    in_channels, stride = SHORTCUTS[shortcut]
    attention = partial(CompetitiveSE, view=view, reduction=4, maps=2) if view else None
    settings = {"stride": stride, "drop_rate": 0.0, "drop_path": 0.0, "dtype": torch.float64} | kwargs
    return randomise(block_type(in_channels, planes, attention=attention, **settings)).train(training)


def images(channels=24, batch=4, size=(5, 6), dtype=torch.float64, **kwargs):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, *size, generator=generator, dtype=torch.float64)
    x += torch.randn(batch, channels, 1, 1, generator=generator, dtype=torch.float64)
    return x.to(dtype=dtype, **kwargs)


def spy_on_gate(block, monkeypatch) -> list:
    """Collects residual squeeze, identity squeeze and gate of each call."""
    seen, original = [], block.attention.gate

    def gate(r, i):
        seen.append((r, i, original(r, i)))
        return seen[-1][2]

    monkeypatch.setattr(block.attention, "gate", gate)
    return seen


def assert_rounded(actual, expected, dtype):
    tolerance = ROUNDING[dtype] * expected.abs().max().item()
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", ROUNDING)
@MODES
@pytest.mark.parametrize("view", SQUEEZE_VIEWS)
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_the_squeezes_that_flow_are_those_of_the_maps(
    kind, shortcut, view, training, dtype, memory_format, monkeypatch
):
    block = make_block(kind, shortcut, view, training=training).to(dtype=dtype, memory_format=memory_format)
    seen = spy_on_gate(block, monkeypatch)
    x = images(SHORTCUTS[shortcut][0], dtype=dtype, memory_format=memory_format)
    plain = copy.deepcopy(block).double()
    residual, identity = naive_flows(plain, x.double())
    y, y_squeeze = block(x)
    ((r, i, gate),) = seen

    squeezed = torch.float64 if dtype == torch.float64 else torch.float32
    assert r.dtype == i.dtype == squeezed
    assert_rounded(r, squeeze(residual), dtype)  # fact 2
    if view not in COMPETING_VIEWS:
        assert y_squeeze is None
    else:
        assert_rounded(i, squeeze(identity), dtype)
        assert y_squeeze.dtype == squeezed
        assert_rounded(y_squeeze, squeeze(y), dtype)  # fact 3
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=memory_format)
    if dtype != torch.bfloat16:  # whose rounding a batch norm over a picture blows up
        assert_rounded(gate, naive_gate(plain.attention, squeeze(residual), squeeze(identity)), dtype)


@MODES
@pytest.mark.parametrize("view", [None, *SQUEEZE_VIEWS])
@pytest.mark.parametrize("shortcut", SHORTCUTS)
@pytest.mark.parametrize("kind", BLOCKS)
def test_output_with_and_without_a_squeeze_from_before(kind, shortcut, view, training):
    block = make_block(kind, shortcut, view, training=training)
    x = images(SHORTCUTS[shortcut][0])
    expected = naive_block(block, x)
    assert_rounded(block(x)[0], expected, torch.float64)
    assert_rounded(block(x, squeeze(x))[0], expected, torch.float64)
    # It is believed where the identity is x, and not asked for where there is a projection or no competition.
    changed = (block(x, squeeze(x).flip(1))[0] - expected).abs().max() > 1e-3
    assert changed == (shortcut == "identity" and view in COMPETING_VIEWS)


@pytest.mark.parametrize("view", [None, *SQUEEZE_VIEWS])
@pytest.mark.parametrize("shortcut", ["identity", "wider and strided"])
@pytest.mark.parametrize("kind", BLOCKS)
def test_a_dropped_path_leaves_the_shortcut(kind, shortcut, view):
    block = make_block(kind, shortcut, view, training=True, drop_path=0.5)
    x = images(SHORTCUTS[shortcut][0], batch=40)
    residual, identity = naive_flows(copy.deepcopy(block), x)
    gate = torch.ones(40, 24, dtype=torch.float64)
    if view:
        gate = naive_gate(copy.deepcopy(block).attention, squeeze(residual), squeeze(identity))
    kept = identity + 2 * gate[:, :, None, None] * residual  # 2 keeps the expectation
    y, y_squeeze = block(x)

    dropped = (y - identity).abs().amax((1, 2, 3)) < 1e-12
    assert 8 < dropped.sum() < 32
    assert_rounded(y[~dropped], kept[~dropped], torch.float64)
    if view in COMPETING_VIEWS:
        assert_rounded(y_squeeze, squeeze(y), torch.float64)

    block.eval()
    assert_rounded(block(x)[0], naive_block(block, x), torch.float64)


@pytest.mark.parametrize("kind", BLOCKS)
def test_dropout_acts_before_the_last_convolution(kind):
    """Where the squeeze is taken behind it too, so that fact 3 still holds."""
    block = make_block(kind, training=True, drop_rate=0.5)
    inputs = {}
    block.last_conv.register_forward_hook(lambda _, args, __: inputs.update(dropped=args[0]))
    y, y_squeeze = block(images())
    assert_rounded(y_squeeze, squeeze(y), torch.float64)
    block.dropout.p = 0.0
    dropped = inputs["dropped"]
    block(images())
    alive = inputs["dropped"] > 0
    survived = dropped[alive] > 0
    assert 0.4 < survived.double().mean() < 0.6
    assert_rounded(dropped[alive][survived], 2 * inputs["dropped"][alive][survived], torch.float64)


def step(model, x, backwards=1):
    """Output, gradients and statistics of one training step."""
    torch.manual_seed(0)  # for the dropout
    x = x.clone().requires_grad_()
    output = model(x)
    loss = (output * torch.linspace(-1, 1, output.numel(), dtype=x.dtype).reshape(output.shape)).sum()
    for _ in range(backwards):
        loss.backward(retain_graph=True)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output, "x": x.grad} | gradients | dict(model.named_buffers())


def assert_same(actual: dict, expected: dict, tolerance: float):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


RECOMPUTED = {
    "as it is": {},
    "with dropout": {"drop_rate": 0.3},
    "with stochastic depth": {"drop_path_rate": 0.5},
    "with a mask": {"mask": 0.3},
}
UNMASKED = (None, "static", "timm_cbam", "aff")


def recomputing_pair(kind, view, training=True, **kwargs):
    torch.manual_seed(0)
    plain = randomise(SMALL_NETWORKS[kind](view=view, num_classes=4, **{"dtype": torch.float64} | kwargs))
    recomputing = copy.deepcopy(plain.train(training))
    recomputing.set_grad_checkpointing()
    assert all(stage.grad_checkpointing for stage in recomputing.stages)
    return plain, recomputing


@pytest.mark.parametrize(
    ("view", "case"),
    [
        (view, case)
        for view in ("se", "pair_view_1x1", "folded_3x3", *UNMASKED)
        for case in RECOMPUTED
        if case != "with a mask" or view not in UNMASKED
    ],
)
@pytest.mark.parametrize("kind", SMALL_NETWORKS)
def test_recomputed_blocks_learn_the_same(kind, view, case):
    plain, recomputing = recomputing_pair(kind, view, **RECOMPUTED[case])
    calls = []
    recomputing.stages[1].blocks[0].bn1.register_forward_hook(lambda *_: calls.append(1))
    x = images(3, size=(8, 8))
    for _ in range(2):
        assert_same(step(recomputing, x), step(plain, x), 0)
    assert len(calls) == 4  # or nothing was recomputed
    assert {norm.momentum for norm in recomputing.modules() if isinstance(norm, nn.BatchNorm2d)} == {0.1}
    assert int(recomputing.stages[1].blocks[0].bn1.num_batches_tracked) == 2

    calls.clear()
    recomputing.set_grad_checkpointing(False)
    assert_same(step(recomputing, x), step(plain, x), 0)
    assert len(calls) == 1


def test_recomputed_blocks_in_eval_and_without_gradients():
    plain, recomputing = recomputing_pair("bottleneck", "folded_3x3", training=False)
    x = images(3, size=(8, 8))
    assert_same(step(recomputing, x), step(plain, x), 0)
    recomputing.train()
    with torch.no_grad():
        recomputing(x)
    assert int(recomputing.stages[0].blocks[0].bn1.num_batches_tracked) == 1


def test_recomputed_blocks_of_a_graph_that_is_kept():
    plain, recomputing = recomputing_pair("bottleneck", "folded_3x3")
    x = images(3, size=(8, 8))
    assert_same(step(recomputing, x, backwards=2), step(plain, x, backwards=2), 0)


def test_recomputed_blocks_with_synchronised_norms():
    plain, recomputing = recomputing_pair("bottleneck", "folded_3x3")
    recomputing = nn.SyncBatchNorm.convert_sync_batchnorm(recomputing)
    assert isinstance(recomputing.stages[0].blocks[0].bn1, nn.SyncBatchNorm)
    x = images(3, size=(8, 8))
    assert_same(step(recomputing, x), step(plain, x), 1e-10)  # whose maps are made, and averaged


def test_recomputed_blocks_under_autocast():
    plain, recomputing = recomputing_pair("bottleneck", "folded_3x3", dtype=torch.float32)
    x = images(3, size=(8, 8), dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(step(recomputing, x), step(plain, x), 0)


@pytest.mark.long
def test_recomputed_blocks_compile():
    plain, recomputing = recomputing_pair("bottleneck", "folded_3x3")
    x = images(3, size=(8, 8))
    expected = step(plain, x)
    torch.compiler.reset()
    actual = step(torch.compile(recomputing, backend="aot_eager", fullgraph=True), x)
    assert_same({name.removeprefix("_orig_mod."): value for name, value in actual.items()}, expected, 1e-10)


@MODES
def test_a_changed_last_convolution(training):
    """Its hooks are called, and what they change reaches squeeze and output alike."""
    block = make_block(training=training)
    block.conv3.register_forward_hook(lambda _, __, output: 2 * output)
    x = images()
    y, y_squeeze = block(x)
    assert_rounded(y_squeeze, squeeze(y), torch.float64)
    doubled = make_block(training=training)
    with torch.no_grad():
        doubled.conv3.weight.mul_(2)
    assert_rounded(y, doubled(x)[0], torch.float64)


def test_a_pruned_convolution_learns():
    block = make_block(training=True)
    torch.nn.utils.prune.l1_unstructured(block.conv3, "weight", amount=0.5)
    for _ in range(2):
        block(images())[0].sum().backward()
    assert block.conv3.weight_orig.grad.abs().sum() > 0
