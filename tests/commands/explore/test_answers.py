"""What the page says is what the network says: as trained, with gates held, of examples and of files."""

import functools
import io
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from html.parser import HTMLParser

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import cmpe_se
from cmpe_se.commands.explore.answers import ATTRIBUTIONS
from cmpe_se.commands.explore.images import MOST_PIXELS, read_upload
from cmpe_se.commands.explore.network import FORCES, Force, Network, Networks
from cmpe_se.commands.explore.visit import AS_TRAINED, HERE, ONE, TWO_IMAGES, TWO_NETWORKS, Answers, Choices, Chosen
from cmpe_se.commands.predict import predict
from cmpe_se.data import load_data
from cmpe_se.data.preprocessing import KEY
from cmpe_se.errors import UserError
from cmpe_se.inspecting import find_gates, forced_gates
from cmpe_se.inspecting.attribution import attribute
from cmpe_se.training.run_folder import RunFolder
from tests.tiers import long_but
from tests.training.conftest import write_digits
from tests.training.processes import trained_run

pytestmark = pytest.mark.slow


class Shown(HTMLParser):
    """The text of an answer, and its tags."""

    def __init__(self, html: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


@functools.cache
def network(run) -> Network:
    """Of a run that stays as it is: loaded once, for all tests that only ask it."""
    return Network(RunFolder.open(run))


class Loaded(Networks):
    """Networks that other tests have loaded already."""

    def _loaded(self, name: str) -> Network:
        return network(self._folders[name].path)


def answers(*runs) -> tuple[Answers, list[str]]:
    networks = Loaded([RunFolder.open(run) for run in runs])
    return Answers(networks), networks.names


def choices(left: str, right: str | None = None, **others) -> Choices:
    values = {"mode": ONE, "depth": 2, "to": AS_TRAINED, "at": HERE, "attribution": ATTRIBUTIONS[0]}
    images = {"left_image": Chosen(left, 0), "right_image": Chosen(left, 1)}
    return Choices(**{"left": left, "right": right or left, **images, **values, **others})


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@pytest.fixture(scope="module")
def plain_file(digit_file, folded):
    """A digit as a file, and what ``cmpe-se predict`` says of it."""
    return digit_file.read_bytes(), predict(str(folded), str(digit_file))[0]["classes"]


@pytest.fixture(scope="module")
def digit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("digit") / "seven.png"
    load_data("digits").test_image(17).save(path)
    return path


def test_examples_are_test_images_right_and_wrong_ones(folded):
    asked, data = network(folded), load_data("digits")
    assert (asked.missing, asked.sample, len(asked.examples)) == (None, 360, 18)
    images, labels = next(data.test_batches(batch_size=360))
    said = RunFolder(folded).load_model()(images).argmax(1)
    for number, picture in enumerate(asked.examples):
        index = int(picture.name.removeprefix("Test image "))
        assert picture.read().tobytes() == data.test_image(index).tobytes() == picture.thumbnail.tobytes()
        assert (picture.truth, picture.classes) == (labels[index], data.classes)
        assert picture.predicted == (None if said[index] == labels[index] else data.classes[said[index]])
        assert (picture.predicted is None) == (number < 12)
    right, wrong = asked.examples[0], asked.examples[-1]
    assert right.caption == data.classes[right.truth]
    assert wrong.caption == f"{data.classes[wrong.truth]} → {wrong.predicted}"


def test_the_answer_is_the_network_s(folded):
    asked = network(folded)
    images, _ = next(load_data("digits").test_batches(batch_size=360))
    with torch.no_grad():
        expected = RunFolder(folded).load_model()(images).softmax(1)
    for picture in asked.examples:
        answer = asked.ask(asked.photo(picture))
        index = int(picture.name.removeprefix("Test image "))
        torch.testing.assert_close(answer.probabilities, expected[index], rtol=1e-4, atol=1e-5)
        assert [view.name for view in answer.views] == asked.blocks


@pytest.mark.parametrize("to", FORCES)
@pytest.mark.parametrize("run", long_but(["folded", "se", "converted", "static"], ["folded", "converted"]))
def test_held_gates(run, to, request):
    asked = network(request.getfixturevalue(run))
    photo, block = asked.photo(asked.examples[0]), asked.blocks[1]
    images, _ = next(load_data("digits").test_batches(batch_size=360))
    model = RunFolder(request.getfixturevalue(run)).load_model()
    mean = {view.name: view.gate.mean(0) for view in cmpe_se.inspect(model, images)}[block]
    torch.testing.assert_close(asked.usual[block], mean, rtol=1e-4, atol=1e-4)
    gates = {"closed": 0.0, "open": find_gates(model)[block].gain, "mean": mean}[to]
    with forced_gates(model, block, gates), torch.no_grad():
        expected = model(photo.tensor[None])[0].softmax(0)
    held = asked.ask(photo, Force(block, to))
    torch.testing.assert_close(held.probabilities, expected, rtol=1e-3, atol=1e-4)
    shown = {view.name: view.gate[0] for view in held.views}[block]
    torch.testing.assert_close(shown, torch.as_tensor(gates).expand(len(shown)), rtol=1e-4, atol=1e-4)
    trained = asked.ask(photo).probabilities  # nothing is held any more
    torch.testing.assert_close(trained, model(photo.tensor[None])[0].softmax(0).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("run", ["folded", "converted"])
def test_what_each_gate_is_worth(run, request):
    """Of the prediction's probability, with the gates of each block alone at their means."""
    asked = network(request.getfixturevalue(run))
    photo = asked.photo(asked.examples[-1])
    before = asked.ask(photo).probabilities
    target = int(before.argmax())
    expected = {
        block: 100 * (asked.ask(photo, Force(block, "mean")).probabilities[target] - before[target]).item()
        for block in asked.blocks
    }
    assert asked.worth(photo, target) == pytest.approx(expected, abs=1e-2)


def test_attributions_are_the_report_s(folded):
    asked = network(folded)
    photo, block = asked.photo(asked.examples[0]), asked.blocks[1]
    expected = attribute(RunFolder(folded).load_model(), photo.tensor[None], [3], [block])[0]
    torch.testing.assert_close(asked.attribute(photo, 3, block), expected.blocks[block], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(asked.attribute(photo, 3, None), expected.pixels, rtol=1e-3, atol=1e-5)
    held = asked.attribute(photo, 3, block, Force(asked.blocks[-1], "closed"))
    assert not torch.allclose(held, expected.blocks[block], rtol=1e-2)


def test_words_bars_and_figures(folded):
    talk, (name,) = answers(folded)
    html, right = talk.show(choices(name))
    shown = Shown(html)
    picture, result = talk.network(name).examples[0], RunFolder(folded).read_result()
    truth = picture.classes[picture.truth]
    assert right is None
    assert f"(test top-1 {result['test_top1']:.2f} %)" in shown.text
    assert re.search(rf"{picture.name} \(true class {truth}\): prediction {truth} \([\d.]+ %\), correct\.", html)
    images = [attributes for tag, attributes in shown.tags if tag == "img"]
    assert len(images) == 4
    assert all(image["src"].startswith("data:image/png;base64,") and len(image["alt"]) > 40 for image in images)
    expected = talk.network(name).ask(talk.network(name).photo(picture)).probabilities.topk(5)
    bars = [float(value) for value in re.findall(r'<i style="width: ([\d.]+)%">', html)]
    assert bars == pytest.approx([100 * value for value in expected.values.tolist()], abs=0.006)
    assert [attributes for tag, attributes in shown.tags if tag in ("script", "link", "iframe")] == []


def test_depth_and_where_gates_are_held(folded):
    talk, (name,) = answers(folded)
    blocks = talk.network(name).blocks
    assert talk.blocks(ONE, name, name) == blocks
    assert f"{blocks[3]} closes" in talk.show(choices(name, depth=4))[0]
    here = Shown(talk.show(choices(name, depth=4, to="closed"))[0]).text
    assert f"with the gates of {blocks[3]} held closed: prediction" in here
    assert f"{blocks[3]} closes 16 of 16 channels" in here or re.search(rf"{blocks[3]} closes (\d+) of \1 ", here)
    there = Shown(talk.show(choices(name, depth=4, to="mean", at=1))[0]).text
    assert f"with the gates of {blocks[0]} held at their mean: prediction" in there
    assert f"{blocks[3]} closes" in there
    assert "as trained: prediction" in there


def test_two_networks_and_two_images(folded, se):
    talk, (left, right) = answers(folded, se)
    assert left != right
    sides = talk.show(choices(left, right, mode=TWO_NETWORKS))
    assert [f'aria-label="{name} (' in side for name, side in zip((left, right), sides, strict=True)] == [True, True]
    assert all(talk.network(left).examples[0].name in side for side in sides)
    sides = talk.show(choices(left, right, mode=TWO_IMAGES))
    assert all(f'aria-label="{left} (' in side for side in sides)
    assert [talk.network(left).examples[i].name in side for i, side in enumerate(sides)] == [True, True]


def test_networks_of_other_depths_are_shown_at_the_same_part_of_the_way(folded, converted):
    talk, (left, right) = answers(folded, converted)
    few, many = sorted((talk.network(left).blocks, talk.network(right).blocks), key=len)
    assert talk.blocks(TWO_NETWORKS, left, right) == many
    for depth, ends in ((1, 0), (len(many), -1)):
        sides = talk.show(choices(left, right, mode=TWO_NETWORKS, depth=depth))
        for blocks, side in zip((many, few), sides, strict=True):
            assert re.search(rf"<b>(The gates of )?{re.escape(blocks[ends])} (closes|have not moved)", side)


@pytest.mark.parametrize("to", FORCES)
def test_gates_that_cannot_be_held(folded, cbam, to):
    """The answer is as trained, and says why; the other network's gates are held all the same."""
    talk, (left, right) = answers(cbam, folded)
    sides = [Shown(side).text for side in talk.show(choices(left, right, mode=TWO_NETWORKS, to=to))]
    sentence = "The gates of stages.0.blocks.1 (view timm_cbam) rescale whole feature maps by themselves, and cannot be"
    assert [sentence in side for side in sides] == [True, False]
    assert ["as trained" in side for side in sides] == [False, True]
    trained = Shown(talk.show(choices(left))[0]).text
    assert sides[0].replace(f" {sentence} held.", "") == trained


def test_a_plain_network_is_asked_too(folded, plain):
    talk, (left, right) = answers(folded, plain)
    answer = talk.show(choices(left, right, mode=TWO_NETWORKS, to="closed"))[1]
    assert "This network has no gates" in answer
    assert "held" not in answer
    assert len(re.findall("<img", answer)) == 1
    assert "Attribution of the prediction" in talk.show(choices(right, attribution=ATTRIBUTIONS[1]))[0]


@pytest.mark.parametrize("kind", ["PNG", "BMP", "GIF", "colour"])
def test_own_image_as_predict_has_it(kind, folded, plain_file):
    content, expected = plain_file
    image = Image.open(io.BytesIO(content))
    content = png(image.convert("RGB")) if kind == "colour" else png(image, kind)
    talk, (name,) = answers(folded)
    html = talk.show(choices(name, left_image=Chosen("", content=content)))[0]
    best = expected[0]
    assert f"Your image: prediction {best['class']} ({100 * best['probability']:.1f} %)." in html


@pytest.mark.long
def test_own_images_of_any_size_and_look(folded, se):
    talk, (left, right) = answers(folded, se)
    for image in (Image.new("L", (1, 1)), Image.new("RGBA", (900, 3), (1, 2, 3, 4)), Image.new("I;16", (40, 40), 999)):
        sides = talk.show(choices(left, right, mode=TWO_NETWORKS, left_image=Chosen("", content=png(image))))
        assert all("Your image: prediction" in side for side in sides)


def bomb() -> bytes:
    """A PNG of few bytes whose header promises more pixels than are read."""
    side = int(MOST_PIXELS**0.5) + 1
    return png(Image.new("1", (side, side)))


MISTAKES = {
    "text": (lambda: b"no image at all", r"^the uploaded file is not an image \(PNG, JPEG"),
    "empty": (lambda: b"", r"^the uploaded file is not an image \(PNG"),
    "cut off": (lambda: png(Image.effect_noise((64, 64), 90))[:900], "uploaded file is truncated or corrupt"),
    "bomb": (bomb, r"pixels are more than the 25,000,000 that are read; scale it down"),
    "large": (lambda: b"0" * (10 * 2**20 + 1), "uploaded file is larger than 10 MB"),
    "tiles": (lambda: png(Image.new("RGB", (4, 4)), "TIFF"), r"is not an image \(PNG, JPEG, WEBP"),
    "another format": (lambda: png(Image.new("RGB", (4, 4)), "PPM"), r"is not an image \(PNG, JPEG, WEBP"),
    "script": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not an image"),
    "drawing": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "is not an image"),
}


@pytest.mark.parametrize(("content", "message"), MISTAKES.values(), ids=MISTAKES)
def test_files_that_are_no_images(content, message):
    with pytest.raises(UserError, match=message) as complaint:
        read_upload(content())
    assert "/" not in str(complaint.value)  # no path of this machine


def test_an_example_that_is_none(folded):
    talk, (name,) = answers(folded)
    with pytest.raises(UserError, match="no example 99"):
        talk.show(choices(name, left_image=Chosen(name, 99)))
    with pytest.raises(UserError, match=r"no run is called '\.\./other'"):
        talk.show(choices(name, left_image=Chosen("../other", 0)))


def test_without_the_data_set(folded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folded, run)
    config = run / "config.yaml"
    config.write_text(
        config.read_text().replace("data: digits", "data: folder").replace("data_dir: null", "data_dir: gone")
    )
    asked = network(run)
    assert "gone" in asked.missing
    assert [picture.name for picture in asked.examples] == ["Photograph of a temple", "Photograph of a flower"]
    talk, (name,) = answers(run)
    assert "Photograph of a temple: prediction" in talk.show(choices(name))[0]
    assert re.search(r"No test images: [^<]*gone", talk.show(choices(name))[0])
    assert "the black line" not in talk.show(choices(name))[0]
    with pytest.raises(UserError, match=r"mean of the gates is not known without test images.*gone"):
        talk.show(choices(name, to="mean"))


def test_what_comes_from_runs_is_escaped(folded, tmp_path):
    run = tmp_path / "<b>run"
    shutil.copytree(folded, run)
    file = run / "model" / "config.json"
    file.write_text(file.read_text().replace('"classes": [\n      "0"', '"classes": [\n      "<script>0"'))
    assert "<script>0" in RunFolder(run).preprocessing().classes
    talk, (name,) = answers(run)
    html = talk.show(choices(name))[0]
    assert "<script>" not in html
    assert "<b>run" not in html
    assert "&lt;b&gt;run" in html


def test_runs_of_one_name_are_told_apart(folded, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(folded, tmp_path / place / "run")
    networks = Networks([RunFolder.open(tmp_path / place / "run") for place in ("a", "b")])
    assert networks.names == [str(tmp_path / place / "run") for place in ("a", "b")]
    assert networks[networks.names[0]] is networks[networks.names[0]]  # loaded once


def test_a_run_is_called_by_its_folder_wherever_it_is_named_from(folded, monkeypatch):
    monkeypatch.chdir(folded)
    assert Networks([RunFolder.open(".")]).names == [folded.name]


def test_truth_is_of_the_same_classes_only(folded, tmp_path):
    run = tmp_path / "letters"
    shutil.copytree(folded, run)
    file = run / "model" / "config.json"
    config = json.loads(file.read_text())
    config[KEY]["classes"][0] = "nought"
    file.write_text(json.dumps(config))
    talk, (left, right) = answers(folded, run)
    sides = talk.show(choices(left, right, mode=TWO_NETWORKS))
    assert [bool(re.search(r"%\), (correct|wrong)\.", side)) for side in sides] == [True, False]


DIVERGED = {torch.nan: "holds values that are not finite", 3e38: "output is NaN: its training has diverged"}


@pytest.mark.parametrize(("value", "sentence"), DIVERGED.items())
def test_a_diverged_network_is_said_to_be_one(value, sentence, folded, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(folded, run)
    weights = load_file(run / "model" / "model.safetensors")
    weights["head.fc.weight"].fill_(value)
    save_file(weights, run / "model" / "model.safetensors")
    talk, (name,) = answers(run)
    with pytest.raises(UserError, match=sentence):
        talk.show(choices(name))


def test_visitors_at_the_same_time_do_not_meet_each_other_s_hooks(folded, monkeypatch):
    talk, (name,) = answers(folded)
    expected = {to: talk.show(choices(name, to=to))[0] for to in (AS_TRAINED, "closed", "mean")}
    monkeypatch.setattr(Network, "ask", slowly(Network.ask))  # whoever is not kept out comes between
    with ThreadPoolExecutor(6) as visitors:
        said = list(visitors.map(lambda to: (to, talk.show(choices(name, to=to))[0]), list(expected) * 2))
    assert all(html == expected[to] for to, html in said)


def slowly(ask):
    def slow(network, shown, force=None):
        with network._held(force):
            time.sleep(0.05)
            return ask(network, shown, force)

    return slow


def test_large_photos_are_not_kept(folded, tmp_path):
    for part in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.effect_noise((900, 700), 90).convert("RGB").save(tmp_path / part / name / "x.png")
    done = trained_run(
        *("--data=folder", f"--data-dir={tmp_path}", "--epochs=1", "--model=se_preact_resnet20", "--image-size=97"),
        *("--batch-size=2", "--crop-padding=0", "--workers=0"),
    )
    asked = network(done)
    assert asked.missing is None
    assert {picture.read().size for picture in asked.examples} == {(900, 700)}
    assert max(max(picture.thumbnail.size) for picture in asked.examples) == 160


@pytest.fixture(scope="module")
def other_data(plain, tmp_path_factory):
    """A run like the plain one, whose test images are files of another folder."""
    place = tmp_path_factory.mktemp("other")
    images = write_digits(place / "images", {"train": 1, "test": 3}, digits=range(10))
    run = place / "other"
    shutil.copytree(plain, run)
    text = (run / "config.yaml").read_text().replace("data: digits", "data: folder")
    (run / "config.yaml").write_text(text.replace("data_dir: null", f"data_dir: {images}"))
    return run


def test_another_runs_image_is_not_taken_for_ones_own(plain, other_data, folded):
    talk, (own, other, same) = answers(plain, other_data, folded)
    chosen = Chosen(own, 3)
    assert talk.image_for(same, chosen, 0) == chosen  # the same test images: networks can be compared on one
    assert talk.image_for(other, chosen, 1) == Chosen(other, 1)
    upload = Chosen("", content=png(load_data("digits").test_image(0)))
    assert talk.image_for(other, upload, 0) == upload
    name = talk.network(own).examples[3].name
    said, _ = talk.show(choices(other, left_image=chosen))
    assert f"{name} of {own}" in Shown(said).text
    assert f"{name} of" not in Shown(talk.show(choices(same, left_image=chosen))[0]).text


def test_a_network_that_is_loaded_again_has_images_of_its_own(plain):
    first, second = (Network(RunFolder.open(plain)) for _ in range(2))
    assert first.number != second.number  # the cache of images asks for it


def test_gates_at_their_start_are_said_to_be(converted):
    networks = Networks([RunFolder.open(converted)])  # its own, to be changed
    talk, (name,) = Answers(networks), networks.names
    for parameter in talk.network(name).model.parameters():
        parameter.requires_grad_(False)
    for gate in find_gates(talk.network(name).model).values():
        gate.fc2.weight.zero_()
        if gate.fc2.bias is not None:
            gate.fc2.bias.zero_()
    text = Shown(talk.show(choices(name, depth=1))[0]).text
    assert "have not moved from their start, 1." in text
    assert "closes 0" not in text
    held = Shown(talk.show(choices(name, depth=1, to="closed"))[0]).text
    assert "closes" in held
