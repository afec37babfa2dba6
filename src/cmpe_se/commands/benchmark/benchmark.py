"""The ``benchmark`` command: time and memory of each kind of gate, in one run with the plain network."""

import copy
import itertools
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from cmpe_se.commands.benchmark.contenders import NAIVE, PLAIN, build, check_contenders
from cmpe_se.commands.benchmark.presenting import Row, plot_ratios, tables_of
from cmpe_se.errors import UserError
from cmpe_se.layers.precision import emulation_warning
from cmpe_se.merging import merge
from cmpe_se.moved import renamed_parameters
from cmpe_se.runtimes.engines import DTYPES, ENGINES, MODES, OUTSIDE, Step, make_runner, require_engine, why_not
from cmpe_se.runtimes.timing import keep_heap, paired_ratio, peak_memory, percentile, take_turns
from cmpe_se.training.provenance import write_results
from cmpe_se.utils.cost import count_multiply_adds
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import os_errors_as
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import split_names

LATENCY_STEPS = 100
"""Steps of each network at batch 1 in forward, at least: fewer have no 99th percentile."""


class _Group(NamedTuple):
    """Contenders that take turns with each other, at one batch size after another."""

    mode: str
    dtype: str
    engine: str
    merged: bool

    def __str__(self) -> str:
        return f"{self.mode} {self.dtype} {self.engine}{' merged' if self.merged else ''}"


@renamed_parameters(batch_size="batch_sizes")
def benchmark(
    model: str = "preact_resnet20",
    *,
    contenders: str = "timm_se,folded_3x3,folded_3x3_naive",
    start: str | None = None,
    reduction: int = 16,
    min_hidden: int = 1,
    bias: bool = False,
    mask: float = 0.0,
    modes: str = "forward,training",
    dtypes: str = "float32",
    engines: str = "eager",
    merged: bool = True,
    batch_sizes: str = "64",
    image_size: int | None = None,
    repeats: int = 15,
    threads: int | None = None,
    channels_last: bool = True,
    device: str = "auto",
    output: str = "results",
) -> list[Row]:
    """Measure the time and memory that attention costs on this machine, against the plain network.

    Networks take turns within one run, so that a drift of the machine affects all of them. Times are medians; ratios
    are of pairs within a turn, with the 95 % confidence interval of their median, and a ratio whose interval contains 1
    is not printed. At batch 1 a forward pass is run at least 100 times, and its percentiles are printed too. glibc
    keeps freed memory, for all networks alike.

    Args:
        model: name of the plain network: one of cmpe_se, or any in timm with residual blocks, which is converted. If
            left out, the small one that the package has weights of; preact_resnet164 is the paper's.
        contenders: views to measure, separated by commas (docs/gates.md lists them), such as timm_se, folded_3x3 or
            static; VIEW_naive for the straightforward form of one of the paper's. The plain network always takes part.
        start: initial value of the gates, half or one; the network's own if left out.
        reduction: number of channels for each hidden unit of a gate; a larger number makes the hidden layer narrower.
        min_hidden: smallest number of hidden units of a gate, whatever the reduction.
        bias: biases in the linear layers of the gates.
        mask: probability of dropping each squeezed channel from the gate's input in training; 0 for off.
        modes: passes to measure, separated by commas: forward, training (forward and backward, without the optimizer).
        dtypes: precisions to measure, separated by commas: float32, bfloat16 (the whole network in forward, autocast in
            training).
        engines: engines to measure, separated by commas: eager, compiled (torch.compile), cudagraphs (compiled, CUDA
            only), onnxruntime, openvino (both in float32 on the CPU, on what `cmpe-se export` writes, with as many
            threads as PyTorch).
        merged: measure the merged networks too, in forward, against the merged plain one.
        batch_sizes: numbers of images in a batch, separated by commas.
        image_size: side of the images in pixels; the network's own if left out.
        repeats: number of turns of each network; at least 100 at batch 1 in forward.
        threads: number of PyTorch's threads on the CPU; unchanged if left out.
        channels_last: channels-last memory format of images and weights.
        device: auto, cpu, or the type of an accelerator such as cuda.
        output: folder for the CSV file and the bar chart.

    Returns:
        The rows of the CSV: ``mode``, ``dtype``, ``engine``, ``merged``, ``batch_size``, ``contender``,
        ``images_per_second``, ``milliseconds`` (of a step, median), ``ratio`` to plain (None where the interval
        contains 1), ``low``, ``high`` (the 95 % interval), ``steps`` (that were timed), ``p50``, ``p90``, ``p99``
        (percentiles of a step's milliseconds; None except at batch 1 in forward), ``peak_mib`` (memory that a step
        adds) and ``memory_ratio``.

    Raises:
        UserError: unknown names, a network that cannot be built so, a missing package, nothing to measure.
    """
    names = [PLAIN, *(name for name in split_names(contenders) if name != PLAIN)]
    check_contenders(names)
    chosen = {"modes": split_names(modes), "dtypes": split_names(dtypes), "engines": split_names(engines)}
    for kind, known in (("modes", MODES), ("dtypes", tuple(DTYPES)), ("engines", ENGINES)):
        if unknown := [value for value in chosen[kind] if value not in known]:
            raise UserError(f"unknown {kind} '{unknown[0]}'; choose of {', '.join(known)}")
    sizes = _sizes(batch_sizes)
    if repeats < 3 or (threads is not None and threads < 1):
        raise UserError(f"repeats {repeats} should be at least 3, and threads at least 1")
    for engine in chosen["engines"]:
        require_engine(engine)
    if threads:
        torch.set_num_threads(threads)
    console = Terminal(stderr=True)
    place = choose_device(device)
    if warning := next(filter(None, (emulation_warning(dtype, place.type) for dtype in chosen["dtypes"])), None):
        console.print(warning, highlight=False, soft_wrap=True)
    groups = _groups(chosen, merged, place, console)
    heap = keep_heap() if place.type == "cpu" else False

    gates: dict[str, Any] = {"reduction": reduction, "min_hidden": min_hidden, "bias": bias, "mask": mask}
    gates |= {} if start is None else {"start": start}
    networks = {name: build(model, name, **gates) for name in names}
    plain: Any = networks[PLAIN]  # with the attributes of timm's networks
    side = image_size or plain.default_cfg["input_size"][-1]
    count_multiply_adds(plain, (3, side, side))  # which refuses in one line a network of signals, clips or other sizes
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.randn(max(sizes), 3, side, side).to(place, memory_format=layout)
    labels = torch.randint(plain.num_classes, (max(sizes),)).to(place)
    rows: list[Row] = []
    for group in groups:
        torch.compiler.reset()  # frees the last group's compiled code and its memory
        with console.status(f"preparing {group}"):
            runners = {
                name: make_runner(_ready(network, group.merged, place, layout), (3, side, side), *_how(group))
                for name, network in networks.items()
                if not (group.merged and name.endswith(NAIVE))
            }
        for size in sizes:
            with console.status(f"preparing {group} batch {size}"):
                steps = {name: runner(images[:size], labels[:size]) for name, runner in runners.items()}
            rows += _measure(group, steps, repeats, size, place, console)

    setup = f"{model}, {side}x{side}, {'channels_last' if channels_last else 'contiguous'}"
    Terminal().print(tables_of(rows, setup))
    folder = Path(output)
    with os_errors_as(f"cannot write to {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        hardware = f"{torch.get_num_threads()}-threads" if place.type == "cpu" else ""
        what = f"benchmark-{model}-b{'-'.join(map(str, sizes))}-{'-'.join(chosen['dtypes'] + chosen['engines'])}"
        notes = {"network": setup, "turns": str(repeats), "heap_kept": str(heap)}
        notes |= {engine: version(engine) for engine in chosen["engines"] if engine in OUTSIDE}
        path = write_results(folder, what, rows, setup=hardware, **notes)
        plot_ratios(rows, setup, path.with_suffix(".png"))
    console.print(f"{path}\n{path.with_suffix('.png')}", highlight=False)
    return rows


def _sizes(batch_sizes: str) -> list[int]:
    names = split_names(str(batch_sizes))  # a number too, in Python
    if not names or not all(name.isdecimal() and int(name) for name in names):
        raise UserError(
            f"batch_sizes '{batch_sizes}' should be numbers of at least 1, separated by commas, such as 1,8"
        )
    return list(dict.fromkeys(map(int, names)))


def _groups(chosen: dict[str, list[str]], merged: bool, device: torch.device, console: Console) -> list[_Group]:
    groups = []
    for engine, mode, dtype in itertools.product(chosen["engines"], chosen["modes"], chosen["dtypes"]):
        if reason := why_not(engine, mode, dtype, device):
            console.print(f"left out: {mode} {dtype} {engine} ({reason})", highlight=False)
            continue
        groups.append(_Group(mode, dtype, engine, False))
        if merged and mode == "forward":
            groups.append(_Group(mode, dtype, engine, True))
    if not groups:
        raise UserError("nothing is left to measure; choose other modes, dtypes or engines")
    return groups


def _ready(network: nn.Module, merged: bool, device: torch.device, layout: torch.memory_format) -> nn.Module:
    network = merge(network) if merged else copy.deepcopy(network)
    return network.to(device).to(memory_format=layout)


def _how(group: _Group) -> tuple[str, str, str]:
    return group.engine, group.mode, group.dtype


def _measure(
    group: _Group, steps: dict[str, Step], repeats: int, batch_size: int, device: torch.device, console: Console
) -> list[Row]:
    latency = group.mode == "forward" and batch_size == 1
    steps_each = max(repeats, LATENCY_STEPS) if latency else repeats
    turns = with_progress(range(steps_each), f"{group} batch {batch_size}", console=console)
    seconds = take_turns(steps, turns, device)
    memory = {name: None if group.engine in OUTSIDE else peak_memory(step, device) for name, step in steps.items()}
    rows: list[Row] = []
    plain = memory[PLAIN]
    for name, times in seconds.items():
        own = memory[name]
        ratio = paired_ratio(times, seconds[PLAIN]).rounded()
        median = sorted(times)[len(times) // 2]
        known = name != PLAIN and ratio.resolved
        rows.append(
            {
                "mode": group.mode,
                "dtype": group.dtype,
                "engine": group.engine,
                "merged": group.merged,
                "batch_size": batch_size,
                "contender": name,
                "images_per_second": round(batch_size / median, 1),
                "milliseconds": round(1000 * median, 2),
                "ratio": 1.0 if name == PLAIN else ratio.median if known else None,
                "low": ratio.low,
                "high": ratio.high,
                "steps": steps_each,
                "p50": round(1000 * percentile(times, 50), 2) if latency else None,
                "p90": round(1000 * percentile(times, 90), 2) if latency else None,
                "p99": round(1000 * percentile(times, 99), 2) if latency else None,
                "peak_mib": None if own is None else round(own / 2**20, 1),
                "memory_ratio": round(own / plain, 3) if plain and own is not None else None,
            }
        )
    return rows
