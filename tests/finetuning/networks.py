"""Small networks with gates that have moved from their start."""

import timm
import torch
from torch import Tensor, nn

import cmpe_se
from cmpe_se import CompetitiveSE
from tests.conversion.cifar import CifarResNet
from tests.conversion.networks import randomise


class ScaledBlock(nn.Module):
    """A residual with a factor, added by a function."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.conv(x), alpha=0.3)


def scaled() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 16, 3), ScaledBlock(), nn.BatchNorm2d(16), ScaledBlock())


NETWORKS = {
    "bottleneck": lambda: timm.create_model("test_resnet", num_classes=5),
    "layer scale": lambda: timm.create_model("test_convnext2", num_classes=5),
    "cifar": lambda: CifarResNet(8),
    "scaled": scaled,
    "preact": lambda: cmpe_se.PreActResNet(11),
    "wide": lambda: cmpe_se.WideResNet(10, 2),
}
"""Without gates."""
FOREIGN = ("bottleneck", "layer scale", "cifar", "scaled")


def build(kind: str) -> nn.Module:
    """In eval mode, with no norm at its initial statistics."""
    torch.manual_seed(0)
    return randomise(NETWORKS[kind]()).eval()


def gated(kind: str, view: str = "folded_3x3", model: nn.Module | None = None) -> nn.Module:
    """The same network with gates that make a difference."""
    if kind == "preact":
        made = cmpe_se.PreActResNet(11, view=view)
        made.load_state_dict(build(kind).state_dict(), strict=False)
    elif kind == "wide":
        made = cmpe_se.WideResNet(10, 2, view=view)
        made.load_state_dict(build(kind).state_dict(), strict=False)
    else:
        made = cmpe_se.convert(model or build(kind), view=view)
    return moved(made.eval())


@torch.no_grad()
def moved(model: nn.Module, seed: int = 1) -> nn.Module:
    """Random numbers in all gates, running statistics among them."""
    generator = torch.Generator().manual_seed(seed)
    for gate in gates(model):
        for name, tensor in gate.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + (0.5 if "var" in name else -0.5))
    return model


def gates(model: nn.Module) -> list[CompetitiveSE]:
    return [module for module in model.modules() if isinstance(module, CompetitiveSE)]


def images(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return list(before) == list(after) and all(torch.equal(before[name], after[name]) for name in before)
