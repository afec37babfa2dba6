"""A finished run's network, ready for single images, also with gates that are held."""

import functools
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmpe_se.commands.explore.images import Picture, photograph_pictures, thumbnail
from cmpe_se.data import ImageData, StreamedImages, load_data
from cmpe_se.errors import UserError
from cmpe_se.exhibits.choosing import Photo, choose_images, photo
from cmpe_se.inspecting import BlockView, can_hold, find_gates, forced_gates, held_one_by_one, look
from cmpe_se.inspecting.attribution import grad_cam, integrated_gradients
from cmpe_se.inspecting.gathering import Gathered, gather
from cmpe_se.inspecting.tested import read_tested
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.merging import MergedGate
from cmpe_se.training.run_data import load_run_data
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.text import counted

_SAMPLE = 500  # test images that the mean gates are of, and the examples are chosen from
_BATCH = 50
_RIGHT, _WRONG = 12, 6  # examples: of all classes, classified correctly and not
_NUMBERS = itertools.count()
_QUICK = 5e9  # multiply-adds: a fraction of a second
_KEPT = 4  # networks in memory at a time

FORCES = ("closed", "open", "mean")
"""What a block's gates can be held to: 0, their largest value, or each to its mean over the test images."""


class Force(NamedTuple):
    """A block, and which of :data:`FORCES` its gates are held to."""

    block: str
    to: str


@dataclass(frozen=True, eq=False)
class Answer:
    """A network's prediction for one image.

    Args:
        probabilities: of the classes, (K,), on the CPU.
        views: of its gates for the image alone; empty for a network without any.
    """

    probabilities: Tensor
    views: list[BlockView]


class Network:
    """A run's network with its classes, test metrics and examples.

    Args:
        folder: of a finished run.
        load: ``load_data``, or one that remembers what it has loaded.

    Raises:
        UserError: an unfinished run, or one whose network cannot be loaded.
    """

    def __init__(self, folder: RunFolder, load: Callable[..., ImageData] = load_data):
        self.number = next(_NUMBERS)
        """Tells networks apart, also those that one folder held at different times."""
        self.result, self.preprocessing = folder.read_result(), folder.preprocessing()
        config = folder.read_config()
        self.data = config.data, config.data_dir
        """Whose test images the examples are."""
        self.classes = self.preprocessing.classes
        self.model = folder.load_model().requires_grad_(False)
        self._device = choose_device(config.device)
        self.model.to(self._device)
        self._gates = _gates(self.model)
        self.blocks = list(self._gates)
        self.usual: dict[str, Tensor] = {}
        """Mean gates of each block over ``sample`` test images, (C,); empty where those are not at hand."""
        self.sample = 0
        self.missing: str | None = None
        """Why there are no test images, if so."""
        try:
            self.examples = self._meet(load_run_data(folder, load))
        except UserError as error:
            self.missing, self.examples = str(error), photograph_pictures()
            if folder.has_lost_its_images and folder.tested.exists():
                self._recall(read_tested(folder.tested))

    def _meet(self, data: ImageData) -> list[Picture]:
        """Look at a sample of the test images, for the mean gates and for examples."""
        count = min(_SAMPLE, data.test_size)
        streamed = isinstance(data, StreamedImages)  # of which the first ones are to be had soon
        indices = list(range(count)) if streamed else [place * data.test_size // count for place in range(count)]
        tested = self._gather(self._batches(data, indices))
        self.sample = count
        self.usual = {block.name: block.mean.float() for block in tested.blocks}
        chosen = choose_images(tested, min(_RIGHT, count), min(_WRONG, count))
        places = sorted(chosen)
        images = dict(zip(places, data.test_examples([indices[place] for place in places]), strict=True))
        pictures = []
        for place in chosen:
            index, (image, truth), said = indices[place], images[place], int(tested.predicted[place])
            predicted = self.classes[said] if said != truth else None
            read = functools.partial(data.test_image, index)
            pictures.append(Picture(read, f"Test image {index}", truth, predicted, self.classes, thumbnail(image)))
        return pictures

    def _recall(self, tested: Gathered) -> None:
        """Take over what the network did on test images that are not at hand."""
        self.sample = len(tested.labels)
        self.missing = (
            "they do not come with the network, the means of its gates over them do; what the photographs show may be "
            "none of its classes"
        )
        self.usual = {block.name: block.mean.float() for block in tested.blocks}

    def _batches(self, data: ImageData, indices: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        said = f"gates of {counted(len(indices), 'test image')}"
        examples = iter(with_progress(data.test_examples(indices), said, len(indices)))
        while some := list(islice(examples, _BATCH)):
            pixels = torch.stack([self.preprocessing.pixels(image) for image, _ in some])
            yield self.preprocessing.normalise(pixels), torch.tensor([label for _, label in some])

    @torch.no_grad()
    def _gather(self, batches: Iterable[tuple[Tensor, Tensor]]) -> Gathered:
        if self.blocks:
            return gather(self.model, batches, len(self.classes))
        pairs = [(self.model(images.to(self._device)).float().cpu(), labels) for images, labels in batches]
        logits, labels = (torch.cat(part) for part in zip(*pairs, strict=True))
        return Gathered.of_logits(logits, labels)

    def unheld(self, block: str) -> str:
        """A sentence for visitors where the gates of a block cannot be held; nothing where they can."""
        gate = self._gates[block]
        if can_hold(gate):
            return ""
        return f"The gates of {block} (view {gate.view}) rescale whole feature maps by themselves, and cannot be held."

    def photo(self, picture: Picture) -> Photo:
        """An image as this network gets it; its truth counts if the network has the same classes."""
        truth = picture.truth if picture.classes == self.classes else None
        return photo(picture.name, picture.read(), truth, self.preprocessing)

    def ask(self, shown: Photo, force: Force | None = None) -> Answer:
        """Prediction for an image, and its gates for it; raises UserError where the output is not finite."""
        batch = shown.tensor[None].to(self._device)
        with self._held(force), torch.no_grad():
            output, views = look(self.model, batch) if self.blocks else (self.model(batch), [])
        probabilities = output[0].float().softmax(0).cpu()
        if not probabilities.isfinite().all():
            raise UserError("the network's output is NaN: its training has diverged, or its weights are damaged")
        return Answer(probabilities, views)

    def worth(self, shown: Photo, target: int) -> dict[str, float]:
        """Points that a class's probability changes by where the gate of a block alone is held at its mean.

        Empty where the means are not known, and for networks that would take long for that many copies of an image.
        """
        means = {name: mean for name, mean in self.usual.items() if can_hold(self._gates[name])}
        if not means or self.result["macs"] * len(means) > _QUICK:
            return {}
        with torch.no_grad():
            outputs = held_one_by_one(self.model, shown.tensor.to(self._device), means)
            before = self.model(shown.tensor[None].to(self._device))
        after = outputs.float().softmax(1)[:, target] - before.float().softmax(1)[0, target]
        return {name: 100 * value for name, value in zip(means, after.tolist(), strict=True)}

    def attribute(self, shown: Photo, target: int, block: str | None, force: Force | None = None) -> Tensor:
        """Attribution of a class: Grad-CAM at a block or, without one, integrated gradients on the input, (h, w)."""
        batch = shown.tensor[None].to(self._device)
        with self._held(force):
            if block is None:
                return integrated_gradients(self.model, batch, [target])[0]
            return grad_cam(self.model, batch, [target], block)[0]

    def _held(self, force: Force | None) -> AbstractContextManager:
        if force is None:
            return nullcontext()
        if force.to == "mean" and force.block not in self.usual:
            raise UserError(f"the mean of the gates is not known without test images: {self.missing}")
        fixed: dict[str, float] = {"closed": 0.0, "open": self._gates[force.block].gain}
        gates = fixed[force.to] if force.to in fixed else self.usual[force.block]
        return forced_gates(self.model, force.block, gates)


class Networks:
    """The networks of runs, by name; loaded when they are first asked for, and the last few kept.

    Args:
        runs: folders.
    """

    def __init__(self, runs: Sequence[RunFolder]):
        names = [visible(Path(os.path.abspath(run.path)).name) for run in runs]  # also of `.`; a link keeps its name
        self._folders = {
            name if names.count(name) == 1 else visible(str(run.path)): run
            for name, run in zip(names, runs, strict=True)
        }
        self._load = functools.lru_cache(maxsize=_KEPT)(self._loaded)
        self._data = functools.lru_cache(maxsize=_KEPT)(load_data)

    @property
    def names(self) -> list[str]:
        """In the order in which they were given."""
        return list(self._folders)

    def __getitem__(self, name: str) -> Network:
        if name not in self._folders:
            raise UserError(f"no run is called '{name}'; there are {', '.join(self._folders)}")
        return self._load(name)

    def _loaded(self, name: str) -> Network:
        return Network(self._folders[name], self._data)


def _gates(model: nn.Module) -> dict[str, CompetitiveSE | MergedGate]:
    try:
        return find_gates(model)
    except UserError:
        return {}  # a plain network, to compare others with
