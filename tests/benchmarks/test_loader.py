"""``benchmarks/loader.py``: each contender gives all of the images, and the file has a row for each."""

import csv
import sys

import pytest

from benchmarks import loader

pytestmark = pytest.mark.slow


def test_rows_of_all_contenders(tmp_path, monkeypatch):
    for package in ("datasets", "webdataset"):
        pytest.importorskip(package)
    flags = ["--sizes", "64x48", "--images", "8", "--workers", "0", "--rounds", "2", "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["loader.py", *flags])
    loader.main()
    (path,) = tmp_path.glob("loader-64x48-0-workers_*.csv")
    rows = list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))
    assert [(row["loader"], row["contender"]) for row in rows] == [
        (part, name) for part in ("train", "test") for name in loader.CONTENDERS
    ]
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert {row["speed_over_timm"] for row in rows if row["contender"] == "timm"} == {"1"}
