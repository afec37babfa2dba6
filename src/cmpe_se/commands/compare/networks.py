"""The networks of a comparison as they are made: what gates they have, and whether two of them are one."""

import hashlib
from collections.abc import Mapping
from functools import cache
from typing import NamedTuple

import timm
import torch

from cmpe_se.data import ImageData
from cmpe_se.errors import UserError
from cmpe_se.training.config import TrainingConfig
from cmpe_se.training.network import count_gates, create_network
from cmpe_se.training.seeding import seed_everything


class _AnyImages(NamedTuple):
    classes: tuple[str, ...] = ("0", "1")
    in_chans: int = 3


@cache
def gates_of(model: str, view: str | None, convert: str | None) -> dict[str, int]:
    """View to the number of gates of the network that these three fields of a configuration make."""
    network, _ = create_network(TrainingConfig(model=model, view=view, convert=convert), _AnyImages())
    return count_gates(network)


def check_networks(configs: Mapping[str, TrainingConfig], data: ImageData) -> None:
    """Make each network once: one that cannot be made, or is another one by another name, is found before any run.

    Args:
        configs: label of the network to its configuration.
        data: that they are trained on.

    Raises:
        UserError: such a network.
    """
    labels: dict[str, str] = {}
    for label, config in configs.items():
        same = labels.setdefault(_fingerprint(config, data), label)
        if same != label and torch.equal(_output(configs[same], data), _output(config, data)):
            raise UserError(f"{same} and {label} are the same network; name it once")


def _fingerprint(config: TrainingConfig, data: ImageData) -> str:
    """Of the layers of a network and their first values, with a fixed seed, and of the weights that it starts from."""
    seed_everything(0)
    network, _ = create_network(config.changed(pretrained=None), data)
    digest = hashlib.sha256(repr(network).encode())
    for name, tensor in network.state_dict().items():
        digest.update(name.encode() + tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
    if config.pretrained == "timm":
        weights = timm.get_pretrained_cfg(config.model)
        digest.update(repr((weights.hf_hub_id, weights.url, weights.tag) if weights else None).encode())
    return digest.hexdigest()


@torch.no_grad()
def _output(config: TrainingConfig, data: ImageData) -> torch.Tensor:
    """Logits (2, classes) of random images: layers of the same names may be put together in different ways."""
    seed_everything(0)
    network, _ = create_network(config.changed(pretrained=None), data)
    return network.eval()(torch.randn(2, data.in_chans, *data.image_size))
