"""What ``pruning.json`` in a pruned run's folder says."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from cmpe_se.errors import UserError
from cmpe_se.pruning import Pruned
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.records import read_json

NAME = "pruning.json"


class LatencyRatio(TypedDict):
    """Milliseconds of a forward pass before and after, both merged, and the ratio with its 95 % interval."""

    engine: str
    batch_size: int
    before: float
    after: float
    ratio: float
    low: float
    high: float


class PruningRecord(TypedDict):
    """What was asked for, what was pruned, and what came of it; accuracies are percentages."""

    run: str
    target_macs: float
    criterion: str
    layerwise: bool
    steps: int
    round_to: int
    epochs: int
    images: int
    lr: float
    seed: int
    multiply_adds: list[int]
    """Before, and after each step."""
    parameters: list[int]
    test_top1: list[float]
    """Likewise, before any training."""
    through_stream: bool
    layers: list[dict[str, Any]]
    """See :class:`cmpe_se.pruning.prune.Layer`."""
    blocks: list[dict[str, Any]]
    """See :class:`cmpe_se.pruning.prune.Block`."""
    left: dict[str, str]
    """Layers that were no candidates, to the reason."""
    widths: dict[str, list[int]]
    latency: list[LatencyRatio]
    latency_left_out: dict[str, str]
    """Engines that were not measured, to the reason."""
    trained_top1: NotRequired[float]
    """After the training."""


def pruned_fields(pruned: Pruned) -> dict[str, Any]:
    """The fields that say what was pruned."""
    return {
        "multiply_adds": pruned.multiply_adds,
        "parameters": pruned.parameters,
        "through_stream": pruned.through_stream,
        "layers": [asdict(layer) for layer in pruned.layers],
        "blocks": [asdict(block) for block in pruned.blocks],
        "left": pruned.left,
        "widths": pruned.widths,
    }


def read_record(folder: Path) -> PruningRecord | None:
    """What was pruned in a run; None in one that is no pruned one.

    Raises:
        UserError: a file that cannot be read.
    """
    path = folder / NAME
    return read_json(path, PruningRecord, advice="delete the folder and prune again") if path.exists() else None


def begun(target: RunFolder, asked: dict[str, Any]) -> PruningRecord | None:
    """What an interrupted command has pruned; None where there is nothing yet.

    Raises:
        UserError: something else was asked for then.
    """
    record = read_record(target.path)
    if record is None:
        return None
    values: Any = record
    if other := next((name for name, value in asked.items() if values[name] != value), None):
        raise UserError(
            f"{target.path} was pruned with {other} {values[other]}, not {asked[other]}; name another --output"
        )
    return record


def sentences(record: PruningRecord) -> list[str]:
    """What came of it, for people."""
    macs, parameters = record["multiply_adds"], record["parameters"]
    said = [
        f"multiply-adds: {macs[-1] / macs[0]:.3f} of {macs[0]:,}; parameters: {parameters[-1] / parameters[0]:.3f} of "
        f"{parameters[0]:,}"
    ]
    for one in record["latency"]:
        said.append(
            f"time of a forward pass, merged, {one['engine']}, batch {one['batch_size']}: {one['ratio']:.3f} "
            f"({one['low']:.3f} to {one['high']:.3f}) of {one['before']:.2f} ms"
        )
    said += [f"{engine} not measured: {reason}" for engine, reason in record["latency_left_out"].items()]
    if record["through_stream"]:
        said.append("the inner widths of the blocks were not enough: channels of the residual stream went too")
    if record["left"]:
        name, reason = next(iter(record["left"].items()))
        said.append(f"{len(record['left'])} groups of channels were no candidates, such as that of {name}: {reason}")
    return said
