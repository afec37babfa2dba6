"""Progressive resizing: smaller training images in the first epochs, which cost as much less."""

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from cmpe_se.errors import UserError


class ProgressiveResizing:
    """Makes the images of a batch smaller, by the epoch; networks that average their last maps take any size.

    Args:
        epochs_at: sides in pixels to numbers of epochs, in the order of training; what is left of the epochs has whole
            images.
        image_size: height and width of whole images.

    Raises:
        UserError: a side that is not below the images' own.
    """

    def __init__(self, epochs_at: Mapping[int, int], image_size: tuple[int, int]):
        self.shorter = min(image_size)
        if large := [side for side in epochs_at if side >= self.shorter]:
            raise UserError(
                f"progressive_resizing has images of {large[0]} pixels first, and whole ones have "
                f"{'x'.join(map(str, image_size))}; give smaller sides, or leave it out"
            )
        self._sides = [side for side, epochs in epochs_at.items() for _ in range(epochs)]

    def side(self, epoch: int) -> int:
        """Shorter side in pixels of the images of an epoch, counted from 0."""
        return self._sides[epoch] if epoch < len(self._sides) else self.shorter

    def __call__(self, images: Tensor, epoch: int) -> Tensor:
        """A batch (B, C, H, W) in the size of an epoch, by bilinear interpolation with antialiasing."""
        side = self.side(epoch)
        if side == self.shorter:
            return images
        size = [round(length * side / self.shorter) for length in images.shape[2:]]
        return F.interpolate(images, size, mode="bilinear", antialias=True)
