"""How a result was made: versions, commit, hardware and command."""

import csv
import datetime
import json
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch

from cmpe_se import __version__
from cmpe_se.utils.files import replaced
from cmpe_se.utils.tables import write_csv

REPORTED_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy")


class Hardware(TypedDict):
    """What a process computes on; ``gpu`` is None without CUDA."""

    cpu: str
    threads: int
    gpu: str | None


class Provenance(TypedDict):
    """Part of every record on disk: ``versions`` by package, ``commit`` as :func:`source_commit` says."""

    versions: dict[str, str]
    commit: str | None
    hardware: Hardware
    command: str


def provenance() -> Provenance:
    """Versions, commit of this source, hardware and command of the process."""
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "versions": {"python": platform.python_version(), "cmpe_se": __version__}
        | {package: version(package) for package in REPORTED_PACKAGES},
        "commit": source_commit(),
        "hardware": {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": cuda},
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
    }


def write_results(folder: Path, what: str, rows: Sequence[Mapping[str, Any]], *, setup: str = "", **notes: str) -> Path:
    """Write a table with what made it to ``<what>_<hardware>[-<setup>]_<date>.csv``.

    Args:
        folder: where to.
        what: was measured.
        rows: of the table, all with the same columns.
        setup: of the hardware, such as the number of threads, for the file's name.
        notes: more lines for the file's head.
    """
    source = provenance()
    device = source["hardware"]["gpu"] or source["hardware"]["cpu"] or "cpu"
    hardware = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    date = datetime.datetime.now(datetime.UTC).date()
    path = folder / f"{what}_{'-'.join(filter(None, (hardware, setup)))}_{date}.csv"
    write_table(path, rows, **notes)
    return path


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], **notes: str) -> None:
    """Write a table with what made it, in lines that begin with a #.

    Args:
        path: CSV file to write.
        rows: of the table, all with the same columns.
        notes: more lines for the file's head.
    """
    source = provenance()
    head: dict[str, Any] = {"command": source["command"], "commit": source["commit"], "versions": source["versions"]}
    head |= {"hardware": source["hardware"], **notes}
    with replaced(path) as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as file:
        for key, value in head.items():
            file.write(f"# {key}: {json.dumps(value)}\n")
        columns = list(rows[0])
        write_csv(file, columns, ([row[column] for column in columns] for row in rows))


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a file of :func:`write_table`, all values as text."""
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(line for line in file if not line.startswith("#")))


def has_tf32(device: torch.device) -> bool:
    """Whether convolutions in float32 have TF32's precision on this device."""
    return device.type == "cuda" and torch.backends.cudnn.allow_tf32


def source_commit() -> str | None:
    """Commit of the checkout that this package runs from, with ``-dirty`` where files differ; None outside one."""
    here = Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not git("ls-files", Path(__file__).name):  # installed inside another project's checkout
            return None
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
