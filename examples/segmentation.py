"""A segmentation model with a converted backbone learns to find digits.

    python examples/segmentation.py

torchvision's DeepLabV3 (ResNet-50), converted in one line, on scikit-learn's handwritten digits: four of them to an
image, each pixel of a stroke labelled with its digit. A few steps show the loss falling; nothing is downloaded.
"""

import argparse

import numpy as np
import sklearn.datasets
import torch
import torchvision
from torch import Tensor

import cmpe_se

BACKGROUND, STROKE = 0, 8  # class of what is no digit; grey level (of 16) from which a pixel belongs to the stroke
SCALE = 4  # pixels of the image to a pixel of the data set


def digit_scenes(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images (count, 3, 64, 64) in [0, 1] of two by two digits, and each pixel's class (count, 64, 64), 0 to 10."""
    digits = sklearn.datasets.load_digits()
    chosen = np.random.default_rng(seed).choice(len(digits.images), size=(count, 2, 2), replace=False)
    pixels = torch.from_numpy(digits.images[chosen]).float()  # (count, 2, 2, 8, 8), 0 to 16
    classes = torch.from_numpy(digits.target[chosen])[..., None, None] + 1
    labels = torch.where(pixels >= STROKE, classes, BACKGROUND)

    def scene(tiles: Tensor) -> Tensor:
        joined = tiles.permute(0, 1, 3, 2, 4).reshape(count, 16, 16)
        return joined.repeat_interleave(SCALE, 1).repeat_interleave(SCALE, 2)

    return scene(pixels / 16)[:, None].repeat(1, 3, 1, 1), scene(labels)


def train(steps: int = 20, batch_size: int = 4, seed: int = 0) -> list[float]:
    """Losses of the steps."""
    torch.manual_seed(seed)
    model = torchvision.models.segmentation.deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=11)
    model = cmpe_se.convert(model, view="folded_3x3")
    print(f"{len(cmpe_se.conversion_report(model).gates)} residual additions of the backbone converted")
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4)
    images, labels = digit_scenes(steps * batch_size, seed)
    losses = []
    for step, (x, y) in enumerate(zip(images.split(batch_size), labels.split(batch_size), strict=True), start=1):
        loss = torch.nn.functional.cross_entropy(model(x)["out"], y)  # (B, 11, 64, 64) and (B, 64, 64)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step:>3}  loss {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    train(parser.parse_args().steps)
