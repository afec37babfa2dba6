"""A small RetinaNet learns to find objects: as it is and converted, with the same budget and the same seeds.

    python examples/detection.py                                       # handwritten digits on photographs
    python examples/detection.py --objects CIFAR --classes airplane automobile frog horse
    python examples/detection.py --data-dir COCO                       # or a folder in Pascal VOC's format

Nothing is downloaded. Images come from ``pasted_objects.py``, or from a folder in COCO's or Pascal VOC's format. The
converted detector starts with the weights of the other one, and computes the same until training moves its gates. Each
finished run is kept in the output folder, so that the same command continues after an interruption. The folder gets
``detection.json``, ``detection.csv`` and ``detection.png``: mean average precision on the test images, the paired
difference with its interval, and what both detectors find.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from paired_arms import ARMS, compare_arms
from pasted_objects import PastedObjects, Scene, load_objects, photographs
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.ops import nms

import cmpe_se
from cmpe_se.data.detection import load_detection
from cmpe_se.errors import UserError
from cmpe_se.training.provenance import provenance, write_table
from cmpe_se.utils.files import write_json
from cmpe_se.utils.packages import is_installed
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.records import read_json

METRICS = ("map", "map_50", "map_75")  # torchmetrics' names: mean over IoU 0.5 to 0.95, at 0.5 and at 0.75
TRAIN_SCENES, TEST_SCENES, SHOWN = 4000, 300, 8
CHANNELS = 48
Target = dict[str, Tensor]


class LabelledScenes(Dataset[tuple[Tensor, Target]]):
    """Scenes as torchvision's detectors take them: float images in [0, 1], labels from 1. Made once."""

    def __init__(self, scenes: PastedObjects):
        self.scenes: list[Scene] = [scenes[index] for index in with_progress(range(len(scenes)), "pasting")]

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        scene = self.scenes[index]
        return scene.image.float() / 255, {"boxes": scene.boxes, "labels": scene.labels + 1}


def load(options: argparse.Namespace) -> tuple[tuple[str, ...], Dataset[Any], Dataset[Any]]:
    """Names of the classes, training and test images."""
    if options.data_dir is not None:
        data = load_detection(options.data_dir)
        return data.classes, data.train, data.test
    objects = load_objects(options.objects, options.classes)
    size = options.image_size
    scenes: dict[str, Any] = {"size": size, "objects": (1, 3), "side": (round(0.3 * size), round(0.5 * size))}
    train_scenes = min(TRAIN_SCENES, options.steps * options.batch_size)
    train = PastedObjects(*objects.train, photographs("train"), train_scenes, seed=0, **scenes)
    test = PastedObjects(*objects.test, photographs("test"), options.test_images or TEST_SCENES, seed=1, **scenes)
    return objects.classes, LabelledScenes(train), LabelledScenes(test)


def detector(classes: int, image_size: int, *, view: str | None = None, seed: int = 0) -> nn.Module:
    """A RetinaNet of 0.4 million parameters; with ``view``, the same weights and gates in its backbone.

    Args:
        classes: number of them, without the background.
        image_size: side in pixels that images are scaled to, the longer one.
        view: of the gates; None for the detector as it is.
        seed: of the weights.
    """
    torch.manual_seed(seed)
    backbone = cmpe_se.fpn_backbone(
        "resnet18",
        channels=(24, 48, 96, 96),
        layers=(1, 1, 1, 1),
        stem_width=16,
        out_indices=(2, 3),  # strides 8 and 16: the objects are a third to a half of the image
        out_channels=CHANNELS,
        extra_blocks=None,
    )
    sides = tuple((round(share * image_size), round(1.25 * share * image_size)) for share in (0.3, 0.4))
    anchors = AnchorGenerator(sides, ((1.0,),) * 2)
    # Norms in the head too, as torchvision's retinanet_resnet50_fpn_v2 has them: it starts from random weights.
    norm = partial(nn.GroupNorm, 8)
    head = RetinaNetHead(CHANNELS, anchors.num_anchors_per_location()[0], classes + 1, norm_layer=norm)
    model = RetinaNet(
        backbone,
        classes + 1,
        anchor_generator=anchors,
        head=head,
        min_size=image_size,
        max_size=image_size,
        image_mean=[0.5] * 3,
        image_std=[0.25] * 3,
        detections_per_img=50,
    )
    return model if view is None else cmpe_se.convert(model, view=view)


def train(
    model: nn.Module,
    images: Dataset[Any],
    *,
    steps: int,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> list[float]:
    """Losses of the steps. AdamW with a cosine; half of the images are mirrored."""
    random, warm_up = torch.Generator().manual_seed(seed), min(50, max(1, steps // 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / warm_up) * (1 + math.cos(math.pi * step / steps)) / 2
    )
    order: list[int] = []
    losses, start = [], time.monotonic()
    model.train()
    for step in range(1, steps + 1):
        while len(order) < batch_size:
            order += torch.randperm(len(images), generator=random).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        mirrored = torch.rand(batch_size, generator=random) < 0.5
        pairs = zip(chosen, mirrored, strict=True)
        batch = [_mirrored(*images[index]) if flip else images[index] for index, flip in pairs]
        parts = model(*map(list, zip(*batch, strict=True)))
        loss = sum(parts.values())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if not math.isfinite(losses[-1]):
            raise UserError(f"the loss is {losses[-1]} at step {step}; lower --learning-rate")
        if step % 50 == 0 or step == steps:
            recent = sum(losses[-50:]) / len(losses[-50:])
            say(f"step {step:>5} of {steps}  loss {recent:.3f}  {time.monotonic() - start:.0f} s")
    return losses


def _mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    left, top, right, bottom = target["boxes"].unbind(1)
    width = image.shape[2]
    return image.flip(2), target | {"boxes": torch.stack([width - right, top, width - left, bottom], dim=1)}


@torch.inference_mode()
def evaluate(model: nn.Module, images: Dataset[Any], batch_size: int = 50) -> tuple[dict[str, float], list[Target]]:
    """Mean average precision in percent, and what was detected on each image."""
    from torchmetrics.detection import MeanAveragePrecision

    metric, found = MeanAveragePrecision(backend="faster_coco_eval"), []
    model.eval()
    for first in with_progress(range(0, len(images), batch_size), "testing"):
        batch = [images[index] for index in range(first, min(first + batch_size, len(images)))]
        detected = model([image for image, _ in batch])
        metric.update(detected, [target for _, target in batch])
        found += detected
    values = metric.compute()
    return {name: round(100 * float(values[name]), 2) for name in METRICS}, found


def run(
    arm: str, seed: int, options: argparse.Namespace, data: tuple[tuple[str, ...], Dataset[Any], Dataset[Any]]
) -> dict[str, Any]:
    """The record of one run: from its file if it has finished before."""
    classes, train_images, test_images = data
    settings = {key: value for key, value in vars(options).items() if key not in ("seeds", "output")}
    file = options.output / f"{arm}-seed{seed}.json"
    if file.exists():
        record = read_json(file, dict[str, Any], advice="remove it to train this run again")
        if record.get("settings") != settings:
            raise UserError(f"{file} is a run with other settings; give another --output")
        print(f"{arm}, seed {seed}: finished before, mAP {record['map']:.2f} %")
        return record
    print(f"{arm}, seed {seed}")
    model = detector(len(classes), options.image_size, view=options.view if arm == "converted" else None, seed=seed)
    start = time.monotonic()
    losses = train(
        model,
        train_images,
        steps=options.steps,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate,
        seed=seed,
    )
    seconds = time.monotonic() - start
    scores, found = evaluate(model, test_images)
    print(f"{arm}, seed {seed}: " + ", ".join(f"{name} {value:.2f} %" for name, value in scores.items()))
    shown = [{key: value.tolist() for key, value in each.items()} for each in found[:SHOWN]]
    record = {"arm": arm, "seed": seed, **scores, "loss": round(sum(losses[-50:]) / len(losses[-50:]), 4)}
    record |= {
        "seconds": round(seconds, 1),
        "params": sum(weight.numel() for weight in model.parameters() if weight.requires_grad),
    }
    record |= {"settings": settings, "detections": shown, **provenance()}
    write_json(file, record)
    return record


def sentence(result: dict[str, Any]) -> str:
    """What the comparison says, in words."""
    plain, converted, difference = result["plain"], result["converted"], result["difference"]
    text = f"mAP {plain['mean']:.2f} % plain, {converted['mean']:.2f} % converted: {difference['mean']:+.2f} points"
    if difference["low"] is None:
        return f"{text}; no interval, since the seeds are too few or do not differ"
    low, high = difference["low"], difference["high"]
    shown = "the interval contains 0: no difference shown" if low <= 0 <= high else "the interval leaves 0 out"
    return f"{text} (95 % interval {low:+.2f} to {high:+.2f}, {difference['count']} paired seeds); {shown}"


def draw(
    file: Path, classes: Sequence[str], images: Dataset[Any], records: Sequence[dict[str, Any]], title: str
) -> None:
    """Test images with the true boxes and those that each arm finds: at a place the surest class, from 0.3 up."""
    shown = min(SHOWN, len(images))
    figure = Figure(figsize=(2.2 * shown, 7.4), layout="constrained")
    rows = figure.subplots(len(ARMS) + 1, shown, squeeze=False)
    first = {arm: next(record for record in records if record["arm"] == arm) for arm in ARMS}
    for column in range(shown):
        image, target = images[column]
        found = [(target["boxes"].tolist(), target["labels"].tolist(), None)]
        found += [tuple(first[arm]["detections"][column][key] for key in ("boxes", "labels", "scores")) for arm in ARMS]
        for axes, (boxes, labels, scores) in zip(rows[:, column], found, strict=True):
            axes.imshow(image.permute(1, 2, 0).numpy())
            axes.set(xticks=[], yticks=[])
            for index in range(len(boxes)) if scores is None else _clear(boxes, scores):
                (left, top, right, bottom), label = boxes[index], labels[index]
                colour = "white" if scores is None else "orange"
                text = classes[label - 1] + ("" if scores is None else f" {scores[index]:.2f}")
                axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color=colour, lw=1.5))
                axes.text(left, top, text, fontsize=7, va="top", bbox={"color": colour, "pad": 0.5}, clip_on=True)
    names = ("true boxes", *(f"{arm}, seed {first[arm]['seed']}" for arm in ARMS))
    for axes, name in zip(rows[:, 0], names, strict=True):
        axes.set_ylabel(name)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=110)


def _clear(boxes: list[list[float]], scores: list[float]) -> list[int]:
    """Indices of the boxes that a plot has room for: of those that overlap by half, of any class, the one with most."""
    kept = nms(torch.tensor(boxes).reshape(-1, 4), torch.tensor(scores), 0.5).tolist()
    return [index for index in kept if scores[index] >= 0.3]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--objects", default="digits", help="digits, or a folder with CIFAR-10 or class folders")
    source.add_argument("--data-dir", help="folder in COCO's or Pascal VOC's format")
    parser.add_argument("--classes", nargs="+", default=[], help="classes of the objects; all if left out")
    parser.add_argument("--image-size", type=int, default=64, help="longer side of the images (default 64)")
    parser.add_argument("--steps", type=int, default=800, help="steps of training (default 800)")
    parser.add_argument("--batch-size", type=int, default=16, help="images to a step (default 16)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="of AdamW at its highest (default 0.003)")
    parser.add_argument("--test-images", type=int, default=0, help=f"scenes in the test (default {TEST_SCENES})")
    parser.add_argument("--view", default="folded_3x3", help="view of the gates (default folded_3x3)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of both detectors (default 0 1 2)")
    parser.add_argument("--output", type=Path, default=Path("runs/detection"), help="folder (default runs/detection)")
    return parser.parse_args(arguments)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train both detectors with every seed, and write what came out."""
    if not is_installed("faster_coco_eval"):
        raise UserError("mean average precision needs faster-coco-eval; pip install faster-coco-eval")
    data = load(options)
    options.output.mkdir(parents=True, exist_ok=True)
    records = [run(arm, seed, options, data) for seed in options.seeds for arm in ARMS]
    result = compare_arms(records, "map")
    text = sentence(result)
    columns = ("arm", "seed", *METRICS, "loss", "params", "seconds")
    write_json(options.output / "detection.json", {"sentence": text, **result, "runs": records, **provenance()})
    rows = [{key: record[key] for key in columns} for record in records]
    packages = ", ".join(f"{name} {version(name)}" for name in ("torchmetrics", "faster-coco-eval"))
    write_table(options.output / "detection.csv", rows, sentence=text, metric=packages)
    draw(options.output / "detection.png", data[0], data[2], records, text)
    print(text)
    return result


if __name__ == "__main__":
    try:
        main(parse())
    except UserError as error:
        sys.exit(f"error: {error}")
