"""Times of a network before and after pruning, in turns."""

import torch
from torch import nn

from cmpe_se.commands.prune.record import LatencyRatio
from cmpe_se.data import ImageData
from cmpe_se.errors import MissingPackageError, UserError
from cmpe_se.merging import merge
from cmpe_se.runtimes.engines import make_runner, require_engine, why_not
from cmpe_se.runtimes.timing import paired_ratio, percentile, take_turns
from cmpe_se.utils.progress import with_progress

_ENGINES = ("eager", "onnxruntime")
_BATCH_SIZES = (1, 8)
_TURNS = 15


def measure_latency(before: nn.Module, after: nn.Module, data: ImageData) -> tuple[list[LatencyRatio], dict[str, str]]:
    """Ratios for each engine and batch size, of merged networks in float32; and engines left out, to the reason."""
    device = next(before.parameters()).device
    ratios, left_out = [], {}
    size = (data.in_chans, *data.image_size)
    for engine in _ENGINES:
        try:
            if reason := why_not(engine, "forward", "float32", device):
                raise UserError(reason)
            require_engine(engine)
            networks = {"before": merge(before), "after": merge(after)}
            runners = {
                name: make_runner(network, size, engine, "forward", "float32") for name, network in networks.items()
            }
        except (UserError, MissingPackageError) as error:
            left_out[engine] = str(error)
            continue
        for batch_size in _BATCH_SIZES:
            images = torch.randn(batch_size, *size, device=device)
            labels = torch.zeros(batch_size, dtype=torch.long, device=device)
            steps = {name: runner(images, labels) for name, runner in runners.items()}
            turns = with_progress(range(_TURNS), f"timing, {engine}, batch {batch_size}", _TURNS)
            seconds = take_turns(steps, turns, device)
            ratio = paired_ratio(seconds["after"], seconds["before"])
            milliseconds = {name: round(1000 * percentile(own, 50), 4) for name, own in seconds.items()}
            ratios.append(
                LatencyRatio(
                    engine=engine,
                    batch_size=batch_size,
                    before=milliseconds["before"],
                    after=milliseconds["after"],
                    ratio=round(ratio.median, 4),
                    low=round(ratio.low, 4),
                    high=round(ratio.high, 4),
                )
            )
    return ratios, left_out
