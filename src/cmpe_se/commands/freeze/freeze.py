"""The ``freeze`` command: static gates within a budget of accuracy, and the training that repairs them."""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn

from cmpe_se.commands.freeze.starting import write_recipe, write_start
from cmpe_se.commands.train import train
from cmpe_se.data import ImageData, first_images, plain_training_batches, validation_split
from cmpe_se.errors import UserError
from cmpe_se.merging import merge
from cmpe_se.runtimes.timing import paired_ratio, take_turns
from cmpe_se.static_gates.calibration import Calibration
from cmpe_se.static_gates.choice import Trial, choose_within
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.metrics import collect_logits, test_metrics
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import os_errors_as, whole_path, write_json
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.records import read_json
from cmpe_se.utils.tables import number_table
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import in_points

_BATCH = 250
_TIMED_BATCH, _TURNS = 8, 15
RECORD = "freezing.json"
"""Name of the file in the new run's folder that says what was tried and measured."""


class Accuracies(TypedDict):
    """Top-1 in percent: of the images that chose, and of the test images, which chose nothing."""

    choice_top1: float
    test_top1: float


class Record(TypedDict):
    """What ``freezing.json`` says."""

    run: str
    budget: float
    epochs: int
    images: int
    lr: float
    chosen_on: str
    """The images that chose, in words."""
    trials: list[dict[str, Any]]
    static: list[str]
    dynamic: Accuracies
    frozen: Accuracies
    all_frozen: Accuracies
    time_ratio: float
    """Time of a merged forward pass with these gates static over that with none, median of paired turns."""


def freeze(
    run: str,
    *,
    budget: float = 0.2,
    epochs: int = 3,
    images: int = 2000,
    lr: float | None = None,
    output: str | None = None,
) -> dict[str, Any]:
    """Make those gates of a finished run static that it can spare, and train the network on with them.

    A static gate is one number a channel, the same for every image: its mean over training images. Merging puts it into
    the convolution or norm before it, so that it costs nothing. Gates are tried one by one, those first whose freezing
    changes the network's output least, and stay static while the accuracy is within the budget. A short training then
    repairs what that has cost. The same command continues an interrupted one.

    Args:
        run: run folder of a network with gates.
        budget: points of top-1 accuracy that all static gates together may cost before the training, on images that
            calibrated nothing: the run's validation images, or training images where it has none.
        epochs: number of epochs of the training with static gates, at least 1.
        images: largest number of images to calibrate with, and of images to choose with.
        lr: highest learning rate of the training, a cosine; a tenth of the run's if left out.
        output: run folder to make; RUN-static if left out.

    Returns:
        ``run`` (path of the new run), ``static`` (names of the blocks), ``dynamic``, ``frozen`` and ``all_frozen``
        (``test_top1`` and ``choice_top1``, percent, before training), ``test_top1`` of the new run, ``time_ratio`` (of
        a merged forward pass, over the run's own) and ``trials``; freezing.json in the run's folder has the same.

    Raises:
        UserError: no finished run, no gate that depends on the image, its data set gone, or a budget that no gate fits.
    """
    if not budget >= 0 or epochs < 1 or images < 2:
        raise UserError(
            f"budget {budget:g} should be at least 0, epochs {epochs} at least 1, and images {images} at least 2"
        )
    folder = RunFolder.open(run)
    folder.read_result()  # it is finished
    config = folder.read_config()
    target = RunFolder(whole_path(output) if output else folder.outputs.with_name(f"{folder.outputs.name}-static"))
    rate = config.lr / 10 if lr is None else lr
    asked: dict[str, Any] = {"run": folder.name, "budget": budget, "epochs": epochs, "images": images, "lr": rate}
    record = _begun(target, asked)
    if record is None:
        RunFolder.new(target.path)
        record = _choose(folder, config, target, asked)
    _print(record)
    if target.config.exists():
        result = train(resume=target.path)
    else:
        recipe = write_recipe(config, target, _all_static(config, record["static"]), epochs=epochs, lr=rate)
        result = train(recipe=recipe, output=target.path)
    top1 = result["test_top1"]
    dynamic, frozen = record["dynamic"]["test_top1"], record["frozen"]["test_top1"]
    Terminal().print(
        f"test top-1: {dynamic:.2f} % before, {frozen:.2f} % with {len(record['static'])} of "
        f"{len(record['trials'])} gates frozen, {top1:.2f} % after training on with them",
        highlight=False,
        soft_wrap=True,
    )
    return {**record, "run": str(target.path), "test_top1": top1}


def _begun(target: RunFolder, asked: dict[str, Any]) -> Record | None:
    """What an interrupted command has chosen; None where there is nothing yet."""
    path = target.path / RECORD
    if not path.exists():
        return None
    record = read_json(path, Record, advice="name another --output")
    if other := next((name for name, value in asked.items() if record[name] != value), None):
        raise UserError(
            f"{target.path} holds gates frozen with {other} {record[other]}, not {asked[other]}; name another --output"
        )
    return record


def _choose(folder: RunFolder, config: TrainingConfig, target: RunFolder, asked: dict[str, Any]) -> Record:
    """Choose the gates, measure, and write the network to start from."""
    console = Terminal(stderr=True)
    model = folder.load_model().to(choose_device(config.device))
    with console.status("loading images"):
        data = load_run_data(folder)
    calibrating, choosing, chosen_on = _images(data, config.validation, asked["images"])
    calibration = Calibration(model, with_progress(calibrating, "calibrating", len(calibrating)))

    def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]] = choosing) -> float:
        like = next(network.parameters())
        return test_metrics(*collect_logits(lambda x: network(x.to(like)), batches))["test_top1"]

    if not calibration.means:
        calibration.choose("all")  # which says why there is none
    before, trials = choose_within(calibration, accuracy, asked["budget"], with_progress)
    static = [name for name in calibration.means if any(trial.block == name and trial.static for trial in trials)]
    if not static:
        least = min(trials, key=lambda trial: before - trial.top1)
        raise UserError(
            f"no gate of {folder.path} can be frozen within a budget of {in_points(asked['budget'])}; the least is "
            f"{before - least.top1:.2f}, of {least.block}: give a larger --budget"
        )
    frozen = calibration.frozen(static)
    everything = calibration.frozen(calibration.means)
    measured = {}
    networks = {"dynamic": calibration.model, "frozen": frozen, "all_frozen": everything}
    for name, network in networks.items():
        batches = with_progress(data.test_batches(batch_size=_BATCH), f"testing, {name}", -(-data.test_size // _BATCH))
        measured[name] = Accuracies(choice_top1=accuracy(network), test_top1=accuracy(network, batches))
    found: dict[str, Any] = {"chosen_on": chosen_on, "trials": [asdict(trial) for trial in trials], "static": static}
    found["time_ratio"] = _time_ratio(frozen, calibration.model, data)
    record = cast(Record, asked | found | measured)
    write_start(folder, frozen, _all_static(config, static), target, data)
    with os_errors_as(f"cannot write to {target.path}"):
        write_json(target.path / RECORD, record)
    return record


def _all_static(config: TrainingConfig, static: list[str]) -> list[str]:
    """With those that were static before."""
    return list(dict.fromkeys([*(config.static or []), *static]))


def _images(data: ImageData, validation: float, most: int) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]], str]:
    """Batches to calibrate with, labelled batches to choose with, and what these are."""
    if validation:
        data, held = validation_split(data, validation)
        training = list(plain_training_batches(data, most, batch_size=_BATCH))
        choosing = list(first_images(held.test_batches(batch_size=_BATCH), most))
        words = "validation images"
    else:
        # Two batches at least, so that no image is on both sides; no side gets more images than it may.
        size = max(1, min(most // -(-most // _BATCH), data.train_size // 2))
        both = list(plain_training_batches(data, 2 * most, batch_size=size))
        training, choosing = (
            list(first_images(half, most)) for half in (both[: len(both) // 2], both[len(both) // 2 :])
        )
        words = "training images, other than those of the means"
    count = sum(len(labels) for _, labels in choosing)
    return [images for images, _ in training], choosing, f"{count:,} {words}"


def _time_ratio(frozen: nn.Module, dynamic: nn.Module, data: ImageData) -> float:
    """Time of a forward pass, both merged, in turns."""
    like = next(dynamic.parameters())
    x = torch.randn(_TIMED_BATCH, data.in_chans, *data.image_size, device=like.device, dtype=like.dtype)
    networks = {"frozen": merge(frozen), "dynamic": merge(dynamic)}
    steps: dict[str, Callable[[], None]] = {name: partial(network, x) for name, network in networks.items()}
    with torch.inference_mode():
        for step in steps.values():
            step()
        seconds = take_turns(steps, range(_TURNS), like.device)
    return round(paired_ratio(seconds["frozen"], seconds["dynamic"]).median, 3)


def _print(record: Record) -> None:
    table = number_table("effect", "top-1", "gate", title=f"tried in this order, top-1 on {record['chosen_on']}")
    for values in record["trials"]:
        trial = Trial(**values)
        table.add_row(trial.block, f"{trial.effect:.4f}", f"{trial.top1:.2f}", "static" if trial.static else "kept")
    Terminal().print(table)
    Terminal().print(
        "effect: squared change of the output over its variance from image to image. Merged, a forward pass takes "
        f"{record['time_ratio']:.3f} of the time before.",
        highlight=False,
        soft_wrap=True,
    )
