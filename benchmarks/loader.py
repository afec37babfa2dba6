"""Images a second that loaders of photographs give, side by side: ours, timm's, torchvision's, and the decoder alone.

    python benchmarks/loader.py --output results/
    python benchmarks/loader.py --sizes 500x375 --images 400 --rounds 11 --output results/

Each contender goes through the same JPEG files once a round: all of an epoch, with the start of its worker processes,
to normalised batches of 224 pixels. Contenders take turns, and ratios are of the same round.

    ours          load_data("imagenet"), class folders
    ours-shards   load_data("wds/..."), the same files as WebDataset shards, one a worker
    ours-parquet  load_data("hfds/..."), the same files in a Parquet file
    timm          create_loader with its prefetcher, class folders, the same augmentation
    torchvision   ImageFolder, RandomResizedCrop and flip (Resize and CenterCrop in the test), ToTensor, Normalize
    decoder       Pillow decodes each file whole, in as many processes, and nothing else is done

The training loaders crop at random (8 to 100 % of the area), flip and normalise; the testing loaders resize to 256
pixels and crop the centre. The files are made here: random crops of scikit-learn's two photographs, brought to the
size, with a little noise, since the photographs are smaller, as JPEG of quality 90.

Give the machine nothing else to do. Where that cannot be, look at the processor time: of this process and its workers
together, for an image. All contenders keep their processes busy, so on a free machine speed goes by it.
"""

import argparse
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data import create_dataset, create_loader
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from cmpe_se.data import Augmentation, ImageData, load_data
from cmpe_se.runtimes.timing import paired_ratio, take_turns
from cmpe_se.training.provenance import write_results
from cmpe_se.utils.progress import with_progress

CONTENDERS = ("ours", "ours-shards", "ours-parquet", "timm", "torchvision", "decoder")
_COUNTS = {"500x375": 200, "4000x3000": 32}  # photographs of a size
_DIFFERENT, _CLASSES, _SIDE = 8, ("china", "flower"), 224


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default=",".join(_COUNTS), help="WIDTHxHEIGHT of the photographs, with commas")
    parser.add_argument("--images", type=int, help="photographs of each size (default: 200, or 32 of 4000x3000)")
    parser.add_argument("--parts", default="train,test", help="loaders to time: train, test or both")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="with commas; timm is always among them")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode, of each contender")
    parser.add_argument("--rounds", type=int, default=7, help="in which each contender has a turn")
    parser.add_argument("--output", type=Path, required=True, help="folder for the CSV")
    options = parser.parse_args()
    names = [name for name in CONTENDERS if name in (*options.contenders.split(","), "timm")]

    rows: list[dict[str, Any]] = []
    for text in options.sizes.split(","):
        width, height = map(int, text.split("x"))
        count = options.images or _COUNTS.get(text, 100)
        with tempfile.TemporaryDirectory() as folder:
            root = write_images(Path(folder), (width, height), count, options.workers)
            for part in options.parts.split(","):
                rows += time_loaders(root, part, text, count, names, options)
    options.output.mkdir(parents=True, exist_ok=True)
    note = f"{options.rounds} rounds in turns, {options.workers} workers, {_SIDE} pixels, JPEG quality 90"
    what = f"loader-{options.sizes.replace(',', '-')}-{options.workers}-workers"
    busy = f"{os.getloadavg()[0]:.0f} processes wanted to run at the end, these among them"
    print(write_results(options.output, what, rows, setup="", timing=note, machine=busy))


def time_loaders(
    root: Path, part: str, size: str, count: int, names: list[str], options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each contender."""
    batch = max(count // (4 * max(options.workers, 1)), 1)
    makers = {
        "ours": ours,
        "ours-shards": partial(ours, kind="shards"),
        "ours-parquet": partial(ours, kind="parquet"),
        "timm": timm_loader,
        "torchvision": torchvision_loader,
        "decoder": decoder_loader,
    }
    makes = {name: makers[name](root, part, batch, options.workers) for name in names}
    for make in makes.values():
        go_through(make, count, [])
    cpu: dict[str, list[float]] = {name: [] for name in names}
    steps = {name: partial(go_through, make, count, cpu[name]) for name, make in makes.items()}
    turns = with_progress(range(options.rounds), f"{size}, {part}")
    seconds = take_turns(steps, turns, torch.device("cpu"))
    rows = []
    for name, own in seconds.items():
        row = {"photographs": size, "loader": part, "contender": name, "images_per_second": count / median(own)}
        row |= ratio_to_timm("speed_over_timm", seconds["timm"], own)
        row |= {"cpu_ms_per_image": 1000 * median(cpu[name]) / count}
        row |= ratio_to_timm("timm_cpu_over_own", cpu["timm"], cpu[name])
        rows.append({key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()})
        print(*rows[-1].values(), flush=True)
    return rows


def ratio_to_timm(name: str, timm: list[float], own: list[float]) -> dict[str, float]:
    ratio = paired_ratio(timm, own)
    return {name: ratio.median, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def go_through(make: Callable[[], Iterable], count: int, cpu: list[float]) -> None:
    """One epoch, of which all of the images have to come; its processor seconds go to ``cpu``."""
    before = os.times()
    if (seen := sum(len(batch[1]) for batch in make())) != count:
        raise SystemExit(f"{seen} of {count} images came")
    cpu.append(max(sum(os.times()[:4]) - sum(before[:4]), 0.01))  # the system counts hundredths of a second


def ours(root: Path, part: str, batch: int, workers: int, kind: str = "folder") -> Callable[[], Iterable]:
    """Ours, on one of the three forms of the files."""
    data: ImageData = {
        "folder": lambda: load_data("imagenet", root / "folder", workers=workers),
        "shards": lambda: load_data(f"wds/{root / 'shards'}", workers=workers),
        "parquet": lambda: load_data(f"hfds/{root / 'parquet'}", root / "kept", workers=workers, image_size=_SIDE),
    }[kind]()
    if part == "test":
        return partial(data.test_batches, batch_size=batch)
    return partial(data.train_batches, 0, batch_size=batch, seed=0, augmentation=Augmentation(flip=True))


def timm_loader(root: Path, part: str, batch: int, workers: int) -> Callable[[], Iterable]:
    training = part == "train"
    loader = create_loader(
        create_dataset("", root=str(root / "folder" / ("train" if training else "val"))),
        input_size=(3, _SIDE, _SIDE),
        batch_size=batch,
        is_training=training,
        hflip=0.5,
        color_jitter=None,  # type: ignore[arg-type]  # timm takes None for none
        interpolation="bicubic",
        crop_pct=0.875,
        num_workers=workers,
        pin_memory=False,
        device=torch.device("cpu"),
        persistent_workers=False,
    )
    return lambda: loader


def torchvision_loader(root: Path, part: str, batch: int, workers: int) -> Callable[[], Iterable]:
    bicubic, training = transforms.InterpolationMode.BICUBIC, part == "train"
    if training:
        crop = [transforms.RandomResizedCrop(_SIDE, interpolation=bicubic), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(256, interpolation=bicubic), transforms.CenterCrop(_SIDE)]
    normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    steps = transforms.Compose([*crop, transforms.ToTensor(), normalise])
    images = ImageFolder(str(root / "folder" / ("train" if training else "val")), steps)
    loader = DataLoader(images, batch, shuffle=training, num_workers=workers)
    return lambda: loader


class _Decoded(Dataset):
    """Decodes an image and gives nothing of it away."""

    def __init__(self, files: list[Path]):
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[int, int]:
        with Image.open(self.files[index]) as image:
            image.load()
        return 0, 0


def decoder_loader(root: Path, part: str, batch: int, workers: int) -> Callable[[], Iterable]:
    files = sorted((root / "folder" / ("train" if part == "train" else "val")).rglob("*.jpg"))
    return lambda: DataLoader(_Decoded(files), batch, num_workers=workers)


def write_images(root: Path, size: tuple[int, int], count: int, shards: int) -> Path:
    """The photographs as class folders, shards and Parquet, each with a part for training and one for the test."""
    random, contents = np.random.default_rng(0), list[bytes]()
    for index in range(min(_DIFFERENT, count)):
        photo = Image.fromarray(load_sample_image(f"{_CLASSES[index % 2]}.jpg"))
        width = int(random.integers(400, photo.width + 1))
        height = min(width * size[1] // size[0], photo.height)
        left, top = random.integers(photo.width - width + 1), random.integers(photo.height - height + 1)
        large = photo.resize(size, Image.Resampling.LANCZOS, (left, top, left + width, top + height))
        pixels = np.asarray(large, np.int16) + random.normal(0, 4, (*large.size[::-1], 3)).astype(np.int16)
        file = io.BytesIO()
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "jpeg", quality=90)
        contents.append(file.getvalue())
    images = [(contents[index % len(contents)], index % 2) for index in range(count)]
    for index, (content, label) in enumerate(images):
        for part in ("train", "val"):
            folder = root / "folder" / part / _CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{index:05d}.jpg").write_bytes(content)
    write_shards(root / "shards", images, max(shards, 1))
    write_parquet(root / "parquet", images)
    return root


def write_shards(folder: Path, images: list[tuple[bytes, int]], number: int) -> None:
    folder.mkdir()
    names, lengths = [f"part-{shard}.tar" for shard in range(number)], []
    for shard, name in enumerate(names):
        own = images[shard::number]
        lengths.append(len(own))
        with tarfile.open(folder / name, "w") as tar:
            for index, (content, label) in enumerate(own):
                for ending, payload in (("jpg", content), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{index:05d}.{ending}")
                    member.size = len(payload)
                    tar.addfile(member, io.BytesIO(payload))
    split = {"num_samples": len(images), "filenames": names, "shard_lengths": lengths}
    splits = {part: {"name": part, **split} for part in ("train", "val")}
    (folder / "_info.json").write_text(json.dumps({"splits": splits, "classes": _CLASSES}))


def write_parquet(folder: Path, images: list[tuple[bytes, int]]) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(_CLASSES))})
    columns = {
        "image": [{"bytes": content, "path": None} for content, _ in images],
        "label": [label for _, label in images],
    }
    folder.mkdir()
    path = folder / "train-00000-of-00001.parquet"
    datasets.Dataset.from_dict(columns, features=features).to_parquet(str(path))
    shutil.copy(path, folder / "test-00000-of-00001.parquet")


if __name__ == "__main__":
    main()
