"""Your own block: ``CompetitiveSE`` takes the place of the addition, or ``convert`` puts it there.

    python examples/own_block.py

Both ways give a small network that learns scikit-learn's handwritten digits. Nothing is downloaded.
"""

import argparse

import torch
from torch import Tensor, nn

import cmpe_se
from cmpe_se.data import Augmentation, load_data


class PlainBlock(nn.Module):
    """Two convolutions and an addition, as you may have it: (N, C, H, W) to the same shape."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def residual(self, x: Tensor) -> Tensor:
        """What the block adds to its input."""
        x = self.conv1(self.norm1(x).relu())
        return self.conv2(self.norm2(x).relu())

    def forward(self, x: Tensor) -> Tensor:
        """Input + residual."""
        return x + self.residual(x)


class GatedBlock(PlainBlock):
    """The same with a gate: the addition is a module of residual and identity."""

    def __init__(self, channels: int, view: str = "folded_3x3"):
        super().__init__(channels)
        self.add = cmpe_se.CompetitiveSE(channels, view=view, start="one", reduction=4, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Input + gate * residual."""
        return self.add(self.residual(x), x)


def build(block: type[nn.Module], channels: int = 32, depth: int = 3, seed: int = 0) -> nn.Sequential:
    """A network for grey images of ten classes."""
    torch.manual_seed(seed)
    blocks = [block(channels) for _ in range(depth)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), *blocks, head)


def train(model: nn.Module, steps: int = 30, seed: int = 0) -> list[float]:
    """Losses of the steps."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    data, losses = load_data("digits"), []
    while len(losses) < steps:
        epoch = len(losses) // data.steps_per_epoch(64)
        for images, labels in data.train_batches(epoch, batch_size=64, seed=seed, augmentation=Augmentation()):
            loss = nn.functional.cross_entropy(model(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                break
    return losses


def main(steps: int) -> None:
    """Train the network with gates in its blocks, and the plain one after conversion."""
    networks = {
        "CompetitiveSE in the block": build(GatedBlock),
        "plain block, converted": cmpe_se.convert(build(PlainBlock), view="folded_3x3"),
    }
    for name, model in networks.items():
        losses = train(model, steps)
        print(f"{name}: loss {losses[0]:.3f} at the first step, {losses[-1]:.3f} after {steps}")
        for view in cmpe_se.inspect_gates(model, torch.randn(4, 1, 8, 8)):
            print(f"  {view.name}: gates from {view.gate.min():.3f} to {view.gate.max():.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    main(parser.parse_args().steps)
