"""Random state as a function of where a run is."""

import random

import numpy as np
import torch


def seed_everything(*place: int) -> None:
    """Seed Python, NumPy and PyTorch on every device from numbers such as (seed, step, process)."""
    words = np.random.SeedSequence(place).generate_state(2)
    random.seed(int(words[0]))
    np.random.seed(words[0])  # noqa: NPY002 (timm's mixup draws from the global generator)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))
