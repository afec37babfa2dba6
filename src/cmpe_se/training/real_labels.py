"""Accuracy by the ReaL labels of ImageNet's validation images ("Are we done with ImageNet?", arXiv 2006.07159)."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from timm.data import RealLabelsImagenet
from torch import Tensor

from cmpe_se.data import ImageData
from cmpe_se.data.imagenet import indices_of_network
from cmpe_se.errors import UserError

_IMAGES = 50_000
_NAME = "ILSVRC2012_val_{:08d}.JPEG"


class RealMetrics(TypedDict):
    """Percent of the images for which one of the first, or first five, predictions is among an image's labels."""

    top1: float
    top5: float
    images: int
    """That have labels, and were tested."""
    without_labels: int
    """That were tested, and are left out as the paper does: none of ImageNet's classes is in them."""


def check_real(data: ImageData) -> None:
    """Refuse ReaL labels where they do not belong.

    Raises:
        UserError: a network of other classes than ImageNet's 1,000, or images that are no validation images by name.
    """
    if indices_of_network(data.classes) is None:
        raise UserError(
            f"ReaL labels are for networks with ImageNet's 1,000 classes, and this one has {len(data.classes)} "
            f"({', '.join(data.classes[:3])}, ...); leave --real-labels out"
        )
    for name in _names(data):
        found = re.fullmatch(r"ILSVRC2012_val_(\d{8})\.JPEG", name)
        if not found or not 1 <= int(found[1]) <= _IMAGES:
            raise UserError(
                f"ReaL labels are found by the file names {_NAME.format(1)} to {_NAME.format(_IMAGES)}, and {name} is "
                f"tested; test ImageNet's validation images (--data imagenet), or leave --real-labels out"
            )


def real_metrics(logits: Tensor, data: ImageData) -> RealMetrics:
    """Accuracy by ReaL labels.

    Args:
        logits: (N, 1000), of the images of ``data`` that can be read, in order.
        data: that :func:`check_real` has let pass, after a pass over its test images.

    Raises:
        UserError: none of the images has a label.
    """
    labels = RealLabelsImagenet([""] * _IMAGES).real_labels  # which it asks to be as many, whatever is tested
    order = indices_of_network(data.classes) or []
    unreadable = {Path(image.image).name for image in data.unreadable}
    names = [name for name in _names(data) if name not in unreadable]
    counts = {"top1": 0, "top5": 0, "images": 0}
    for name, ranked in zip(names, logits.topk(5).indices.tolist(), strict=True):
        if not (right := labels[name]):
            continue
        hits = [order[place] in right for place in ranked]
        counts["images"] += 1
        counts["top1"] += hits[0]
        counts["top5"] += any(hits)
    tested = counts["images"]
    if not tested:
        raise UserError(f"none of the {len(names)} images that were tested has a ReaL label; test more of them")
    top1, top5 = (100 * counts[key] / tested for key in ("top1", "top5"))
    return {"top1": top1, "top5": top5, "images": tested, "without_labels": len(names) - tested}


def _names(data: ImageData) -> Sequence[str]:
    if data.folders is None:
        raise UserError(f"ReaL labels are found by file names, which {data.name} does not have; test class folders")
    return [Path(path).name for path, _ in data.folders.test]
