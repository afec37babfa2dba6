"""Statistics of the gates of a network over many images, from sums over the batches."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from cmpe_se.inspecting import BlockView
from cmpe_se.layers.views import find_view

CLOSED, OPEN = 0.05, 0.95
"""A gate below the first part of its largest value closes its channel; above the second it is saturated."""
ALWAYS = 0.99
"""Part of the images for which a channel has to be closed, or open, to count as always so."""
DEAD = 0.005
"""A gate with a smaller deviation over the images, as a part of its largest value, does not depend on the image."""
MOVED = 0.01
"""A gate whose mean is closer to its initial value, as a part of the largest value, has not moved."""
TELLING = 0.01
"""Part of the variance of a block's gates that the class has to explain for classes to differ."""
_COUNTED = ("images", "_sums", "_squares", "_closed", "_open", "_histogram", "_class_shares")
_BINS = 2000  # of the histogram that quantiles are read from


class BlockStatistics:
    """Gates and energies of one block over the images of K classes; C channels.

    Args:
        view: of the first images, for the block's name and sizes.
        classes: K.
    """

    def __init__(self, view: BlockView, classes: int):
        self.name, self.view, self.gain, self.channels = view.name, view.view, view.gain, view.gate.shape[1]
        self.neutral, self.constant = view.neutral, find_view(view.view).form == "constant"
        self.images = torch.zeros(classes, dtype=torch.float64)  # of each class
        self._sums = torch.zeros(classes, self.channels, dtype=torch.float64)
        self._squares, self._closed, self._open = torch.zeros(3, self.channels, dtype=torch.float64)
        self._histogram = torch.zeros(_BINS, dtype=torch.float64)
        self._shares: list[Tensor] = []  # 8 bytes an image, for exact quantiles
        self._class_shares = torch.zeros(classes, dtype=torch.float64)

    def add(self, view: BlockView, labels: Tensor) -> None:
        """Count the images of a batch; labels (N,), on the CPU."""
        gate = view.gate.double().cpu() / self.gain  # (N, C) in (0, 1)
        self.images.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self._sums.index_add_(0, labels, gate)
        self._squares += gate.square().sum(0)
        self._closed += (gate < CLOSED).sum(0)
        self._open += (gate > OPEN).sum(0)
        bins = (gate * _BINS).long().clamp(0, _BINS - 1).flatten()
        self._histogram += torch.bincount(bins, minlength=_BINS)
        if view.residual_share is not None:
            self._shares.append(view.residual_share.double().cpu())
            self._class_shares.index_add_(0, labels, self._shares[-1])

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that has been counted: tensors, and what describes them, for :meth:`of_state`."""
        shares = self.residual_shares
        tensors = {name.lstrip("_"): getattr(self, name) for name in _COUNTED}
        words = {name: getattr(self, name) for name in ("name", "view", "gain", "channels", "neutral", "constant")}
        return tensors | ({} if shares is None else {"shares": shares.float()}), words

    @classmethod
    def of_state(cls, tensors: Mapping[str, Tensor], words: Mapping[str, Any]) -> "BlockStatistics":
        """Statistics as :meth:`state` has written them; shares in single precision."""
        made = cls.__new__(cls)
        vars(made).update(words)
        for name in _COUNTED:
            setattr(made, name, tensors[name.lstrip("_")])
        made._shares = [tensors["shares"].double()] if "shares" in tensors else []
        return made

    @property
    def mean(self) -> Tensor:
        """Mean gate of each channel, (C,)."""
        return self.gain * self._sums.sum(0) / self.images.sum()

    @property
    def std(self) -> Tensor:
        """Standard deviation of each channel's gate over the images, (C,)."""
        return self._variance.sqrt() * self.gain

    @property
    def _variance(self) -> Tensor:
        total = self.images.sum()
        return (self._squares / total - (self._sums.sum(0) / total).square()).clamp(min=0)

    @property
    def class_means(self) -> Tensor:
        """Mean gate of each class and channel, (K, C); of a class without images the mean of all."""
        means = self.gain * self._sums / self.images.clamp(min=1)[:, None]
        return torch.where(self.images[:, None] > 0, means, self.mean)

    @property
    def closed(self) -> Tensor:
        """Part of the images for which each channel is closed, (C,)."""
        return self._closed / self.images.sum()

    @property
    def open(self) -> Tensor:
        """Part of the images for which each channel's gate is saturated, (C,)."""
        return self._open / self.images.sum()

    @property
    def varies(self) -> bool:
        """Whether a gate takes notice of the image."""
        return not self.constant and bool((self.std >= DEAD * self.gain).any())

    @property
    def moved(self) -> bool:
        """Whether a gate is elsewhere than where it began."""
        return self.varies or bool(((self.mean - self.neutral).abs() >= MOVED * self.gain).any())

    @property
    def kinds(self) -> dict[str, list[int]]:
        """Numbers of the channels that are always ``closed``, always ``open``, and ``dead`` (may overlap).

        Gates that are constants by design are not dead: they do not read the image by design. Nor are those of a block
        that has not moved: training has not started there.
        """
        dead = (self.std < DEAD * self.gain) & (not self.constant) & self.moved
        masks = {"closed": self.closed >= ALWAYS, "open": self.open >= ALWAYS, "dead": dead}
        return {kind: mask.nonzero().flatten().tolist() for kind, mask in masks.items()}

    def quantiles(self, *parts: float) -> list[float]:
        """Gates below which these parts of all gates lie, over channels and images."""
        below = self._histogram.cumsum(0) / self._histogram.sum()
        places = torch.searchsorted(below, torch.tensor(parts, dtype=torch.float64)).clamp(max=_BINS - 1)
        return (self.gain * (places + 0.5) / _BINS).tolist()

    @property
    def between(self) -> Tensor:
        """Variance between the classes' means of each channel's gate, (C,)."""
        deviations = (self.class_means - self.mean).square()
        return (self.images[:, None] * deviations).sum(0) / self.images.sum()

    @property
    def explained(self) -> float:
        """Part of the gates' variance over images that the class explains, over all channels (eta squared)."""
        total = self.std.square().sum()
        return (self.between.sum() / total).item() if total > 1e-12 else 0.0

    @property
    def telling(self) -> bool:
        """Whether the gates depend on the class: it explains TELLING of their variance, and twice what chance does.

        With n images of K classes, chance explains (K - 1) / (n - 1). Gates that do not vary have rounding noise alone.
        """
        images, classes = int(self.images.sum()), int((self.images > 0).sum())
        if not self.varies or classes < 2 or images <= classes:
            return False
        return self.explained >= max(TELLING, 2 * (classes - 1) / (images - 1))

    @property
    def residual_shares(self) -> Tensor | None:
        """Of each image, (N,): see :attr:`cmpe_se.inspecting.BlockView.residual_share`."""
        return torch.cat(self._shares) if self._shares else None

    @property
    def class_residual_shares(self) -> list[float | None]:
        """Mean residual share of each class's images; None of a class without images."""
        if not self._shares:
            return [None] * len(self.images)
        pairs = zip(self._class_shares.tolist(), self.images.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]
