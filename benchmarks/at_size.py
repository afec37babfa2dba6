"""Memory of ``predict`` with few images and with many, and the time to its first answer, in one process.

    python benchmarks/at_size.py --images 1000 20000

Predictions are written to a file, with two workers, of 16-pixel PNG files, by an untrained network. Prints a line of
JSON for each number of images, which should ascend: the highest resident memory of the process without its workers,
seconds on the clock and of the processor, and seconds from the call to the first lines of the file.
"""

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import timm
import torch
from PIL import Image

from cmpe_se.commands.predict import predict
from cmpe_se.data import Preprocessing
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


def measure(run: Path, images: Path, count: int) -> dict:
    """Predict a folder of ``count`` images."""
    output = run.parent / f"{count}.jsonl"
    before, first = peak(), list[float]()
    clock, processor = time.perf_counter(), time.process_time()

    def watch() -> None:
        while not (output.exists() and output.stat().st_size):
            time.sleep(0.01)
        first.append(time.perf_counter() - clock)

    threading.Thread(target=watch, daemon=True).start()
    predict(str(run), str(images), output=str(output), workers=2)
    seconds = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    row = {"images": count, "peak_mb_before": before, "peak_mb": peak(), "seconds_to_first": first[0], **seconds}
    return {name: round(value, 2) for name, value in row.items()}


def peak() -> float:
    """The highest resident memory of this process so far, in MB."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    """Measure each number of images in turn."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 20000])
    parser.add_argument("--model", default="test_resnet")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        run, images, written = make_run(Path(folder) / "run", settings.model), Path(folder) / "images", 0
        images.mkdir()
        for count in settings.images:
            for number in range(written, count):
                pixels = random.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(images / f"{number:06d}.png", compress_level=0)
            written = count
            print(json.dumps(measure(run, images, count)), flush=True)


if __name__ == "__main__":
    main()
