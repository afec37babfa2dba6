"""The gate settings of a run: the user's, the recipe's, or those of the weights that it starts from."""

from collections.abc import Collection
from pathlib import Path

from cmpe_se.errors import UserError
from cmpe_se.networks.registry import PLAIN_NETWORKS, is_ours, view_of
from cmpe_se.pruning.registry import NAME as PRUNED
from cmpe_se.shipped import shipped_names
from cmpe_se.training.config import GATE_FIELDS, TrainingConfig, read_recipe, recipe_names
from cmpe_se.training.pretrained import saved_network

_DEFAULT = TrainingConfig()


def has_gates(config: TrainingConfig) -> bool:
    """Whether the network of a configuration has gates that its gate settings describe."""
    return view_of(config.model, config.view or config.convert) is not None


def without_foreign_gates(config: TrainingConfig, recipe: str | Path, given: Collection[str]) -> TrainingConfig:
    """Leave out what only the recipe says of gates, where it does not mean this network.

    That is a network without gates and, for a recipe that comes with the package, any network but the recipe's own:
    others keep the numbers that their names stand for.

    Args:
        config: made from the recipe and what the user gave.
        recipe: its name or path.
        given: names of the settings that the user gave; they stay, and fail if the network has no gates.
    """
    packaged = str(recipe) in recipe_names()
    if has_gates(config) and not (packaged and config.model != read_recipe(recipe).get("model")):
        return config
    return without_recipe_gates(config, given)


def without_recipe_gates(config: TrainingConfig, given: Collection[str]) -> TrainingConfig:
    """Gate settings at their defaults, except those that the user gave."""
    return config.changed(**{name: getattr(_DEFAULT, name) for name in GATE_FIELDS if name not in given})


def with_weights_by_name(config: TrainingConfig) -> TrainingConfig:
    """``pretrained: timm`` as the name of the weights, for networks of ours: their settings are known by it.

    Raises:
        UserError: the model's name is one of weights, with settings that the run's own would replace.
    """
    base, _, tag = config.model.partition(".")
    if tag and config.model in shipped_names():
        raise UserError(
            f"{config.model} names weights; give --model {base}, and --pretrained {config.model} to start from them"
        )
    if config.pretrained != "timm":
        return config
    of_base = [name for name in shipped_names() if name.partition(".")[0] == base]
    return config.changed(pretrained=of_base[0]) if of_base else config


def with_pretrained_gates(config: TrainingConfig, given: Collection[str]) -> TrainingConfig:
    """Gates and widths as in the run or folder that the weights come from: they would be others with the same weights.

    ``mask`` is not taken from there: it acts in training alone.

    Args:
        config: of the run.
        given: names of the settings that the user gave.

    Raises:
        UserError: gates of another view there, or a setting that the user gave otherwise.
    """
    saved = saved_network(config.pretrained) if config.pretrained else None
    if saved is None:
        return config
    network, settings = saved
    if network == PRUNED:
        network = str(settings.get("network"))
        if config.widths is None:
            config = config.changed(widths=settings.get("widths"))
    if not has_gates(config):
        return config
    theirs = view_of(network, settings.get("view"))
    if theirs is None:  # nothing is known of the weights, or they have no gates yet
        return config
    flag, own = ("convert", config.convert) if config.convert else ("view", view_of(config.model, config.view))
    if own != theirs:
        raise UserError(f"{config.pretrained} has gates of view {theirs}, not {own}; give --{flag} {theirs}")
    taken = {}
    for name in GATE_FIELDS:
        if name == "mask":
            continue
        there, here = settings.get(name, getattr(_DEFAULT, name)), getattr(config, name)
        if name == "start":  # None is the network's own
            there, here = there or _begins_at(network), here or there
        if name in given and here != there:
            raise UserError(f"{config.pretrained} has gates of {name} {there}, not {here}; give --{name} {there}")
        if name not in given:
            taken[name] = settings.get(name, getattr(_DEFAULT, name))
    return config.changed(**taken)


def _begins_at(name: str) -> str:
    """Where the gates of a network begin if nothing is said: our own at half, converted ones at one."""
    base = name.removeprefix("cmpe_").removeprefix("se_")
    return "half" if is_ours(name) and base in PLAIN_NETWORKS else "one"
