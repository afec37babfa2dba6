"""Random changes to training images: their settings, and the batched form for small images."""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from cmpe_se.errors import UserError


@dataclass(frozen=True)
class Augmentation:
    """What is changed at random in training images. The default changes small images not at all.

    All images but streamed ones know ``repeated_augmentation``. Small images (``SmallImages``) know ``crop_padding``,
    ``flip`` and ``cutout``. Large ones (``LargeImages``, ``StreamedImages``) know ``flip`` and all fields from
    ``scale`` on, and always take a random crop resized to the image size; ``scale=(1.0, 1.0)`` with
    ``ratio=(1.0, 1.0)`` makes that the largest square. A field set for the other kind is an error.

    Args:
        crop_padding: black pixels (0 before normalisation) put on every side before a crop of the image's size is
            taken at random.
        flip: mirrors an image with probability 1/2. Leave it off where a mirror image is no member of its class, as
            with digits and svhn.
        repeated_augmentation: copies of an image in an epoch, which has as many images as without (``epoch_indices``).
        cutout: side in pixels of a square put at a random place and set to the mean colour (arXiv 1708.04552). Its
            centre lies anywhere in the image, so part of the square may fall outside.
        scale: smallest and largest part of the image's area that a crop takes; None is timm's (0.08, 1.0).
        ratio: smallest and largest width / height of a crop; None is timm's (3/4, 4/3).
        color_jitter: largest relative change of brightness, contrast and saturation. timm leaves it out where
            ``auto_augment`` is set.
        auto_augment: a policy in timm's notation, such as ``rand-m9-mstd0.5`` or ``original``.
        random_erasing: probability of overwriting a rectangle with noise (arXiv 1708.04896).
    """

    crop_padding: int = 0
    flip: bool = False
    repeated_augmentation: int = 1
    cutout: int = 0
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout", "color_jitter"):
            if getattr(self, name) < 0:
                raise UserError(f"augmentation: {name} is {getattr(self, name)}, and cannot be negative")
        if self.repeated_augmentation < 1:
            raise UserError(
                f"augmentation: repeated_augmentation is {self.repeated_augmentation}, should be at least 1"
            )
        if not 0 <= self.random_erasing <= 1:
            raise UserError(f"augmentation: random_erasing is {self.random_erasing}, a probability is from 0 to 1")
        for name, limit in (("scale", 1.0), ("ratio", float("inf"))):
            low, high = getattr(self, name) or (1.0, 1.0)
            if not 0 < low <= high <= limit:
                raise UserError(
                    f"augmentation: {name} is {getattr(self, name)}, should be (smallest, largest) above 0"
                    + (" and up to 1" if name == "scale" else "")
                )

    def only(self, known: tuple[str, ...], images: str) -> None:
        """Raises UserError where a field outside ``known`` is set; ``images`` says in the message what they are."""
        chosen = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        unknown = [name for name in chosen if name not in known]
        if unknown:
            raise UserError(
                f"augmentation: {', '.join(unknown)} cannot be used with {images}; these can: {', '.join(known)}"
            )


SMALL_FIELDS = ("crop_padding", "flip", "cutout", "repeated_augmentation")
STREAMED_FIELDS = ("flip", "scale", "ratio", "color_jitter", "auto_augment", "random_erasing")
LARGE_FIELDS = (*STREAMED_FIELDS, "repeated_augmentation")


def draw_places(count: int, size: tuple[int, int], augmentation: Augmentation, generator: torch.Generator) -> Tensor:
    """Where each of ``count`` images is cropped, flipped and cut: int64 (count, 5) of top, left, flip, row, column.

    Every field has its own column of random numbers, so switching one on leaves the others as they were. They are drawn
    on the CPU, where the same seed gives the same numbers whatever device the images are on.
    """
    shifts = 2 * augmentation.crop_padding + 1
    limits = torch.tensor([shifts, shifts, 2, *size], dtype=torch.float64)
    return (torch.rand(count, 5, dtype=torch.float64, generator=generator) * limits).long()


def augment(images: Tensor, places: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor | None]:
    """Crops and flips a batch, and says which pixels ``cutout`` removes.

    ``images`` uint8 (B, C, H, W), ``places`` (B, 5) as ``draw_places`` gives them, on the same device. Returns the
    images and a mask (B, 1, H, W), True where the normalised image is to be set to 0; None without cutout.
    """
    height, width = images.shape[2:]
    top, left, flip, row, column = places.unbind(1)
    if augmentation.crop_padding:
        padded = F.pad(images, (augmentation.crop_padding,) * 4)
        # A view of every crop at once, (B, C, tops, lefts, H, W): one indexing then copies the chosen ones.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        images = crops[torch.arange(len(images), device=images.device), :, top, left]  # (B, C, H, W)
    if augmentation.flip:
        images = torch.where(flip.bool()[:, None, None, None], images.flip(3), images)
    if not augmentation.cutout:
        return images, None
    rows = _covered(row, height, augmentation.cutout)  # (B, H)
    columns = _covered(column, width, augmentation.cutout)  # (B, W)
    return images, (rows[:, :, None] & columns[:, None, :])[:, None]  # (B, 1, H, W)


def _covered(centre: Tensor, length: int, side: int) -> Tensor:
    """Which of ``length`` positions a stretch of ``side`` around ``centre`` covers: bool (B, length)."""
    offset = torch.arange(length, device=centre.device) - (centre[:, None] - side // 2)
    return (offset >= 0) & (offset < side)
