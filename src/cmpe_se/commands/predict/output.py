"""Files of predictions that grow a batch at a time, and that a second call goes on with."""

import csv
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypedDict

from filelock import FileLock, Timeout

from cmpe_se.commands.predict.batches import Record
from cmpe_se.data import Preprocessing
from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import is_exported
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.escaping import csv_cell, to_json
from cmpe_se.utils.files import os_errors_as, whole_path, write_json
from cmpe_se.utils.records import parse_json, read_json

SUFFIXES = (".jsonl", ".csv")
_WEIGHTS = "model.safetensors"
_ANOTHER = "name another --output, or delete that file"


class Origin(TypedDict):
    """What a file of predictions is of, kept beside it: a call with another one would mix two in one file."""

    run: str
    network: str
    preprocessing: str
    top: int


def origin_of(run: str, preprocessing: Preprocessing, top: int) -> Origin:
    """Of predictions by a run folder or exported file; the network counts by its content and not by its place."""
    files = [Path(run), Path(run).with_suffix(".bin")] if is_exported(run) else [RunFolder(run).model / _WEIGHTS]
    digest = hashlib.sha256()
    for file in files:
        if file.is_file():
            with os_errors_as(f"cannot read {file}"), open(file, "rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    how = hashlib.sha256(json.dumps(preprocessing.to_dict()).encode()).hexdigest()
    return {"run": str(run), "network": digest.hexdigest(), "preprocessing": how, "top": top}


def checked_path(output: str) -> Path:
    """The path of a file of predictions; UserError where its name is of no kind that is written."""
    path = whole_path(output)
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"output is {output}, should end in {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent} for {path.name}; make it, or name another --output")
    return path


class PredictionsFile:
    """A file with a line for each image, in their order; each line is whole, whatever ends the command.

    Args:
        path: of :func:`checked_path`.
        file: opened to write at the end of what is kept.
        top: number of classes of a line.
        count: lines that are kept.
        errors: records of the files among them that could not be read.
    """

    def __init__(self, path: Path, file: BinaryIO, top: int, count: int, errors: list[Record]):
        self.path, self.count, self.errors = path, count, errors
        self._file, self._format, self._end = file, _FORMATS[path.suffix.lower()](top), file.tell()

    def add(self, records: Sequence[Record]) -> None:
        """Write the lines of the next images; UserError where there is no room."""
        with os_errors_as(f"cannot write {self.path}", advice="make room, and the same command goes on"):
            self._file.write("".join(map(self._format.line, records)).encode())
            self._file.flush()
        self._end, self.count = self._file.tell(), self.count + len(records)
        self.errors += [record for record in records if "error" in record]

    def cut(self) -> None:
        """Take back what was written of a batch that is not whole."""
        with suppress(OSError):
            self._file.truncate(self._end)


@contextmanager
def opened(path: Path, origin: Origin, paths: Sequence[str], places: Sequence[int]) -> Iterator[PredictionsFile]:
    """The file to write predictions to, cut to the last batch that is whole.

    Args:
        path: of :func:`checked_path`.
        origin: of the predictions.
        paths: of all images, in order.
        places: where batches begin and the last one ends: a call that goes on makes the same ones.

    Raises:
        UserError: a file of other predictions, or one that cannot be written.
    """
    beside, lock = path.with_name(f"{path.name}.origin.json"), FileLock(f"{path}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"{path} is being written by another process; wait for it, or name another --output") from None
    except (OSError, NotImplementedError):  # a file system without locks; what cannot be written is said below
        pass
    try:
        _check_origin(path, beside, origin)
        fresh = not path.exists() or not path.stat().st_size
        if fresh:
            write_json(beside, origin)
        with os_errors_as(f"cannot write {path}"):
            file = open(path, "w+b" if fresh else "r+b")  # noqa: SIM115  # closed below
        with file:
            format_ = _FORMATS[path.suffix.lower()](origin["top"])
            if fresh:
                file.write(format_.head.encode())
                file.flush()
            end, count, errors = _whole_batches(path, file, format_, paths, places)
            file.truncate(end)
            file.seek(end)
            output = PredictionsFile(path, file, origin["top"], count, errors)
            try:
                yield output
            except BaseException:
                output.cut()
                raise
    finally:
        with suppress(OSError):
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def _check_origin(path: Path, beside: Path, origin: Origin) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    if not beside.exists():
        raise UserError(f"{path} is there already, without {beside.name} that says what it is of; {_ANOTHER}")
    found = read_json(beside, Origin, advice=_ANOTHER)
    if found["top"] != origin["top"]:
        raise UserError(f"{path} has the {found['top']} likeliest classes (--top {found['top']}); {_ANOTHER}")
    if (found["network"], found["preprocessing"]) != (origin["network"], origin["preprocessing"]):
        raise UserError(f"{path} holds predictions of another network, {found['run']}; {_ANOTHER}")


def _whole_batches(
    path: Path, file: BinaryIO, format_: "_Format", paths: Sequence[str], places: Sequence[int]
) -> tuple[int, int, list[Record]]:
    """Where the last whole batch ends in a file, its number of images, and the records of those that are none."""
    file.seek(0)
    if format_.head and (head := file.readline().decode("utf-8", "replace")) != format_.head:
        raise UserError(f"{path} begins with {head.strip()[:80]!r} and not with {format_.head.strip()!r}; {_ANOTHER}")
    end, count, errors, whole = file.tell(), 0, list[Record](), set(places)
    kept = end, 0, 0  # where, images, those that are none
    for line in file:
        if not line.endswith(b"\n"):
            break  # of a process that was killed
        try:
            image, error = format_.parsed(line.decode())
        except (ValueError, KeyError, IndexError, TypeError):
            raise UserError(f"{path}: line {count + 1} of an image is no prediction; {_ANOTHER}") from None
        if count == len(paths):
            raise UserError(f"{path} has predictions of more than the {len(paths)} images that are given; {_ANOTHER}")
        if image != format_.name(paths[count]):
            raise UserError(
                f"{path} has {image} where the images that are given have {paths[count]}; give the same images, or "
                "name another --output"
            )
        if error:
            errors.append({"image": paths[count], "error": error})
        count, end = count + 1, end + len(line)
        if count in whole:
            kept = end, count, len(errors)
    return kept[0], kept[1], errors[: kept[2]]


class _Format:
    """Lines of JSON.

    Args:
        top: number of classes of a line.
    """

    head = ""

    def __init__(self, top: int):
        self.top = top

    def name(self, path: str) -> str:
        """A path as it stands in the file."""
        return json.loads(to_json(path))

    def line(self, record: Record) -> str:
        """A record as the file has it."""
        return to_json(record) + "\n"

    def parsed(self, line: str) -> tuple[str, str | None]:
        """Image and error of a line; ValueError, KeyError, IndexError or TypeError where it is none."""
        record: Any = parse_json(line)
        return record["image"], None if "classes" in record else record["error"]


class _Csv(_Format):
    """Comma-separated values."""

    def __init__(self, top: int):
        super().__init__(top)
        ranks = [f"{name}_{rank}" for rank in range(1, top + 1) for name in ("class", "probability")]
        self.head = _csv_line(["image", *ranks, "error"])

    def name(self, path: str) -> str:
        """See ``_Format``."""
        return csv_cell(path)

    def line(self, record: Record) -> str:
        """See ``_Format``."""
        cells = [cell for entry in record.get("classes", ()) for cell in (entry["class"], entry["probability"])]
        return _csv_line([record["image"], *cells, *[None] * (2 * self.top - len(cells)), record.get("error")])

    def parsed(self, line: str) -> tuple[str, str | None]:
        """See ``_Format``."""
        [cells] = csv.reader([line])
        if len(cells) != 2 * self.top + 2:
            raise ValueError
        return cells[0], cells[-1] or None


_FORMATS = {".jsonl": _Format, ".csv": _Csv}


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text).writerow([csv_cell(cell) for cell in cells])
    return text.getvalue()
