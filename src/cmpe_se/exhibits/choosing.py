"""The images and blocks that a report shows."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from cmpe_se.data import Preprocessing
from cmpe_se.errors import UserError
from cmpe_se.inspecting.gathering import Gathered
from cmpe_se.inspecting.statistics import BlockStatistics
from cmpe_se.utils.text import split_names

DEPTHS = 4  # blocks that are shown in detail, at most


@dataclass(frozen=True, eq=False)
class Photo:
    """An image as the network gets it.

    Args:
        name: for people: a path, or a test image's number.
        tensor: normalised, (C, H, W).
        pixels: the same to look at, (H, W) or (H, W, 3) in [0, 1].
        label: index of its true class, None if unknown.
    """

    name: str
    tensor: Tensor
    pixels: np.ndarray
    label: int | None


def photo(name: str, image: Image.Image, label: int | None, preprocessing: Preprocessing) -> Photo:
    """An image brought to what the network was trained on."""
    return _photo(name, preprocessing.pixels(image), label, preprocessing)


def photo_of_file(path: Path, preprocessing: Preprocessing) -> Photo:
    """An image file, of unknown class."""
    return _photo(str(path), preprocessing.read(path), None, preprocessing)


def _photo(name: str, pixels: Tensor, label: int | None, preprocessing: Preprocessing) -> Photo:
    """Pixels, uint8 (C, H, W), as a network and as a plot take them."""
    shown = pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)
    return Photo(name, preprocessing.normalise(pixels), shown.numpy() / np.float32(255), label)


def choose_images(tested: Gathered, right: int, wrong: int) -> list[int]:
    """Numbers of test images of as many classes as possible: the most probable predictions, correct ones first."""
    surest = tested.confidence.argsort(descending=True, stable=True).tolist()
    correct = (tested.predicted == tested.labels).tolist()
    taken: set[int] = set()
    mistakes = _of_new_classes([i for i in surest if not correct[i]], tested.labels, taken, wrong)
    return _of_new_classes([i for i in surest if correct[i]], tested.labels, taken, right) + mistakes


def _of_new_classes(candidates: list[int], labels: Tensor, taken: set[int], count: int) -> list[int]:
    chosen: list[int] = []
    for index in candidates:
        if len(chosen) < count and int(labels[index]) not in taken:
            taken.add(int(labels[index]))
            chosen.append(index)
    repeated = [index for index in candidates if index not in chosen]  # where there are fewer classes
    return chosen + repeated[: count - len(chosen)]


def choose_blocks(blocks: Sequence[BlockStatistics]) -> list[str]:
    """Of each stage (blocks of one width in a row) the one whose gates vary most over the images; at most four.

    Where none varies, the one whose channels differ most.
    """
    stages = [list(stage) for _, stage in groupby(blocks, key=lambda block: block.channels)]
    best = [max(stage, key=_variation).name for stage in stages]
    if len(best) > DEPTHS:
        best = [best[round(i * (len(best) - 1) / (DEPTHS - 1))] for i in range(DEPTHS)]
    return best


def _variation(block: BlockStatistics) -> tuple[float, float]:
    over_images = block.std.mean().item() if block.varies else 0.0  # else it is rounding noise
    return over_images / block.gain, block.mean.std(correction=0).item() / block.gain


def named_blocks(text: str, known: Sequence[str]) -> list[str]:
    """Names with commas between, in the network's order.

    Raises:
        UserError: a name that is no competitive block's.
    """
    names = split_names(text)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"no competitive block is called '{unknown[0]}'; there are {', '.join(known)}")
    if not names:
        raise UserError(f"blocks is empty; name some of {', '.join(known)}")
    return [name for name in known if name in names]


@dataclass(frozen=True)
class ConfusedPair:
    """Test images of one class that were predicted as another.

    Args:
        true, predicted: indices of the classes.
        images: numbers of the test images, the most probable mistakes first.
    """

    true: int
    predicted: int
    images: tuple[int, ...]


def confused_pairs(tested: Gathered) -> list[ConfusedPair]:
    """All pairs of classes with mistakes, the most frequent first."""
    found: dict[tuple[int, int], list[int]] = {}
    predicted, labels = tested.predicted.tolist(), tested.labels.tolist()
    for index in tested.confidence.argsort(descending=True, stable=True).tolist():
        if predicted[index] != labels[index]:
            found.setdefault((labels[index], predicted[index]), []).append(index)
    pairs = [ConfusedPair(*pair, tuple(images)) for pair, images in found.items()]
    return sorted(pairs, key=lambda pair: (-len(pair.images), pair.true, pair.predicted))
