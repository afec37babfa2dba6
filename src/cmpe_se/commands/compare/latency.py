"""Latency of each network's forward pass, measured in turns on one device."""

from pathlib import Path
from typing import Any, TypedDict

import torch
from rich.console import Console
from torch import nn

from cmpe_se.commands.compare.estimate import shape_of
from cmpe_se.commands.compare.grid import Entry, Grid
from cmpe_se.commands.compare.outcomes import Latency
from cmpe_se.errors import UserError
from cmpe_se.merging import merge
from cmpe_se.runtimes.engines import make_step
from cmpe_se.runtimes.timing import keep_heap, paired_ratio, take_turns
from cmpe_se.training.network import create_network
from cmpe_se.training.provenance import Hardware, provenance
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import write_json
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.records import read_json

_TURNS = 25
_BATCH = 64


class _Measured(TypedDict):
    hardware: Hardware
    networks: list[str]
    latencies: dict[str, tuple[float, float, float, float]]


def measure_latencies(grid: Grid, console: Console) -> dict[str, Latency]:
    """Forward passes of the networks, merged, in float32, batch 64; the ratio is to the grid's first network.

    A network is the one of its first run that still has weights. Where none has, as in a comparison that was kept as
    small files, it is made from the configuration: what a forward pass takes does not depend on the weights. What was
    measured before on the same hardware for the same networks is kept in ``latency.json`` and read from there.
    Networks without a finished run are left out; so are all where the first one has none.
    """
    finished = {entry.label: entry for entry in grid.entries if _runs(grid, entry)}
    labels = list(finished)
    baseline = grid.entries[0].label
    if baseline not in labels or len(labels) < 2:
        return {}
    hardware, path = provenance()["hardware"], grid.folder / "latency.json"
    known = _read(path)
    if known.get("hardware") == hardware and known.get("networks") == labels:
        return {label: Latency(*values) for label, values in known["latencies"].items()}

    device = choose_device(grid.config.device)
    if device.type == "cpu":
        keep_heap()
    steps = {}
    for label, entry in finished.items():
        network, size = _network(grid, entry)
        network = merge(network).to(device).to(memory_format=torch.channels_last)
        images = torch.randn(_BATCH, *size).to(device, memory_format=torch.channels_last)
        steps[label] = make_step(network, images, torch.zeros(_BATCH, dtype=torch.long), "eager", "forward", "float32")
    turns = with_progress(range(_TURNS), "latency", console=console)
    seconds = take_turns(steps, turns, device)
    latencies = {}
    for label, times in seconds.items():
        ratio = paired_ratio(times, seconds[baseline])
        milliseconds = 1000 * sorted(times)[len(times) // 2]
        latencies[label] = Latency(*(round(value, 4) for value in (milliseconds, *ratio)))
    known = {"hardware": hardware, "networks": labels, "batch_size": _BATCH, "turns": _TURNS, "latencies": latencies}
    write_json(path, known)
    return latencies


def _runs(grid: Grid, entry: Entry) -> list[RunFolder]:
    """The finished ones."""
    return [cell.run for cell in grid.cells if cell.entry == entry and grid.is_finished(cell)]


def _network(grid: Grid, entry: Entry) -> tuple[nn.Module, tuple[int, ...]]:
    """A network, trained where weights are left, and the (C, H, W) of its images."""
    for run in _runs(grid, entry):
        if (run.model / "model.safetensors").is_file():
            return run.load_model(), run.preprocessing().size
    shape = shape_of(grid)
    network, _ = create_network(grid.config.changed(**entry.settings, pretrained=None), shape)
    return network, (shape.in_chans, *shape.image_size)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path, _Measured, advice="")
    except UserError:  # not there, or damaged: it is measured again
        return {}
