"""Random numbers that depend on what they are for, and on nothing else."""

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
