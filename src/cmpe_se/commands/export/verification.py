"""The comparison with PyTorch that every exported file has to pass."""

import torch
from torch import Tensor, nn

from cmpe_se.errors import UserError
from cmpe_se.runtimes.exported import Exported
from cmpe_se.utils.text import in_one_line

BATCH_SIZES = (1, 2, 3, 7)
"""Batches that are compared: none may depend on the batch that the network was traced with."""

_TOLERANCE = 1e-3  # of the largest logit; what float32 errs in other summation orders is a hundredth of it


@torch.no_grad()
def verify(exported: Exported, network: nn.Module, images: Tensor) -> float:
    """Compare an exported file with the network that it should be, at every batch size.

    Args:
        exported: the file, in its own runtime.
        network: the run's network in eval mode.
        images: normalised, float32 (N, C, H, W), N the sum of the batch sizes.

    Returns:
        The largest error of a logit, as a part of its batch's largest logit.

    Raises:
        UserError: an error above a thousandth, another class in first place, or a batch that the runtime refuses.
    """
    largest = 0.0
    for batch in images.split(list(BATCH_SIZES)):
        expected, found = network(batch), _run(exported, batch)
        if found.shape != expected.shape:
            raise _wrong(f"gives logits of shape {tuple(found.shape)} instead of {tuple(expected.shape)}")
        error = ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()
        if not error <= _TOLERANCE:  # nor NaN
            raise _wrong(
                f"has an error of {error:.1e} of the largest logit at batch {len(batch)}, above {_TOLERANCE:g}"
            )
        if not torch.equal(found.argmax(1), expected.argmax(1)):
            raise _wrong(f"predicts another class at batch size {len(batch)}")
        largest = max(largest, error)
    return largest


def verify_batch_sizes(exported: Exported, images: Tensor) -> None:
    """Run a quantised file, whose logits are its own, at every batch size; UserError where it cannot."""
    for batch in images.split(list(BATCH_SIZES)):
        if not _run(exported, batch).isfinite().all():
            raise _wrong(f"gives logits that are not finite at batch size {len(batch)}")


def _run(exported: Exported, batch: Tensor) -> Tensor:
    """Logits (N, classes) of a batch (N, C, H, W); UserError where the runtime refuses it."""
    try:
        return exported(batch)
    except Exception as error:  # each runtime raises many kinds
        raise _wrong(f"cannot run batches of {len(batch)} ({in_one_line(error)})") from None


def _wrong(what: str) -> UserError:
    return UserError(f"the exported network is not the run's: it {what}; nothing was written; try another format")
