"""The network of a run's settings."""

from collections import Counter
from functools import partial
from typing import Any, Protocol

import timm
from torch import nn

from cmpe_se.errors import UserError
from cmpe_se.layers.attention import CompetitiveSE
from cmpe_se.pruning.registry import NAME as PRUNED
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.gate_settings import has_gates
from cmpe_se.training.pretrained import say_what_timm_changed, start_from
from cmpe_se.utils.text import in_one_line


class ImageShape(Protocol):
    """What a network's first and last layer depend on of a data set; every ``ImageData`` is one."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names."""

    @property
    def in_chans(self) -> int:
        """Channels of an image."""


def create_network(config: TrainingConfig, data: ImageShape) -> tuple[nn.Module, dict[str, Any]]:
    """The network of a configuration, and the keywords that timm made it with."""
    model_args: dict[str, Any] = {"num_classes": len(data.classes), "in_chans": data.in_chans, **config.gate_settings}
    if config.gate_settings and not has_gates(config):
        name = next(iter(config.gate_settings))
        raise UserError(
            f"{name} is for gates, and {config.model} has none; add --view or --convert, or leave --{name} out"
        )
    name = config.model
    if config.view is not None:
        model_args["view"] = config.view
    if config.convert is not None:
        name, model_args = "cmpe_se_converted", model_args | {"base": config.model, "view": config.convert}
    if config.widths is not None:
        name, model_args = PRUNED, model_args | {"network": name, "widths": config.widths}
    dropping = {name: getattr(config, name) for name in ("drop_rate", "drop_path_rate") if getattr(config, name)}
    if not timm.is_model(config.model):
        near = timm.list_models(f"*{config.model.split('_')[-1]}*", module="registry")[:5]
        hint = f"did you mean {', '.join(near)}?" if near else "`cmpe-se models` lists those of cmpe_se"
        raise UserError(f"no network '{config.model}'; {hint}")
    create = partial(timm.create_model, name, **model_args, **dropping)
    try:
        if config.pretrained is None:
            return create(), model_args
        if config.pretrained != "timm":
            return start_from(config.pretrained, config.model, create), model_args
        network, own = create(pretrained=True), timm.get_pretrained_cfg(config.model)
        say_what_timm_changed(config.model, len(data.classes), own.num_classes if own else None)
        return network, model_args
    except UserError:
        raise
    except ValueError as error:  # a sentence, about a setting that does not fit
        raise UserError(f"cannot make {config.model}: {error}") from None
    except TypeError as error:
        raise UserError(f"cannot make {config.model} with {model_args | dropping}: {error}") from None
    except Exception as error:
        if config.pretrained is None:
            raise
        reason = in_one_line(error)  # timm, torch and the hub raise many kinds
        raise UserError(f"{config.model} cannot start from {config.pretrained}: {reason}") from None


def count_gates(network: nn.Module) -> dict[str, int]:
    """The gates that are in a network, whatever its settings say: view to their number, empty if there are none."""
    return dict(sorted(Counter(gate.view for gate in network.modules() if isinstance(gate, CompetitiveSE)).items()))
