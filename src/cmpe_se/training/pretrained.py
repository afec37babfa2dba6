"""Weights to start from: a run, a folder or file of weights, or a name on a hub."""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from cmpe_se.conversion.convert import GATE_KEY
from cmpe_se.errors import UserError
from cmpe_se.shipped import shipped_folder
from cmpe_se.training.launching import is_main_process
from cmpe_se.training.weight_files import SUFFIXES, fitted, read_weights, renamed
from cmpe_se.utils.files import whole_path
from cmpe_se.utils.records import read_json
from cmpe_se.utils.tensor_files import not_finite

HUB = "hf-hub:"
"""Prefix of a name on the Hugging Face hub, as timm has it."""

_IN_FOLDERS = ("model.safetensors", "pytorch_model.bin")  # as timm and transformers name them
_COUNTERS = "num_batches_tracked"  # of batch norms; older files have none, and nothing reads it

_log = logging.getLogger(__name__)


class SavedNetwork(TypedDict, total=False):
    """What ``config.json`` beside weights says of their network, as far as it is used."""

    architecture: str | None
    model_args: dict[str, Any] | None


def start_from(pretrained: str, model: str, create: Callable[..., nn.Module]) -> nn.Module:
    """A network with the weights of a file, and a line on what was loaded and what was not.

    The classifier is re-initialised where the file has one for another number of classes, or none. Gates begin anew
    where the file has none. Everything else has to be there: names without the prefixes of wrappers, or in the layout
    of the network's authors, which timm converts.

    Args:
        pretrained: a run folder, a folder with model.safetensors or pytorch_model.bin, a file, or ``hf-hub:NAME``.
        model: name of the network, for messages.
        create: makes the network; takes timm's ``pretrained`` and ``pretrained_cfg_overlay``.

    Raises:
        UserError: no weights there, weights of another network, some of them missing, or values that are not finite.
    """
    before = torch.get_rng_state()
    network = create()
    expected = network.state_dict()
    path = _downloaded(pretrained.removeprefix(HUB)) if pretrained.startswith(HUB) else _file(pretrained)
    weights = read_weights(path)
    found, converted = fitted(renamed(weights.tensors, expected, str(path)), expected, str(path))
    classifiers = _classifiers(network)
    head = _classifier_of_the_file(found, expected, classifiers)
    renewed = [name for name in expected if name.rpartition(".")[0] in classifiers and _differs(found, expected, name)]
    state = found | {name: expected[name] for name in renewed}
    gaps = _compare(state, expected)
    if gaps.complete:
        network.load_state_dict({name: state.get(name, tensor) for name, tensor in expected.items()})
    else:
        torch.set_rng_state(before)  # so that gates begin as they do in a network from the start
        kept = {name: state[name] for name in state if name in expected} if gaps.adaptable else state
        try:
            network = _loaded_by_timm(create, kept, expected, classifiers)
        except Exception:  # each layout's converter raises many kinds
            raise UserError(f"{model} cannot start from {pretrained}: {gaps.words(model)}") from None
    if name := not_finite(network.state_dict()):
        raise UserError(f"{name} in {path} holds values that are not finite; give another file of weights")
    if is_main_process():
        part = f" (its {weights.part})" if weights.part else ""
        count = sum(name in found and name not in renewed for name in _essential(expected))
        _log.warning(f"{model} starts from {path}{part}: " + "; ".join([*_loaded(count, gaps, converted), *head]))
    return network


def say_what_timm_changed(model: str, classes: int, theirs: int | None) -> None:
    """A line where timm's own weights are for another number of classes."""
    if is_main_process() and theirs not in (None, classes):
        _log.warning(f"{model} starts from timm's weights; classifier re-initialised: {classes} classes, not {theirs}")


class _Gaps(NamedTuple):
    """How the weights of a file differ from a network's, classifier apart."""

    total: int
    missing: list[str]
    other_shapes: list[tuple[str, tuple[int, ...], tuple[int, ...]]]
    others: list[str]

    @property
    def complete(self) -> bool:
        """Whether all that the network needs is there."""
        return not self.missing and not self.other_shapes

    @property
    def new_gates(self) -> bool:
        """Whether all that is missing is gates."""
        return bool(self.missing) and all(GATE_KEY.search(name) for name in self.missing)

    @property
    def adaptable(self) -> bool:
        """Whether names agree: timm adapts a first convolution to other channels, and gates begin anew."""
        return (not self.missing or self.new_gates) and len(self.other_shapes) <= 1

    def words(self, model: str) -> str:
        """Why they are not those of the network."""
        parts = []
        if self.missing:
            parts.append(f"{len(self.missing)} of its {self.total} tensors are not there: {_first(self.missing)}")
        if self.other_shapes:
            name, there, here = self.other_shapes[0]
            parts.append(f"{len(self.other_shapes)} have another shape ({name} is {there}, should be {here})")
        if self.others:
            parts.append(f"the file has others: {_first(self.others)}")
        return "; ".join([*parts, f"give weights of {model}"])


def _compare(state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> _Gaps:
    missing = [name for name in _essential(expected) if name not in state]
    shapes = [
        (name, tuple(state[name].shape), tuple(tensor.shape))
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    return _Gaps(len(_essential(expected)), missing, shapes, [name for name in state if name not in expected])


def _essential(names: Iterable[str]) -> list[str]:
    return [name for name in names if not name.endswith(_COUNTERS)]


def _loaded(count: int, gaps: _Gaps, converted: str) -> list[str]:
    """What was loaded, and what was not."""
    converted = f", {converted}" if converted else ""
    if not (gaps.complete or gaps.adaptable):
        return [f"all {gaps.total} tensors loaded, which timm converted from another layout{converted}"]
    parts = [f"{count} of {gaps.total} tensors loaded{converted}"]
    if gaps.new_gates:
        parts.append("the gates begin anew, as the file has none")
    if gaps.other_shapes:
        name, there, here = gaps.other_shapes[0]
        parts.append(f"{name} adapted from {there[1]} to {here[1]} channels")
    if gaps.others:
        parts.append(f"left out, since the network has no such tensors: {_first(gaps.others)}")
    return parts


def _loaded_by_timm(
    create: Callable[..., nn.Module],
    state: dict[str, Tensor],
    expected: Mapping[str, Tensor],
    classifiers: Collection[str],
) -> nn.Module:
    """timm converts other layouts and first convolutions; what is then missing raises, as the classifier is there."""
    rows = [len(expected[f"{name}.weight"]) for name in classifiers if f"{name}.weight" in expected]
    overlay: dict[str, Any] = {"state_dict": state, "source": "", "custom_load": False, "label_offset": 0}
    if rows:
        overlay["num_classes"] = rows[0]
    network = create(pretrained=True, pretrained_cfg_overlay=overlay)
    if isinstance(network.pretrained_cfg, dict):
        network.pretrained_cfg.pop("state_dict", None)
    return network


def _classifiers(network: nn.Module) -> tuple[str, ...]:
    """Names of a network's classifiers; distilled ones have two."""
    names = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _differs(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], name: str) -> bool:
    return name not in found or found[name].shape != expected[name].shape


def _classifier_of_the_file(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifiers: Collection[str]
) -> list[str]:
    """What happens to each classifier, where it does not come from the file."""
    said = []
    for name in classifiers:
        weight = f"{name}.weight"
        if weight not in expected or not _differs(found, expected, weight):
            continue
        classes = len(expected[weight])
        reason = f"{classes} classes, not {len(found[weight])}" if weight in found else "the file has none"
        said.append(f"classifier {name} re-initialised: {reason}")
    return said


def _first(names: Collection[str]) -> str:
    return ", ".join(list(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def saved_network(pretrained: str) -> tuple[str, dict[str, Any]] | None:
    """Name of the network whose weights these are, and the keywords that timm made it with; None where nothing says.

    Args:
        pretrained: as of :func:`start_from`, or ``timm``.

    Raises:
        UserError: a config.json that cannot be read.
    """
    if pretrained == "timm" or pretrained.startswith(HUB):
        return None
    file = _place(pretrained).with_name("config.json")
    if not file.is_file():
        return None
    config = read_json(file, SavedNetwork, advice="give the model.safetensors in a folder by itself")
    name = config.get("architecture")
    return (name, config.get("model_args") or {}) if name else None


def _place(pretrained: str) -> Path:
    """The file of weights in a run folder or a folder; other paths as they are."""
    path = whole_path(pretrained)
    if not path.exists():
        path = shipped_folder(pretrained) or path
    for folder in (path / "model", path):
        for name in _IN_FOLDERS:
            if (folder / name).is_file():
                return folder / name
    return path


def _file(pretrained: str) -> Path:
    path = _place(pretrained)
    if path.suffix not in SUFFIXES or not path.is_file():
        raise UserError(
            f"no weights at {pretrained}; give a finished run folder, a folder with model.safetensors, a file "
            f"({', '.join(SUFFIXES)}), hf-hub:NAME, a network of the package by name, or timm for the network's own"
        )
    return path


def _downloaded(name: str) -> Path:
    """The file of weights of a repository on the hub; nothing else of it is looked at."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    for file in _IN_FOLDERS:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None, library_name="cmpe-se"))
        except LocalEntryNotFoundError:  # the hub cannot be reached
            raise
        except EntryNotFoundError:
            continue
    raise UserError(f"{HUB}{name} has no {' or '.join(_IN_FOLDERS)}; give another name")
