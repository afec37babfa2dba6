"""The choice of the device."""

import torch

from cmpe_se.errors import UserError


def choose_device(wanted: str = "auto") -> torch.device:
    """The device that a setting means: ``auto`` is the accelerator where there is one, and the CPU elsewhere.

    Args:
        wanted: ``auto``, ``cpu``, or the type of an accelerator, such as ``cuda``.

    Raises:
        UserError: an accelerator that is not there.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if wanted == "cpu" or (wanted == "auto" and accelerator is None):
        return torch.device("cpu")
    if accelerator is None or wanted not in ("auto", accelerator.type):
        there = "auto or cpu" if accelerator is None else f"auto, cpu or {accelerator.type}"
        raise UserError(f"device '{wanted}' is not available; choose {there}")
    return accelerator
