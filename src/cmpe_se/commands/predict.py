"""The ``predict`` command: the predictions of a trained network for images."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from cmpe_se.data import Preprocessing
from cmpe_se.data.reading import image_files
from cmpe_se.errors import UserError, unreadable_complaint
from cmpe_se.runtimes.exported import is_exported, load_exported
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.escaping import to_json
from cmpe_se.utils.terminal import Terminal

_SHOWN = 3  # classes a line of the table


def predict(
    run: str,
    images: str | Sequence[str],
    *,
    top: int = 5,
    batch_size: int = 64,
    as_json: bool = False,
    fail_fast: bool = False,
    trust_pickle: bool = False,
) -> list[dict[str, Any]]:
    """Print the predictions of a finished run's network for images.

    Args:
        run: run folder, or a file that `cmpe-se export` wrote (.onnx, .xml, .pt2 or, with trust_pickle, .aoti.pt2).
        images: image files, and folders of them.
        top: number of classes to report for each image.
        batch_size: number of images in a batch.
        as_json: print a line of JSON for each image instead of a table.
        fail_fast: stop at the first file that cannot be read. Otherwise the others are predicted, those that cannot be
            read are listed at the end, and the exit status is 1.
        trust_pickle: open a .pt2 file whatever it holds, a compiled package (.aoti.pt2) too. Such a file can run any
            code on this machine: only for files of authors that you trust.

    Returns:
        For each image ``image`` (its path) and ``classes``: ``class`` and ``probability``, most likely first. Of a file
        that cannot be read ``image`` and ``error``, a sentence.

    Raises:
        UserError: no finished run, no exported file of one, one that could run code, no images, probabilities that are
            not finite, or, with ``fail_fast``, a file that is no image.
    """
    if top < 1 or batch_size < 1:
        raise UserError(f"top {top} and batch_size {batch_size} should be at least 1")
    model, preprocessing = _load(run, trust_pickle)
    images = [images] if isinstance(images, (str, Path)) else images
    paths = [path for image in images for path in image_files(Path(image))]
    if not paths:
        raise UserError("no images given; name image files, or folders of them")
    console = Terminal()
    predictions: list[dict[str, Any]] = []
    for start in range(0, len(paths), batch_size):
        records = _predict_batch(model, preprocessing, paths[start : start + batch_size], top, fail_fast=fail_fast)
        if as_json:
            for record in records:
                print(to_json(record), flush=True)
        predictions += records
    good = [record for record in predictions if "classes" in record]
    if good and not as_json:
        console.print(_table(good))
    for record in predictions:
        if "error" in record:
            Terminal(stderr=True).print(f"not predicted: {record['error']}", soft_wrap=True)
    return predictions


def complaint(predictions: list[dict[str, Any]]) -> str | None:
    """What is wrong with what ``predict`` has returned, after all: files that cannot be read."""
    errors = [record["error"] for record in predictions if "error" in record]
    return unreadable_complaint(errors, len(predictions) - len(errors))


def _predict_batch(
    model: Callable[[Tensor], Tensor], preprocessing: Preprocessing, paths: Sequence[Path], top: int, *, fail_fast: bool
) -> list[dict[str, Any]]:
    """A record for each file, in their order."""
    pixels: dict[Path, Tensor] = {}
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            pixels[path] = preprocessing.read(path)
        except UserError as error:
            if fail_fast:
                raise
            errors[path] = str(error)
    records = {path: {"image": str(path), "error": error} for path, error in errors.items()}
    if pixels:
        with torch.inference_mode():
            logits = model(preprocessing.normalise(torch.stack(list(pixels.values()))))
        probabilities = logits.softmax(1)  # (B, classes)
        for path, row in zip(pixels, probabilities, strict=True):
            if not row.isfinite().all():
                raise UserError(
                    f"the network has no finite probabilities for {path}: its weights are damaged or too large"
                )
            records[path] = _record(path, row, preprocessing.classes, top)
    return [records[path] for path in paths]


def _load(run: str, trust_pickle: bool) -> tuple[Callable[[Tensor], Tensor], Preprocessing]:
    """Images (N, C, H, W) to logits (N, classes), and what makes such images of files."""
    if is_exported(run):
        exported = load_exported(run, trust_pickle=trust_pickle)
        return exported, exported.preprocessing
    folder = RunFolder.open(run)
    return folder.load_model(), folder.preprocessing()


def _record(path: Path, probabilities: Tensor, classes: Sequence[str], top: int) -> dict[str, Any]:
    values, indices = probabilities.topk(min(top, len(classes)))
    ranked = zip(indices.tolist(), values.tolist(), strict=True)
    return {"image": str(path), "classes": [{"class": classes[i], "probability": round(p, 6)} for i, p in ranked]}


def _table(predictions: list[dict[str, Any]]) -> Table:
    table = Table()
    table.add_column("image", overflow="fold")
    for rank in range(min(_SHOWN, len(predictions[0]["classes"]))):
        table.add_column("most likely" if rank == 0 else "or")
    for prediction in predictions:
        cells = [f"{entry['class']} {100 * entry['probability']:.1f} %" for entry in prediction["classes"][:_SHOWN]]
        table.add_row(prediction["image"], *cells)
    return table
