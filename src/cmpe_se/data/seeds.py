"""Random numbers that depend on what they are for, and on nothing else."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch

# A word of its own for each use keeps, say, the order of epoch 3 apart from the augmentation of epoch 3.
_USES = {"order": 1, "augmentation": 2, "sample": 3, "stream": 4, "noise": 5}


def derive_seed(use: str, *numbers: int) -> int:
    """A 64-bit seed from non-negative ``numbers``; seeds of neighbouring numbers have nothing in common."""
    return int(np.random.SeedSequence([_USES[use], *numbers]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def generator(use: str, *numbers: int) -> torch.Generator:
    """A CPU generator seeded with ``derive_seed``."""
    return torch.Generator().manual_seed(derive_seed(use, *numbers))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Runs its block with Python's, NumPy's and PyTorch's (CPU) global generators at ``seed``, then puts them back.

    timm's and torchvision's transforms draw from all three and take no generator of their own.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.default_generator.set_state(states[2])
