"""Networks in PyTorch's tools: compilation, export, and data-parallel training."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.networks.naive import SMALL_NETWORKS, randomise

CASES = pytest.mark.parametrize(
    ("family", "view"),
    [("bottleneck", "folded_3x3"), ("wide", "pair_view_1x1"), ("basic", "double_fc"), ("wide", "se"), ("basic", None)],
)


def make(family, view, *, training=True, **kwargs):
    torch.manual_seed(0)
    return randomise(SMALL_NETWORKS[family](view=view, num_classes=4, **kwargs)).train(training)


def images(batch=4, dtype=torch.float32):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch), dtype=dtype)


def step(model, run, x) -> dict:
    output = run(x)
    nn.functional.cross_entropy(output.float(), torch.arange(len(x)) % 4).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {"output": output} | gradients | dict(model.named_buffers())


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "view", "training"),
    [
        ("bottleneck", "folded_3x3", True),
        ("wide", "se", False),
        pytest.param("bottleneck", "folded_3x3", False, marks=pytest.mark.long),
        pytest.param("wide", "pair_view_1x1", True, marks=pytest.mark.long),
        pytest.param("basic", "double_fc", True, marks=pytest.mark.long),
        pytest.param("basic", None, True, marks=pytest.mark.long),
    ],
)
def test_compile_has_no_graph_break(family, view, training):
    model = make(family, view, training=training, dtype=torch.float64)
    plain, x = copy.deepcopy(model), images(dtype=torch.float64)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same(step(model, compiled, x), step(plain, plain, x), 1e-10)


@pytest.mark.parametrize(
    ("family", "view"),
    [
        *(("bottleneck", None), ("wide", "pair_view_2x1"), ("basic", "static"), ("basic", "timm_cbam")),
        *(
            pytest.param(family, view, marks=pytest.mark.long)
            for family, view in (
                *(("basic", "se"), ("bottleneck", "double_fc"), ("bottleneck", "se_identity")),
                *(("basic", "se_sum"), ("basic", "timm_eca"), ("basic", "aff")),
            )
        ),
    ],
)
def test_export_with_any_batch(family, view):
    model = make(family, view, training=False, dtype=torch.float64)
    program = torch.export.export(
        model, (images(dtype=torch.float64),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    for batch in (1, 2, 7):
        x = images(batch, torch.float64)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)


def test_export_with_any_batch_and_size():
    """Edges of a padded 3x3 convolution, wherever they come to lie."""
    model = make("wide", "folded_3x3", training=False, dtype=torch.float64)
    sizes = {0: torch.export.Dim.DYNAMIC, 2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}
    program = torch.export.export(model, (images(dtype=torch.float64),), dynamic_shapes=(sizes,))
    for shape in ((2, 3, 8, 8), (5, 3, 12, 9), (3, 3, 17, 33)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(program.module()(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.fixture
def one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("recompute", [False, True], ids=["", "recompute"])
@CASES
@pytest.mark.usefixtures("one_process")
def test_data_parallel(family, view, recompute):
    model = make(family, view)
    model.set_grad_checkpointing(recompute)
    plain = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):  # the second forward finds parameters that the first step left unused
        assert_same(step(model, wrapped, images()), step(plain, plain, images()), 1e-6)
    assert all(parameter.grad is not None for parameter in model.parameters())
