"""The choice of the device, with and without an accelerator."""

import pytest
import torch

from cmpe_se.errors import UserError
from cmpe_se.utils.devices import choose_device

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.mark.parametrize(
    ("there", "wanted", "chosen"),
    [
        (None, "auto", CPU),
        (None, "cpu", CPU),
        (CUDA, "auto", CUDA),
        (CUDA, "cpu", CPU),
        (CUDA, "cuda", CUDA),
        (MPS, "auto", MPS),
        (MPS, "cpu", CPU),
    ],
)
def test_choice(there, wanted, chosen, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    assert choose_device(wanted) == chosen


@pytest.mark.parametrize(
    ("there", "wanted", "message"),
    [
        (None, "cuda", "device 'cuda' is not available; choose auto or cpu"),
        (CUDA, "mps", "device 'mps' is not available; choose auto, cpu or cuda"),
        (CUDA, "gpu", "device 'gpu' is not available; choose auto, cpu or cuda"),
    ],
)
def test_what_is_not_there(there, wanted, message, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: there)
    with pytest.raises(UserError, match=f"^{message}$"):
        choose_device(wanted)
