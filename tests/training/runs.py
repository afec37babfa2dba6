"""What a run folder says, as tests compare it."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from cmpe_se.training.checkpoint import Checkpoints
from cmpe_se.training.run_folder import RunFolder
from tests.training.processes import Running, start

_TIMES = ("seconds", "images_per_second", "epoch_seconds", "train_seconds")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The saved network."""
    return load_file(folder / "model" / "model.safetensors")


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def metrics(folder: Path) -> list[dict]:
    """The epochs' records, without the times."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in _TIMES} for record in records]


def checkpoint(folder: Path) -> dict:
    """The newest good checkpoint."""
    return Checkpoints(folder / "state").load()[0]


def place(folder: Path) -> tuple[int, int]:
    """Finished epochs, and batches of the next one, at the last checkpoint."""
    loaded = Checkpoints(folder / "state").load(tensors=False)  # quick: a test waits for a moment of a run
    return (loaded[0]["epoch"], loaded[0]["batch"]) if loaded else (0, 0)


def start_until(folder: Path, epoch: int, batch: int, *arguments, **settings) -> Running:
    """Start a run, with a checkpoint every five steps, and wait for the first one at or after (epoch, batch)."""
    running = start("train", *arguments, "--checkpoint-steps", 5, "--output", folder, **settings)
    return running.until(lambda: place(folder) >= (epoch, batch))


def assert_same_tensors(first: dict, second: dict) -> None:
    """Equal bit for bit."""
    assert first.keys() == second.keys()
    different = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    assert not different, different


def assert_same_run(first: Path, second: Path) -> None:
    """Two finished runs that agree bit for bit in all but the times."""
    assert metrics(first) == metrics(second)
    assert_same_tensors(weights(first), weights(second))
    one, two = checkpoint(first), checkpoint(second)
    assert_same_tensors(one["network"], two["network"])
    assert (one["ema"] is None) == (two["ema"] is None)
    if one["ema"]:
        assert_same_tensors(one["ema"], two["ema"])
    for index, state in one["optimizer"]["state"].items():
        assert_same_tensors(state, two["optimizer"]["state"][index])
    figures = ("test_top1", "test_top5", "test_loss", "epochs", "model", "view")
    assert {name: result(first)[name] for name in figures} == {name: result(second)[name] for name in figures}
    assert RunFolder(second).load_model() is not None


def everything_in(folder: Path) -> dict[str, bytes]:
    """Path to contents of all files of a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
