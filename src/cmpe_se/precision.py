"""Autocast, and where it must not round."""

from contextlib import AbstractContextManager, nullcontext

import torch


def autocasts(device_type: str) -> bool:
    """Whether autocast is on for a type of device; some, such as meta, do not have it."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Context in which autocast rounds nothing; empty where it is off already."""
    return torch.autocast(device_type, enabled=False) if autocasts(device_type) else nullcontext()
