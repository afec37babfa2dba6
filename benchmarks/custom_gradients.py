"""The gates' custom gradients against plain PyTorch, eager and compiled, in one run.

    python benchmarks/custom_gradients.py --model preact_resnet56b --batch-size 64 --threads 1

Under ``torch.compile`` the functions of ``cmpe_se.layers.gated_addition`` step aside. This asks whether they should,
and what each of them gives eager training: it times a training step with all of them, with each one left out, and with
none, and compiled with none and with all.
"""

import argparse
import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch

from cmpe_se.commands.benchmark.contenders import PLAIN, build
from cmpe_se.layers import gated_addition
from cmpe_se.runtimes.engines import make_step
from cmpe_se.runtimes.timing import keep_heap, paired_ratio, peak_memory, take_turns
from cmpe_se.training.provenance import write_results

FUNCTIONS = ("_AddGated", "_AddGatedPointwise", "_WithSqueeze")


@contextmanager
def used(functions: tuple[str, ...], *, compiled: bool) -> Iterator[None]:
    """Let these functions run and no others; under the compiler too where that is asked for."""
    plain: dict[str, Callable] = {
        "_AddGated": lambda identity, gate, residual: torch.addcmul(identity, gate, residual),
        "_AddGatedPointwise": lambda identity, gate, weight, x: torch.addcmul(
            identity, gated_addition._at_positions(gate, x), gated_addition._convolved(x, weight)
        ),
        "_WithSqueeze": lambda x: (x, gated_addition.squeeze(x)),
    }
    left_out = [name for name in FUNCTIONS if name not in functions]
    patches = [patch.object(getattr(gated_addition, name), "apply", plain[name]) for name in left_out]
    if compiled and functions:
        patches += [patch.object(gated_addition, "_plain_is_best", lambda: False)]
    for change in patches:
        change.start()
    try:
        yield
    finally:
        for change in patches:
            change.stop()


def main() -> None:
    """Time the forms in turns, and write a table to ``results/``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="preact_resnet56b")
    parser.add_argument("--view", default="folded_3x3")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--engines", default="eager,compiled")
    parser.add_argument("--output", type=Path, default=Path("results"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    heap = keep_heap()
    torch.manual_seed(0)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size)
    images = images.to(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch_size,))
    gates = {"reduction": 16, "min_hidden": 1, "bias": False, "mask": 0.0}
    network = build(options.model, options.view, **gates)
    forms = {f"eager, without {name}": tuple(other for other in FUNCTIONS if other != name) for name in FUNCTIONS}
    forms = {"eager, all": FUNCTIONS, **forms, "eager, none": (), "compiled, none": (), "compiled, all": FUNCTIONS}
    forms = {name: functions for name, functions in forms.items() if name.split(",")[0] in options.engines.split(",")}
    steps = {}
    for name, functions in forms.items():
        engine = name.split(",")[0]
        own = copy.deepcopy(network).to(memory_format=torch.channels_last)
        with used(functions, compiled=engine == "compiled"):
            step = make_step(own, images, labels, engine, "training", "float32")
        steps[name] = with_functions(step, functions, engine)
    plain = copy.deepcopy(build(options.model, PLAIN)).to(memory_format=torch.channels_last)
    steps["eager, plain network"] = make_step(plain, images, labels, "eager", "training", "float32")
    seconds = take_turns(steps, range(options.repeats), torch.device("cpu"))
    rows = []
    for name, times in seconds.items():
        ratio, memory = paired_ratio(times, seconds["eager, plain network"]), peak_memory(steps[name], images.device)
        row = {"form": name, "milliseconds": round(1000 * sorted(times)[len(times) // 2], 1)}
        row |= {"ratio": round(ratio.median, 3), "low": round(ratio.low, 3), "high": round(ratio.high, 3)}
        rows.append(row | {"peak_mib": None if memory is None else round(memory / 2**20, 1)})
        print(row | rows[-1])
    setup = f"{options.model} {options.view}, batch {options.batch_size}, channels_last, float32, training"
    what = f"custom-gradients-{options.model}-b{options.batch_size}"
    print(write_results(options.output, what, rows, network=setup, turns=str(options.repeats), heap_kept=str(heap)))


def with_functions(step: Callable[[], None], functions: tuple[str, ...], engine: str) -> Callable[[], None]:
    """A step with these functions, as it was prepared."""

    def run() -> None:
        with used(functions, compiled=engine == "compiled"):
            step()

    return run


if __name__ == "__main__":
    main()
