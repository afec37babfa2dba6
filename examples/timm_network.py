"""A network of timm, converted: its output stays, its gates learn, and its merged form computes the same.

    python examples/timm_network.py

A ResNet-18 and scikit-learn's handwritten digits; a few steps show the loss falling. Nothing is downloaded: the weights
are random here, and ``pretrained=True`` is where yours would come in.
"""

import argparse

import timm
import torch
from torch import Tensor, nn

import cmpe_se
from cmpe_se.data import Augmentation, load_data


def build(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The network of timm and its converted copy, for grey images of ten classes."""
    torch.manual_seed(seed)
    original = timm.create_model("resnet18", pretrained=False, num_classes=10, in_chans=1)
    converted = cmpe_se.convert(original, view="folded_3x3")
    print(cmpe_se.conversion_report(converted))
    return original, converted


def train(model: nn.Module, steps: int = 15, batch_size: int = 64, seed: int = 0) -> list[float]:
    """Losses of the steps. The gates learn ten times as fast as the weights that the network came with."""
    gates = [weight for name, weight in model.named_parameters() if ".competition." in name]
    others = [weight for name, weight in model.named_parameters() if ".competition." not in name]
    optimizer = torch.optim.AdamW([{"params": gates, "lr": 1e-2}, {"params": others, "lr": 1e-3}])
    batches = load_data("digits").train_batches(0, batch_size=batch_size, seed=seed, augmentation=Augmentation())
    losses = []
    model.train()
    for step, (images, labels) in zip(range(steps), batches, strict=False):
        images = nn.functional.interpolate(images, scale_factor=4)  # (B, 1, 32, 32), from 8x8
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        print(f"step {step + 1:>3}  loss {losses[-1]:.3f}")
    return losses


def largest_difference(one: nn.Module, other: nn.Module, images: Tensor) -> float:
    """Largest difference of a logit in eval mode, as a part of the largest logit."""
    with torch.inference_mode():
        a, b = one.eval()(images), other.eval()(images)
    return float((a - b).abs().max() / a.abs().max())


def main(steps: int) -> None:
    """Convert, train, look at the gates, merge."""
    original, converted = build()
    images = torch.randn(4, 1, 32, 32)
    print(f"before training: difference {largest_difference(original, converted, images)}")
    train(converted, steps)
    for block in cmpe_se.inspect_gates(converted, images):
        print(f"{block.name}: gates from {block.gate.min():.3f} to {block.gate.max():.3f}")
    merged = cmpe_se.merge(converted)
    print(f"merged: difference {largest_difference(converted, merged, images):.1e}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    main(parser.parse_args().steps)
