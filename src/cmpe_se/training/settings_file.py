"""Text of a file of settings: YAML that is strict, with a line that says how many settings it has to have.

The line ``# settings: 52, sha256 0123456789abcdef`` stands at the head, where a file that was cut still has it. Files
of people, and of runs from before there was the line, do without.
"""

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import yaml

from cmpe_se.utils.text import in_one_line

_REPEAT = "# repeat: cmpe-se train --recipe THIS_FILE"
_SEAL = "# settings:"
_SEAL_LINE = re.compile(rf"{_SEAL} (\d+), sha256 ([0-9a-f]{{16}})\s*")

# What the first version's runs have. A run's file without the line has these at least; the others came later.
_FIRST = (
    *("model", "view", "data", "data_dir", "download", "image_size", "workers", "epochs", "batch_size", "accumulate"),
    *("seed", "optimizer", "lr", "momentum", "weight_decay", "schedule", "min_lr", "warmup_epochs"),
    *("decay_milestones", "decay_epochs", "decay_rate", "label_smoothing", "mixup", "cutmix", "drop_rate"),
    *("drop_path_rate", "clip_grad", "ema", "crop_padding", "flip", "cutout", "scale", "ratio", "color_jitter"),
    *("auto_augment", "random_erasing", "precision", "channels_last", "compile", "device", "checkpoint_steps"),
    "tensorboard",
)


def settings_text(values: Mapping[str, Any]) -> str:
    """A file of settings, each on its line, with the line that says how many they are."""
    body = yaml.safe_dump(dict(values), sort_keys=False)
    return f"{_REPEAT}\n{_SEAL} {len(values)}, sha256 {_digest(body)}\n{body}"


def parse_settings(text: str) -> dict[str, Any]:
    """Values by name.

    Raises:
        ValueError: no YAML mapping, a name twice, an alias, or nothing at all.
    """
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        line = f" in line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ValueError(f"is not YAML: {error.problem}{line}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"is not YAML: {in_one_line(error)}") from None
    except RecursionError:
        raise ValueError("is not YAML of settings: it has too many levels") from None
    if values is None:
        raise ValueError("is empty; it should map settings to values, such as 'epochs: 30'")
    if not isinstance(values, dict):
        raise ValueError("should map settings to values, such as 'epochs: 30'")
    return values


def refuse_incomplete(text: str, values: Mapping[str, Any], known: Sequence[str], *, of_a_run: bool) -> None:
    """Compare settings with the line that says how many they are.

    Args:
        text: of the file.
        values: parsed from it.
        known: names of all settings of this version.
        of_a_run: without the line, ask for all settings of the first version; else it is a recipe, which has any.

    Raises:
        ValueError: some are missing.
    """
    if (sealed := _sealed(text)) is None:
        if of_a_run and (missing := [name for name in _FIRST if name not in values]):
            raise ValueError(f"lacks {_some(missing)}")
        return
    count, _ = sealed
    if len(values) < count:
        missing = [name for name in known if name not in values]
        raise ValueError(f"has {len(values)} of the {count} settings that were written; it lacks {_some(missing)}")
    if len(values) > count:
        raise ValueError(f"has {len(values)} settings, and {count} were written")


def is_as_written(text: str) -> bool:
    """Whether no setting has changed since the file was written; true of files without the line, which cannot tell."""
    sealed = _sealed(text)
    return sealed is None or sealed[1] == _digest(text)


def _sealed(text: str) -> tuple[int, str] | None:
    """The number of settings and their checksum, where the file says them."""
    lines = [line for line in text.splitlines() if line.startswith(_SEAL)]
    if not lines:
        return None
    found = _SEAL_LINE.fullmatch(lines[0])
    if found is None or len(lines) > 1:
        raise ValueError(f"has a damaged line '{lines[-1][:60]}'")
    return int(found[1]), found[2]


def _digest(text: str) -> str:
    """Of all lines but comments and empty ones."""
    lines = [line.rstrip() for line in text.splitlines()]
    body = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _some(names: Collection[str]) -> str:
    return ", ".join(list(names)[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


class _Loader(yaml.SafeLoader):
    """Refuses a name that is there twice, of which YAML takes the last, and aliases, which multiply."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "found an alias", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if names.count(key.value) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"found {key.value} twice", key.start_mark)
        return super().construct_mapping(node, deep)
