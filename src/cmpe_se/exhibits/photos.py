"""Exhibits of single images: squeezes and gates, attributions, and confusions."""

from collections.abc import Sequence
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from cmpe_se.exhibits.choosing import ConfusedPair, Photo
from cmpe_se.exhibits.drawing import draw_attributions, draw_inside, draw_pairs
from cmpe_se.exhibits.drawing.depth import short_name, titled
from cmpe_se.exhibits.drawing.photos import Depth, Explained
from cmpe_se.exhibits.exhibit import Exhibit
from cmpe_se.inspecting import BlockView
from cmpe_se.inspecting.attribution import Attribution
from cmpe_se.inspecting.statistics import CLOSED, BlockStatistics
from cmpe_se.layers.views import TABLE
from cmpe_se.training.summary import EpochRecord
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.plots import draw_confusion, draw_curves
from cmpe_se.utils.text import counted, shortened


class Said(NamedTuple):
    """The prediction for an image, and whether it is correct, in a sentence and below the image; ``wrong`` if not."""

    text: str
    caption: str
    wrong: bool


def answer(photo: Photo, probabilities: Tensor, classes: Sequence[str]) -> Said:
    """What to say of an image's probabilities (K,)."""
    best = int(probabilities.argmax())
    percent = f"({100 * probabilities[best].item():.0f} %)"
    text, caption = f"prediction {classes[best]} {percent}", f"{visible(shortened(classes[best], 18))} {percent}"
    if photo.label is None:
        return Said(text, caption, wrong=False)
    if photo.label == best:
        return Said(f"{text}, correct", f"{caption},\ncorrect", wrong=False)
    truth = classes[photo.label]
    return Said(f"{text}, true class {truth}", f"{caption},\ntrue class\n{visible(shortened(truth, 24))}", wrong=True)


def inside(
    number: int,
    photo: Photo,
    said: Said,
    views: Sequence[BlockView],
    index: int,
    statistics: dict[str, BlockStatistics],
) -> Exhibit:
    """The paper's figure for one image.

    Args:
        number: of the plot, from 1.
        photo: the image.
        said: :func:`answer` for it.
        views: the blocks to show, for a batch of images.
        index: of the image in that batch.
        statistics: of each block by its name.
    """
    depths, rows, shut = [], [], []
    for view in views:
        gate, usual = view.gate[index].cpu(), statistics[view.name].mean
        depths.append(depth_of(view, index, usual))
        shut.append(int((gate < depths[-1].closed).sum()))
        numbers = (*_squeezes(view, index), gate, usual)
        rows += [
            [view.name, channel, *row]
            for channel, row in enumerate(zip(*(vector.tolist() for vector in numbers), strict=True))
        ]
    most = int(np.argmax([count / len(depth.gate) for count, depth in zip(shut, depths, strict=True)]))
    if shut[most]:
        seen = f"{depths[most].name} closes {shut[most]} of {len(depths[most].gate)} channels"
    else:
        seen = "no channel is closed at these depths"
    title = f"{shortened(photo.name, 48)}: {said.text}; {seen}"
    pictured = views[0].picture is not None
    drawn = "picture" if pictured else "squeezes"
    shows, special = _reading(views[0].view)
    return Exhibit(
        f"inside-{number}",
        title,
        f"Rows r are the residual's squeezes, rows i the identity's{shows}. Purple: above zero; orange: below. After "
        f"gating, the residual's rows are multiplied by the gates. {special}",
        draw_inside(title, photo.pixels, said.caption, depths, drawn),
        ["block", "channel", "residual_squeeze", "identity_squeeze", "gate", "mean_gate_of_test"],
        rows,
    )


def _reading(view: str) -> tuple[str, str]:
    """How the gate depends on the squeezes above it, and how to read its points and the line."""
    kind = TABLE[view]
    if kind.form == "constant":
        return ", which this gate does not read", "Gates are sorted; they are the same for every image."
    shows = {"picture": "", "maps": ", of which this gate computes its own, from whole feature maps"}
    if kind.form == "squeezes":
        read = f"the {kind.reads[0]}'s are" if len(kind.reads) == 1 else "both are"
        shows["squeezes"] = f"; {read} read without a picture"
    special = (
        "Gates are sorted by their mean over the test images (black line). A point above the line is a gate more open "
        "for this image than on average."
    )
    return shows[kind.form], special


def depth_of(view: BlockView, index: int, usual: Tensor | None) -> Depth:
    """One block of the figure, for an image of the batch; ``usual`` (C,) is the mean gate over the test images."""
    gate, closed = view.gate[index].cpu().numpy(), CLOSED * view.gain
    mean = None if usual is None else usual.numpy()
    return Depth(view.name, *shown_pictures(view, index), gate, mean, view.neutral, view.gain, closed)


def shown_pictures(view: BlockView, index: int) -> tuple[np.ndarray, np.ndarray]:
    """Picture before and after gating as plots show them: pairs transposed, squeezes where there is no picture."""
    if view.picture is None or view.attentional_picture is None:
        residual, identity = _squeezes(view, index)
        pictures = [torch.stack((r, identity)) for r in (residual, view.gate[index] * residual)]
    else:
        pictures = [picture[index, 0] for picture in (view.picture, view.attentional_picture)]
        if not TABLE[view.view].layers.folded:
            pictures = [picture.T for picture in pictures]
    before, after = (picture.cpu().numpy() for picture in pictures)
    return before, after


def _squeezes(view: BlockView, index: int) -> tuple[Tensor, Tensor]:
    """Of residual and identity, (C,) each; only a merged gate of a foreign block lacks one, and runs are not merged."""
    return cast(Tensor, view.residual_squeeze)[index], cast(Tensor, view.identity_squeeze)[index]


def attributions(
    photos: Sequence[Photo], said: Sequence[Said], explained: Sequence[tuple[int, Attribution]], classes: Sequence[str]
) -> Exhibit:
    """Attributions of classes, for some images.

    Args:
        photos: images.
        said: :func:`answer` for each.
        explained: indices of photos, with an attribution each.
        classes: names.
    """
    rows, table = [], []
    names = list(explained[0][1].blocks)
    for index, attribution in explained:
        photo, target = photos[index], classes[attribution.target]
        maps = {"input": attribution.pixels, **attribution.blocks}
        heats = [heat.numpy() for heat in maps.values()]
        rows.append(
            Explained(
                photo.pixels,
                f"{visible(shortened(target, 24))}\n{_role(photo, attribution.target, said[index])}",
                heats,
            )
        )
        for place, heat in maps.items():
            for y, line in enumerate(heat.tolist()):
                table += [[photo.name, target, place, y, x, value] for x, value in enumerate(line)]
    wrong = sum(each.wrong for each in said)
    title = f"Attributions for {counted(len(photos), 'image')}: evidence for a class (purple) and against it (orange)"
    if wrong:
        title += f"; for {counted(wrong, 'misclassified image')}, of the prediction and of the true class"
    return Exhibit(
        "attributions",
        title,
        "Integrated gradients on the input, and Grad-CAM at the outputs of blocks from the input on (captum). Each map "
        "has its own scale.",
        draw_attributions(title, ["integrated gradients", *(f"Grad-CAM {short_name(name)}" for name in names)], rows),
        ["image", "class", "at", "row", "column", "attribution"],
        table,
    )


def _role(photo: Photo, target: int, said: Said) -> str:
    if photo.label == target:
        return "true class" if said.wrong else "prediction, correct"
    return "prediction" if photo.label is None else "prediction, wrong"


def curves(history: Sequence[EpochRecord], loss: str) -> Exhibit:
    """Training curves; ``loss`` says what the losses are."""
    tested = [(accuracy, record["epoch"]) for record in history if (accuracy := record.get("test_top1")) is not None]
    title = epochs = counted(len(history), "epoch")
    if tested:
        (best, epoch), (last, _) = max(tested, key=lambda pair: pair[0]), tested[-1]
        title = f"Test accuracy ends at {last:.2f} % after {epochs}"
        if best > last:
            title += f", and was highest at epoch {epoch} ({best:.2f} %)"
    columns = list(dict.fromkeys(key for record in history for key in record))
    return Exhibit(
        "curves",
        title,
        "Loss and accuracy over the epochs. This report is about the network of the last epoch.",
        titled(draw_curves(history, "", loss=loss), title),
        columns,
        [[record.get(column) for column in columns] for record in history],
    )


def confusion(counts: Tensor, classes: Sequence[str]) -> Exhibit:
    """Confusion matrix of counts (true, predicted)."""
    accuracy = counts.diagonal() / counts.sum(1).clamp(min=1)
    seen = torch.where(counts.sum(1) > 0, accuracy, torch.nan)
    best, worst = (int(torch.nan_to_num(seen, nan=fill).mul(sign).argmax()) for fill, sign in ((-1, 1), (2, -1)))
    low, high = (f"{100 * accuracy[place].item():.1f} %" for place in (worst, best))
    title = f"Hardest class: '{classes[worst]}' ({low} correct); easiest: '{classes[best]}' ({high})"
    if low == high:
        title = f"All classes are as hard: {low} correct"
    return Exhibit(
        "confusion",
        title,
        "A row for each true class, in percent of its images. The diagonal is the accuracy of each class. The table "
        "has the counts.",
        titled(draw_confusion(counts, classes), title),
        ["true \\ predicted", *classes],
        [[name, *row] for name, row in zip(classes, counts.tolist(), strict=True)],
    )


def pairs(confused: Sequence[ConfusedPair], shown: Sequence[Sequence[Photo]], classes: Sequence[str]) -> Exhibit:
    """The most confused pairs, with some of their images; ``shown`` are those of the first pairs."""
    names = [f"{classes[pair.true]} predicted as {classes[pair.predicted]}" for pair in confused]
    title = f"Most frequent mistake: {names[0]} ({_times(len(confused[0].images))})"
    captions = [
        f"{visible(shortened(classes[pair.true], 20))} predicted as {visible(shortened(classes[pair.predicted], 20))}\n"
        f"{_times(len(pair.images))}"
        for pair, _ in zip(confused, shown, strict=False)
    ]
    return Exhibit(
        "confused-pairs",
        title,
        "The most confused pairs of classes, with the wrong predictions of highest probability.",
        draw_pairs(title, captions, [[photo.pixels for photo in photos] for photos in shown]),
        ["true", "predicted", "images", "surest_test_images"],
        [
            [classes[pair.true], classes[pair.predicted], len(pair.images), " ".join(map(str, pair.images[:20]))]
            for pair in confused
        ],
    )


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
