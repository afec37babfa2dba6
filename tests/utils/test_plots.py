"""Plots of a run: whole epochs, accuracies that can be, percent where percent is said."""

import numpy as np
import pytest
import torch
from matplotlib.text import Text

from cmpe_se.utils.figures import _characters, save_figure
from cmpe_se.utils.plots import draw_confusion, draw_curves


def record(epoch: int, top1: float = 90.0, loss: float = 0.5) -> dict:
    return {"epoch": epoch, "train_loss": loss, "test_loss": 1.1 * loss, "train_top1": top1, "test_top1": top1}


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6, 7, 30])
def test_epochs_are_whole(epochs):
    figure = draw_curves([record(epoch) for epoch in range(1, epochs + 1)], "")
    for axes in figure.axes:
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert all(tick == int(tick) for tick in ticks)
        assert len(ticks) >= min(epochs, 3)
        assert low < 1 <= epochs < high


@pytest.mark.parametrize("top1", [0.0, 50.0, 99.99, 100.0])
def test_accuracies_lie_between_0_and_100(top1):
    _, accuracy = draw_curves([record(epoch, top1) for epoch in (1, 2)], "").axes
    assert accuracy.get_ylim()[0] >= 0
    assert accuracy.get_ylim()[1] <= 100


def test_markers_of_one_epoch_are_whole():
    loss, accuracy = draw_curves([record(1, 100.0)], "").axes
    assert loss.get_ylim()[1] > 1.02 * 0.55
    assert all(line.get_marker() == "o" and not line.get_clip_on() for line in (*loss.lines, *accuracy.lines))


def test_a_run_without_a_loss_has_axes():
    loss, _ = draw_curves([record(1, loss=0.0)], "").axes
    assert loss.get_ylim()[1] > 0


def test_the_confusion_matrix_shows_percent():
    counts = torch.tensor([[1000, 1, 0], [5, 50, 5], [0, 0, 7]])
    figure = draw_confusion(counts, ["a", "b", "c"])
    cells = {text.get_position(): text.get_text() for text in figure.axes[0].texts}
    assert cells == {(0, 0): ">99", (1, 0): "<1", (0, 1): "8", (1, 1): "83", (2, 1): "8", (2, 2): "100"}


def test_text_of_a_figure_is_drawn_as_it_is(tmp_path):
    names = ["a_$x^$", "two\nlines", "猫" if "猫" not in _characters(None) else "\x00", "x" * 300]
    figure = draw_confusion(torch.from_numpy(np.eye(4, dtype=int)), names)
    save_figure(figure, tmp_path / "x.png", dpi=50)
    drawn = {text.get_text() for text in figure.findobj(Text)}
    assert {"a_$x^$", "two\\nlines"} <= drawn
    assert not drawn & set(names[1:])
    assert {"\\u732b", "\\x00"} & drawn
    assert max(map(len, drawn)) < 60
    assert not any(text.get_parse_math() for text in figure.findobj(Text))


def test_every_curve_is_inside_its_axes():
    """A validation loss may be far above the others."""
    records = [
        {"epoch": epoch, "train_loss": 1.0, "validation_loss": 9.0 / epoch, "test_loss": 0.5 if epoch == 2 else None}
        for epoch in (1, 2, 3)
    ]
    loss = draw_curves(records, "").axes[0]
    assert [line.get_label() for line in loss.lines] == ["train", "validation", "test"]
    assert max(max(line.get_ydata()) for line in loss.lines) == 9.0 < loss.get_ylim()[1]
