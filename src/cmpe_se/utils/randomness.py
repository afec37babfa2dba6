"""Random number generators that a forward can draw from without a tensor of its own."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_states() -> tuple[Any, ...]:
    """States of PyTorch's, Python's and NumPy's generators, of which equal ones give equal numbers."""
    numpy: Any = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), repr([list(numpy[1]), *numpy[2:]])


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Give the generators back the states that they had."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
