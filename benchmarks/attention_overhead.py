"""What attention costs ResNet-164 on this machine, against the plain network in the same run.

    python benchmarks/attention_overhead.py                       # table on the screen
    python benchmarks/attention_overhead.py --output results/     # and a CSV named by hardware and date

Contenders take turns, so a machine that drifts drifts for all of them. Figures are medians; the ratio is the median of
the ratios within each turn, with its quartiles. METHOD.md's figures of the paper's code on two CPU cores (MXNet 1.9.1,
folded ResNet-164: 38.9 images/s forward, 5.8 training) stand beside ours as multiples.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cmpe_se import VIEWS, PreActResNet
from cmpe_se.networks.blocks import PreActBlock
from cmpe_se.provenance import write_results

REFERENCE = {"forward": 38.9, "training": 5.8}  # images/s of the paper's code, folded, batch 64, two CPU cores


def naive_forward(block: PreActBlock, x, _=None):
    """A block's forward without flowing squeezes: every squeeze reads its tensor, and the addition is two passes."""
    h = torch.relu(block.bn1(x))
    shortcut = x if block.shortcut is None else block.shortcut(h)
    residual = block.last_conv(block.branch(h))
    gate = block.attention.gate(residual.mean((2, 3)), shortcut.mean((2, 3)))
    return shortcut + gate[:, :, None, None] * residual, None


def contenders(views: list[str]) -> dict[str, torch.nn.Module]:
    """Networks by name, with one seed."""

    def build(view):
        torch.manual_seed(0)
        return PreActResNet(164, view=view).to(memory_format=torch.channels_last)

    models = {"plain": build(None)}
    for view in views:
        models[view] = build(view)
    models["folded_3x3 naive"] = build("folded_3x3")
    for module in models["folded_3x3 naive"].modules():
        if isinstance(module, PreActBlock):
            module.forward = naive_forward.__get__(module)
    return models


def forward(model, images, _):
    with torch.inference_mode():
        model(images)


def training(model, images, labels):
    torch.nn.functional.cross_entropy(model(images), labels).backward()
    for parameter in model.parameters():
        parameter.grad = None


def measure(models, step, images, labels, repeats: int, name: str) -> dict[str, list[float]]:
    """Seconds of each contender in each turn."""
    for model in models.values():
        step(model, images, labels)
        step(model, images, labels)
    seconds = {contender: [] for contender in models}
    console = Console(stderr=True)
    for _ in track(range(repeats), name, console=console, disable=not console.is_terminal):
        for contender, model in models.items():
            started = time.perf_counter()
            step(model, images, labels)
            seconds[contender].append(time.perf_counter() - started)
    return seconds


def summarise(mode: str, seconds: dict[str, list[float]], batch: int) -> list[dict]:
    rows = []
    for contender, times in seconds.items():
        ratios = [own / plain for own, plain in zip(times, seconds["plain"], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        rate = batch / statistics.median(times)
        rows.append(
            {
                "mode": mode,
                "contender": contender,
                "images_per_second": round(rate, 1),
                "ratio_to_plain": round(middle, 3),
                "quartiles": f"{low:.3f}-{high:.3f}",
                "times_reference": round(rate / REFERENCE[mode], 2) if contender == "folded_3x3" else "",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=15, help="turns of each contender (default: 15)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--views", nargs="+", default=["se", "folded_3x3"], choices=VIEWS)
    parser.add_argument("--output", type=Path, help="folder for a CSV")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    models = contenders(options.views)
    images = torch.randn(options.batch_size, 3, 32, 32).to(memory_format=torch.channels_last)
    labels = torch.randint(10, (options.batch_size,))
    rows = []
    for mode, step in (("forward", forward), ("training", training)):
        for model in models.values():
            model.train(mode == "training")
        rows += summarise(mode, measure(models, step, images, labels, options.repeats, mode), options.batch_size)

    table = Table(title=f"ResNet-164, batch {options.batch_size}, channels_last, float32, {options.threads} threads")
    for column in rows[0]:
        table.add_column(column.replace("_", " "))
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    if options.output:
        path = write_results(options.output, "attention-overhead", rows, setup=f"{options.threads}-threads")
        print(path, file=sys.stderr)


if __name__ == "__main__":
    main()
