"""WebDataset shards: what ``_info.json`` says of them, and whether it can be so."""

import json
import logging
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from cmpe_se.data.image_files import describe_passed_over, image_suffixes, is_hidden
from cmpe_se.data.preprocessing import Preprocessing
from cmpe_se.data.splits import choose_splits, places_of
from cmpe_se.data.streamed import StreamedImages
from cmpe_se.errors import UserError

_log = logging.getLogger(__name__)
_MOST_MEMBERS = 50_000
"""Members that are looked at in all shards together, before a shard's first good sample is enough."""


def load_web_dataset(
    name: str,
    root: Path,
    *,
    create: Callable[[tuple[str, ...]], Preprocessing],
    workers: int,
    train_image_size: int | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    known: tuple[str, ...] | None = None,
    skip_unreadable: bool = False,
) -> StreamedImages:
    """The shards of ``root``, described by timm's ``_info.json``.

    The file may also hold ``classes``, a list of names; without it the shards are gone through once for their labels
    (``.cls``). ``create`` makes the preprocessing of the class names, and ``train_image_size`` is the side of training
    images where it is not the preprocessing's. Each shard has to hold a sample of an image and a label. Shards for a
    network that has the classes ``known`` are only tested on, and need none for training.
    """
    if not find_spec("webdataset"):
        raise UserError(f"{name} needs the package webdataset: pip install 'cmpe-se[wds]'")
    info_file = root / "_info.json"
    try:
        info = json.loads(info_file.read_text())
        train, tests = choose_splits(name, list(info["splits"]), train_split, test_split, hold_out=known is not None)
        test = tests[0]
        used = [split for split in (train, test) if split]
        shards = [(split, root / shard, shard) for split in used for shard in info["splits"][split]["filenames"]]
        samples = {split: info["splits"][split].get("num_samples") for split in used}
        label_members = {split: _label_member(info["splits"][split]) for split in used}
        classes = tuple(info.get("classes") or ())
    except FileNotFoundError:
        raise UserError(f"{root} has no _info.json; expected timm's description of the shards there") from None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{info_file} cannot be used ({type(error).__name__}: {error}); expected "
            '{"splits": {"train": {"name": "train", "num_samples": N, "filenames": [...], "shard_lengths": [...]}}}'
        ) from None
    missing = [(path, shard) for _, path, shard in shards if not path.is_file()]
    for _, shard in missing:
        refuse_url(shard, f"{info_file} names the shard")
    if missing:
        raise UserError(f"{info_file} names {len(missing)} shards that are not there, the first {missing[0][0]}")
    _check(root, [(path, label_members[split]) for split, path, _ in shards])
    if not classes:
        classes = tuple(map(str, range(_largest_label(info_file, [path for _, path, _ in shards]) + 1)))
    if empty := [split for split in used if samples[split] == 0]:
        raise UserError(f"{info_file} says that the split {empty[0]} has no samples; correct it")
    try:
        return StreamedImages(
            name,
            root,
            preprocessing=create(known or classes),
            train_split=train,
            test_split=test,
            workers=workers,
            train_image_size=train_image_size,
            skip_unreadable=skip_unreadable,
            places=None if known is None else places_of(classes, known, name),
        )
    except (RuntimeError, KeyError, TypeError) as error:
        raise UserError(f"{info_file} cannot be used ({type(error).__name__}: {error})") from None


def refuse_url(place: str, said: str) -> None:
    """Raise UserError where a name is no file's and webdataset would run a command for it, or fetch it.

    ``said`` begins the message: who names the place.
    """
    scheme = urlparse(place).scheme
    if place == "-" or len(scheme) > 1:  # one letter is a drive of Windows
        raise UserError(
            f"{said} {place}: no command is run and nothing is fetched for shards here; write them to a folder first, "
            "and name the files"
        )


def _label_member(split: dict[str, Any]) -> str:
    """Ending of the members that hold labels, as timm takes it."""
    return "json" if split.get("alt_label") else "cls"


def _check(root: Path, shards: list[tuple[Path, str]]) -> None:
    """Raise UserError for a shard without one sample of an image and a label; log what is passed over."""
    left, passed_over = _MOST_MEMBERS, Counter[str]()
    endings = {suffix[1:] for suffix in image_suffixes()}
    for path, label in shards:
        good, kinds, hidden = 0, Counter[str](), 0
        for members in _samples(path):
            left -= len(members)
            names = {ending for _, ending in members}
            hidden += any(is_hidden(name) for name, _ in members)
            if label in names and names & endings:
                good += 1
            elif label in names:
                kinds.update(f".{ending}" for ending in names - {label, "json", "txt"})
            if good and left < 0:
                break
        if not good:
            reason = describe_passed_over(kinds) if kinds else f"each image needs a .{label} of the same name"
            if hidden:
                reason = (
                    "the hidden files of macOS (._NAME) in it come between images and labels, which COPYFILE_DISABLE=1 "
                    "leaves out"
                )
            raise UserError(f"{path} holds no image with a label ({reason}); write it again")
        passed_over += kinds
    if passed_over:
        _log.warning(f"{root}: {describe_passed_over(passed_over)}")


def _samples(shard: Path) -> Iterator[list[tuple[str, str]]]:
    """The samples of a shard as webdataset groups them: (file name, ending in lower case) of each member."""
    from webdataset.tariterators import base_plus_ext

    key, members = None, list[tuple[str, str]]()
    for name in _member_names(shard):
        base, ending = base_plus_ext(name)
        if base is None:
            continue
        if base != key and members:
            yield members
            members = []
        key = base
        members.append((Path(name).name, ending.lower()))
    if members:
        yield members


def _member_names(shard: Path) -> Iterator[str]:
    try:
        with tarfile.open(shard) as tar:
            for member in tar:
                tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
                if member.isreg():
                    yield member.name
    except (OSError, ValueError, tarfile.TarError) as error:
        raise UserError(f"{shard} is no complete tar file of images and .cls files ({error}); write it again") from None


def _is_label(name: str) -> bool:
    return name.endswith(".cls") and not is_hidden(Path(name).name)


def _largest_label(info_file: Path, shards: list[Path]) -> int:
    labels = []
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                files = (tar.extractfile(member) for member in tar if _is_label(member.name))
                labels += [int(file.read()) for file in files if file is not None]  # a folder has none
        except (OSError, ValueError, tarfile.TarError) as error:
            raise UserError(
                f"{shard} is no complete tar file of images and .cls files ({error}); write it again"
            ) from None
    if not labels:
        raise UserError(f'the shards hold no labels as .cls files; add "classes": [names] to {info_file}')
    return max(labels)
