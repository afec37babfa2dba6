"""A U-Net with gates against the same U-Net without: real images, one budget, three seeds, mean IoU on a test part.

    pip install 'cmpe-se[train]' segmentation-models-pytorch scikit-image
    python examples/segmentation.py                                 # scikit-learn's digits on photographs
    python examples/segmentation.py --objects data/cifar10 --classes airplane,automobile,bird,frog,horse,ship
    python examples/segmentation.py --data-dir VOCdevkit/VOC2012    # or a folder with images/ and masks/

For each seed segmentation_models_pytorch's U-Net is trained as it is, and once more after `cmpe_se.convert`. Both start
from the same weights (a new gate is exactly 1) and get the same batches, so their difference is a pair. At its very
first step a gate's last layer is zero, and only that layer has a gradient; the others follow.

In the output folder, each finished run has a JSON record and its weights: started again, the program goes on with the
runs that are missing. At the end there are results.csv (a row for each run), summary.json (means, 95 % intervals, the
paired difference) and predictions.png.
"""

import argparse
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from paired_arms import ARMS, compare_arms
from pasted_objects import PastedObjects, load_objects, photographs
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.transforms import InterpolationMode, v2

import cmpe_se
from cmpe_se.data.segmentation import IGNORED, MaskedImages, load_segmentation
from cmpe_se.errors import UserError
from cmpe_se.training.provenance import provenance, write_table
from cmpe_se.utils.figures import save_figure
from cmpe_se.utils.files import os_errors_as, replaced, write_json
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.records import read_json
from cmpe_se.utils.text import duration, split_names

SHOWN = 6  # test images in the plot


class Scenes(NamedTuple):
    """Images uint8 (N, 3, S, S) and masks uint8 (N, S, S), of class indices and 255 for what is ignored."""

    images: Tensor
    masks: Tensor


class Data(NamedTuple):
    """Classes, of which 0 is the background, the two parts, and whether a mirrored object is of the same class."""

    classes: tuple[str, ...]
    train: Scenes
    test: Scenes
    mirror: bool = True


def pasted(source: str, classes: list[str], count: int, size: int) -> Data:
    """Small classified images on photographs; training and test share neither objects nor photographs."""
    objects = load_objects(source, classes)
    sides, mirror = (3 * size // 8, 9 * size // 16), source != "digits"

    def scenes(part: str, number: int) -> Scenes:
        small = getattr(objects, part)
        made = PastedObjects(*small, photographs(part), number, size=size, objects=(1, 3), side=sides, mirror=mirror)
        images = torch.empty(number, 3, size, size, dtype=torch.uint8)
        masks = torch.empty(number, size, size, dtype=torch.uint8)
        for index in with_progress(range(number), f"{part} scenes"):
            scene = made[index]
            images[index] = scene.image
            masks[index] = (scene.masks * (scene.labels + 1)[:, None, None]).sum(0)
        return Scenes(images, masks)

    train, test = scenes("train", count), scenes("test", max(SHOWN, count // 4))
    return Data(("background", *objects.classes), train, test, mirror)


def own(folder: Path, size: int) -> Data:
    """The images and masks of a folder, each brought to a square."""

    def scenes(part: MaskedImages, name: str) -> Scenes:
        pairs = [part[index] for index in with_progress(range(len(part)), f"{name} images")]
        return Scenes(torch.stack([image for image, _ in pairs]), torch.stack([mask for _, mask in pairs]).byte())

    to_square = v2.Resize((size, size), interpolation=InterpolationMode.BILINEAR)  # masks: nearest, as v2 does
    found = load_segmentation(folder, transform=to_square, test_transform=to_square)
    return Data(found.classes, scenes(found.train, "training"), scenes(found.test, "test"))


def build(arm: str, classes: int, view: str, seed: int) -> nn.Module:
    """The U-Net, a small ResNet-18 in it, with random weights."""
    try:
        import segmentation_models_pytorch as smp
    except ImportError:
        raise UserError(
            "the U-Net comes with segmentation_models_pytorch; pip install segmentation-models-pytorch"
        ) from None
    torch.manual_seed(seed)
    model = smp.Unet(
        "tu-resnet18",
        encoder_weights=None,
        encoder_depth=4,
        decoder_channels=(48, 32, 24, 16),
        classes=classes,
        channels=(16, 32, 64, 96),
    )
    return cmpe_se.convert(model, view=view) if arm == "converted" else model


def train(
    model: nn.Module,
    scenes: Scenes,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    mirror: bool = True,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Losses of the steps. Every batch depends on seed and step alone."""
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    losses, start = [], time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        chosen = torch.randint(len(scenes.images), (batch_size,), generator=random)
        x, y = normalised(scenes.images[chosen]), scenes.masks[chosen].long()
        if mirror and torch.rand((), generator=random) < 0.5:
            x, y = x.flip(3), y.flip(2)
        loss = nn.functional.cross_entropy(model(x), y, ignore_index=IGNORED)  # (B, K, S, S) and (B, S, S)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % max(1, steps // 10) == 0:
            left = (time.monotonic() - start) / step * (steps - step)
            say(f"step {step}/{steps}  loss {np.mean(losses[-max(1, steps // 10) :]):.3f}  {duration(left)} left")
    return losses


def normalised(images: Tensor) -> Tensor:
    """uint8 to float32 of about mean 0 and deviation 1."""
    return (images.float() / 255 - 0.45) / 0.25


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor, batch_size: int = 32) -> Tensor:
    """Class indices (N, S, S) of uint8 images (N, 3, S, S)."""
    model.eval()
    return torch.cat([model(normalised(part)).argmax(1) for part in images.split(batch_size)])


def evaluate(model: nn.Module, scenes: Scenes, classes: int) -> tuple[float, list[float]]:
    """Intersection over union in percent, counted over all pixels of all images: mean over classes, and of each."""
    settings: dict[str, Any] = {"num_classes": classes, "ignore_index": IGNORED}
    metrics = MetricCollection(
        {kind: MulticlassJaccardIndex(average=kind, **settings) for kind in ("macro", "none")}, compute_groups=False
    )
    metrics.update(predict(model, scenes.images), scenes.masks.long())
    found = metrics.compute()
    return 100 * float(found["macro"]), [100 * value for value in found["none"].tolist()]


def run(arm: str, seed: int, data: Data, options: argparse.Namespace, settings: dict[str, Any]) -> dict[str, Any]:
    """The record of one run: read, if it has finished before, or trained and written."""
    record = options.output / f"{arm}-seed{seed}.json"
    if record.exists():
        known = read_json(record, dict[str, Any], advice="remove it to train this run again")
        if known.get("settings") != settings:
            raise UserError(f"{record} is of a run with other settings; remove it, or give another --output")
        print(f"{arm}, seed {seed}: finished before, mean IoU {known['miou']:.2f} %")
        return known
    model = build(arm, len(data.classes), options.view, seed)
    start = time.monotonic()
    losses = train(
        model,
        data.train,
        steps=options.steps,
        batch_size=options.batch_size,
        seed=seed,
        mirror=data.mirror,
        say=lambda line: print(f"{arm}, seed {seed}: {line}", flush=True),
    )
    seconds = time.monotonic() - start
    miou, ious = evaluate(model, data.test, len(data.classes))
    result = {
        "settings": settings,
        "arm": arm,
        "seed": seed,
        "miou": miou,
        "iou": dict(zip(data.classes, ious, strict=True)),
        "loss": float(np.mean(losses[-10:])),
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
    }
    with replaced(record.with_suffix(".safetensors")) as unfinished:
        save_file(model.state_dict(), unfinished)
    write_json(record, result)  # last: it says that the run has finished
    print(f"{arm}, seed {seed}: mean IoU {miou:.2f} % in {duration(seconds)}", flush=True)
    return result


def verdict(found: dict[str, Any]) -> str:
    """The summary in words."""
    lines = [
        f"{arm:>9}: mean IoU {found[arm]['mean']:.2f} %"
        + (f" (95 % interval {found[arm]['low']:.2f} to {found[arm]['high']:.2f})" if found[arm]["low"] else "")
        for arm in ARMS
    ]
    difference = found["difference"]
    text = f"converted minus plain: {difference['mean']:+.2f} points over {difference['count']} seed(s)"
    if difference["p"] is not None and difference["low"] is not None:
        text += f", 95 % interval {difference['low']:+.2f} to {difference['high']:+.2f}, p {difference['p']:.3f}"
        text += "" if difference["p"] < 0.05 else ": no difference shown"
    return "\n".join([*lines, text])


def plot(data: Data, predictions: dict[str, Tensor], title: str, path: Path) -> None:
    """Test images, their masks, and what each network makes of them."""
    colours = ["#222222", *(colormaps["tab20"](index % 20) for index in range(len(data.classes) - 1))]
    colour_map = ListedColormap([*colours, "white"])
    norm = BoundaryNorm(np.arange(len(colours) + 2) - 0.5, len(colours) + 1)
    images = data.test.images[:SHOWN]
    rows = {"truth": data.test.masks[: len(images)], **predictions}
    figure = Figure(figsize=(1.5 * len(images) + 0.6, 1.5 * (1 + len(rows)) + 0.9), layout="constrained")
    axes = figure.subplots(1 + len(rows), len(images), squeeze=False)
    for column, image in enumerate(images):
        axes[0, column].imshow(image.permute(1, 2, 0).numpy())
        for row, masks in enumerate(rows.values(), start=1):
            indices = masks[column].long().clamp(max=len(colours)).numpy()
            axes[row, column].imshow(indices, cmap=colour_map, norm=norm, interpolation="nearest")
    for row, name in enumerate(["image", *rows]):
        axes[row, 0].set_ylabel(name)
    for each in axes.flat:
        each.set(xticks=[], yticks=[])
    labels = [Patch(color=colour, label=name) for colour, name in zip(colours, data.classes, strict=True)]
    figure.legend(handles=labels[:22], loc="outside lower center", ncols=min(len(labels), 7), frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Train what has not been trained yet, then write the table, the summary and the plot."""
    options = parse(arguments)
    with os_errors_as(f"cannot make the folder {options.output}"):
        options.output.mkdir(parents=True, exist_ok=True)
    if options.data_dir:
        data = own(options.data_dir, options.size)
    else:
        data = pasted(options.objects, split_names(options.classes), options.scenes, options.size)
    source = str(options.data_dir or options.objects)
    print(f"{len(data.train.images)} training and {len(data.test.images)} test images of {len(data.classes)} classes")
    settings = {name: getattr(options, name) for name in ("size", "steps", "batch_size", "view")}
    settings |= {"classes": list(data.classes), "train": len(data.train.images), "test": len(data.test.images)}
    records = [run(arm, seed, data, options, settings) for seed in range(options.seeds) for arm in ARMS]

    found = compare_arms(records, "miou")
    print(verdict(found))
    rows = [
        {"arm": each["arm"], "seed": each["seed"], "params": each["params"], "miou": f"{each['miou']:.2f}"}
        | {f"iou_{name}": f"{value:.2f}" for name, value in each["iou"].items()}
        | {"train_loss": f"{each['loss']:.4f}", "train_seconds": f"{each['seconds']:.1f}"}
        for each in records
    ]
    write_table(
        options.output / "results.csv",
        rows,
        segmentation_models_pytorch=version("segmentation-models-pytorch"),
        settings=", ".join(f"{name} {value}" for name, value in settings.items()),
        summary=verdict(found).replace("\n", "; "),
    )
    write_json(options.output / "summary.json", {"settings": settings, "miou": found, **provenance()})
    predictions = {}
    for arm in ARMS:
        model = build(arm, len(data.classes), options.view, 0)
        model.load_state_dict(load_file(options.output / f"{arm}-seed0.safetensors"))
        predictions[arm] = predict(model, data.test.images[:SHOWN])
    plot(
        data,
        predictions,
        f"{Path(source).name}: predictions on test images, seed 0",
        options.output / "predictions.png",
    )
    print(f"results.csv, summary.json and predictions.png are in {options.output}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-dir", type=Path, help="folder laid out as Pascal VOC's, or with images/ and masks/")
    add("--objects", default="digits", help="without --data-dir: digits, or a folder with CIFAR-10 or class folders")
    add("--classes", default="", help="classes of the objects, with commas between (default: all)")
    add("--scenes", type=int, default=2000, help="training images that are made, and a quarter as many for the test")
    add("--size", type=int, default=48, help="side of the square images in pixels, a multiple of 16")
    add("--steps", type=int, default=600, help="training steps of each run")
    add("--batch-size", type=int, default=8, help="images of a step")
    add("--seeds", type=int, default=3, help="runs of each network")
    add("--view", default="folded_3x3", choices=cmpe_se.VIEWS, metavar="VIEW", help="of the gates (docs/gates.md)")
    add("--output", type=Path, default=Path("runs/segmentation"), help="folder for records, weights, table and plot")
    options = parser.parse_args(arguments)
    for name, least in (("scenes", 1), ("size", 32), ("steps", 5), ("batch_size", 2), ("seeds", 1)):
        if getattr(options, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}, should be at least {least}")
    if options.size % 16:
        raise UserError(f"--size is {options.size}, should be a multiple of 16, such as {options.size // 16 * 16}")
    return options


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"segmentation.py: {error}")
