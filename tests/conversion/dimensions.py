"""Residual networks of signals, volumes and clips, small: torchvision's, MONAI's, and blocks in the style of papers."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional

from tests.conversion.networks import randomise


class EcgBlock(nn.Module):
    """Pre-activation block of the ECG papers (Hannun et al. 2019): its shortcut pools, and pads channels with zeros."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float = 0.2):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm1d(in_channels), nn.BatchNorm1d(channels)
        self.conv1 = nn.Conv1d(in_channels, channels, 16, padding="same", bias=False)
        self.conv2 = nn.Conv1d(channels, channels, 15, stride, padding=7, bias=False)
        self.dropout, self.relu = nn.Dropout(dropout), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool1d(stride, ceil_mode=True)
        self.added = channels - in_channels

    def residual(self, x: Tensor) -> Tensor:
        return self.conv2(self.dropout(self.relu(self.bn2(self.conv1(self.bn1(x).relu())))))

    def shortcut(self, x: Tensor) -> Tensor:
        return functional.pad(self.pool(x), (0, 0, 0, self.added))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class EcgNet(nn.Module):
    """Signals (N, 2, L) to logits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(2, 12, 16, padding="same", bias=False), nn.BatchNorm1d(12), nn.ReLU())
        self.blocks = nn.Sequential(EcgBlock(12, 12, 1), EcgBlock(12, 16, 2), EcgBlock(16, 16, 1), EcgBlock(16, 24, 2))
        self.norm, self.head = nn.BatchNorm1d(24), nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x))).relu().mean(2))


class Excitation3d(nn.Module):
    """Squeeze-and-excitation as X3D has it."""

    def __init__(self, channels: int):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool3d(1)
        self.fc1, self.fc2 = nn.Conv3d(channels, 8, 1), nn.Conv3d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc2(self.fc1(self.pool(x)).relu()).sigmoid()


class X3dBlock(nn.Module):
    """Inverted bottleneck of X3D: a depthwise 3x3x3 convolution, SE, Swish (Feichtenhofer 2020)."""

    def __init__(self, in_channels: int, channels: int, stride: int, inner: int = 24):
        super().__init__()
        self.a, self.norm_a = nn.Conv3d(in_channels, inner, 1, bias=False), nn.BatchNorm3d(inner)
        self.b = nn.Conv3d(inner, inner, 3, (1, stride, stride), padding=1, groups=inner, bias=False)
        self.norm_b, self.se, self.act = nn.BatchNorm3d(inner), Excitation3d(inner), nn.SiLU()
        self.c, self.norm_c = nn.Conv3d(inner, channels, 1, bias=False), nn.BatchNorm3d(channels)
        self.projection = None
        if stride != 1 or in_channels != channels:
            conv = nn.Conv3d(in_channels, channels, 1, (1, stride, stride), bias=False)
            self.projection = nn.Sequential(conv, nn.BatchNorm3d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.se(self.norm_b(self.b(self.norm_a(self.a(x)).relu()))))
        y = self.norm_c(self.c(y))
        shortcut = x if self.projection is None else self.projection(x)
        return (shortcut + y).relu()


class X3d(nn.Module):
    """Clips (N, 3, T, H, W) to logits."""

    def __init__(self):
        super().__init__()
        self.stem_xy = nn.Conv3d(3, 12, (1, 3, 3), (1, 2, 2), padding=(0, 1, 1), bias=False)
        self.stem_t = nn.Conv3d(12, 12, (5, 1, 1), padding=(2, 0, 0), groups=12, bias=False)
        self.norm = nn.BatchNorm3d(12)
        self.blocks = nn.Sequential(X3dBlock(12, 12, 2), X3dBlock(12, 12, 1), X3dBlock(12, 36, 2), X3dBlock(36, 36, 1))
        self.head = nn.Linear(36, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.norm(self.stem_t(self.stem_xy(x))).relu())
        return self.head(x.mean((2, 3, 4)))


class Case(NamedTuple):
    """A network.

    Args:
        make: makes it.
        size: of one input, (channels, ...).
        gates: residual additions that are converted.
        skipped: blocks that are not, each with a part of the reason.
        view: of the gates.
    """

    make: Callable[[], nn.Module]
    size: tuple[int, ...]
    gates: int
    skipped: dict[str, str] = {}  # noqa: RUF012
    view: str = "folded_3x3"


def monai(name: str, *args, **settings) -> Callable[[], nn.Module]:
    """A network of MONAI's."""

    def make() -> nn.Module:
        reason = "MONAI is not installed; it is an optional package of these tests"
        return getattr(pytest.importorskip("monai.networks.nets", reason=reason), name)(*args, **settings)

    return make


def monai_resnet(block: str, axes: int, shortcut: str) -> Callable[[], nn.Module]:
    settings = {"spatial_dims": axes, "n_input_channels": 2, "num_classes": 3, "shortcut_type": shortcut}
    return monai("ResNet", block, [2, 1, 1, 1], [8, 12, 16, 24], conv1_t_size=3, **settings)


_CLIP = (3, 4, 24, 24)


def video(maker: str, first: str | None = None, stem: str = "BasicStem") -> Callable[[], nn.Module]:
    """r3d_18, mc3_18 or r2plus1d_18 of torchvision with half of their blocks: two in the first stage, then one."""
    parts = torchvision.models.video.resnet

    def make() -> nn.Module:
        makers = [getattr(parts, name) for name in (first or maker, *[maker] * 3)]
        return parts.VideoResNet(parts.BasicBlock, makers, [2, 1, 1, 1], getattr(parts, stem))

    return make


CASES = {
    "ecg": Case(EcgNet, (2, 50), 4),
    "x3d": Case(X3d, (3, 3, 18, 20), 4),
    "r3d": Case(video("Conv3DSimple"), _CLIP, 5),
    "mc3": Case(video("Conv3DNoTemporal", "Conv3DSimple"), _CLIP, 5),
    "r2plus1d": Case(video("Conv2Plus1D", stem="R2Plus1dStem"), _CLIP, 5),
}
for _axes, _size in {1: (40,), 2: (20, 24), 3: (10, 12, 14)}.items():
    _shape = (2, *_size)
    CASES |= {
        f"MONAI ResNet {_axes}-D": Case(monai_resnet("basic", _axes, "B"), _shape, 5),
        f"MONAI ResNet {_axes}-D, padded": Case(monai_resnet("basic", _axes, "A"), _shape, 5),
        f"MONAI ResNet {_axes}-D, bottleneck": Case(monai_resnet("bottleneck", _axes, "B"), _shape, 5),
    }
for _axes, _size in {2: (16, 24), 3: (8, 16, 24)}.items():
    settings = {"spatial_dims": _axes, "in_channels": 2, "out_channels": 3, "init_filters": 8}
    CASES[f"MONAI SegResNet {_axes}-D"] = Case(monai("SegResNet", **settings), (2, *_size), 15)
_UNET = {"in_channels": 2, "out_channels": 6, "channels": (8, 12, 16), "strides": (2, 2), "num_res_units": 2}
CASES["MONAI UNet 1-D"] = Case(monai("UNet", spatial_dims=1, **_UNET), (2, 32), 5)

QUICK = ("ecg", "x3d", "MONAI ResNet 1-D", "MONAI ResNet 3-D, bottleneck", "MONAI ResNet 3-D, padded")
"""Those of the default tier."""


def build(name: str) -> nn.Module:
    """A network in eval mode with random norms."""
    torch.manual_seed(0)
    return randomise(CASES[name].make()).eval()


def inputs(name: str, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random ones."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, *CASES[name].size, generator=generator, dtype=torch.float64).to(dtype)
