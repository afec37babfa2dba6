"""The gated addition in all its forms, against the plain one: values, gradients, and derivatives of those."""

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.nn.functional import conv2d

from cmpe_se.layers.gated_addition import add_gated, add_gated_pointwise, squeeze, with_squeeze


def near(actual, expected, tolerance=1e-12):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def plainly_added(identity, gate, residual):
    return identity + gate[:, :, None, None] * residual


def summands(size=(5, 64, 4, 3), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    shapes = (size, size[:2], size)  # identity, gate, residual
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


@pytest.mark.parametrize("enabled", ["111", "100", "010", "001", "011", "101"])
@pytest.mark.parametrize("cotangent", ["dense", "expanded", "transposed"])
def test_gradients_of_add_gated(cotangent, enabled):
    results = []
    for function in (add_gated, plainly_added):
        leaves = [x.requires_grad_(flag == "1") for x, flag in zip(summands(), enabled, strict=True)]
        output = function(*leaves)
        incoming = {
            "dense": torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape),
            "expanded": torch.tensor(3.0, dtype=output.dtype).expand(output.shape),
            "transposed": torch.linspace(-1, 1, output.numel(), dtype=output.dtype)
            .reshape(3, 4, 64, 5)
            .permute(3, 2, 1, 0),
        }[cotangent]
        before = incoming.clone()
        output.backward(incoming)
        assert torch.equal(incoming, before)  # another branch may be reading it
        results.append([output, *(x.grad for x in leaves if x.requires_grad)])
    assert len(results[0]) == 1 + enabled.count("1")
    for actual, expected in zip(*results, strict=True):
        near(actual, expected)


def test_second_and_forward_derivatives_of_add_gated():
    inputs = [x.requires_grad_() for x in summands((2, 3, 2, 2))]
    assert torch.autograd.gradcheck(add_gated, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(add_gated, inputs)


@pytest.mark.parametrize("identity_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_add_gated_of_two_dtypes(identity_dtype, residual_dtype):
    identity, gate, residual = summands()
    identity, residual = identity.to(identity_dtype).requires_grad_(), residual.to(residual_dtype).requires_grad_()
    output = add_gated(identity, gate.float(), residual)
    assert output.dtype == torch.promote_types(identity_dtype, residual_dtype)
    near(output.double(), plainly_added(identity.double(), gate, residual.double()), 5e-2)
    output.sum().backward()
    assert (identity.grad.dtype, residual.grad.dtype) == (identity_dtype, residual_dtype)


POINTWISE = ((3, 4, 5, 2), (3, 4), (4, 6, 1, 1), (3, 6, 5, 2))  # identity, gate, weight, input


def pointwise_leaves(layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in POINTWISE]
    return [(x.to(memory_format=layout) if x.ndim == 4 else x).requires_grad_() for x in leaves]


def by_functions(identity, gate, weight, x):
    conv = nn.Conv2d(6, 4, 1, bias=False)
    del conv.weight
    conv.weight = weight  # a leaf of the test's instead of a parameter
    return add_gated_pointwise(identity, gate, conv, x)


def by_hand(identity, gate, weight, x):
    return plainly_added(identity, gate, conv2d(x, weight))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("enabled", ["1111", "0100", "0010", "0001", "1011", "0110"])
def test_gradients_of_add_gated_pointwise(enabled, layout):
    results = []
    for function in (by_functions, by_hand):
        leaves = [x.requires_grad_(flag == "1") for x, flag in zip(pointwise_leaves(layout), enabled, strict=True)]
        output = function(*leaves)
        output.backward(torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape))
        results.append([output, *(x.grad for x in leaves if x.requires_grad)])
    for actual, expected in zip(*results, strict=True):
        near(actual, expected)


def test_second_and_forward_derivatives_of_add_gated_pointwise():
    leaves = pointwise_leaves()
    assert torch.autograd.gradcheck(by_functions, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(by_functions, leaves)


def test_the_pointwise_form_keeps_no_large_tensor():
    """Besides what the convolution itself keeps: its input and its weight."""
    kept = []
    leaves = pointwise_leaves()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        by_functions(*leaves)
    assert sorted(tuple(x.shape) for x in kept) == sorted(POINTWISE[1:])


def test_a_convolution_with_a_bias():
    conv = nn.Conv2d(6, 4, 1, dtype=torch.float64)
    identity, gate, _, x = pointwise_leaves()
    output = add_gated_pointwise(identity, gate, conv, x)
    near(output, plainly_added(identity, gate, conv(x)))
    output.sum().backward()
    near(conv.bias.grad, 10 * gate.sum(0))


def test_hooks_of_the_convolution_are_called():
    conv, seen = nn.Conv2d(6, 4, 1, bias=False, dtype=torch.float64), []
    conv.register_forward_hook(lambda *_: seen.append(1))
    identity, gate, _, x = pointwise_leaves()
    near(add_gated_pointwise(identity, gate, conv, x), plainly_added(identity, gate, conv(x)))
    assert len(seen) == 2


@pytest.mark.parametrize("uses", ["both", "tensor", "squeeze"])
def test_gradients_of_with_squeeze(uses):
    def plainly(x):
        return x, squeeze(x)

    gradients = []
    for function in (with_squeeze, plainly):
        x = summands()[0].requires_grad_()
        same, squeezed = function(x)
        assert torch.equal(same, x)
        loss = same.square().sum() if uses != "squeeze" else 0
        loss = loss + (squeezed**3).sum() if uses != "tensor" else loss
        loss.backward()
        gradients.append(x.grad)
    near(*gradients)


def test_with_squeeze_leaves_gradients_of_others_alone():
    x = summands()[0].requires_grad_()
    same, squeezed = with_squeeze(x)
    (same.sum() + squeezed.sum()).backward()  # the sum's gradient is one number, expanded
    near(x.grad, torch.full_like(x, 1 + 1 / 12))


def test_derivatives_and_transforms_of_with_squeeze():
    def loss(x):
        same, squeezed = with_squeeze(x)
        return (same**3 * squeezed[:, :, None, None]).sum()

    x = summands((2, 3, 2, 2))[0].requires_grad_()
    assert torch.autograd.gradcheck(loss, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, x)
    near(vmap(grad(lambda sample: loss(sample[None])))(x), torch.autograd.grad(loss(x), x)[0])


@pytest.mark.parametrize("size", [(2, 64, 9, 7), (3, 128, 16, 16), (2, 256, 1, 1)])
def test_squeeze_of_bfloat16_maps_without_gradients(size):
    """Rows are rounded as the maps themselves are; their mean is not."""
    x = torch.rand(size, generator=torch.Generator().manual_seed(0)).bfloat16().to(memory_format=torch.channels_last)
    with torch.no_grad():
        squeezed = squeeze(x)
    assert squeezed.dtype == torch.float32
    exact = x.double().mean((2, 3))
    assert ((squeezed - exact).abs() / exact).max() < 2**-8
    torch.testing.assert_close(squeeze(x.requires_grad_()).double(), exact, rtol=1e-6, atol=0)
