"""A network of torchvision: convert its last stage, export it, and run it without this package.

    python examples/torchvision_network.py

A RegNet, converted from its third stage on, merged, and written by torch.export to a temporary file. The file needs
PyTorch alone. Weights are random here; ``weights="DEFAULT"`` downloads torchvision's.
"""

import tempfile
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import cmpe_se

WHERE = ["trunk_output.block3", "trunk_output.block4"]


def build(seed: int = 0) -> tuple[nn.Module, nn.Module]:
    """The network of torchvision and its copy with gates in the blocks of ``WHERE``, both in eval mode."""
    torch.manual_seed(seed)
    original = torchvision.models.regnet_y_400mf(weights=None, num_classes=10).eval()
    converted = cmpe_se.convert(original, view="se_sum", reduction=4, where=WHERE)
    print(cmpe_se.conversion_report(converted))
    return original, converted


def open_gates_a_little(model: nn.Module, seed: int = 0) -> None:
    """Move the gates from their start, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".competition." in name:
                weight.add_(0.1 * torch.randn(weight.shape, generator=generator))


def export(model: nn.Module, path: Path, images: Tensor) -> None:
    """Write the merged network for batches of any size."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(cmpe_se.merge(model), (images,), dynamic_shapes=({0: batch},))
    torch.export.save(program, path)


def main() -> None:
    """Convert, export, and compare the file's outputs with the network's."""
    original, converted = build()
    images = torch.randn(3, 3, 64, 64)
    with torch.inference_mode():
        print("before training, equal bit for bit:", torch.equal(original(images), converted(images)))
    open_gates_a_little(converted)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        export(converted, Path(folder) / "network.pt2", torch.randn(2, 3, 64, 64))
        loaded = torch.export.load(Path(folder) / "network.pt2").module()  # our own file: a .pt2 can hold code
        print(f"exported: largest difference {(loaded(images) - converted(images)).abs().max():.1e}")


if __name__ == "__main__":
    main()
