"""The ``predict`` command: the predictions of a trained network for images."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from cmpe_se.commands.predict.batches import Record, boundaries, predictions
from cmpe_se.commands.predict.output import checked_path, opened, origin_of
from cmpe_se.commands.predict.table import PredictionTable
from cmpe_se.data import Preprocessing
from cmpe_se.data.reading import image_files
from cmpe_se.errors import UserError, unreadable_complaint
from cmpe_se.runtimes.exported import is_exported, load_exported
from cmpe_se.shipped import SHIPPED, shipped_names, timm_configs
from cmpe_se.training.interruption import Interrupted
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.escaping import to_json
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import counted


class Predicted(TypedDict):
    """What is left of predictions that were printed or written."""

    images: int
    """All of them, with those that a file had before."""
    unreadable: list[Record]
    """``image`` and ``error`` of those that could not be read."""
    output: str | None
    """The file."""


def predict(
    run: str,
    images: str | Sequence[str],
    *,
    top: int = 5,
    batch_size: int = 64,
    as_json: bool = False,
    fail_fast: bool = False,
    trust_pickle: bool = False,
    output: str | None = None,
    workers: int = 2,
) -> list[dict[str, Any]] | Predicted:
    """Print the predictions of a finished run's network for images, as they come.

    Args:
        run: run folder, a file that `cmpe-se export` wrote (.onnx, .xml, .pt2 or, with trust_pickle, .aoti.pt2), or a
            network that comes with the package, by name. On a command line it is the first word, and the network with
            folded gates if left out.
        images: image files, and folders of them.
        top: number of classes to report for each image.
        batch_size: number of images in a batch.
        as_json: print a line of JSON for each image instead of a table.
        fail_fast: stop at the first file that cannot be read. Otherwise the others are predicted, those that cannot be
            read are listed at the end, and the exit status is 1.
        trust_pickle: open a .pt2 file whatever it holds, a compiled package (.aoti.pt2) too. Such a file can run any
            code on this machine: only for files of authors that you trust.
        output: file to write the predictions to, a line for each image (.jsonl or .csv), instead of printing them. The
            same command goes on after the images that are in the file already.
        workers: number of processes that decode images.

    Returns:
        For each image ``image`` (its path) and ``classes``: ``class`` and ``probability``, most likely first. Of a file
        that cannot be read ``image`` and ``error``, a sentence. With ``output`` ``images`` (how many are in the file),
        ``unreadable`` (records of those that could not be read) and ``output``.

    Raises:
        UserError: no finished run, no exported file of one, one that could run code, no images, probabilities that are
            not finite, with ``fail_fast`` a file that is no image, or an ``output`` that holds other predictions.
        Interrupted: Ctrl-C, with ``output``.
    """
    records: list[Record] = []
    predicted = _predict(
        run,
        images,
        records if output is None else None,
        top=top,
        batch_size=batch_size,
        as_json=as_json,
        fail_fast=fail_fast,
        trust_pickle=trust_pickle,
        output=output,
        workers=workers,
    )
    return records if output is None else predicted


def as_command(run: str | None = None, images: str | Sequence[str] = (), **settings: Any) -> Predicted:
    """:func:`predict` for the command line, which keeps no records.

    Args:
        run: what ``--run`` names; if left out, the first of the words, or the package's network if that is an image.
        images: the words.
        settings: of :func:`predict`.
    """
    words = [images] if isinstance(images, (str, Path)) else list(images)
    if run is not None:
        return _predict(run, words, None, **settings)
    if _names_a_network(words[0], alone=len(words) == 1):
        if len(words) == 1:
            raise UserError(f"no images given for {words[0]}; name image files, or folders of them, after it")
        return _predict(words[0], words[1:], None, **settings)
    config = timm_configs()[SHIPPED]
    classes = config["pretrained_cfg"]["label_names"]
    said = f"{SHIPPED} (CIFAR-10, test accuracy {config['trained']['test_top1']:.2f} %): {', '.join(classes)}"
    Terminal(stderr=True).print(said, soft_wrap=True, highlight=False)
    return _predict(SHIPPED, words, None, **settings)


def _names_a_network(path: str, *, alone: bool) -> bool:
    """Whether the first word is a network's and not an image's; of a word ``alone`` that names nothing, it is not."""
    place = Path(path)
    if is_exported(path):
        return True
    if place.is_dir():
        known = ("config.yaml", "result.json", "model", "state", "*/config.yaml")
        return any(any(True for _ in place.glob(name)) for name in known)
    if place.exists():
        return False
    return path in shipped_names() or not (alone or path.lower().endswith(IMG_EXTENSIONS))


def complaint(predicted: list[dict[str, Any]] | Predicted) -> str | None:
    """What is wrong with what ``predict`` has returned, after all: files that cannot be read."""
    if isinstance(predicted, list):
        errors = [record["error"] for record in predicted if "error" in record]
        return unreadable_complaint(errors, len(predicted) - len(errors))
    errors = [record["error"] for record in predicted["unreadable"]]
    return unreadable_complaint(errors, predicted["images"] - len(errors))


def _predict(
    run: str,
    images: str | Sequence[str],
    records: list[Record] | None,
    *,
    top: int,
    batch_size: int,
    as_json: bool,
    fail_fast: bool,
    trust_pickle: bool,
    output: str | None,
    workers: int,
) -> Predicted:
    """Print or write the predictions; ``records`` takes them up."""
    if top < 1 or batch_size < 1:
        raise UserError(f"top {top} and batch_size {batch_size} should be at least 1")
    if workers < 0:
        raise UserError(f"workers is {workers}: give a number of processes, 0 or more")
    target = checked_path(output) if output is not None else None
    network, preprocessing, device = _load(run, trust_pickle)
    images = [images] if isinstance(images, (str, Path)) else images
    paths = [str(path) for image in images for path in image_files(Path(image))]
    if not paths:
        raise UserError("no images given; name image files, or folders of them")
    top = min(top, len(preprocessing.classes))
    places = boundaries(len(paths), batch_size)
    table = None if as_json or target else PredictionTable(paths, preprocessing.classes, top)
    unreadable: list[Record] = []
    with opened(target, origin_of(run, preprocessing, top), paths, places) if target else nullcontext() as file:
        if file and file.count:
            said = f"{counted(file.count, 'image')} of {len(paths):,} are in {target} already"
            Terminal(stderr=True).print(said, soft_wrap=True)
        places = [place for place in places if place >= (file.count if file else 0)]
        batches = predictions(
            network,
            preprocessing,
            paths,
            places,
            top=top,
            workers=workers,
            device=device,
            fail_fast=fail_fast,
        )
        try:
            for batch in _with_progress(batches, len(places) - 1, hidden=not target and sys.stdout.isatty()):
                if file:
                    file.add(batch)
                if table:
                    table.add(batch)
                if as_json:
                    print("\n".join(map(to_json, batch)), flush=True)
                if records is not None:
                    records += batch
                unreadable += [record for record in batch if "error" in record]
        except KeyboardInterrupt:
            if not file:
                raise
            raise Interrupted(
                f"stopped; {file.count:,} of {counted(len(paths), 'image')} are in {target}, and the same command goes "
                "on after them"
            ) from None
    for record in file.errors if file else unreadable:
        Terminal(stderr=True).print(f"not predicted: {record['error']}", soft_wrap=True)
    if target:
        Terminal().print(f"{target}: {counted(len(paths), 'image')}", soft_wrap=True)
    return {
        "images": len(paths),
        "unreadable": file.errors if file else unreadable,
        "output": str(target) if target else None,
    }


def _with_progress(batches: Iterator[list[Record]], total: int, *, hidden: bool) -> Iterator[list[Record]]:
    """The batches with a bar, unless what is printed of them shows the progress on the same terminal."""
    yield from with_progress(batches, None if hidden else "predicting", total)


def _load(run: str, trust_pickle: bool) -> tuple[Callable[[Tensor], Tensor], Preprocessing, torch.device]:
    """Images (N, C, H, W) to logits (N, classes), what makes such images of files, and where they have to be."""
    if is_exported(run):
        exported = load_exported(run, trust_pickle=trust_pickle)
        return exported, exported.preprocessing, torch.device("cpu")
    folder = RunFolder.open(run)
    device = choose_device(folder.read_config().device)
    return folder.load_model().to(device), folder.preprocessing(), device
