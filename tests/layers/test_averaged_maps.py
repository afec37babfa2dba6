"""The mean of the normalised maps without the maps, against convolution, norm and mean one after the other."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from cmpe_se import CompetitiveSE
from cmpe_se.layers.averaged_maps import averaged_maps, can_average

PICTURES = {
    "1x1": ((1, 1), (6, 2)),
    "2x1": ((1, 2), (6, 2)),
    "3x3": ((3, 3), (4, 6)),
    "3x3, smallest": ((3, 3), (3, 3)),
}


def layers(kernel, momentum=0.1, dtype=torch.float64, maps=3):
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(1, maps, kernel, bias=False), nn.BatchNorm2d(maps, momentum=momentum)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return conv.to(dtype), norm.to(dtype)


def picture_of(size, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(5, 1, *size, generator=generator, dtype=torch.float64) * 2 + 3).to(dtype).requires_grad_()


def plainly(conv, norm, picture):
    return norm(conv(picture)).mean(1).flatten(1)


def step(function, conv, norm, picture):
    conv, norm, picture = copy.deepcopy(conv), copy.deepcopy(norm), picture.detach().requires_grad_()
    for _ in range(2):  # the second one averages its statistics with the first one's
        output = function(conv, norm, picture)
    (output * torch.linspace(-1, 2, output.numel(), dtype=output.dtype).view_as(output)).sum().backward()
    gradients = [picture.grad, conv.weight.grad, norm.weight.grad, norm.bias.grad]
    return [output, *gradients, norm.running_mean, norm.running_var, norm.num_batches_tracked]


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("case", PICTURES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_values_gradients_and_statistics(case, momentum, dtype, tolerance):
    kernel, size = PICTURES[case]
    conv, norm = layers(kernel, momentum, dtype)
    picture = picture_of(size, dtype)
    assert can_average(conv, norm, picture)
    exact = step(plainly, conv.double(), norm.double(), picture.double())
    for actual, expected in zip(step(averaged_maps, conv.to(dtype), norm.to(dtype), picture), exact, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("case", PICTURES)
def test_second_derivatives(case):
    kernel, size = PICTURES[case]
    conv, norm = layers(kernel, maps=2)

    def function(picture, *values):
        names = ("weight",), ("weight", "bias")
        pretend_conv, pretend_norm = copy.copy(conv), copy.copy(norm)
        for layer, layer_names, tensors in zip(
            (pretend_conv, pretend_norm), names, (values[:1], values[1:]), strict=True
        ):
            layer._parameters = {}
            for name, tensor in zip(layer_names, tensors, strict=True):
                object.__setattr__(layer, name, tensor)
        pretend_norm.track_running_stats = False
        return averaged_maps(pretend_conv, pretend_norm, picture)

    inputs = (picture_of(size)[:3].detach().requires_grad_(), conv.weight, norm.weight, norm.bias)
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_a_whole_gate_learns_the_same_and_transforms():
    torch.manual_seed(0)
    attention = CompetitiveSE(24, maps=2, reduction=4, dtype=torch.float64)
    watched = copy.deepcopy(attention)
    watched.map_conv.register_forward_hook(lambda *_: None)
    flows = torch.randn(2, 5, 24, 3, 3, dtype=torch.float64)
    assert can_average(attention.map_conv, attention.map_norm, flows)
    assert not can_average(watched.map_conv, watched.map_norm, flows)
    for gate in (attention, watched):
        gate(*flows).square().sum().backward()
    for one, two in zip(attention.parameters(), watched.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-11, atol=1e-11)
    for one, two in zip(attention.buffers(), watched.buffers(), strict=True):
        torch.testing.assert_close(one, two)

    values = {name: parameter.detach() for name, parameter in attention.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in attention.named_buffers()}
    gradient = grad(lambda v, b: functional_call(attention, (v, b), tuple(flows)).square().sum())(values, buffers)
    for name, parameter in attention.named_parameters():
        torch.testing.assert_close(gradient[name], parameter.grad)


def test_when_the_layers_themselves_are_called():
    conv, norm = layers((3, 3))
    picture = picture_of((4, 6))
    assert not can_average(conv, copy.deepcopy(norm).eval(), picture)
    assert not can_average(conv, nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(norm)), picture)
    assert not can_average(conv, norm, picture[:1])
    with torch.no_grad():
        assert not can_average(conv, norm, picture)


@pytest.mark.parametrize("scale", [1.0, 10.0, 1000.0])
def test_a_map_of_small_differences_of_large_numbers(scale):
    conv, norm = layers((1, 2), dtype=torch.float32)
    with torch.no_grad():
        conv.weight[0, 0] = torch.tensor([[1.0, -1.0]])
    residual = scale * torch.randn(8, 1, 16, 1, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(8, 1, 16, 1, generator=torch.Generator().manual_seed(1))
    picture = torch.cat((residual, residual + 1e-2 * scale * noise), dim=3).requires_grad_()
    exact = plainly(copy.deepcopy(conv).double(), copy.deepcopy(norm).double(), picture.double())
    torch.testing.assert_close(averaged_maps(conv, norm, picture).double(), exact, rtol=1e-4, atol=1e-4)


def test_indices_are_not_made_where_they_could_not_be_kept():
    conv, norm = layers((3, 3))
    size = (9, 7)  # of no other test
    with torch.inference_mode(), torch.enable_grad():
        assert not can_average(conv, norm, picture_of(size))
    averaged_maps(conv, norm, picture_of(size)).sum().backward()
