"""Test images corrupted in five ways and five severities, the same for every network.

After "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations" (arXiv 1903.12261), with
torchvision's transforms instead of that paper's code: the numbers cannot be compared with those on CIFAR-10-C.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor

from cmpe_se.data import ImageData
from cmpe_se.data.seeds import derive_seed
from cmpe_se.errors import UserError
from cmpe_se.utils.randomness import seeded

CORRUPTIONS: dict[str, tuple[float, ...]] = {
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (1.25, 1.5, 1.75, 2.0, 2.25),
    "noise": (0.03, 0.06, 0.09, 0.12, 0.15),
    "blur": (1 / 64, 1.5 / 64, 2 / 64, 2.5 / 64, 3 / 64),
    "jpeg": (80, 60, 40, 25, 15),
}
"""Name of each corruption to its parameter at the severities 1 to 5:

- ``contrast``: factor on each pixel's distance to the image's mean grey: 0.75, 0.5, 0.4, 0.3, 0.15 (CIFAR-10-C's);
- ``brightness``: factor on each pixel, cut off at white: 1.25, 1.5, 1.75, 2, 2.25;
- ``noise``: standard deviation of Gaussian noise on each channel of each pixel, white being 1: 0.03, 0.06, 0.09, 0.12,
  0.15 (CIFAR-10-C has 0.04 to 0.1, ImageNet-C 0.08 to 0.38);
- ``blur``: standard deviation of a Gaussian filter, as a part of the image's shorter side: 1/64, 1.5/64, 2/64, 2.5/64,
  3/64. So 0.5 to 1.5 pixels for an image of 32, 0.25 to 0.75 for 16, and 3.5 to 10.5 for 224: the same details are lost
  at every size. Images of 8 pixels, such as digits, change little;
- ``jpeg``: quality of JPEG compression: 80, 60, 40, 25, 15 (CIFAR-10-C goes down to 40, ImageNet-C to 7).
"""

SEVERITIES = (1, 2, 3, 4, 5)


def corrupt(images: Tensor, corruption: str, severity: int, *, first: int = 0) -> Tensor:
    """Corrupt images; what becomes of one depends on its pixels and its index alone, not on the batch it is in.

    Only noise is random. It is drawn on the CPU from a generator seeded by (severity, index of the image), so it is the
    same for all networks, devices and batch sizes.

    Args:
        images: uint8 (B, C, H, W), C of 1 or 3, on any device; all work is done on the CPU.
        corruption: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        first: index of the batch's first image in the test set.

    Returns:
        uint8 (B, C, H, W), on the device of ``images``.

    Raises:
        UserError: an unknown corruption or severity, or images of another kind.
    """
    if corruption not in CORRUPTIONS or severity not in SEVERITIES:
        raise UserError(
            f"there is no corruption {corruption!r} of severity {severity}; choose of {', '.join(CORRUPTIONS)}, with "
            "severities from 1 to 5"
        )
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(
            f"corruptions are for images of uint8 (B, 1 or 3, H, W); these are {images.dtype} {tuple(images.shape)}"
        )
    if not len(images):
        return images.clone()
    parameter = CORRUPTIONS[corruption][severity - 1]
    pixels = images.cpu()
    if corruption == "noise":
        pixels = _with_noise(pixels, parameter, severity, first)
    else:
        pixels = _CHANGES[corruption](pixels, parameter)
    return pixels.to(images.device)


def corrupted_test_sets(data: ImageData) -> Iterator[tuple[str, int, Tensor]]:
    """All test images of a data set, corrupted in each way: for callers who test many networks on the same ones.

    Yields (corruption, severity, images): in the order of ``CORRUPTIONS`` and from severity 1 to 5, images uint8
    (M, C, H, W) on the CPU, in the order of ``data.test_pixels``, which has their labels. A list of them takes 25 times
    the memory of the test images: 770 MB for CIFAR-10.

    Raises:
        UserError: data that are streamed.
    """
    images, _ = next(data.test_pixels(batch_size=data.test_size))
    for corruption in CORRUPTIONS:
        for severity in SEVERITIES:
            yield corruption, severity, corrupt(images, corruption, severity)


def _with_noise(images: Tensor, deviation: float, severity: int, first: int) -> Tensor:
    noisy = []
    for index, image in enumerate(images / 255, start=first):  # added to uint8, noise would be rounded towards 0
        with seeded(derive_seed("noise", severity, index)):  # torchvision takes no generator
            noisy.append(F.gaussian_noise(image, 0.0, deviation))
    return torch.stack(noisy).mul_(255).round_().to(torch.uint8)


def _blurred(images: Tensor, part: float) -> Tensor:
    height, width = images.shape[2:]
    deviation = part * min(height, width)
    reach = math.ceil(3 * deviation)
    rows, columns = (2 * min(reach, side - 1) + 1 for side in (height, width))  # reflection reaches no further
    # One direction after the other: at 224 pixels a filter in both at once takes ten times as long.
    blurred = F.gaussian_blur(images.float(), [columns, 1], [deviation, deviation])
    return F.gaussian_blur(blurred, [1, rows], [deviation, deviation]).round_().to(torch.uint8)


_CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "contrast": F.adjust_contrast,
    "brightness": F.adjust_brightness,
    "blur": _blurred,
    "jpeg": F.jpeg,
}
