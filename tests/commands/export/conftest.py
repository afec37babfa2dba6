"""Trained runs to export, exports that several tests look at, and real images as files."""

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from filelock import FileLock

from cmpe_se.commands.export import export
from tests.tiers import long_but
from tests.training.conftest import write_digits
from tests.training.processes import empty_folder, shared_folder, trained_run

SUFFIXES = {"onnx": ".onnx", "torch-export": ".pt2", "openvino": ".xml"}
"""Formats that are a file for any machine, and the ends of their names."""
ENDS = SUFFIXES | {"aoti": ".aoti.pt2"}


@pytest.fixture(scope="session")
def trained() -> Path:
    """Our network with folded_3x3 and the paper's gates, after five epochs of digits."""
    return trained_run("--epochs=5", "--reduction=16", "--min-hidden=1", "--bias=false")


class Export(NamedTuple):
    """An exported file, and what export returned."""

    path: Path
    result: dict[str, Any]


@functools.cache
def _export(run: Path, to: str, name: str = "model", **settings: Any) -> Export:
    """What ``export`` of a run writes, once for all workers."""
    folder = shared_folder() / f"{run.name}-{to}-{name}"
    path, result = folder / "model" / f"model{ENDS[to]}", folder / "result.json"
    with FileLock(f"{folder}.lock"):
        if not result.exists():
            returned = export(str(run), to=to, output=str(path), **settings)
            result.write_text(json.dumps(returned))
    return Export(path, json.loads(result.read_text()))


@pytest.fixture(scope="session", params=long_but(SUFFIXES, ["onnx"]))
def exported(request, trained) -> Export:
    """The trained run in each format."""
    return _export(trained, request.param)


@pytest.fixture(scope="session")
def onnx_export(trained) -> Export:
    """The trained run as ONNX."""
    return _export(trained, "onnx")


def _quantise(run: Path, merge: bool) -> Export:
    name = "int8" if merge else "int8-unmerged"
    path, result = _export(run, "onnx", name, merge=merge, int8=True, calibration_images=200)
    return Export(path.with_name("model.int8.onnx"), result)


@pytest.fixture(scope="session", params=long_but([True, False], [True]), ids=["merged", "unmerged"])
def quantised(request, trained) -> Export:
    """The trained run in int8: the path is the int8 file's."""
    return _quantise(trained, request.param)


@pytest.fixture(scope="session")
def unmerged(trained) -> Export:
    """The trained run as ONNX, not merged."""
    result = _quantise(trained, False).result
    return Export(Path(result["path"]), result)


@pytest.fixture(scope="session")
def images() -> list[str]:
    """Five digits as PNG files of 32x32."""
    folder = write_digits(empty_folder() / "images", {"some": 1}, digits=(0, 3, 4, 7, 9), side=32)
    return sorted(map(str, folder.rglob("*.png")))
