"""The reference's outputs, and how near to them is near enough."""

import json
from pathlib import Path

import numpy as np
import torch

FIXTURES = Path(__file__).parent / "fixtures"
VIEW_OF = {"se": "se", "dfc": "double_fc", "1x1": "pair_view_1x1", "2x1": "pair_view_2x1", "3x3": "folded_3x3"}


class Fixture:
    """One case of a fixture file: arrays by key, as float64 tensors."""

    def __init__(self, arrays, prefix: str, meta: dict):
        self.arrays, self.prefix, self.meta = arrays, prefix, meta

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self.arrays[self.prefix + key])).double()

    def __contains__(self, key: str) -> bool:
        return self.prefix + key in self.arrays

    def numbers(self, kind: str) -> dict[str, np.ndarray]:
        """All arrays under ``kind/``, by the rest of their key."""
        start = f"{self.prefix}{kind}/"
        return {key[len(start) :]: self.arrays[key] for key in self.arrays.files if key.startswith(start)}


def load_fixtures(file: str) -> list[Fixture]:
    arrays = np.load(FIXTURES / f"{file}.npz", allow_pickle=False)
    meta = json.loads(str(arrays["meta"]))
    if "cases" in meta:
        return [Fixture(arrays, f"{case['case']}/", case) for case in meta["cases"]]
    return [Fixture(arrays, "", meta)]


def assert_near(actual: torch.Tensor, expected, relative: float, floor: float = 0.0) -> None:
    """Largest difference at most ``relative`` of the largest expected magnitude (or of ``floor``)."""
    expected = torch.as_tensor(np.asarray(expected)).double()
    assert actual.shape == expected.shape
    scale = max(expected.abs().max().item(), floor)
    worst = (actual.detach().double() - expected).abs().max().item()
    assert worst <= relative * scale, f"differs by {worst:.3g}, scale {scale:.3g}"


def check_statistics(after: dict, before: dict, targets: dict, samples: dict, relative: float = 1e-6) -> None:
    """Running statistics after one training step; the reference accumulates the biased batch variance."""
    assert after
    for path, expected in after.items():
        actual = targets[path].tensor.double()
        if path.endswith("running_var"):
            n = samples[path.removesuffix(".running_var")]
            old = torch.as_tensor(before[path]).double()
            # ours = 0.9 old + 0.1 biased n / (n - 1)
            actual = 0.9 * old + (actual - 0.9 * old) * (n - 1) / n
        assert_near(actual, expected, relative, floor=1e-3)
