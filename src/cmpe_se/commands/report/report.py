"""The ``report`` command: statistics, plots of them, and a page with both."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchmetrics.functional.classification import multiclass_confusion_matrix

from cmpe_se.commands.prune.record import read_record, sentences
from cmpe_se.commands.report.facts import facts_of
from cmpe_se.commands.report.page import Section, Table, write_page
from cmpe_se.data import ImageData
from cmpe_se.data.photographs import photographs
from cmpe_se.data.reading import image_files
from cmpe_se.errors import UserError
from cmpe_se.exhibits import depth as depth_exhibits
from cmpe_se.exhibits import photos as photo_exhibits
from cmpe_se.exhibits import pruning as pruning_exhibits
from cmpe_se.exhibits.choosing import (
    Photo,
    choose_blocks,
    choose_images,
    confused_pairs,
    named_blocks,
    photo,
    photo_of_file,
)
from cmpe_se.exhibits.exhibit import Exhibit, write_csv
from cmpe_se.inspecting import gated_blocks, look
from cmpe_se.inspecting.attribution import attribute
from cmpe_se.inspecting.gathering import Gathered, gather
from cmpe_se.inspecting.statistics import BlockStatistics
from cmpe_se.inspecting.tested import read_tested
from cmpe_se.layers.views import TABLE
from cmpe_se.shipped import SHIPPED
from cmpe_se.static_gates import Calibration
from cmpe_se.training.loss import loss_label
from cmpe_se.training.run_data import load_run_data, load_tested
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.devices import choose_device
from cmpe_se.utils.files import os_errors_as, whole_path
from cmpe_se.utils.packages import require
from cmpe_se.utils.progress import with_progress
from cmpe_se.utils.terminal import Terminal
from cmpe_se.utils.text import counted, data_name

_MOST_IMAGES = 12  # that a page shows
_RIGHT, _WRONG = 2, 2  # test images that are shown by themselves
_PAIRS, _PAIR_IMAGES = 5, 7  # confused pairs, and images of each
_FROZEN = 200  # test images that the network sees with each gate frozen in turn
_CHANNELS = 12  # numbers of channels in a cell of the table


def report(
    run: str = SHIPPED,
    *,
    images: str | Sequence[str] | None = None,
    blocks: str | None = None,
    output: str | None = None,
    data_dir: str | None = None,
    batch_size: int = 256,
) -> dict[str, Any]:
    """Write an HTML page on a finished run and the competition in its network, with plots as PNG and CSV.

    The page shows the run's metrics, the paper's figure for some images, the gates and the competition over depth and
    by class, attributions of the network's predictions, and its confusions. It needs nothing from the internet.

    Args:
        run: run folder of a network with competition, or one that comes with the package, by name; the one with folded
            gates if left out.
        images: image files, and folders of them, to show squeezes, gates and attributions for; if left out, test
            images of different classes, two with correct predictions and two with wrong ones, or two photographs where
            the test images are not at hand.
        blocks: names of the blocks to show, separated by commas; if left out, the one of each stage whose gates vary
            most.
        output: folder for the files; RUN/report if left out, and runs/NAME/report for a network that comes with the
            package.
        data_dir: folder of images to test on, with classes of the run's; the run's own test images if left out. Where
            those are not at hand, a network that comes with the package has what it did on them in a file.
        batch_size: number of images in a batch.

    Returns:
        ``page`` (path of the HTML file), ``test_top1`` (percent), ``blocks`` (those shown), ``images`` (those shown),
        and ``seen``: a sentence for each plot, by its file's name, and one called ``gates`` where they are
        the same for every image, or for every class.

    Raises:
        UserError: no finished run, no competition in its network, its data set gone, unknown blocks, a file that is no
            image, or a missing package.
    """
    require(("captum", "jinja2"), "cmpe-se report", extra="report")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}, should be at least 1")
    folder = RunFolder.open(run)
    result, config = folder.read_result(), folder.read_config()
    name = data_name(config.data, config.data_dir)
    model, preprocessing = folder.load_model(), folder.preprocessing()
    known = _known_blocks(model, folder)
    shown_blocks = named_blocks(blocks, known) if blocks is not None else None
    photos = [photo_of_file(path, preprocessing) for path in _paths(images)]
    target = whole_path(output) if output else folder.outputs / "report"
    _make(target)

    console, classes = Terminal(stderr=True), preprocessing.classes
    with console.status("loading test images"):
        data = _test_images(folder, data_dir)
    model.to(choose_device(config.device))
    tested = _gathered(model, data, batch_size) if data else read_tested(folder.tested)

    shown_blocks = shown_blocks or choose_blocks(tested.blocks)
    if not photos and data:
        photos = _test_photos(data, tested, choose_images(tested, _RIGHT, _WRONG))
    elif not photos:
        photos = [photo(what, image, None, preprocessing) for what, image in photographs()]
    with console.status("computing gates and attributions"):
        inside, attributions = _single_images(model, photos, tested, shown_blocks, classes)
    still = depth_exhibits.standstill(tested.blocks)
    worth = [] if still or not data else _worth(model, data, [block.name for block in tested.blocks])
    with console.status("drawing"):
        sections = [
            Section("run", "The run", exhibits=[photo_exhibits.curves(folder.read_metrics(), loss_label(config))]),
            *_pruning(folder),
            _gates(tested, classes, still, worth),
            _competition(tested.blocks, still),
            _mistakes(data, tested, classes),
            Section("inside", "Squeezes and gates of single images", _inside_text(tested.blocks), inside),
            Section("attribution", "Attributions of the predictions", exhibits=[attributions]),
        ]
    exhibits = [exhibit for section in sections for exhibit in section.exhibits]
    page, top1 = target / "report.html", tested.top1
    with os_errors_as(f"cannot write to {target}"):
        for exhibit in with_progress(exhibits, "saving"):
            exhibit.save(target)
        write_csv(target / "channels.csv", depth_exhibits.CHANNEL_COLUMNS, depth_exhibits.channel_rows(tested.blocks))
        facts = facts_of(folder, top1, classes, tested.labels)
        write_page(page, f"{result['model']} on {name}: the competition", facts, sections)
    findings = [(section.name, section.finding) for section in sections if section.finding]
    seen = dict(findings) | {exhibit.name: exhibit.title for exhibit in exhibits}
    _print(page, seen)
    return {
        "page": str(page),
        "test_top1": top1,
        "blocks": shown_blocks,
        "images": [shown.name for shown in photos],
        "seen": seen,
    }


def _test_images(folder: RunFolder, data_dir: str | None) -> ImageData | None:
    """The run's test images, or others; None where the run has what it did on them in a file, and they are gone."""
    if data_dir is not None:
        return load_tested(folder, data_dir=data_dir)
    if folder.has_lost_its_images and folder.tested.exists():
        said = f"{folder.name}: its test images are not at hand; what it did on them comes with it"
        Terminal(stderr=True).print(said, soft_wrap=True)
        return None
    return load_run_data(folder)


def _gathered(model: nn.Module, data: ImageData, batch_size: int) -> Gathered:
    steps = -(-data.test_size // batch_size)
    shown = with_progress(data.test_batches(batch_size=batch_size), "testing", steps)
    return gather(model, shown, len(data.classes))


def _pruning(folder: RunFolder) -> list[Section]:
    """What was pruned, in a pruned run."""
    record = read_record(folder.path)
    if record is None:
        return []
    exhibits = [
        pruning_exhibits.widths_over_depth(record["layers"], record["blocks"]),
        pruning_exhibits.accuracy_along_the_way(
            record["multiply_adds"], record["test_top1"], folder.read_result()["test_top1"]
        ),
    ]
    if worth := pruning_exhibits.worth_of_what_went(record["layers"], record["criterion"]):
        exhibits.append(worth)
    rows = [
        [block["name"], f"{block['mean_gate']:.3f}", f"{block['share']:.3f}", "gone" if block["gone"] else "stayed"]
        for block in record["blocks"]
    ]
    note = "Before pruning: mean gate over channels and images, and the part of residual and identity that is residual."
    table = Table(["block", "mean gate", "residual share", "now"], rows, note)
    said = " ".join(f"{sentence[0].upper()}{sentence[1:]}." for sentence in sentences(record))
    return [
        Section(
            "pruning", "What was pruned", f"From {record['run']}, by {record['criterion']}. {said}", exhibits, table
        )
    ]


def _inside_text(blocks: Sequence[BlockStatistics]) -> str:
    pictured = all(TABLE[block.view].form == "picture" for block in blocks)
    shown, end = ("picture of", " computed from it") if pictured else ("squeezes of", "")
    return (
        f"For a block of each stage, as in the paper's figure: the {shown} residual and identity"
        f"{' squeezes' if pictured else ''}, the same after gating, and the gates{end}."
    )


def _known_blocks(model: nn.Module, folder: RunFolder) -> list[str]:
    try:
        return gated_blocks(model)
    except UserError as error:
        raise UserError(f"{folder.name}: {error}") from None


def _paths(images: str | Sequence[str] | None) -> list[Path]:
    if images is None:
        return []
    given = [images] if isinstance(images, (str, Path)) else images
    paths = [path for image in given for path in image_files(Path(image))]
    if not 1 <= len(paths) <= _MOST_IMAGES:
        raise UserError(f"a report shows 1 to {_MOST_IMAGES} images, not {len(paths)}; name fewer files")
    return paths


def _make(folder: Path) -> None:
    with os_errors_as(f"cannot make the folder {folder}", advice="name another --output"):
        folder.mkdir(parents=True, exist_ok=True)


def _test_photos(data: ImageData, tested: Gathered, indices: Iterable[int]) -> list[Photo]:
    labels, how = tested.labels.tolist(), data.preprocessing
    return [photo(f"Test image {index}", data.test_image(index), labels[index], how) for index in indices]


def _single_images(
    model: nn.Module, photos: Sequence[Photo], tested: Gathered, blocks: Sequence[str], classes: Sequence[str]
) -> tuple[list[Exhibit], Exhibit]:
    """The paper's figure for each image, and attributions: of the prediction and, if wrong, of the true class."""
    device = next(model.parameters()).device
    batch = torch.stack([photo.tensor for photo in photos]).to(device)
    output, views = look(model, batch)
    probabilities = output.float().softmax(1).cpu()
    said = [photo_exhibits.answer(*pair, classes) for pair in zip(photos, probabilities, strict=True)]
    chosen = [view for view in views if view.name in blocks]
    statistics = {block.name: block for block in tested.blocks}
    inside = [
        photo_exhibits.inside(number + 1, shown, said[number], chosen, number, statistics)
        for number, shown in enumerate(photos)
    ]
    asked = []
    for index, (shown, row) in enumerate(zip(photos, probabilities, strict=True)):
        best = int(row.argmax())
        asked.append((index, best))
        if shown.label not in (None, best):
            asked.append((index, shown.label))
    indices, targets = zip(*asked, strict=True)
    maps = attribute(model, batch[list(indices)], targets, blocks)
    pairs = list(zip(indices, maps, strict=True))
    return inside, photo_exhibits.attributions(photos, said, pairs, classes)


def _worth(model: nn.Module, data: ImageData, names: Sequence[str]) -> list[Exhibit]:
    """What freezing each gate does; nothing for gates that differ from position to position."""
    images, _ = next(data.test_batches(batch_size=_FROZEN))
    if len(images) < 2:
        return []
    calibration = Calibration(model, images)
    effects = calibration.effects(with_progress)
    return [depth_exhibits.effects_over_depth(names, effects, len(images))] if effects else []


def _gates(tested: Gathered, classes: Sequence[str], still: str | None, worth: Sequence[Exhibit] = ()) -> Section:
    """Gates over depth and by class; the latter not of gates that are alike for every image (``still``) or class."""
    blocks, exhibits, finding = tested.blocks, [], still or ""
    if any(block.moved for block in blocks):
        exhibits.append(depth_exhibits.gates_over_depth(blocks))
    by_class = any(block.telling for block in blocks)
    if not still and not by_class:
        finding = "The gates do not differ between classes by more than twice what chance would make them."
    if by_class:
        exhibits.append(depth_exhibits.class_differences(blocks, classes))
        exhibits.append(depth_exhibits.telling_channels(blocks, classes))
    text = f"Over {counted(len(tested.labels), 'test image')}."
    if any(TABLE[block.view].by_position for block in blocks):
        text += " A gate that differs from position to position is shown by its mean over them."
    exhibits += worth
    heading = "Gates over depth, and by class" if by_class else "Gates over depth"
    return Section("gates", heading, f"{text} {finding}".rstrip(), exhibits, finding=finding)


def _competition(blocks: Sequence[BlockStatistics], still: str | None) -> Section:
    shares = depth_exhibits.shares_over_depth(blocks)
    exhibits, heading = [shares] if shares else [], "Residual against identity"
    if still and not any(bool(block.closed.any() or block.open.any()) for block in blocks):
        return Section("competition", heading, "No gate closes its channel, and none is saturated.", exhibits)
    exhibits.append(depth_exhibits.closing_over_depth(blocks))
    constant = all(block.constant for block in blocks)
    columns = {"closed": "always closed", "open": "always open"} | ({} if constant else {"dead": "dead"})
    rows = []
    for block in blocks:
        kinds = block.kinds
        rows.append([block.name, str(block.channels), *(_listed(kinds[kind]) for kind in columns)])
    note = depth_exhibits.definitions(constant=constant) + " All channels: channels.csv."
    return Section("competition", heading, "", exhibits, Table(["block", "channels", *columns.values()], rows, note))


def _listed(channels: Sequence[int]) -> str:
    if not channels:
        return "none"
    more = f" and {len(channels) - _CHANNELS} more" if len(channels) > _CHANNELS else ""
    return f"{len(channels)}: {', '.join(map(str, channels[:_CHANNELS]))}{more}"


def _mistakes(data: ImageData | None, tested: Gathered, classes: Sequence[str]) -> Section:
    counts = multiclass_confusion_matrix(tested.predicted, tested.labels, num_classes=len(classes))
    exhibits = [photo_exhibits.confusion(counts, classes)]
    confused = confused_pairs(tested)
    text = "All test images are classified correctly."
    if confused:
        wrong = sum(len(pair.images) for pair in confused)
        text = f"{wrong:,} of {counted(len(tested.labels), 'test image')} misclassified."
        if data:
            shown = [_test_photos(data, tested, pair.images[:_PAIR_IMAGES]) for pair in confused[:_PAIRS]]
            exhibits.append(photo_exhibits.pairs(confused, shown, classes))
    return Section("mistakes", "Confusions", text, exhibits)


def _print(page: Path, seen: dict[str, str]) -> None:
    console = Terminal()
    for sentence in seen.values():
        console.print(f"- {sentence}", highlight=False, markup=False, soft_wrap=True)
    console.print(f"{page}", highlight=False, markup=False, soft_wrap=True)
