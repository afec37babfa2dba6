"""Settings of a training run, and the recipes that set them."""

import math
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser

from cmpe_se.data import Augmentation, DataOptions
from cmpe_se.errors import UserError
from cmpe_se.layers.views import GATE_SETTINGS, STARTS, TABLE
from cmpe_se.training.settings_file import is_as_written, parse_settings, refuse_incomplete, settings_text

DEFAULT_RECIPE = "digits"


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of a training run. A recipe sets them, flags win over the recipe.

    Args:
        model: name of a network in timm or in cmpe_se (`cmpe-se models` lists the latter).
        view: kind of gate in a network of cmpe_se, such as se, folded_3x3, static or timm_eca (all in docs/gates.md);
            null for the kind in the model's name.
        convert: kind of gate to put into the model, any residual network of timm; null for none.
        start: initial value of the gates, half (1/2, as in the paper) or one (the block starts as one without a gate);
            null for half in networks of cmpe_se and one in converted ones.
        reduction: number of channels for each hidden unit of a gate; a larger number makes the hidden layer narrower.
        min_hidden: smallest number of hidden units of a gate, whatever the reduction.
        bias: biases in the linear layers of the gates (in the views se, double_fc, se_identity, se_sum and those with
            a picture; the other views set their own).
        mask: probability of dropping each squeezed channel from the gate's input in training; 0 for off.
        static: names of blocks whose gate is one learned number a channel (the view static), whatever the view of the
            others, such as '[stages.0.blocks.1]'; null for none.
        widths: names of layers to their channels in and out, where these are fewer than the model's own, and [0, 0] for
            a block that is gone; ``cmpe-se prune`` writes them.
        pretrained: weights to start from, a run folder, a folder or file of safetensors, hf-hub:NAME, the name of a
            network that comes with the package, or timm for the model's own. A run's start, reduction, min_hidden,
            bias and static come along. The classifier is re-initialised if the number of classes differs.
        data: data set, one of digits, cifar10, cifar100, svhn, svhn_extra (with SVHN's extra set), fashion_mnist,
            folder (class folders), imagenet, hfds/NAME (Hugging Face) or wds/NAME (WebDataset).
        data_dir: folder of the data set; for hfds, one that has Parquet files, or where datasets keeps its copies.
        image_column: column of the images (Hugging Face); null for the only one.
        label_column: column of the classes (Hugging Face); null for label, or the only one of the type ClassLabel.
        train_split: split to train on (Hugging Face, also a slice such as train[:5000]; WebDataset), or its folder;
            null for train.
        test_split: split to test on, or its folder; null for test, or else validation.
        download: download torchvision's data sets if they are missing.
        image_size: side of the images in pixels; null for the data set's own.
        test_image_size: side of the images in pixels when they are tested, and afterwards (large images); null for
            image_size.
        progressive_resizing: sides of training images in pixels to numbers of epochs, of the first epochs and in their
            order, such as '{16: 20, 24: 6}'; the epochs that are left, one at least, have whole images. null for off.
        test_crop: part of the resized image's shorter side that the crop of a test takes, above 0 and at most 1 (large
            images); null for 0.875.
        validation: share of each class's training images, from 0 to below 1, that are held out for validation and
            tested in the place of the test images after each epoch. The epoch with the best validation accuracy is
            what the run keeps, and the only one whose network is tested. 0 keeps the last epoch.
        patience: number of epochs without a better validation accuracy after which training stops early; 0 for never.
        workers: number of processes that decode images. The batches are the same for any number, but for WebDataset,
            whose shards are dealt out to them: resume a run on shards with as many.
        epochs: number of passes over the training images.
        batch_size: images per optimizer step, over all processes and gradient-accumulation steps.
        accumulate: gradient-accumulation steps per optimizer step; more of them need less memory.
        seed: random seed of weights, data order, augmentation and dropout.
        optimizer: name of an optimizer in timm; sgd has Nesterov momentum.
        lr: highest learning rate.
        momentum: momentum of the optimizer, from 0 to below 1.
        optimizer_args: more arguments of the optimizer by name, such as '{eps: 1e-6, betas: [0.9, 0.98]}'; null for
            none.
        weight_decay: weight decay, which norms and biases are exempt from.
        layer_decay: factor on the learning rate from each layer to the one before it; 1 for the same rate everywhere.
        freeze_epochs: number of epochs at the start, with pretrained weights, in which only the classifier and the
            gates are trained; the rest, the statistics of its norms included, is frozen.
        gate_lr: factor on the learning rate of the gates' parameters.
        schedule: name of a learning rate schedule in timm, such as cosine, step, multistep or constant.
        min_lr: learning rate at the end of the schedule.
        warmup_epochs: epochs of linear warm-up from a hundredth of the learning rate.
        decay_milestones: epochs after which the multistep schedule multiplies the learning rate by decay_rate.
        decay_epochs: number of epochs between two decays of the step schedule.
        decay_rate: factor on the learning rate at each decay of the step and multistep schedules.
        class_weights: balanced for a loss in which each class weighs the same, however many training images it has
            (each image weighs images / (classes * images of its class)); null for each image the same. Test metrics
            are unweighted in any case.
        loss: training loss, cross_entropy, or bce for binary cross-entropy of each class. Tests report cross-entropy.
        bce_threshold: largest target of a class that becomes 0 with bce, where those above become 1; from 0 to below 1,
            null for targets as label smoothing, mixup and CutMix make them.
        label_smoothing: amount of label smoothing, from 0 to below 1.
        mixup: alpha of mixup; 0 for off.
        cutmix: alpha of CutMix; 0 for off.
        drop_rate: dropout rate, between the convolutions in wide networks and before the classifier in the others.
        drop_path_rate: stochastic depth rate of the last block; the rates of the others grow linearly to it from 0.
        clip_grad: largest norm of the gradient; 0 for no clipping.
        ema: decay of the exponential moving average of the weights; 0 for off. If it is on, the averaged weights are
            tested and saved.
        ema_batch_size: batch size that ema is meant for; at another batch size the decay is
            ema ** (batch_size / ema_batch_size), so that the average reaches back over as many images (arXiv
            2307.13813). null for the decay as it is.
        crop_padding: padding in pixels before a random crop (small images).
        flip: mirror images at random.
        repeated_augmentation: number of copies of an image in an epoch, each augmented by itself, and most of them in
            one batch (arXiv 1902.05509); an epoch has as many images as without, so that part of different ones. 1 for
            off.
        cutout: side in pixels of a randomly placed blank square (small images); 0 for off.
        scale: smallest and largest area of a random crop, as fractions of the image (large images).
        ratio: smallest and largest width / height of a random crop (large images).
        color_jitter: strength of color jitter (large images); 0 for off.
        auto_augment: name of an augmentation policy in timm, such as rand-m9-mstd0.5 (large images).
        random_erasing: probability of erasing a random rectangle (large images).
        precision: float32, or bfloat16 or float16 for automatic mixed precision.
        channels_last: channels-last memory format of images and weights, faster on most devices.
        compile: compile the network with torch.compile.
        device: cpu, or auto for the accelerator if there is one.
        parallel: how several processes train one network, ddp (each has all of it) or fsdp (each has a part of the
            weights and of the optimizer's state, by FSDP2).
        gradient_compression: how gradients are sent between processes with ddp, fp16, bf16, power_sgd or
            batched_power_sgd; null for as they are.
        sync_batchnorm: batch norms over the images of all processes, on accelerators; else each process normalises
            its own.
        checkpoint_steps: number of steps between two checkpoints; each epoch ends with one in any case.
        test_interval: number of epochs between two tests; the last epoch is tested in any case.
        tensorboard: write TensorBoard logs into the run folder; the same as tensorboard in log_to.
        log_to: names of trackers, with commas between them, that get the metrics of each epoch (tensorboard, wandb,
            mlflow, trackio; also aim, clearml, comet_ml, dvclive or swanlab); null for none.
        profile: write a trace of ten training steps into the run folder, and print the ten costliest operations.
    """

    model: str = "cmpe_se_preact_resnet20"
    view: str | None = None
    convert: str | None = None
    start: str | None = None
    reduction: int = 16
    min_hidden: int = 1
    bias: bool = False
    mask: float = 0.0
    static: list[str] | None = None
    widths: dict[str, list[int]] | None = None
    pretrained: str | None = None
    data: str = "digits"
    data_dir: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    download: bool = False
    image_size: int | None = None
    test_image_size: int | None = None
    progressive_resizing: dict[int, int] | None = None
    test_crop: float | None = None
    validation: float = 0.0
    patience: int = 0
    workers: int = 2
    epochs: int = 30
    batch_size: int = 64
    accumulate: int = 1
    seed: int = 0
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    optimizer_args: dict[str, Any] | None = None
    weight_decay: float = 5e-4
    layer_decay: float = 1.0
    freeze_epochs: int = 0
    gate_lr: float = 1.0
    schedule: str = "cosine"
    min_lr: float = 0.0
    warmup_epochs: int = 0
    decay_milestones: list[int] | None = None
    decay_epochs: int = 30
    decay_rate: float = 0.1
    class_weights: str | None = None
    loss: str = "cross_entropy"
    bce_threshold: float | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    clip_grad: float = 0.0
    ema: float = 0.0
    ema_batch_size: int | None = None
    crop_padding: int = 0
    flip: bool = False
    repeated_augmentation: int = 1
    cutout: int = 0
    scale: tuple[float, float] | None = None
    ratio: tuple[float, float] | None = None
    color_jitter: float = 0.0
    auto_augment: str | None = None
    random_erasing: float = 0.0
    precision: str = "float32"
    channels_last: bool = True
    compile: bool = False
    device: str = "auto"
    parallel: str = "ddp"
    gradient_compression: str | None = None
    sync_batchnorm: bool = False
    checkpoint_steps: int = 500
    test_interval: int = 1
    tensorboard: bool = False
    log_to: str | None = None
    profile: bool = False

    def __post_init__(self) -> None:
        if self.optimizer_args is not None:  # as they come back from a file
            object.__setattr__(
                self, "optimizer_args", {key: _listed(each) for key, each in self.optimizer_args.items()}
            )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{name} is {value}, should be at least {least}")
        for name, value in asdict(self).items():
            several = value.values() if isinstance(value, dict) else value
            numbers = several if isinstance(value, list | tuple | dict) else [value]
            if not all(math.isfinite(number) for number in numbers if isinstance(number, float)):
                raise UserError(f"{name} is {value}, should be a finite number")
        for name in ("momentum", "mask", "label_smoothing", "drop_rate", "drop_path_rate", "ema", "validation"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, should be at least 0 and below 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(f"unknown {name} '{getattr(self, name)}'; choose one of {', '.join(choices)}")
        if not 0 < self.layer_decay <= 1:
            raise UserError(f"layer_decay is {self.layer_decay}, should be above 0 and at most 1")
        for name, known in (
            ("view", tuple(TABLE)),
            ("convert", tuple(TABLE)),
            ("start", STARTS),
            ("class_weights", CLASS_WEIGHTS),
            ("gradient_compression", COMPRESSIONS),
        ):
            if (value := getattr(self, name)) is not None and value not in known:
                raise UserError(f"unknown {name} '{value}'; choose one of {', '.join(known)}")
        if self.convert is not None and self.view is not None:
            raise UserError("view is for networks of cmpe_se, convert is for all others; give one of the two")
        if self.widths is not None and self.pretrained == "timm":
            raise UserError("timm's weights are for the whole network; leave --widths or --pretrained out")
        if self.patience and not self.validation:
            raise UserError(
                "patience waits for a better validation accuracy, and no image is held out: give --validation 0.1 too"
            )
        if self.test_image_size is not None and self.image_size is None:
            raise UserError(
                f"test_image_size is {self.test_image_size}, and the side of training images is not said: give "
                "--image-size too"
            )
        if self.progressive_resizing is not None:
            self._check_resizing(self.progressive_resizing)
        if self.test_crop is not None and not 0 < self.test_crop <= 1:
            raise UserError(f"test_crop is {self.test_crop}, should be above 0 and at most 1")
        if self.bce_threshold is not None and not 0 <= self.bce_threshold < 1:
            raise UserError(f"bce_threshold is {self.bce_threshold}, should be at least 0 and below 1")
        if self.bce_threshold is not None and self.loss != "bce":
            raise UserError("bce_threshold is for the loss bce; add --loss bce, or leave it out")
        if self.ema_batch_size is not None and not self.ema:
            raise UserError("ema_batch_size is for the moving average; add --ema 0.9999, or leave it out")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"batch_size {self.batch_size} does not divide into accumulate={self.accumulate} gradient-accumulation "
                "steps; give a multiple of accumulate"
            )

    def _check_resizing(self, epochs_at: dict[int, int]) -> None:
        if min([*epochs_at, *epochs_at.values()], default=0) < 1:
            raise UserError(
                f"progressive_resizing is {epochs_at}, should map sides in pixels to epochs, both at least 1"
            )
        if (first := sum(epochs_at.values())) >= self.epochs:
            raise UserError(
                f"progressive_resizing has {first} epochs of {self.epochs}, and whole images come last; give fewer "
                f"there, or --epochs {first + 1}"
            )

    @property
    def gate_settings(self) -> dict[str, Any]:
        """The fields that describe gates, where they are not the network's own; the view is none of them."""
        return {name: value for name in GATE_FIELDS if (value := getattr(self, name)) != _DEFAULTS[name]}

    @property
    def data_options(self) -> DataOptions:
        """The columns and splits of the data set, as ``load_data`` takes them."""
        return DataOptions(**{name: getattr(self, name) for name in DataOptions._fields})

    @property
    def augmentation(self) -> Augmentation:
        """The fields that change training images, as the data sets take them."""
        return Augmentation(**{field.name: getattr(self, field.name) for field in fields(Augmentation)})

    @classmethod
    def from_recipe(cls, recipe: str | Path = DEFAULT_RECIPE, **settings: Any) -> "TrainingConfig":
        """Settings of a recipe, changed by keyword.

        Args:
            recipe: name of a recipe that comes with the package (see :func:`recipe_names`), or path of a YAML file.
            settings: fields that win over the recipe.

        Raises:
            UserError: no such recipe, a field that does not exist, or a value that cannot be.
        """
        check_names(settings, "setting")
        return cls(**(read_recipe(recipe) | _typed(settings, "")))

    @classmethod
    def of_run(cls, path: Path, *, as_written: bool = False) -> "TrainingConfig":
        """All settings of a run, from its config.yaml.

        Args:
            path: of the file.
            as_written: refuse one that has changed since it was written.

        Raises:
            UserError: a file that cannot be read, is not complete, or has changed.
        """
        where = str(path)
        text = _read(path, where)
        values = _parse(text, where, of_a_run=True)
        try:
            config = cls(**values)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        if as_written and not is_as_written(text):
            raise UserError(
                f"{where} has changed since it was written, by hand or by damage, and training would go on with other "
                "settings; put it back and give changes as flags, or delete its line '# settings' if it is right"
            )
        return config

    def changed(self, **settings: Any) -> "TrainingConfig":
        """A copy with other values in some fields."""
        check_names(settings, "setting")
        return replace(self, **_typed(settings, ""))

    def to_yaml(self) -> str:
        """The text of a recipe file that repeats the run."""
        values = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
        return settings_text(values)


GATE_FIELDS = (*GATE_SETTINGS, "static")
"""Fields that describe gates, whatever their view."""
_DEFAULTS = {field.name: field.default for field in fields(TrainingConfig)}
_LEAST = {
    "epochs": 1,
    "reduction": 1,
    "min_hidden": 1,
    "batch_size": 1,
    "accumulate": 1,
    "test_image_size": 1,
    "ema_batch_size": 1,
    "repeated_augmentation": 1,
    "seed": 0,
    "workers": 0,
    "lr": 0.0,
    "weight_decay": 0.0,
    "gate_lr": 0.0,
    "warmup_epochs": 0,
    "freeze_epochs": 0,
    "patience": 0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "clip_grad": 0.0,
    "checkpoint_steps": 1,
    "test_interval": 1,
}


def _listed(value: Any) -> Any:
    """Lists for tuples, which YAML does not have."""
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value


CLASS_WEIGHTS = ("balanced",)
COMPRESSIONS = ("fp16", "bf16", "power_sgd", "batched_power_sgd")
_CHOICES = {
    "precision": ("float32", "bfloat16", "float16"),
    "device": ("auto", "cpu"),
    "parallel": ("ddp", "fsdp"),
    "loss": ("cross_entropy", "bce"),
}


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package."""
    found = (Path(entry.name) for entry in files("cmpe_se.training.recipes").iterdir())
    return sorted(path.stem for path in found if path.suffix == ".yaml")


def read_recipe(recipe: str | Path) -> dict[str, Any]:
    """Fields that a recipe sets, from its name or from the path of its YAML file."""
    where = f"recipe {recipe}"
    if str(recipe) in recipe_names():
        text = files("cmpe_se.training.recipes").joinpath(f"{recipe}.yaml").read_text()
    elif Path(recipe).is_file():
        text = _read(Path(recipe), where)
    else:
        raise UserError(f"no recipe '{recipe}'; give one of {', '.join(recipe_names())}, or the path of a YAML file")
    return _parse(text, where, of_a_run=False)


def _read(path: Path, where: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{where} cannot be read: {error}") from None


def _parse(text: str, where: str, *, of_a_run: bool) -> dict[str, Any]:
    """Typed settings of a file's text."""
    advice = (
        "put it back, from a copy or another run"
        if of_a_run
        else "put them back, or delete its line '# settings' for defaults"
    )
    try:
        values = parse_settings(text)
    except ValueError as error:
        raise UserError(f"{where} {error}") from None
    check_names(values, f"{where}: setting")
    try:
        refuse_incomplete(text, values, [field.name for field in fields(TrainingConfig)], of_a_run=of_a_run)
    except ValueError as error:
        raise UserError(f"{where} {error}; {advice}") from None
    return _typed(values, f"{where}: ")


def _typed(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Each value in its field's type; ``where`` begins the message for one that cannot be."""
    hints = get_type_hints(TrainingConfig)
    if empty := [name for name, value in values.items() if value is None and NoneType not in get_args(hints[name])]:
        raise UserError(f"{where}setting {empty[0]} is null, should be {hints[empty[0]].__name__}")
    try:
        return vars(_parser().parse_object(values, defaults=False))
    except ArgumentError as error:
        raise UserError(where + " ".join(error.message.replace("Parser key", "setting").split())) from None


@cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(TrainingConfig, as_group=False)
    return parser


def check_names(values: dict[str, Any], what: str) -> None:
    """Refuse names that are no field of :class:`TrainingConfig`."""
    known = {field.name for field in fields(TrainingConfig)}
    if unknown := [name for name in values if name not in known]:
        raise UserError(f"{what} {', '.join(map(str, unknown))} does not exist; `cmpe-se train --help` lists them")
