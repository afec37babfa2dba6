"""Training images without augmentation, to look at and not to learn from."""

from collections.abc import Iterable, Iterator

from cmpe_se.data.augmentation import Augmentation
from cmpe_se.data.interface import Batch, ImageData
from cmpe_se.data.small import SmallImages


def plain_training_batches(data: ImageData, count: int, *, batch_size: int) -> Iterator[Batch]:
    """At most ``count`` training images, drawn evenly, in batches as of ``train_batches``; the same ones every time.

    They are as they stand in the data set, or, where they are of many sizes, the largest square of each, at the size
    that tests have: the network is looked at as it is used.
    """
    plain = Augmentation() if isinstance(data, SmallImages) else Augmentation(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    batches = data.trained_as_tested().train_batches(0, batch_size=min(batch_size, count), seed=0, augmentation=plain)
    return first_images(batches, count)


def first_images(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """The first ``count`` images of batches, at least one; no batch is read beyond them."""
    for images, labels in batches:
        yield images[:count], labels[:count]
        count -= len(images)
        if count <= 0:
            return
