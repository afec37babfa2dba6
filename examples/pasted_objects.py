"""Objects pasted on photographs: images for detection and segmentation, with exact boxes and masks and no download.

Small classified images (CIFAR-10's, other class folders', scikit-learn's digits) are cut out round or square and pasted
on crops of the photographs that come with scikit-image and scikit-learn. Objects do not cover each other, so boxes and
masks are exact. Training and test share neither objects nor photographs.

    objects = load_objects("data/cifar10", classes=("airplane", "frog"))
    scenes = PastedObjects(*objects.train, photographs("train"), count=1000, seed=0)
    scene = scenes[0]  # image, boxes, labels, masks
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cmpe_se.data import load_data
from cmpe_se.errors import UserError

PHOTOGRAPHS = {
    "train": (
        "china.jpg",
        "astronaut.png",
        "brick.png",
        "grass.png",
        "motorcycle_left.png",
        "retina.jpg",
        "rocket.jpg",
    ),
    "test": ("flower.jpg", "camera.png", "chelsea.png", "coffee.png", "gravel.png", "hubble_deep_field.jpg"),
}
"""Files of scikit-learn (china and flower) and scikit-image, all in their wheels."""

_TRIES = 20  # places that are drawn for an object before it is left out


class Scene(NamedTuple):
    """An image and its K objects, K at least 1."""

    image: Tensor
    """uint8 (3, H, W)."""
    boxes: Tensor
    """float32 (K, 4): left, top, right, bottom in pixels, where right and bottom are the first pixel outside."""
    labels: Tensor
    """int64 (K,), from 0."""
    masks: Tensor
    """bool (K, H, W); they do not overlap."""


class Objects(NamedTuple):
    """Small classified images for training and for the test."""

    classes: tuple[str, ...]
    train: tuple[Tensor, Tensor]
    """uint8 (N, 3, h, w) and int64 (N,)."""
    test: tuple[Tensor, Tensor]


def load_objects(source: str | Path = "digits", classes: Sequence[str] = ()) -> Objects:
    """Small images to paste.

    Args:
        source: ``digits`` (scikit-learn's, nothing to download), a folder that has torchvision's CIFAR-10
            (``cifar-10-batches-py``), or one with class folders in ``train`` and ``test``.
        classes: those to take, in the order of their labels; all if left out.

    Raises:
        UserError: what :func:`cmpe_se.data.load_data` refuses, or a class that is not there.
    """
    if str(source) == "digits":
        data = load_data("digits")
    elif Path(source, "cifar-10-batches-py").is_dir():
        data = load_data("cifar10", source)
    else:
        data = load_data("folder", source, image_size=32)
    if missing := [name for name in classes if name not in data.classes]:
        raise UserError(f"{source} has no class {missing[0]!r}; it has {', '.join(data.classes)}")
    chosen = [data.classes.index(name) for name in classes or data.classes]
    train_images, train_labels, test_images, test_labels = data.tensors
    return Objects(
        tuple(data.classes[index] for index in chosen),
        _of_classes(train_images, train_labels, chosen),
        _of_classes(test_images, test_labels, chosen),
    )


def _of_classes(images: Tensor, labels: Tensor, classes: list[int]) -> tuple[Tensor, Tensor]:
    kept = torch.isin(labels, torch.tensor(classes))
    numbers = torch.full((max(classes) + 1,), -1)
    numbers[classes] = torch.arange(len(classes))
    return images[kept].expand(-1, 3, -1, -1), numbers[labels[kept]]


@cache
def photographs(part: str) -> tuple[Tensor, ...]:
    """Photographs uint8 (3, H, W), H and W at least 300, for the part ``train`` or ``test``; the two share none."""
    try:
        import skimage.data
        import sklearn.datasets
    except ImportError as error:
        raise UserError(f"the photographs come with {error.name}; pip install scikit-image scikit-learn") from None
    folders = (Path(sklearn.datasets.__file__).parent / "images", Path(skimage.data.__file__).parent)
    files = [next(folder / name for folder in folders if (folder / name).is_file()) for name in PHOTOGRAPHS[part]]
    return tuple(torch.from_numpy(np.array(Image.open(file).convert("RGB"))).permute(2, 0, 1) for file in files)


class PastedObjects(torch.utils.data.Dataset[Scene]):
    """Scenes that depend on (seed, index) alone, made when they are asked for.

    Args:
        images: objects, uint8 (N, 3, h, w).
        labels: int64 (N,).
        backgrounds: photographs, uint8 (3, H, W), at least ``size`` high and wide.
        count: number of scenes.
        size: side of the square scenes in pixels.
        objects: least and largest number of objects in a scene. One that finds no free place is left out.
        side: least and largest side of an object in pixels.
        mirror: whether half of the objects are mirrored; not digits, of which a mirrored 5 reads as a 2.
        seed: of all that is drawn.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        backgrounds: Sequence[Tensor],
        count: int,
        *,
        size: int = 128,
        objects: tuple[int, int] = (1, 4),
        side: tuple[int, int] = (28, 48),
        mirror: bool = True,
        seed: int = 0,
    ):
        self.images, self.labels, self.backgrounds, self.mirror = images, labels, backgrounds, mirror
        self.count, self.size, self.objects, self.side, self.seed = count, size, objects, side, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:  # which also ends a loop over the scenes
            raise IndexError(f"scene {index} of {self.count}")
        random = np.random.default_rng([self.seed, index])
        image = self._background(random)
        boxes: list[tuple[int, int, int, int]] = []
        labels, masks = [], []
        for _ in range(random.integers(self.objects[0], self.objects[1] + 1)):
            side = int(random.integers(self.side[0], self.side[1] + 1))
            chosen, is_round, is_flipped = int(random.integers(len(self.images))), *random.integers(2, size=2)
            place = self._free_place(boxes, side, random)
            if place is None:
                continue
            left, top = place
            cut_out = _disc(side) if is_round else torch.ones(side, side, dtype=torch.bool)
            pixels = _resized(self.images[chosen], side)
            region = image[:, top : top + side, left : left + side]
            region[:, cut_out] = (pixels.flip(2) if is_flipped and self.mirror else pixels)[:, cut_out]
            mask = torch.zeros(self.size, self.size, dtype=torch.bool)
            mask[top : top + side, left : left + side] = cut_out
            boxes.append((left, top, left + side, top + side))
            labels.append(self.labels[chosen])
            masks.append(mask)
        return Scene(image, torch.tensor(boxes, dtype=torch.float32), torch.stack(labels), torch.stack(masks))

    def _background(self, random: np.random.Generator) -> Tensor:
        """A square crop of a photograph, mirrored or not, scaled down by a factor between 1 and 3."""
        photograph = self.backgrounds[random.integers(len(self.backgrounds))]
        height, width = photograph.shape[1:]
        side = int(random.integers(self.size, min(height, width, 3 * self.size) + 1))
        top, left = random.integers(height - side + 1), random.integers(width - side + 1)
        crop = photograph[:, top : top + side, left : left + side]
        return _resized(crop.flip(2) if random.integers(2) else crop, self.size)

    def _free_place(
        self, boxes: list[tuple[int, int, int, int]], side: int, random: np.random.Generator
    ) -> tuple[int, int] | None:
        for left, top in random.integers(self.size - side + 1, size=(_TRIES, 2)).tolist():
            if all(
                left + side <= other[0] or other[2] <= left or top + side <= other[1] or other[3] <= top
                for other in boxes
            ):
                return left, top
        return None


def _disc(side: int) -> Tensor:
    """bool (side, side): the pixels whose centres lie in the circle that touches all four edges."""
    offsets = torch.arange(side) - (side - 1) / 2
    return offsets[:, None] ** 2 + offsets**2 <= (side / 2) ** 2


def _resized(image: Tensor, side: int) -> Tensor:
    pixels = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((side, side), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
