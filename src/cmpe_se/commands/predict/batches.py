"""Predictions of files, a batch at a time: nothing of a batch is kept once the next one is there."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cmpe_se.data import Preprocessing
from cmpe_se.data.workers import batches_on
from cmpe_se.errors import UserError
from cmpe_se.utils.signals import ignore_in_worker

_FIRST = 8  # images of the first batch, so that the first answer comes soon
Record = dict[str, Any]
"""``image``, with ``classes`` or ``error``."""


def boundaries(count: int, batch_size: int) -> list[int]:
    """Where batches of ``count`` images begin, and where the last one ends."""
    first = min(_FIRST, batch_size)
    return sorted({0, *range(first, count, batch_size), count})


def predictions(
    network: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    paths: Sequence[str],
    places: Sequence[int],
    *,
    top: int,
    workers: int,
    device: torch.device,
    fail_fast: bool = False,
) -> Iterator[list[Record]]:
    """A record for each file, in their order, in batches.

    Args:
        network: images (N, C, H, W) on ``device`` to logits (N, classes).
        preprocessing: of its images.
        paths: files.
        places: where batches begin and the last one ends, of :func:`boundaries`; none before the first is predicted.
        top: number of classes in a record.
        workers: processes that decode; the records are the same for any number.
        device: of the network.
        fail_fast: raise the UserError of the first file that cannot be read.

    Raises:
        UserError: probabilities that are not finite.
    """
    plan = [range(*pair) for pair in pairwise(places)]
    loader = DataLoader(
        _Files(paths, preprocessing),
        batch_size=None,
        sampler=plan,
        num_workers=min(workers, len(plan)) if len(plan) > 1 else 0,
        generator=torch.Generator(),  # else it draws a seed from the global one, which belongs to the caller
        worker_init_fn=ignore_in_worker,
    )
    for batch, (pixels, good, errors) in zip(plan, batches_on(device, loader), strict=True):
        if errors and fail_fast:
            raise UserError(errors[0][1])
        found = {place: {"image": paths[place], "error": error} for place, error in errors}
        if len(pixels):
            with torch.inference_mode():
                probabilities = network(preprocessing.normalise(pixels)).float().softmax(1).cpu()  # (N, classes)
            values, indices = probabilities.topk(min(top, len(preprocessing.classes)))
            finite = probabilities.isfinite().all(1).tolist()
            for place, row, ranked, is_finite in zip(
                good.tolist(), values.tolist(), indices.tolist(), finite, strict=True
            ):
                if not is_finite:
                    raise UserError(
                        f"the network has no finite probabilities for {paths[place]}: its weights are damaged or too "
                        "large"
                    )
                entries = zip(ranked, row, strict=True)
                classes = [{"class": preprocessing.classes[k], "probability": round(p, 6)} for k, p in entries]
                found[place] = {"image": paths[place], "classes": classes}
        yield [found[place] for place in batch]


class _Files(Dataset):
    """Item ``range`` is the images of these files, uint8 (n, C, H, W), their places, and those of files that are none.

    A batch rather than an image goes through the loader: so it goes through shared memory in one piece.
    """

    def __init__(self, paths: Sequence[str], preprocessing: Preprocessing):
        self.paths, self.preprocessing = paths, preprocessing

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, batch: range) -> tuple[Tensor, Tensor, list[tuple[int, str]]]:
        pixels, good, errors = [], [], []
        for place in batch:
            try:
                pixels.append(self.preprocessing.read(self.paths[place]))
                good.append(place)
            except UserError as error:
                errors.append((place, str(error)))
        images = torch.stack(pixels) if pixels else torch.empty(0, dtype=torch.uint8)
        return images, torch.tensor(good, dtype=torch.int64), errors
