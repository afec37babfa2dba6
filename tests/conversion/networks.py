"""Networks of timm and torchvision with nothing at its initial value."""

import timm
import torch
import torchvision
from torch import nn

from tests.tiers import long_but

TIMM = {
    "test_resnet": (4, 4),
    "test_byobnet": (4, 4),
    "test_convnext2": (4, 4),
    "resnet18": (8, 7),
    "resnet50": (16, 8),
    "resnet50d": (16, 8),
    "seresnet50": (16, 8),
    "ecaresnet50d": (16, 8),
    "resnetv2_50": (16, 8),
    "regnetx_002": (13, 6),
    "regnety_004": (16, 7),
    "mobilenetv2_100": (10, 5),
    "efficientnet_b0": (9, 5),
    "convnext_tiny": (18, 4),
    "res2net50_26w_4s": (16, 8),
    "resnest50d": (16, 8),
}
TORCHVISION = {
    "resnet18": (8, 7),
    "resnet50": (16, 8),
    "regnet_y_400mf": (16, 7),
    "mobilenet_v2": (10, 5),
}
"""Names, and how many residual additions each network has: whole, and where each block is there once.

Of networks with the same classes of blocks, in other widths, groups and numbers, the smallest is there.
"""

FAMILIES = (
    "timm test_resnet",  # bottleneck blocks
    "timm test_byobnet",
    "timm test_convnext2",  # layer scale, no batch norm
    "timm mobilenetv2_100",  # inverted bottlenecks, additions without an activation
    "timm regnetx_002",  # grouped convolutions
    "torchvision resnet18",  # basic blocks
)
"""One small network of each kind, for the default tier."""

ALL_NAMES = [f"timm {name}" for name in TIMM] + [f"torchvision {name}" for name in TORCHVISION]
NAMES = long_but(ALL_NAMES, FAMILIES)


def build(name: str, **settings) -> nn.Module:
    """A network in eval mode with random norms: no residual branch is zero, no norm is the identity."""
    torch.manual_seed(0)
    library, _, name = name.partition(" ")
    model = timm.create_model(name, **settings) if library == "timm" else getattr(torchvision.models, name)(**settings)
    return randomise(model).eval()


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Random affine parameters and running statistics for every batch norm, and random layer scales."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.7, 1.3)
            if module.affine:
                module.weight.uniform_(0.7, 1.3)
                module.bias.normal_(0, 0.2)
    for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
            parameter.uniform_(0.5, 1.5)
    return model


def shorten(model: nn.Module) -> nn.Module:
    """Each block once: of blocks in a row with the same class and shapes, the first stays."""
    for module in list(model.modules()):
        before = None
        for name, child in list(module.named_children()):
            look = type(child), [parameter.shape for parameter in child.parameters()]
            if look == before and look[1] and any(True for _ in child.children()):
                del module._modules[name]
            before = look
    return model


def expected_additions(name: str, whole: bool = True) -> int:
    library, _, name = name.partition(" ")
    return (TIMM if library == "timm" else TORCHVISION)[name][0 if whole else 1]
