"""Real photographs of many shapes and modes as files: scikit-learn's two, cropped."""

import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image

_SIZES = {
    "landscape": (640, 427),
    "portrait": (280, 420),
    "narrow": (400, 90),
    "high": (77, 333),
    "tiny": (20, 30),
    "odd": (501, 333),
    "exact": (32, 32),
    "square": (250, 250),
}  # (width, height)
CLASSES = ("china", "flower")


def write_photos(root: Path, parts: tuple[str, ...] = ("train", "test")) -> Path:
    """Write root/PART/CLASS/SHAPE.png and .jpg, with grey, transparent and turned ones, other crops in each part."""
    for seed, part in enumerate(parts):
        random = np.random.default_rng(seed)
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            photo = Image.fromarray(load_sample_image(f"{name}.jpg"))
            for shape, (width, height) in _SIZES.items():
                left, top = random.integers(photo.width - width + 1), random.integers(photo.height - height + 1)
                photo.crop((left, top, left + width, top + height)).save(folder / f"{shape}.png")
            crop = photo.crop((40, 30, 340, 230))
            crop.convert("L").save(folder / "grey.png")
            crop.convert("P").save(folder / "palette.png")
            clear = crop.convert("RGBA")
            clear.putalpha(Image.radial_gradient("L").resize(crop.size))
            clear.save(folder / "transparent.png")
            turned = Image.Exif()
            turned[0x0112] = 6  # orientation: to be turned by 90 degrees
            crop.save(folder / "turned.jpg", exif=turned)
    return root


def write_shards(root: Path, photos: Path) -> Path:
    """The files of ``photos`` as WebDataset shards, one for each part, in the order of the sorted paths."""
    root.mkdir()
    splits = {}
    for part in ("train", "test"):
        files = sorted((photos / part).rglob("*.*"))
        with tarfile.open(root / f"{part}.tar", "w") as tar:
            for number, file in enumerate(files):
                tar.add(file, f"{number:04d}{file.suffix}")
                label = root / f"{number:04d}.cls"
                label.write_text(str(CLASSES.index(file.parent.name)))
                tar.add(label, label.name)
                label.unlink()
        splits[part] = {
            "name": part, "num_samples": len(files), "filenames": [f"{part}.tar"], "shard_lengths": [len(files)]
        }  # fmt: skip
    (root / "_info.json").write_text(json.dumps({"splits": splits, "classes": CLASSES}))
    return root
