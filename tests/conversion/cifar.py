"""Residual networks for CIFAR as arXiv 1512.03385 has them: option A, shortcuts that skip pixels and pad channels."""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.functional import relu


class Shortcut(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class OptionA(nn.Module):
    """A basic block; ``join`` adds its residual and its identity."""

    def __init__(self, in_channels, channels, stride, join=torch.add):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.padding, self.join = stride, (channels - in_channels) // 2, join

    def residual(self, x):
        return self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))

    def shortcut(self, x):
        if self.stride == 1:
            return x
        return functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))

    def forward(self, x):
        return relu(self.join(self.residual(x), self.shortcut(x)))


class OptionALayer(OptionA):
    """The same with the shortcut as a layer."""

    def __init__(self, *settings):
        super().__init__(*settings)
        self.layer = Shortcut(super().shortcut) if self.stride == 1 else Shortcut(self._pad)

    def _pad(self, x):
        return functional.pad(x[..., ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))

    def shortcut(self, x):
        return self.layer(x)


class CifarResNet(nn.Module):
    """Depth 6n + 2."""

    def __init__(self, depth=56, block=OptionA, **settings):
        super().__init__()
        n, width = (depth - 2) // 6, 16
        self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        for stage in (1, 2, 3):
            blocks = []
            for number in range(n):
                stride = 2 if stage > 1 and number == 0 else 1
                blocks.append(block(width, width * stride, stride, **settings))
                width *= stride
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = relu(self.bn1(self.conv1(x)))
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
