"""The attention of every view against the method's equations, and everything else that PyTorch asks of a module."""

import copy
import io
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from cmpe_se import VIEWS, CompetitiveSE
from cmpe_se.layers.attention import is_pointwise, squeeze_through
from cmpe_se.layers.gated_addition import squeeze
from cmpe_se.layers.views import PAPER_VIEWS, TABLE
from tests.networks.conftest import _one_thread  # noqa: F401 (a fixture for this file too)
from tests.networks.naive import COMPETING_VIEWS, KERNELS, SQUEEZE_VIEWS, naive_gate, naive_picture, randomise

PICTURES = tuple(KERNELS)
SETTINGS = {
    "default 64": (64, {}),
    "one hidden unit": (12, {}),
    "several maps": (48, {"maps": 3, "reduction": 4}),
    "columns": (48, {"columns": 16, "maps": 2, "reduction": 5}),
    "biases": (24, {"bias": True, "min_hidden": 4}),
}
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EVERY_VIEW = pytest.mark.parametrize("view", SQUEEZE_VIEWS)


def make(view: str, channels: int = 64, *, seed: int = 0, training: bool = False, **kwargs) -> CompetitiveSE:
    torch.manual_seed(seed)
    return randomise(CompetitiveSE(channels, view=view, **{"dtype": torch.float64} | kwargs), seed).train(training)


def flows(channels: int = 64, batch: int = 5, size=(4, 3), *, seed: int = 0, dtype=torch.float64, **kwargs):
    """A residual and an identity, whose channels have means of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, batch, channels, *size, generator=generator, dtype=torch.float64)
    x += 2 * torch.randn(2, batch, channels, 1, 1, generator=generator, dtype=torch.float64)
    return [flow.to(dtype=dtype, **kwargs) for flow in x]


def near(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, check_dtype=False)


@MODES
@pytest.mark.parametrize("case", SETTINGS)
@EVERY_VIEW
def test_equals_the_equations(view, case, training):
    channels, kwargs = SETTINGS[case]
    attention = make(view, channels, seed=6, training=training, **kwargs)
    oracle = copy.deepcopy(attention)
    residual, identity = flows(channels)
    r, i = residual.mean((2, 3)), identity.mean((2, 3))

    gate = naive_gate(oracle, r, i)
    assert gate.std() > 0.03  # or nothing would be compared
    near(attention(residual, identity), identity + gate[:, :, None, None] * residual)
    for name, statistic in attention.named_buffers():
        near(statistic, oracle.get_buffer(name))

    fresh = copy.deepcopy(oracle)
    expected = naive_gate(fresh, r, i)
    near(oracle.gate(residual, identity), expected)
    near(oracle.gate(r, i), expected)


@pytest.mark.parametrize("columns", [None, 4, 16])
@pytest.mark.parametrize("view", PICTURES)
def test_picture(view, columns):
    attention = make(view, columns=columns)
    residual, identity = flows()
    r, i = residual.mean((2, 3)), identity.mean((2, 3))
    expected = naive_picture(r, i, view, columns or 16)[:, None]
    assert tuple(expected.shape[2:]) == attention.picture_size
    near(attention.picture(residual, identity), expected)
    assert torch.equal(attention.picture(r, i), expected)


@pytest.mark.parametrize("view", ["se", "double_fc"])
def test_views_without_a_picture_say_so(view):
    attention = make(view)
    assert attention.picture_size is None
    with pytest.raises(ValueError, match=f"view '{view}' draws no picture; these views do: {', '.join(PICTURES)}"):
        attention.picture(*flows())


@settings(deadline=None, max_examples=100)
@given(
    view=st.sampled_from(SQUEEZE_VIEWS),
    channels=st.sampled_from([6, 9, 16, 60, 64]),
    reduction=st.integers(1, 80),
    maps=st.none() | st.integers(1, 4),
    batch=st.integers(1, 4),
    size=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    scale=st.floats(0, 5),
    training=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_gates_lie_between_0_and_1(view, channels, reduction, maps, batch, size, scale, training, seed):
    torch.manual_seed(seed)
    attention = CompetitiveSE(channels, view=view, reduction=reduction, maps=maps, dtype=torch.float64).train(training)
    residual, identity = flows(channels, batch, size, seed=seed)
    gate = attention.gate(scale * residual, scale * identity)
    assert gate.shape == (batch, channels)
    assert gate.min() > 0
    assert gate.max() < 1
    output = attention.eval()(residual, identity)
    bound = identity.abs() + residual.abs()
    assert (output.abs() <= bound).all()
    assert ((output - identity) * residual >= 0).all()  # the gate only ever scales


def test_se_does_not_look_at_the_identity():
    attention = make("se")
    residual, identity = flows()
    assert torch.equal(attention.gate(residual, identity), attention.gate(residual, torch.full_like(identity, 9)))
    assert not attention.competitive


@pytest.mark.parametrize("view", COMPETING_VIEWS)
def test_the_identity_competes(view):
    attention = make(view)
    residual, identity = flows()
    change = attention.gate(residual, identity) - attention.gate(residual, identity.flip(1))
    assert change.abs().max() > 1e-3
    assert attention.competitive


X = (2, 64, 4, 4)
WRONG_SHAPES = {
    "channels": ((2, 32, 4, 4), (2, 32, 4, 4)),
    "identity's channels": (X, (2, 32, 4, 4)),
    "batch": (X, (3, 64, 4, 4)),
    "one in a batch of many": (X, (1, 64, 4, 4)),
    "height and width": (X, (2, 64, 4, 2)),
    "size 1": (X, (2, 64, 1, 1)),
    "no batch": ((64, 4, 4), (64, 4, 4)),
    "signal and image": ((2, 64, 4), X),
    "image and volume": (X, (2, 64, 4, 4, 4)),
    "tokens": ((2, 4, 64), (2, 4, 64)),
    "1 dimension": ((64,), (64,)),
    "0 dimensions": ((), ()),
    "channels last": ((2, 4, 4, 64), (2, 4, 4, 64)),
    "squeeze and maps": ((2, 64), X),
}


@pytest.mark.parametrize("method", ["forward", "gate"])
@pytest.mark.parametrize("case", WRONG_SHAPES)
@EVERY_VIEW
def test_wrong_shapes(view, case, method):
    attention = CompetitiveSE(64, view=view)
    residual, identity = WRONG_SHAPES[case]
    sentence = (
        "CompetitiveSE(64) takes a residual and an identity of one shape, such as (N, 64, L), (N, 64, H, W), "
        f"(N, 64, D, H, W); got {tuple(residual)} and {tuple(identity)}"
    )
    with pytest.raises(ValueError, match=re.escape(sentence)):
        getattr(attention, method)(torch.zeros(residual), torch.zeros(identity))


@EVERY_VIEW
def test_squeezes_are_not_added(view):
    """Broadcasting would make (N, C, N, C) of them."""
    with pytest.raises(ValueError, match=r"one shape, such as \(N, 64, L\), .*; got \(3, 64\) and \(3, 64\)"):
        CompetitiveSE(64, view=view)(torch.zeros(3, 64), torch.zeros(3, 64))


@pytest.mark.parametrize(
    ("channels", "kwargs", "sentence"),
    [
        (64, {"view": "folded"}, "unknown view 'folded'; choose one of " + ", ".join(VIEWS)),
        (64, {"view": ""}, "unknown view ''"),
        (64, {"view": None}, "unknown view 'None'"),
        (0, {}, "channels must be a whole number of at least 1, got 0"),
        (-64, {}, "channels must be a whole number of at least 1, got -64"),
        (64.0, {}, "channels must be a whole number of at least 1, got 64.0"),
        ("64", {}, "channels must be a whole number of at least 1, got '64'"),
        (64, {"reduction": 0}, "reduction must be a whole number of at least 1, got 0"),
        (64, {"reduction": 0.5}, "reduction must be a whole number of at least 1, got 0.5"),
        (64, {"columns": 0}, "columns must be a whole number of at least 1, got 0"),
        (64, {"maps": 0}, "maps must be a whole number of at least 1, got 0"),
        (64, {"columns": 12}, "cannot fold 64 channels into 12 columns: columns must divide the channels"),
        (64, {"columns": 64}, "the picture would be 2x64"),
        (67, {}, "cannot fold 67 channels into a picture with both sides at least 3; use 66 or 68 channels"),
    ],
)
def test_bad_settings(channels, kwargs, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        CompetitiveSE(channels, **kwargs)


@pytest.mark.parametrize("view", [view for view in SQUEEZE_VIEWS if not TABLE[view].layers.folded])
def test_views_without_a_fold_take_any_channels_and_ignore_columns(view):
    assert make(view, 7, columns=5)(*flows(7)).shape == (5, 7, 4, 3)


@pytest.mark.parametrize(
    ("view", "channels", "kwargs", "text"),
    [
        ("se", 64, {}, "CompetitiveSE(\n  64, view='se', hidden=4\n"),
        ("double_fc", 8, {}, "8, view='double_fc', hidden=1\n"),
        ("pair_view_2x1", 64, {}, "64, view='pair_view_2x1', hidden=4, picture=64x2\n"),
        ("pair_view_1x1", 64, {"reduction": 8}, "64, view='pair_view_1x1', hidden=8, picture=64x2\n"),
        ("folded_3x3", 64, {}, "64, view='folded_3x3', hidden=4, picture=8x16\n"),
        ("folded_3x3", 256, {"columns": 32}, "256, view='folded_3x3', hidden=16, picture=16x32\n"),
    ],
)
def test_repr(view, channels, kwargs, text):
    assert text in repr(CompetitiveSE(channels, view=view, **kwargs))


def by_pickle(attention):
    return pickle.loads(pickle.dumps(attention))


def by_state_dict(attention):
    file = io.BytesIO()
    torch.save(attention.state_dict(), file)
    file.seek(0)
    fresh = make(attention.view, seed=1)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_state_dict])
@EVERY_VIEW
def test_copies(view, duplicate):
    attention = make(view)
    other = duplicate(attention)
    expected = attention(*flows())
    assert torch.equal(other(*flows()), expected)
    with torch.no_grad():
        attention.fc2.weight.zero_()
    assert torch.equal(other(*flows()), expected)  # nothing is shared


@pytest.mark.parametrize(
    ("channels", "hidden", "maps"), [(8, 1, 1), (64, 4, 1), (100, 6, 1), (128, 8, 2), (512, 32, 8)]
)
@pytest.mark.parametrize("view", [*PAPER_VIEWS, "se_identity", "se_sum"])
def test_default_sizes(view, channels, hidden, maps):
    attention = CompetitiveSE(channels, view=view, device="meta")
    assert attention.hidden == hidden
    assert attention.fc2.weight.shape == (channels, 2 * hidden if view == "double_fc" else hidden)
    if view in PICTURES:
        assert attention.map_conv.weight.shape == (maps, 1, *KERNELS[view])


@pytest.mark.parametrize("view", PICTURES)
def test_initialisation_of_the_maps(view):
    """Normal with a standard deviation of sqrt(2 / (kernel area x maps))."""
    torch.manual_seed(0)
    weight = CompetitiveSE(64, view=view, maps=400).map_conv.weight
    expected = (2 / weight[:, 0].numel()) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.15)
    assert weight.abs().max() > 2 * expected  # not uniform


@EVERY_VIEW
def test_reset_parameters(view):
    attention = make(view)
    before = {name: tensor.clone() for name, tensor in attention.state_dict().items() if tensor.is_floating_point()}
    attention.reset_parameters()
    assert all((attention.state_dict()[name] != tensor).any() for name, tensor in before.items())


@EVERY_VIEW
def test_meta_device(view):
    attention = CompetitiveSE(64, view=view, device="meta")
    assert {tensor.device.type for tensor in attention.state_dict().values()} == {"meta"}
    x = torch.empty(2, 64, 4, 4, device="meta")
    output = attention(x, x)
    assert output.device.type == "meta"
    assert output.shape == x.shape
    assert attention.gate(x, x).shape == (2, 64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 3e-2), (torch.float64, 1e-12)])
@EVERY_VIEW
def test_dtype_and_device(view, dtype, tolerance):
    attention = randomise(CompetitiveSE(64, view=view, device="cpu", dtype=dtype)).eval()
    assert {t.dtype for t in attention.state_dict().values() if t.is_floating_point()} == {dtype}
    assert {t.device.type for t in attention.state_dict().values()} == {"cpu"}
    residual, identity = flows(dtype=dtype)
    output = attention(residual, identity)
    assert output.dtype == dtype
    expected = copy.deepcopy(attention).double()(residual.double(), identity.double())
    near(output.double(), expected, tolerance * expected.abs().max().item())


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2**-7)]
)
@MODES
@EVERY_VIEW
def test_dtype_and_strides_of_the_inputs_are_kept(view, training, dtype, tolerance, memory_format):
    attention = make(view, training=training, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    residual, identity = flows(dtype=dtype, memory_format=memory_format)
    expected = copy.deepcopy(attention).double()(residual.double(), identity.double())
    output = attention(residual, identity)
    assert output.dtype == dtype
    assert output.stride() == identity.stride()
    assert output.is_contiguous(memory_format=memory_format)
    near(output.double(), expected, tolerance * expected.abs().max().item())


@MODES
@EVERY_VIEW
def test_autocast_does_not_round_the_gate(view, training, monkeypatch):
    attention = make(view, training=training, dtype=torch.float32)
    residual, identity = flows(dtype=torch.bfloat16)
    expected = copy.deepcopy(attention).gate(residual.float(), identity.float())
    seen = []
    original = attention._excite

    def spy(r, i):
        seen.extend((r, i, original(r, i)))
        return seen[-1]

    monkeypatch.setattr(attention, "_excite", spy)
    hidden = []
    layers = [child for child in attention.children() if isinstance(child, nn.Linear | nn.Conv2d)]
    for linear in layers:
        linear.register_forward_hook(lambda _, inputs, output: hidden.extend((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        output = attention(residual, identity)
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16  # autocast is on again
    assert output.dtype == torch.bfloat16
    assert len(hidden) == 2 * len(layers) > 0
    assert {tensor.dtype for tensor in seen + hidden} == {torch.float32}
    near(seen[2], expected, 1e-6)  # bfloat16 would be 1e-3 away


def gradients(attention, residual, identity, run=None):
    """Output and all gradients of one step, on leaves of its own."""
    attention.zero_grad()
    inputs = [flow.clone().requires_grad_() for flow in (residual, identity)]
    output = attention(*inputs) if run is None else run(*inputs)
    (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
    return [output, *(x.grad for x in inputs), *(p.grad.clone() for p in attention.parameters())]


def check_compiled(attention, backend, tolerance):
    inputs = flows(dtype=torch.float32)
    plain = copy.deepcopy(attention)
    torch.compiler.reset()
    compiled = gradients(attention, *inputs, torch.compile(attention, backend=backend, fullgraph=True))
    for actual, expected in zip(compiled, gradients(plain, *inputs), strict=True):
        near(actual, expected, tolerance)
    for name, statistic in plain.named_buffers():
        near(attention.get_buffer(name), statistic, tolerance)


@MODES
@EVERY_VIEW
def test_compile_has_no_graph_break(view, training):
    check_compiled(make(view, training=training, dtype=torch.float64), "aot_eager", 1e-10)


@pytest.mark.long
def test_compile_with_inductor():
    check_compiled(make("folded_3x3", training=True, maps=2, dtype=torch.float32), "inductor", 1e-3)


@EVERY_VIEW
def test_compile_under_autocast(view):
    attention = make(view, dtype=torch.float32)
    inputs = flows(dtype=torch.bfloat16)
    torch.compiler.reset()
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(*inputs), attention(*inputs)
    assert actual.dtype == torch.bfloat16
    near(actual.float(), expected.float(), 2**-7)


@EVERY_VIEW
def test_export_with_any_batch(view):
    attention = make(view)
    batch = torch.export.Dim("batch")
    program = torch.export.export(attention, tuple(flows()), dynamic_shapes=({0: batch}, {0: batch}))
    for size in (1, 2, 5, 9):
        inputs = flows(batch=size, seed=size)
        near(program.module()(*inputs), attention(*inputs))


@MODES
@EVERY_VIEW
def test_gradient_reaches_everything(view, training):
    attention = make(view, training=training, maps=3, reduction=8)
    residual, identity = flows()
    output, d_residual, d_identity, *d_parameters = gradients(attention, residual, identity)
    assert d_residual.abs().min(dim=0).values.max() > 0
    cotangent = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).reshape(output.shape)
    through_the_gate = (d_identity - cotangent).abs().max()
    assert (through_the_gate > 1e-4) == attention.competitive
    for (name, _), gradient in zip(attention.named_parameters(), d_parameters, strict=True):
        assert gradient.abs().max() > 1e-6, name


@MODES
@EVERY_VIEW
def test_gradcheck(view, training):
    attention = make(view, 6, training=training, reduction=2, maps=2)
    names, parameters = zip(*attention.named_parameters(), strict=True)

    def function(residual, identity, *values):
        buffers = {name: buffer.clone() for name, buffer in attention.named_buffers()}
        return functional_call(attention, buffers | dict(zip(names, values, strict=True)), (residual, identity))

    inputs = [x.requires_grad_() for x in flows(6, 3, (2, 2))]
    assert torch.autograd.gradcheck(function, (*inputs, *(p.detach().requires_grad_() for p in parameters)))


@EVERY_VIEW
def test_function_transforms(view):
    """Gradients of single samples by torch.func are those of one backward pass each."""
    attention = make(view)
    residual, identity = flows(batch=3)
    parameters = dict(attention.named_parameters())

    def loss(values, r, i):
        return functional_call(attention, values, (r[None], i[None])).square().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, residual, identity)
    for sample in range(3):
        expected = torch.autograd.grad(loss(parameters, residual[sample], identity[sample]), parameters.values())
        for name, gradient in zip(parameters, expected, strict=True):
            near(per_sample[name][sample], gradient)
    _, derivative = jvp(lambda r: attention(r, identity), (residual,), (torch.ones_like(residual),))
    step = 1e-6
    difference = attention(residual + step, identity) - attention(residual - step, identity)
    near(derivative, difference / (2 * step), 1e-5)


@pytest.mark.parametrize(
    ("dtype", "squeezed"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_squeeze_is_never_narrower_than_float32(dtype, squeezed):
    x = flows(size=(9, 7), dtype=dtype)[0]
    assert squeeze(x).dtype == squeezed
    near(squeeze(x).double(), x.double().mean((2, 3)), 1e-6)


CONVOLUTIONS = {
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 strided by (2, 3)": {"kernel_size": 1, "stride": (2, 3)},
}
SQUEEZED_DTYPES = {torch.float64: (torch.float64, 1e-12), torch.float32: (torch.float32, 1e-5)} | {
    torch.bfloat16: (torch.float32, 1e-5)  # of bfloat16 numbers, but not rounded to them
}


def squeezed_flow(conv, height, width, dtype, memory_format=torch.contiguous_format):
    generator = torch.Generator().manual_seed(10 * height + width)
    x = torch.randn(2, conv.in_channels, height, width, generator=generator, dtype=torch.float64)
    return x.to(dtype=dtype, memory_format=memory_format).requires_grad_()


@pytest.mark.parametrize("dtype", SQUEEZED_DTYPES)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", ""])
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_squeeze_through(case, bias, dtype):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, bias=bias, dtype=dtype, **CONVOLUTIONS[case])
    exact = copy.deepcopy(conv).double()
    squeezed_dtype, tolerance = SQUEEZED_DTYPES[dtype]
    for height in range(1, 6):
        for width in range(1, 6):
            for memory_format in (torch.contiguous_format, torch.channels_last):
                x = squeezed_flow(conv, height, width, dtype, memory_format)
                expected = exact(x.double()).mean((2, 3))
                actual = squeeze_through(conv, x)
                assert actual.dtype == squeezed_dtype
                near(actual.double(), expected, tolerance)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2), (3, 3)], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_gradients_of_squeeze_through(case, size):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, dtype=torch.float64, **CONVOLUTIONS[case])
    x = squeezed_flow(conv, *size, torch.float64)
    cotangent = torch.randn(2, 5, dtype=torch.float64)
    wanted = (x, conv.weight, conv.bias)
    expected = torch.autograd.grad(conv(x).mean((2, 3)), wanted, cotangent)
    for actual, gradient in zip(
        torch.autograd.grad(squeeze_through(conv, x), wanted, cotangent), expected, strict=True
    ):
        near(actual, gradient)


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_squeeze_through_under_autocast(case):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, **CONVOLUTIONS[case])
    x = squeezed_flow(conv, 5, 4, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = squeeze_through(conv, x)
    assert actual.dtype == torch.float32
    near(actual, conv(x.float()).mean((2, 3)), 1e-5)


def test_pointwise_layers():
    assert is_pointwise(nn.Conv2d(4, 8, 1, stride=2))
    others = ({"kernel_size": 3}, {"kernel_size": 1, "padding": 1}, {"kernel_size": 1, "groups": 2})
    assert not any(is_pointwise(nn.Conv2d(4, 8, **settings)) for settings in others)
    assert not is_pointwise(nn.Linear(4, 8))


@pytest.mark.parametrize("method", ["forward", "gate"])
def test_empty_maps_are_refused(method):
    attention = CompetitiveSE(64)
    with pytest.raises(ValueError, match="at least one position"):
        getattr(attention, method)(torch.zeros(2, 64, 0, 4), torch.zeros(2, 64, 0, 4))


def test_traced_and_saved():
    """Tracing with gradients on meets no custom function, which a trace cannot be saved with."""
    attention = CompetitiveSE(64).eval()
    maps = torch.randn(2, 64, 4, 4), torch.randn(2, 64, 4, 4)
    traced = torch.jit.trace(attention, maps)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(*maps), attention(*maps))
