"""Results of a comparison so far: the finished runs of each network."""

from typing import NamedTuple

from cmpe_se.commands.compare.grid import Grid
from cmpe_se.training.summary import EpochRecord


class Latency(NamedTuple):
    """Time of a forward pass; ``ratio`` to the first network in the same run, with its 95 % interval."""

    milliseconds: float
    ratio: float
    low: float
    high: float


class Outcome(NamedTuple):
    """A network and its finished runs.

    ``seeds`` maps a seed to the test top-1 accuracy in percent, ``curves`` to the records of ``metrics.jsonl``;
    ``params`` are trainable ones, ``macs`` the multiply-adds of one image; ``published`` is a paper's accuracy.
    """

    label: str
    params: int
    macs: int
    seeds: dict[int, float]
    train_seconds: list[float]
    curves: dict[int, list[EpochRecord]]
    latency: Latency | None = None
    published: float | None = None


def collect(grid: Grid, latencies: dict[str, Latency]) -> list[Outcome]:
    """The outcomes of the networks that have at least one finished run, in the grid's order."""
    outcomes = []
    for entry in grid.entries:
        runs = {cell.seed: cell.run for cell in grid.cells if cell.entry == entry and grid.is_finished(cell)}
        results = {seed: run.read_result() for seed, run in runs.items()}
        if not results:
            continue
        any_result = next(iter(results.values()))
        outcomes.append(
            Outcome(
                entry.label,
                any_result["params"],
                any_result["macs"],
                {seed: result["test_top1"] for seed, result in results.items()},
                [result["train_seconds"] for result in results.values()],
                {seed: runs[seed].read_metrics() for seed in results},
                latencies.get(entry.label),
                grid.published.get(entry.label),
            )
        )
    return outcomes
