"""Gates and gated additions in float32 on the GPU, against float64 on the CPU."""

import copy

import pytest
import timm
import torch
from torch import Tensor, nn

from cmpe_se import VIEWS, CompetitiveSE, convert, merge
from cmpe_se.layers.gated_addition import add_gated, add_gated_pointwise, with_squeeze

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def assert_near(found: Tensor, right: Tensor, tolerance: float = 2e-4, least: float = 1e-3) -> None:
    """Within ``tolerance`` of the right tensor's largest number, or of ``least`` where that is larger."""
    assert found.shape == right.shape
    assert (found.double().cpu() - right).abs().max() <= tolerance * right.abs().max().clamp(min=least)


def assert_all_near(found: list[Tensor], right: list[Tensor], tolerance: float = 2e-4) -> None:
    """Each near its own; what is 0 in theory, such as the gradient of a bias before a norm, may err as others do."""
    least = 0.05 * max(x.abs().max().item() for x in right)
    for one, other in zip(found, right, strict=True):
        assert_near(one, other.double().cpu(), tolerance, least)


def gradients(function, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """The output, and gradients of its weighted sum."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape).to(output)
    return [output.detach(), *torch.autograd.grad((output * weights).sum(), [*leaves, *parameters])]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_a_gate_and_its_gradients(view, layout):
    torch.manual_seed(1)
    gate = CompetitiveSE(64, view=view, reduction=4, dtype=torch.float64)
    inputs = [torch.randn(8, 64, 6, 5, dtype=torch.float64) for _ in range(2)]
    other = copy.deepcopy(gate).float().cuda()
    moved = [x.float().cuda().to(memory_format=layout) for x in inputs]
    right = gradients(gate, inputs, list(gate.parameters()))
    assert_all_near(gradients(other, moved, list(other.parameters())), right)
    for name, buffer in gate.named_buffers():
        assert_near(other.get_buffer(name).double(), buffer.double())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gated_additions_and_their_gradients(layout):
    torch.manual_seed(2)
    conv = nn.Conv2d(8, 32, 1, bias=False, dtype=torch.float64)
    x, identity, residual = (torch.randn(4, c, 7, 6, dtype=torch.float64) for c in (8, 32, 32))
    gate = torch.rand(4, 32, dtype=torch.float64)

    def sum_and_squeeze(residual: Tensor) -> Tensor:
        same, squeezed = with_squeeze(residual)
        return same + 3 * squeezed[:, :, None, None]

    cases = (
        (lambda c: add_gated, [identity, gate, residual], []),
        (lambda c: lambda i, g, x: add_gated_pointwise(i, g, c, x), [identity, gate, x], [conv]),
        (lambda c: sum_and_squeeze, [residual], []),
    )
    other = copy.deepcopy(conv).float().cuda()
    for make, inputs, convs in cases:
        moved = [x.float().cuda() for x in inputs]
        moved = [x.to(memory_format=layout) if x.ndim == 4 else x for x in moved]
        right = gradients(make(conv), inputs, [conv.weight] if convs else [])
        assert_all_near(gradients(make(other), moved, [other.weight] if convs else []), right)


def with_statistics(network: nn.Module) -> nn.Module:
    """Norms that are no identity, as after training."""
    torch.manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)
    return network.eval()


@pytest.mark.parametrize("view", ["se", "folded_3x3", "static"])
@pytest.mark.parametrize("name", ["cmpe_se_preact_resnet20b", "resnet18"])
@torch.no_grad()
def test_a_merged_network_is_the_same_function(name, view):
    if name == "resnet18":
        network = convert(timm.create_model(name, num_classes=10), view=view)
    else:
        network = timm.create_model(name, view=view)
    network = with_statistics(network).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    assert_near(merge(network)(images), network(images).double().cpu(), 1e-3)


@pytest.mark.parametrize("view", VIEWS)
def test_autocast_rounds_no_gate(view):
    torch.manual_seed(4)
    network = timm.create_model("cmpe_se_preact_resnet20b", view=view).cuda().to(memory_format=torch.channels_last)
    images = torch.randn(16, 3, 32, 32, device="cuda").to(memory_format=torch.channels_last)
    gates = []
    for module in network.modules():
        if isinstance(module, CompetitiveSE) and hasattr(module, "fc2"):
            module.fc2.register_forward_hook(lambda module, inputs, output: gates.append(output.dtype))
    with torch.autocast("cuda", torch.bfloat16):
        logits = network(images)
        loss = logits.float().square().mean()
    loss.backward()
    assert set(gates) <= {torch.float32}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    assert_near(logits.detach(), copy.deepcopy(network)(images).detach().double().cpu(), 0.1)


@pytest.mark.parametrize("view", ["folded_3x3", "static", "se"])
def test_a_compiled_network_is_the_same_function(view):
    torch.manual_seed(5)
    network = timm.create_model("cmpe_se_preact_resnet20", view=view).cuda()
    images = torch.randn(8, 3, 16, 16, device="cuda")
    right = gradients(network, [images], list(network.parameters()))
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(network), dynamic=False)
    found = gradients(compiled, [images], list(compiled.parameters()))
    assert_all_near(found, right, 2e-2)  # a value near 0 may fall on the other side of a ReLU
