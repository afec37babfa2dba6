"""``cmpe-se report``: the page holds all that it shows, its numbers are those of the network, mistakes get a line."""

import base64
import csv
import io
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cmpe_se
from cmpe_se.commands.report import report
from cmpe_se.commands.report.report import _mistakes
from cmpe_se.data import load_data
from cmpe_se.errors import UserError
from cmpe_se.exhibits.choosing import choose_images, photo
from cmpe_se.inspecting import forced_gates
from cmpe_se.inspecting.gathering import Gathered
from cmpe_se.training.run_folder import RunFolder
from tests.tiers import long_but
from tests.training.processes import complaint_of, shown_on_terminal, succeed
from tests.training.runs import everything_in, result

pytestmark = pytest.mark.slow

FIGURES = {
    *("curves", "inside-1", "inside-2", "inside-3", "inside-4", "gates-over-depth", "class-differences"),
    "effects-over-depth",
    *("telling-channels", "shares-over-depth", "closing-over-depth", "attributions", "confusion", "confused-pairs"),
}

UNSEEN = {"gates-over-depth", "class-differences", "telling-channels", "closing-over-depth", "effects-over-depth"}
"""Of gates that do not depend on the image."""


class Page(HTMLParser):
    """Tags with their attributes, and the text in order."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(folded):
    """The report of the command, as a process, in its default folder."""
    before = everything_in(folded)
    done = succeed("report", folded)
    after = everything_in(folded)
    assert {path: after[path] for path in before} == before  # what the run held stays as it was
    return folded / "report", done


@pytest.fixture(scope="module")
def page(made):
    return Page(made[0] / "report.html")


@pytest.fixture(scope="module")
def seen(folded):
    """The network's views and logits on all test images, and the labels."""
    model = RunFolder(folded).load_model()
    images, labels = next(load_data("digits").test_batches(batch_size=360))
    logits, views = cmpe_se.inspecting.look(model, images)
    return {view.name: view for view in views}, logits, labels


def rows(folder: Path, name: str) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / f"{name}.csv").open()))


def test_files_and_what_is_printed(made):
    folder, done = made
    names = {path.name for path in folder.iterdir()}
    assert names == {"report.html", "channels.csv"} | {f"{name}.{kind}" for name in FIGURES for kind in ("png", "csv")}
    assert done.out.splitlines()[-1] == str(folder / "report.html")
    assert "Most frequent mistake" in done.out


def test_the_page_needs_nothing_else(made, page):
    text = (made[0] / "report.html").read_text()
    assert not re.search(r"https?://|@import|url\(|<script", text)
    pictures = page.all("img")
    assert len(pictures) == len(FIGURES)
    for picture, figure in zip(pictures, page.all("figure"), strict=True):
        kind, data = picture["src"].split(",")
        assert kind == "data:image/png;base64"
        content = base64.b64decode(data)
        assert content == (made[0] / f"{figure['id']}.png").read_bytes()
        with Image.open(io.BytesIO(content)) as image:
            assert min(image.size) > 250
        assert len(picture["alt"]) > 40
    for link in page.all("a"):
        target = link["href"]
        exists = target[1:] in {attributes.get("id") for _, attributes in page.tags}
        assert exists if target.startswith("#") else (made[0] / target).is_file(), target


def test_facts_come_first(page, folded):
    facts = page.text[: page.text.index("At a glance")]
    for fact in ("cmpe_se_preact_resnet20", "folded_3x3", f"{result(folded)['test_top1']:.2f} %", "3 epochs", "290,8"):
        assert fact in facts, fact
    for word in ("closed below 0.05", "saturated above 0.95", "below 0.005"):
        assert word in page.text


def test_numbers_of_gates(made, seen):
    views, _, labels = seen
    channels = {(row["block"], int(row["channel"])): row for row in rows(made[0], "channels")}
    assert len(channels) == sum(view.gate.shape[1] for view in views.values())
    for name, view in views.items():
        numbers = zip(
            view.gate.mean(0), view.gate.std(0, correction=0), (view.gate < 0.05).float().mean(0), strict=True
        )
        for channel, (mean, std, closed) in enumerate(numbers):
            row = channels[name, channel]
            assert float(row["mean"]) == pytest.approx(mean.item(), rel=1e-4)
            assert float(row["std"]) == pytest.approx(std.item(), rel=1e-3, abs=1e-6)
            assert float(row["closed_percent"]) == pytest.approx(100 * closed.item(), rel=1e-4)
            assert ("dead" in row["kind"]) == (std < 0.005).item()
    for row in rows(made[0], "gates-over-depth"):
        gate = views[row["block"]].gate.flatten()
        for part in (0.05, 0.25, 0.5, 0.75, 0.95):
            assert float(row[f"quantile_{part:g}"]) == pytest.approx(gate.quantile(part).item(), abs=1e-3)
    for row in rows(made[0], "closing-over-depth"):
        gate = views[row["block"]].gate
        assert float(row["closed_percent"]) == pytest.approx(100 * (gate < 0.05).float().mean().item(), rel=1e-4)
        assert float(row["saturated_percent"]) == pytest.approx(100 * (gate > 0.95).float().mean().item(), rel=1e-4)
        assert int(row["dead"]) == (gate.std(0, correction=0) < 0.005).sum()
    for row in rows(made[0], "shares-over-depth"):
        share = views[row["block"]].residual_share
        assert float(row["residual_share_median"]) == pytest.approx(share.quantile(0.5).item(), rel=1e-4)
        assert float(row["residual_share_90"]) == pytest.approx(share.quantile(0.9).item(), rel=1e-4)
    for row in rows(made[0], "class-differences"):
        view, own = views[row["block"]], labels == int(row["class"])
        assert int(row["images"]) == own.sum()
        assert float(row["mean_gate"]) == pytest.approx(view.gate[own].mean().item(), rel=1e-4)
        difference = (view.gate[own].mean() - view.gate.mean()).item()
        assert float(row["difference"]) == pytest.approx(difference, abs=1e-5)
        assert float(row["residual_share"]) == pytest.approx(view.residual_share[own].mean().item(), rel=1e-4)


def test_numbers_of_frozen_gates(made, folded):
    """Each gate alone at its mean over the first 200 test images, by another function."""
    model = RunFolder(folded).load_model()
    images, _ = next(load_data("digits").test_batches(batch_size=200))
    means = {view.name: view.gate.mean(0) for view in cmpe_se.inspect(model, images)}
    with torch.no_grad():
        before = model(images)
    found = {row["block"]: float(row["effect_percent"]) for row in rows(made[0], "effects-over-depth")}
    assert list(found) == list(means)
    for block, mean in means.items():
        with forced_gates(model, block, mean), torch.no_grad():
            change = (model(images) - before).square().sum() / (before - before.mean(0)).square().sum()
        assert found[block] == pytest.approx(100 * change.item(), rel=1e-3, abs=1e-5)


def test_numbers_of_single_images(made, seen, page):
    views, logits, labels = seen
    right = []
    for number in range(1, 5):
        title = re.search(rf'id="inside-{number}">.*?alt="(.*?)"', (made[0] / "report.html").read_text(), re.DOTALL)[1]
        index = int(re.search(r"Test image (\d+)", title)[1])
        right.append(bool(logits[index].argmax() == labels[index]))
        assert (", correct" in title) == right[-1]
        assert f"{logits[index].argmax()} (" in title
        table = rows(made[0], f"inside-{number}")
        assert len({row["block"] for row in table}) == 3  # one of each stage
        for row in table:
            view, channel = views[row["block"]], int(row["channel"])
            for column in ("residual_squeeze", "identity_squeeze", "gate"):
                assert float(row[column]) == pytest.approx(getattr(view, column)[index, channel].item(), abs=1e-4)
            assert float(row["mean_gate_of_test"]) == pytest.approx(view.gate[:, channel].mean().item(), rel=1e-4)
    assert right == [True, True, False, False]
    classes = {row["class"] for row in rows(made[0], "attributions")}
    assert len(classes) >= 3


def test_numbers_of_mistakes(made, seen):
    _, logits, labels = seen
    predicted = logits.argmax(1)
    counts = torch.zeros(10, 10, dtype=torch.int64)
    counts.index_put_((labels, predicted), torch.tensor(1), accumulate=True)
    for digit, row in enumerate(rows(made[0], "confusion")):
        assert [int(row[str(other)]) for other in range(10)] == counts[digit].tolist()
    pairs = rows(made[0], "confused-pairs")
    assert sum(int(row["images"]) for row in pairs) == (predicted != labels).sum()
    first = pairs[0]
    assert int(first["images"]) == counts[int(first["true"]), int(first["predicted"])]
    assert int(first["images"]) == counts.fill_diagonal_(0).max()
    for index in map(int, first["surest_test_images"].split()):
        assert (labels[index], predicted[index]) == (int(first["true"]), int(first["predicted"]))


@pytest.mark.long
def test_own_images_and_blocks(folded, digit_files, tmp_path):
    """On a terminal, which shows how far it is."""
    arguments = ("--images", digit_files, "--blocks", "stages.2.blocks.1,stages.0.blocks.2", "--output", tmp_path)
    shown = shown_on_terminal("report", folded, *arguments, "--batch-size", 20, columns=100)
    for word in ("testing", "computing gates and attributions", "saving", "report.html"):
        assert word in shown, word
    assert sorted(path.name for path in tmp_path.glob("inside-*.csv")) == [f"inside-{n}.csv" for n in (1, 2, 3)]
    table = rows(tmp_path, "inside-1")
    assert list(dict.fromkeys(row["block"] for row in table)) == ["stages.0.blocks.2", "stages.2.blocks.1"]
    assert "000.png: " in Page(tmp_path / "report.html").text


@pytest.mark.parametrize("kind", long_but(["converted", "se"], ["converted"]))
def test_other_networks(kind, request, tmp_path):
    made = report(str(request.getfixturevalue(kind)), output=str(tmp_path), batch_size=100)
    assert made["page"] == str(tmp_path / "report.html")
    assert made["test_top1"] == pytest.approx(result(request.getfixturevalue(kind))["test_top1"], abs=0.3)
    assert len(made["images"]) == 4
    still = kind == "converted"  # an epoch moves such gates by little
    unseen = UNSEEN if still else set()
    assert set(made["seen"]) == FIGURES - unseen | ({"gates"} if still else set())
    assert made["seen"].get("gates", "").startswith("The gates have hardly moved" if still else "")
    view = Page(tmp_path / "report.html").text
    assert ("pair_view_1x1" if kind == "converted" else "without a picture") in view


@pytest.mark.long
@pytest.mark.parametrize("kind", ["static", "cbam"])
def test_other_gates(kind, request, tmp_path):
    """What cannot be seen of gates is said, and not drawn."""
    made = report(str(request.getfixturevalue(kind)), output=str(tmp_path), batch_size=100)
    text = " ".join(Page(tmp_path / "report.html").text.split())
    if kind == "cbam":
        assert set(made["seen"]) == FIGURES - {"effects-over-depth"}
        assert "At 1 the block is as one without a gate" in (tmp_path / "report.html").read_text()
        assert "shown by its mean over" in text
        assert "timm_cbam, start one, reduction 4, min_hidden 6" in text
        return
    assert set(made["seen"]) == FIGURES - UNSEEN | {"gates"}
    assert made["seen"]["gates"].startswith("The gates are learned constants, and none has moved by as much as 0.01")
    assert made["seen"]["gates"] in text
    assert "No gate closes its channel, and none is saturated." in text
    assert "the same for every image" in (tmp_path / "report.html").read_text()
    assert "dead" not in text
    assert {row["kind"] for row in rows(tmp_path, "channels")} == {""}


MISTAKES = {
    "no run": (lambda run, folder: [folder], "no run folder"),
    "block": (lambda run, folder: [run, "--blocks", "layer1"], r"called 'layer1'; there are stages\.0\.blocks\.0"),
    "image": (lambda run, folder: [run, "--images", folder / "none.png"], "no image at .*none.png"),
    "no images": (lambda run, folder: [run, "--images", folder], "holds no images"),
    "batch": (lambda run, folder: [run, "--batch-size", 0], "batch_size is 0"),
    "output": (lambda run, folder: [run, "--output", run / "config.yaml" / "x"], "cannot make the folder"),
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(arguments, message, folded, tmp_path):
    assert re.search(message, complaint_of("report", *arguments(folded, tmp_path)))


def test_no_mistakes(folded):
    data = load_data("digits")
    labels = torch.arange(10).repeat(3)
    perfect = Gathered.of_logits(torch.eye(10)[labels], labels)
    section = _mistakes(data, perfect, data.classes)
    assert section.text == "All test images are classified correctly."
    assert [exhibit.name for exhibit in section.exhibits] == ["confusion"]
    assert choose_images(perfect, 2, 2) == [0, 1]


def test_shown_is_what_the_network_gets(folded):
    data, preprocessing = load_data("digits"), RunFolder(folded).preprocessing()
    images, _ = next(data.test_batches(batch_size=5))
    shown = photo("test image 4", data.test_image(4), 7, preprocessing)
    assert torch.equal(shown.tensor, images[4])
    assert np.array_equal((shown.pixels * 255).round(), np.asarray(data.test_image(4)))


def test_plain_network(plain):
    assert "has no gates" in complaint_of("report", plain)


def test_too_many_images(folded, digit_files):
    image = str(next(digit_files.rglob("*.png")))
    with pytest.raises(UserError, match="1 to 12 images, not 13"):
        report(str(folded), images=[image] * 13)


def test_missing_package(folded, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(UserError, match=r"captum and jinja2; pip install 'cmpe-se\[report\]'"):
        report(str(folded))
