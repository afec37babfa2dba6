"""Predictions that are written to a file as they come, interrupted and gone on with; and their table on the screen."""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import ImageNetInfo

from cmpe_se.commands.predict import as_command, complaint, predict
from cmpe_se.commands.predict.batches import boundaries
from cmpe_se.data import Preprocessing
from cmpe_se.errors import UserError
from cmpe_se.training.interruption import Interrupted
from cmpe_se.training.run_folder import RunFolder
from tests.training.written import write_run

COUNT = 61


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    classes = tuple(ImageNetInfo().label_names()[:12])
    return write_run(tmp_path_factory.mktemp("run") / "run", "test_resnet", Preprocessing.of_photos(classes, 32)).path


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Pieces of a photograph; two files cannot be read."""
    folder, photo = tmp_path_factory.mktemp("images"), Image.fromarray(load_sample_image("china.jpg"))
    for number in range(COUNT):
        left, top = 7 * number, 5 * number
        photo.crop((left, top, left + 60, top + 50)).save(folder / f"{number:03d}.png")
    (folder / "020.png").write_bytes(b"hello")
    (folder / "059.png").write_bytes((folder / "058.png").read_bytes()[:90])
    return folder


@pytest.fixture(scope="module")
def records(run, images) -> list[dict]:
    return predict(str(run), str(images), top=3, batch_size=16, workers=0)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(run, images, output, **settings):
    return predict(
        str(run), str(images), **{"top": 3, "batch_size": 16, "workers": 0, "output": str(output), **settings}
    )


def test_records_are_those_of_each_image_alone(run, images, records):
    folder = RunFolder(run)
    network, how = folder.load_model(), folder.preprocessing()
    assert [record["image"] for record in records] == [str(path) for path in sorted(images.iterdir())]
    for number, record in enumerate(records):
        if number in (20, 59):
            assert set(record) == {"image", "error"}
            continue
        with torch.no_grad():
            row = network(how(Image.open(record["image"]))[None])[0].softmax(0).numpy()
        order = np.argsort(-row)[:3]
        assert [entry["class"] for entry in record["classes"]] == [how.classes[place] for place in order]
        assert [entry["probability"] for entry in record["classes"]] == pytest.approx(row[order], abs=2e-6)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_file_has_the_same_for_any_number_of_workers(workers, run, images, records, tmp_path, capsys):
    made = write(run, images, tmp_path / "out.jsonl", workers=workers)
    assert lines(tmp_path / "out.jsonl") == records
    assert (made["images"], [record["image"][-7:] for record in made["unreadable"]]) == (COUNT, ["020.png", "059.png"])
    assert complaint(made) == complaint(records)
    said = capsys.readouterr()
    assert f"out.jsonl: {COUNT} images" in " ".join(said.out.split())
    assert said.err.count("not predicted: ") == 2


def test_a_table_of_comma_separated_values(run, images, records, tmp_path):
    write(run, images, tmp_path / "out.csv")
    rows = list(csv.reader((tmp_path / "out.csv").open(newline="")))
    assert rows[0] == ["image", *(f"{name}_{k}" for k in (1, 2, 3) for name in ("class", "probability")), "error"]
    for row, record in zip(rows[1:], records, strict=True):
        cells = [str(cell) for entry in record.get("classes", []) for cell in (entry["class"], entry["probability"])]
        assert row == [record["image"], *(cells or [""] * 6), record.get("error", "")]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
@pytest.mark.parametrize("size", [0, 0.4, 1])
def test_a_file_that_was_cut_anywhere_goes_on_as_if_it_never_was(size, suffix, run, images, tmp_path):
    output = tmp_path / f"out{suffix}"
    first = write(run, images, output)
    whole = output.read_bytes()
    output.write_bytes(whole[: int(size * len(whole))])
    assert write(run, images, output) == first
    assert output.read_bytes() == whole


def test_what_is_there_is_not_predicted_again(run, images, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.jsonl"
    write(run, images, output)
    output.write_bytes(b"".join(output.read_bytes().splitlines(keepends=True)[:45]))  # whole batches end at 40
    read = []
    monkeypatch.setattr(
        Preprocessing, "read", lambda how, path, old=Preprocessing.read: read.append(path) or old(how, path)
    )
    write(run, images, output)
    assert len(read) == COUNT - 40
    assert f"40 images of {COUNT} are in {output} already" in " ".join(capsys.readouterr().err.split())


def test_ctrl_c_leaves_whole_lines_and_says_how_to_go_on(run, images, records, tmp_path, monkeypatch):
    output = tmp_path / "out.jsonl"

    def interrupted(how, path, old=Preprocessing.read):
        if path.endswith("030.png"):
            raise KeyboardInterrupt
        return old(how, path)

    with monkeypatch.context() as patch:
        patch.setattr(Preprocessing, "read", interrupted)
        with pytest.raises(
            Interrupted, match=f"stopped; 24 of {COUNT} images are in .*out.jsonl, and the same command"
        ):
            write(run, images, output)
    assert lines(output) == records[:24]
    write(run, images, output)
    assert lines(output) == records


def refusal(run, images, output, **settings) -> str:
    with pytest.raises(UserError) as raised:
        write(run, images, output, **settings)
    return str(raised.value)


def test_files_of_other_predictions_are_refused(run, images, tmp_path):
    output = tmp_path / "out.jsonl"
    write(run, images, output)
    kept = output.read_bytes()
    assert "has the 3 likeliest classes (--top 3); name another --output" in refusal(run, images, output, top=2)
    how = RunFolder(run).preprocessing()
    other = write_run(tmp_path / "other", "test_resnet", how, seed=1).path
    assert f"holds predictions of another network, {run}; name another" in refusal(other, images, output)
    moved = shutil.copytree(images, tmp_path / "moved")
    assert f"has {images}/000.png where the images that are given have {moved}/000.png" in refusal(run, moved, output)
    assert "of more than the 1 images" in refusal(run, images / "000.png", output)
    assert output.read_bytes() == kept
    assert (
        predict(str(shutil.copytree(run, tmp_path / "copy")), str(images), top=3, output=str(output))["images"] == COUNT
    )
    output.write_bytes(b"{}\n" + kept)
    assert "line 1 of an image is no prediction" in refusal(run, images, output)
    (tmp_path / "out.jsonl.origin.json").unlink()
    assert "is there already, without out.jsonl.origin.json" in refusal(run, images, output)
    assert "should end in .jsonl or .csv" in refusal(run, images, tmp_path / "out.txt")
    assert "there is no folder" in refusal(run, images, tmp_path / "none" / "out.csv")
    assert "workers is -1" in refusal(run, images, output, workers=-1)


def test_two_processes_do_not_write_one_file(run, images, tmp_path):
    from filelock import FileLock

    with FileLock(f"{tmp_path / 'out.csv'}.lock"):
        assert "is being written by another process" in refusal(run, images, tmp_path / "out.csv")


def test_names_that_are_no_utf_8(run, images, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in (b"caf\xe9.png", b"=1+1.png", b'a,"b".png'):
        shutil.copy(images / "000.png", bytes(folder) + b"/" + name)
    for suffix in (".jsonl", ".csv"):
        made = [write(run, folder, tmp_path / f"out{suffix}") for _ in range(2)]
        assert made[0] == made[1]
        assert made[0]["images"] == 3


def test_rows_are_printed_as_they_come(run, images, capsys, monkeypatch):
    printed = []
    monkeypatch.setattr(
        Preprocessing,
        "read",
        lambda how, path, old=Preprocessing.read: printed.append(capsys.readouterr().out) or old(how, path),
    )
    monkeypatch.setenv("COLUMNS", "200")
    left = as_command(
        str(run),
        str(images),
        top=3,
        batch_size=16,
        as_json=False,
        fail_fast=False,
        trust_pickle=False,
        output=None,
        workers=0,
    )
    assert left == {"images": COUNT, "unreadable": left["unreadable"], "output": None}
    printed.append(capsys.readouterr().out)
    shown = "".join(printed)
    assert "000.png" in printed[8]  # while the second batch is read
    assert shown.count("most likely") == 1
    rows = [line for line in shown.splitlines() if ".png" in line]
    assert len(rows) == COUNT - 2
    assert len({line.index(".png") for line in rows}) == 1
    assert re.search(r"n0\d{7} [a-z].* \d+\.\d %", rows[0])


def test_where_batches_begin():
    assert boundaries(1, 64) == [0, 1]
    assert boundaries(8, 64) == [0, 8]
    assert boundaries(100, 64) == [0, 8, 72, 100]
    assert boundaries(5, 2) == [0, 2, 4, 5]
