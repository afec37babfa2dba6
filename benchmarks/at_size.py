"""Memory of ``predict`` and of ``report`` with few images and with many, in one process, and the time that they take.

    python benchmarks/at_size.py --images 1000 20000
    python benchmarks/at_size.py --of report --images 1000 50000

Predictions are written to a file, with two workers, of 16-pixel PNG files, by an untrained network. Reports are of the
network that comes with the package, on 32-pixel PNG files. Both are noise. Prints a line of JSON for each number of
images, which should ascend: the highest resident memory of the process without its workers, seconds on the clock and of
the processor, and for ``predict`` seconds from the call to the first lines of the file.
"""

import argparse
import json
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from PIL import Image

from cmpe_se.commands.predict import predict
from cmpe_se.commands.report import report
from cmpe_se.data import Preprocessing
from cmpe_se.shipped import SHIPPED
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.provenance import provenance
from cmpe_se.training.run_folder import RunFolder

CLASSES, SIDE = 100, 16


def make_run(path: Path, model: str) -> Path:
    """A run folder of an untrained network."""
    torch.manual_seed(0)
    classes = tuple(f"{number:02d}" for number in range(CLASSES))
    how = Preprocessing(classes, (3, SIDE, SIDE), (0.5,) * 3, (0.25,) * 3)
    run, arguments = RunFolder(path), {"num_classes": CLASSES}
    run.write_config(TrainingConfig(model=model, data="folder", data_dir="/not/there", device="cpu"))
    network = timm.create_model(model, **arguments)
    run.save_model(network, model_args=arguments, data=SimpleNamespace(classes=classes, preprocessing=how))
    numbers = {"test_top1": 1.0, "test_top5": 5.0, "test_loss": 4.6, "train_seconds": 1.0, "images_per_second": 1.0}
    counts = {"seed": 0, "epochs": 1, "params": 1, "macs": 1, "train_images": 1, "test_images": 1}
    words = {"model": model, "view": None, "data": "folder", "run": str(path), "processes": 1}
    run.write_result({**words, **counts, **numbers, **provenance()})
    return path


def measure(count: int, call: Callable[[], dict]) -> dict:
    """What a call for ``count`` images takes, beside what it returns."""
    before, clock, processor = peak(), time.perf_counter(), time.process_time()
    more = call()
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    row = {"images": count, "peak_mb_before": before, "peak_mb": peak(), **seconds, **more}
    return {name: round(value, 2) for name, value in row.items()}


def predicted(run: Path, images: Path, output: Path) -> dict:
    """Predict a folder of images."""
    first, clock = list[float](), time.perf_counter()

    def watch() -> None:
        while not (output.exists() and output.stat().st_size):
            time.sleep(0.01)
        first.append(time.perf_counter() - clock)

    threading.Thread(target=watch, daemon=True).start()
    predict(str(run), str(images), output=str(output), workers=2)
    return {"seconds_to_first": first[0]}


def write_images(folder: Path, side: int, numbers: range, classes: Sequence[str]) -> None:
    """Noise, as PNG files in class folders, or in the folder itself where there are no classes."""
    random = np.random.default_rng(numbers.start)
    for number in numbers:
        place = folder / classes[number % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{number:06d}.png", compress_level=0)


def peak() -> float:
    """The highest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Measure each number of images in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--of", choices=("predict", "report"), default="predict", help="command (default: predict)")
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--model", default="test_resnet", help="network that predicts")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder, written = Path(name), 0
        images = folder / "images"
        if settings.of == "report":
            place, side, classes = images / "test", 32, RunFolder.open(SHIPPED).preprocessing().classes
        else:
            place, side, classes = images, SIDE, ()
            run = make_run(folder / "run", settings.model)

        def call(count: int) -> dict:
            if settings.of == "predict":
                return predicted(run, images, folder / f"{count}.jsonl")
            report(data_dir=str(images), output=str(folder / f"{count}"))
            return {}

        for count in settings.images:
            write_images(place, side, range(written, count), classes)
            written = count
            print(json.dumps(measure(count, partial(call, count))), flush=True)


if __name__ == "__main__":
    main()
