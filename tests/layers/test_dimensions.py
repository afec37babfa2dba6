"""Signals (N, C, L) and volumes (N, C, D, H, W): every gate, equal to its equations; all that images have."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, jvp, vmap
from torch.nn import functional

from cmpe_se import VIEWS, CompetitiveSE, inspect_gates, merge
from cmpe_se.errors import UserError
from cmpe_se.layers.attention import is_pointwise, kept_by_stride, squeeze_through
from cmpe_se.layers.gated_addition import add_gated, add_gated_pointwise, squeeze, with_squeeze
from cmpe_se.layers.map_gates import MapLayers
from cmpe_se.layers.views import TABLE, View
from cmpe_se.merging import MergedGate
from tests.layers.test_views import flows, make, naive_factors
from tests.networks.naive import MERGING_VIEWS, SQUEEZE_VIEWS, naive_gate
from tests.tiers import long_but

SIZES = {"1-D": (7,), "3-D": (3, 4, 2), "one sample": (1,), "one voxel": (1, 1, 1), "odd": (5, 1, 3)}
DIMENSIONS = pytest.mark.parametrize("size", [SIZES["1-D"], SIZES["3-D"]], ids=["1-D", "3-D"])
ANY_SIZE = pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
MODES = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
OF_IMAGES = "timm_cbam"  # a convolution of 7x7 positions
GENERAL = tuple(view for view in VIEWS if view != OF_IMAGES)
CONVOLUTIONS = {1: (nn.Conv1d, functional.conv1d), 2: (nn.Conv2d, functional.conv2d), 3: (nn.Conv3d, functional.conv3d)}


def everywhere(a: Tensor, axes: int) -> Tensor:
    return a.view(*a.shape, *[1] * axes)


def naively(gate: CompetitiveSE, u: Tensor, s: Tensor) -> Tensor:
    """The gated addition, from the equations."""
    if gate.view in SQUEEZE_VIEWS:
        a = gate.gain * naive_gate(gate, u.flatten(2).mean(2), s.flatten(2).mean(2))
        return s + everywhere(a, u.ndim - 2) * u
    of_residual, of_identity = naive_factors(gate, u, s)
    return of_identity * s + of_residual * u


def near(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@MODES
@ANY_SIZE
@pytest.mark.parametrize("view", GENERAL)
def test_equals_the_equations(view, size, training):
    gate, (u, s) = make(view, start="one", training=training), flows(size=size)
    expected = naively(copy.deepcopy(gate), u, s)
    assert (expected - s - u).abs().max() > 0.1  # the gate does something
    near(gate(u, s), expected)


@DIMENSIONS
@pytest.mark.parametrize("view", GENERAL)
def test_gradients(view, size):
    """Of both flows and every parameter, in training mode, against autograd through the equations."""
    results = []
    for function in (lambda gate, u, s: gate(u, s), naively):
        gate, (u, s) = make(view, training=True), flows(size=size).requires_grad_()
        output = function(gate, u, s)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
        names, parameters = zip(*gate.named_parameters(), strict=True)
        results.append(torch.autograd.grad((output * weights).sum(), (u, s, *parameters), allow_unused=True))
    for name, actual, expected in zip(("residual", "identity", *names), *results, strict=True):
        assert (actual is None) == (expected is None), name
        if actual is not None:
            near(actual, expected, 1e-10)


@ANY_SIZE
def test_a_gate_of_images_names_those_that_take_signals_and_volumes(size):
    with pytest.raises(UserError, match=rf"view '{OF_IMAGES}' is one of images .*: {', '.join(GENERAL)}$"):
        make(OF_IMAGES)(*flows(size=size))


@pytest.mark.parametrize("view", GENERAL)
def test_one_gate_takes_every_dimension(view):
    """The same numbers as images, signals and volumes are the same to it: one gate, one value for each channel."""
    gate, (u, s) = make(view), flows(size=(6, 4))
    expected = gate(u, s).flatten(2)
    near(gate(u.flatten(2), s.flatten(2)).flatten(2), expected)
    near(gate(u.unflatten(2, (3, 2)), s.unflatten(2, (3, 2))).flatten(2), expected)


@DIMENSIONS
@pytest.mark.parametrize(
    "view", [view for view in GENERAL if view != "timm_eca"]
)  # timm's takes none, of images either
def test_an_empty_batch(view, size):
    u, s = flows(batch=0, size=size)
    assert make(view)(u, s).shape == (0, 24, *size)


@pytest.mark.parametrize("method", ["forward", "gate"])
@pytest.mark.parametrize("size", [(0,), (3, 0, 2)])
def test_maps_without_positions_are_refused(size, method):
    with pytest.raises(ValueError, match="at least one position"):
        getattr(make("se"), method)(*flows(size=size))


@pytest.mark.parametrize("shapes", [((2, 7, 24), (2, 7, 24)), ((2, 24, 7), (2, 24, 8)), ((2, 24, 7), (2, 24, 7, 1))])
@pytest.mark.parametrize("view", GENERAL)
def test_wrong_shapes(view, shapes):
    with pytest.raises(ValueError, match=r"of one shape, such as \(N, 24, L\)"):
        make(view)(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))


@DIMENSIONS
@pytest.mark.parametrize("view", MERGING_VIEWS)
def test_merged(view, size):
    gate, (u, s) = make(view, start="one", bias=True), flows(size=size)
    for merged in (merge(gate), gate.fuse()):
        assert type(merged) is MergedGate
        near(merged(u, s), naively(gate, u, s))


@DIMENSIONS
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda gate: pickle.loads(pickle.dumps(gate))])
def test_copies(duplicate, size):
    gate, (u, s) = make("folded_3x3"), flows(size=size)
    assert torch.equal(duplicate(gate)(u, s), gate(u, s))


@DIMENSIONS
@pytest.mark.parametrize("view", long_but(GENERAL, ["folded_3x3", "timm_eca"]))
def test_compiled(view, size):
    torch.compiler.reset()
    gate, (u, s) = make(view, training=True), flows(size=size)
    expected = copy.deepcopy(gate)(u, s)
    near(torch.compile(gate, fullgraph=True, backend="aot_eager")(u, s), expected, 1e-10)


@DIMENSIONS
@pytest.mark.parametrize("view", long_but(GENERAL, ["folded_3x3", "timm_eca"]))
def test_exported_for_any_batch(view, size):
    gate, batch = make(view), torch.export.Dim("batch", min=2)
    with torch.no_grad():
        exported = torch.export.export(gate, tuple(flows(size=size)), dynamic_shapes=({0: batch}, {0: batch}))
        u, s = flows(batch=3, size=size)
        near(exported.module()(u, s), gate(u, s))


@DIMENSIONS
@MODES
def test_autocast_does_not_round_the_gate(size, training):
    gate = make("folded_3x3", training=training, dtype=torch.float32)
    u, s = (x.bfloat16() for x in flows(size=size))
    expected = naively(copy.deepcopy(gate).double(), u.double(), s.double())
    with torch.autocast("cpu", torch.bfloat16):
        y = gate(u, s)
    assert y.dtype == torch.bfloat16
    assert ((y.double() - expected).abs() <= 2**-7 * expected.abs() + 2**-7).all()


@pytest.mark.parametrize("view", ["folded_3x3", "static", "timm_eca", "aff"])
def test_strides_are_kept(view):
    gate = make(view, training=True)
    u, s = (x.contiguous(memory_format=torch.channels_last_3d).requires_grad_() for x in flows(size=(3, 4, 2)))
    y = gate(u, s)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    near(y, make(view, training=True)(u.contiguous(), s.contiguous()))
    y.square().sum().backward()
    assert u.grad.is_contiguous(memory_format=torch.channels_last_3d)


# The addition's own derivatives.


def summands(size):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, *rest, generator=generator, dtype=torch.float64) for rest in (size, (), size)]


@DIMENSIONS
def test_second_and_forward_derivatives_of_add_gated(size):
    inputs = [x.requires_grad_() for x in summands(size)]
    assert torch.autograd.gradcheck(add_gated, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(add_gated, inputs)


@DIMENSIONS
def test_transforms_of_add_gated(size):
    identity, gate, residual = summands(size)

    def loss(i, a, u):
        return add_gated(i[None], a[None], u[None]).square().sum()

    actual = vmap(grad(loss, argnums=(0, 1, 2)))(identity, gate, residual)
    leaves = [x.clone().requires_grad_() for x in (identity, gate, residual)]
    plain = leaves[0] + everywhere(leaves[1], len(size)) * leaves[2]
    for one, other in zip(actual, torch.autograd.grad(plain.square().sum(), leaves), strict=True):
        near(one, other)
    _, tangent = jvp(add_gated, (identity, gate, residual), (residual, gate, identity))
    a = everywhere(gate, len(size))
    near(tangent, residual + a * residual + a * identity)


def pointwise(size):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4, *size), (3, 4), (4, 6, *[1] * len(size)), (3, 6, *size))  # identity, gate, weight, input
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def by_functions(identity, gate, weight, x):
    conv = CONVOLUTIONS[x.ndim - 2][0](6, 4, 1, bias=False)
    del conv.weight
    conv.weight = weight  # a leaf of the test's instead of a parameter
    return add_gated_pointwise(identity, gate, conv, x)


@pytest.mark.long
@DIMENSIONS
@pytest.mark.parametrize("layout", ["channels first", "channels last"])
def test_derivatives_of_add_gated_pointwise(layout, size):
    results = []
    for function in (by_functions, None):
        leaves = identity, gate, weight, x = pointwise(size)
        if layout == "channels last":
            identity, x = (y.movedim(1, -1).contiguous().movedim(-1, 1) for y in (identity, x))
        if function:
            output = function(identity, gate, weight, x)
        else:
            output = identity + everywhere(gate, len(size)) * CONVOLUTIONS[len(size)][1](x, weight)
        incoming = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        if layout == "channels last":
            incoming = incoming.movedim(1, -1).contiguous().movedim(-1, 1)
        results.append([output, *torch.autograd.grad(output, leaves, incoming)])
    for actual, expected in zip(*results, strict=True):
        near(actual, expected)
    assert torch.autograd.gradcheck(by_functions, pointwise(size), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(by_functions, pointwise(size))


@DIMENSIONS
def test_derivatives_and_transforms_of_with_squeeze(size):
    def loss(x):
        same, squeezed = with_squeeze(x)
        return (same**3 * everywhere(squeezed, len(size))).sum()

    x = summands(size)[0].requires_grad_()
    same, squeezed = with_squeeze(x)
    assert torch.equal(same, x)
    near(squeezed, x.flatten(2).mean(2))
    assert torch.autograd.gradcheck(loss, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x)
    near(vmap(grad(lambda sample: loss(sample[None])))(x), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@DIMENSIONS
def test_squeeze_is_never_narrower_than_float32(size, dtype):
    x = flows(size=size)[0].to(dtype)
    squeezed = squeeze(x)
    assert squeezed.dtype == torch.promote_types(dtype, torch.float32)
    near(squeezed.double(), x.double().flatten(2).mean(2), 1e-6)


# Convolutions without the maps.


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stride", [1, 2, "mixed"])
@pytest.mark.parametrize("axes", [1, 3])
def test_squeeze_through(axes, stride, bias):
    steps = (1, 2, 3)[:axes] if stride == "mixed" else stride
    conv = CONVOLUTIONS[axes][0](6, 4, 1, stride=steps, bias=bias, dtype=torch.float64)
    x = torch.randn(2, 6, *(7, 5, 6)[:axes], dtype=torch.float64)
    assert (kept_by_stride(conv) is None) == (conv.stride == (1,) * axes)
    near(squeeze_through(conv, x), conv(x).flatten(2).mean(2))


@pytest.mark.parametrize("axes", [1, 3])
def test_pointwise_layers(axes):
    layer = CONVOLUTIONS[axes][0]
    assert is_pointwise(layer(4, 8, 1, stride=2))
    assert is_pointwise(layer(4, 8, 1, padding="same"))
    others = ({"kernel_size": 3}, {"kernel_size": 1, "padding": 1}, {"kernel_size": 1, "groups": 2})
    assert not any(is_pointwise(layer(4, 8, **settings)) for settings in others)
    assert not is_pointwise(nn.Conv3d(4, 8, (1, 1, 3), padding=(0, 0, 1)))
    assert not is_pointwise(nn.ConvTranspose1d(4, 8, 1))


# What a module of one's own takes.


def test_what_a_module_takes_is_one_of_three_words():
    with pytest.raises(ValueError, match="images, positions, all, not 'videos'"):
        MapLayers(nn.Identity, last=(), takes="videos")
    assert [TABLE[name].layers.images_alone for name in ("se", "static", "timm_eca", OF_IMAGES)] == [False] * 3 + [True]


class EachPosition(nn.Module):
    """A gate at each position of signals, volumes and images alike."""

    def __init__(self, channels, hidden, **factory):
        super().__init__()
        self.fc, self.gate = nn.Linear(channels, channels, **factory), nn.Sigmoid()

    def forward(self, residual):
        return residual * self.gate(self.fc(residual.movedim(1, -1)).movedim(-1, 1))


@pytest.mark.parametrize("takes", ["images", "positions", "all"])
@DIMENSIONS
def test_a_module_of_ones_own(size, takes, monkeypatch):
    layers = MapLayers(EachPosition, last=("fc",), takes=takes)
    monkeypatch.setitem(TABLE, "own", View(("residual",), layers, "test", "a gate at each position", by_position=True))
    gate, (u, s) = make("own"), flows(size=size)
    if takes == "images":
        with pytest.raises(UserError, match=r"view 'own' is one of images .* these views take any number: se, "):
            gate(u, s)
        return
    fc = gate.map_gate.fc
    logits = torch.einsum("ij,nj...->ni...", fc.weight, u) + fc.bias.view(-1, *[1] * len(size))
    factors = 1 / (1 + torch.exp(-logits))
    near(gate(u, s), s + factors * u)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.add = CONVOLUTIONS[len(size)][0](24, 24, 1).double(), gate

        def forward(self, x):
            return self.add(u, x)

    (seen,) = inspect_gates(nn.Sequential(Block()), s)
    near(seen.gate, factors.flatten(2).mean(2))
    near(seen.residual_energy, (factors * u).square().flatten(2).mean(2))
