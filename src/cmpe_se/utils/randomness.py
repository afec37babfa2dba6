"""Python's, NumPy's and PyTorch's (CPU) global generators, which forwards and transforms draw from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> tuple[Any, ...]:
    """States of the generators, of which equal ones give equal numbers."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr([list(numpy[1]), *numpy[2:]])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Runs its block, then gives the generators back the states that they had."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its block with the generators at ``seed``, then puts them back.

    timm's and torchvision's transforms draw from all three and take no generator of their own.
    """
    with random_states_kept():
        seed_all(seed)
        yield


def seed_all(seed: int) -> None:
    """Puts the three generators at ``seed``; a sixth of the time of :func:`seeded`, which also puts them back."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
