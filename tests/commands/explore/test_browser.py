"""``cmpe-se explore`` as people use it: in a real browser, against the command in a real process."""

import io
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from cmpe_se.commands.explore.images import MOST_PIXELS, Picture
from cmpe_se.commands.explore.network import Force, Network
from cmpe_se.commands.predict import predict
from cmpe_se.data import load_data
from cmpe_se.training.run_folder import RunFolder
from tests.commands.explore.served import served
from tests.tiers import long_but
from tests.training.processes import empty_folder

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium: apt-get install chromium"),
]

expect.set_options(timeout=90_000)  # milliseconds, on a machine that does other things beside


@pytest.fixture(scope="module")
def runs(folded, se, plain) -> list[Path]:
    """The network that is shown first, SE, and a plain one."""
    return [folded, se, plain]


@pytest.fixture(scope="module")
def site(runs, tmp_path_factory):
    named = tmp_path_factory.mktemp("runs")
    for name, run in zip(("folded", "se", "plain"), runs, strict=True):
        (named / name).symlink_to(run)
    with served(*(named / name for name in ("folded", "se", "plain"))) as site:
        yield site


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def visit(browser: Browser, site, width: int = 1200) -> Page:
    """A visitor who has opened the page; the test fails where the page's scripts do."""
    page = browser.new_context(viewport={"width": width, "height": 900}).new_page()
    page.broken = []
    page.on("pageerror", lambda error: page.broken.append(str(error)))
    page.goto(site.address)
    arrived(page)
    return page


def arrived(page: Page) -> None:
    """Wait until the page that was asked for gives its first answer."""
    expect(said(page)).to_contain_text("prediction")


@pytest.fixture
def page(browser, site):
    page = visit(browser, site)
    yield page
    assert page.broken == []
    page.context.close()


@pytest.fixture(scope="module")
def network(runs) -> Network:
    """The one shown first, as a second opinion."""
    return Network(RunFolder.open(runs[0]))


def said(page: Page, side: str = "left"):
    return page.locator(f"#{side}-answer .said")


def titles(page: Page, side: str = "left"):
    return page.locator(f"#{side}-answer figcaption b")


def percent(network: Network, example: int, force: Force | None = None) -> str:
    answer = network.ask(network.photo(network.examples[example]), force).probabilities
    return f"{network.classes[int(answer.argmax())]} ({100 * answer.max().item():.1f} %)"


def truth(picture: Picture) -> str:
    return picture.classes[picture.truth]


def give(page: Page, name: str, content: bytes, side: str = "left") -> None:
    """Upload a file, in place of an earlier one."""
    field = page.locator(f"#{side}-file input[type=file]")
    earlier = page.locator(f"#{side}-file").get_by_label("Clear")
    field.or_(earlier).first.wait_for(state="attached")  # a page that has just been loaded has neither yet
    if not field.count():
        earlier.click()
    field.set_input_files({"name": name, "mimeType": "image/png", "buffer": content})


def choose(page: Page, place: str, name: str) -> None:
    """Pick from a list."""
    page.locator(f"#{place} input").click()
    page.get_by_role("option", name=name, exact=True).click()


def digit(index: int = 17) -> Image.Image:
    return load_data("digits").test_image(index)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def test_it_is_never_empty_and_needs_no_internet(browser, site, network):
    page = browser.new_context().new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(site.address)
    first = network.examples[0]
    expect(said(page)).to_have_text(
        f"{first.name} (true class {truth(first)}): prediction {percent(network, 0)}, correct."
    )
    expect(titles(page)).to_have_count(4)
    expect(page.locator("#left-examples button.thumbnail-item")).to_have_count(len(network.examples))
    elsewhere = [url for url in asked if not url.startswith((site.address, "data:", "blob:"))]
    assert elsewhere == []
    sizes = page.locator("#left-answer img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(sizes) == 4
    assert min(sizes) > 300
    page.context.close()


def test_pick_an_example_and_give_an_image(page, network, runs, tmp_path):
    wrong = len(network.examples) - 1
    page.locator("#left-examples button.thumbnail-item").nth(wrong).click()
    picture = network.examples[wrong]
    expect(said(page)).to_have_text(
        f"{picture.name} (true class {truth(picture)}): prediction {percent(network, wrong)}, wrong."
    )

    content = png(digit())
    (tmp_path / "digit.png").write_bytes(content)
    best = predict(str(runs[0]), str(tmp_path / "digit.png"))[0]["classes"][0]
    give(page, "digit.png", content)
    expect(said(page)).to_have_text(f"Your image: prediction {best['class']} ({100 * best['probability']:.1f} %).")
    page.locator("#left-examples button.thumbnail-item").first.click()
    expect(said(page)).to_contain_text("Test image")


@pytest.mark.long
def test_walk_through_the_depth(page, network):
    slider = page.locator("#depth input[type=range]")
    middle = (len(network.blocks) + 1) // 2
    expect(titles(page).first).to_contain_text(f"{network.blocks[middle - 1]} closes")
    expect(page.locator("#block")).to_have_text(f"{network.blocks[middle - 1]} ({middle} of {len(network.blocks)})")
    slider.press("ArrowRight")
    expect(titles(page).first).to_contain_text(f"{network.blocks[middle]} closes")
    expect(page.locator("#block")).to_have_text(f"{network.blocks[middle]} ({middle + 1} of {len(network.blocks)})")
    slider.press("Home")
    expect(titles(page).first).to_contain_text(f"{network.blocks[0]} closes")
    expect(page.locator("#block")).to_have_text(f"{network.blocks[0]} (1 of {len(network.blocks)})")
    page.locator("#attribution").get_by_label("Integrated gradients").check()
    expect(page.locator("#left-answer")).to_contain_text("Integrated gradients on the input (captum)")


@pytest.mark.parametrize("ways", long_but([["closed"], ["open", "mean"]], [["closed"]]), ids=" and ".join)
def test_hold_gates(page, network, ways):
    for to in ways:
        hold(page, network, to)


def hold(page, network, to):
    block = network.blocks[(len(network.blocks) + 1) // 2 - 1]
    page.locator("#to").get_by_label(to).check()
    held = f"held {to}" if to != "mean" else "held at their mean"
    expect(said(page)).to_contain_text(
        f"with the gates of {block} {held}: prediction {percent(network, 0, Force(block, to))}"
    )
    expect(said(page)).to_contain_text(f"as trained: prediction {percent(network, 0)}")
    page.locator("#at").get_by_role("listbox").or_(page.locator("#at input")).first.click()
    page.get_by_role("option", name=network.blocks[-1]).click()
    expect(said(page)).to_contain_text(f"with the gates of {network.blocks[-1]} {held}: prediction")
    choose(page, "at", "the block shown")
    page.locator("#to").get_by_label("as trained").check()
    expect(said(page)).not_to_contain_text("held")


@pytest.mark.long
def test_another_network_and_two_networks(page):
    choose(page, "left-network", "se")
    expect(page.locator("#left-answer h2")).to_contain_text("se (")
    expect(page.locator("#left-answer")).to_contain_text("Top: squeezes")
    choose(page, "left-network", "plain")
    expect(said(page)).to_contain_text("This network has no gates")
    expect(page.locator("#depth")).to_be_hidden()
    expect(page.locator("#block")).to_have_text("")
    choose(page, "left-network", "folded")
    expect(page.locator("#left-answer")).to_contain_text("Top: picture")
    expect(page.locator("#depth")).to_be_visible()

    page.locator("#mode").get_by_label("Two networks").check()
    expect(page.locator("#right-answer h2")).to_contain_text("se (")
    expect(page.locator("#left-answer h2")).to_contain_text("folded (")
    name = said(page).inner_text().partition(":")[0]
    expect(said(page, "right")).to_contain_text(f"{name}: prediction")
    choose(page, "right-network", "plain")
    expect(said(page, "right")).to_contain_text("This network has no gates")
    page.locator("#mode").get_by_label("One", exact=True).check()
    expect(page.locator("#right-answer")).to_be_hidden()


@pytest.mark.long
def test_two_images(page, network):
    page.locator("#mode").get_by_label("Two images").check()
    expect(said(page, "right")).to_contain_text(network.examples[1].name)
    page.locator("#right-examples button.thumbnail-item").nth(4).click()
    expect(said(page, "right")).to_contain_text(network.examples[4].name)
    expect(said(page)).to_contain_text(network.examples[0].name)
    give(page, "digit.png", png(digit()), "right")
    expect(said(page, "right")).to_contain_text("Your image")


@pytest.mark.long
def test_garbage_is_answered_with_a_sentence(page):
    give(page, "digit.png", png(digit()))
    expect(said(page)).to_contain_text("Your image")
    before, alert = said(page).inner_text(), page.locator("#message [role=alert]")
    give(page, "garbage.png", b"this is no image")
    expect(alert).to_contain_text("The uploaded file is not an image (PNG, JPEG, WEBP, BMP, GIF)")
    give(page, "cut.png", png(Image.effect_noise((64, 64), 90))[:900])
    expect(alert).to_contain_text("truncated or corrupt")
    side = int(MOST_PIXELS**0.5) + 1
    give(page, "bomb.png", png(Image.new("1", (side, side))))
    expect(alert).to_contain_text("pixels are more than the 25,000,000 that are read")
    give(page, "long.png", b"0" * (10 * 2**20 + 1))
    expect(page.get_by_text("exceed the maximum allowed size")).to_be_visible()
    assert said(page).inner_text() == before  # nothing that was there is lost
    give(page, "text.txt", b"text")
    expect(page.get_by_text("Invalid file type")).to_be_visible()
    page.reload()
    arrived(page)
    give(page, "digit.png", png(digit(3)))
    expect(said(page)).to_contain_text("Your image")
    expect(alert).to_have_count(0)


def nothing_covers_the_examples_and_words_in_plots_are_large_enough(page: Page) -> None:
    page.wait_for_timeout(500)
    label = page.locator("#left-examples label").first.bounding_box()
    first = page.locator("#left-examples button.thumbnail-item").first.bounding_box()
    assert label["y"] + label["height"] <= first["y"]
    sizes = page.locator("#left-answer img").evaluate_all("all => all.map(one => one.clientWidth / one.naturalWidth)")
    points = 8 * 170 / 72  # the smallest letters, in pixels of the plot
    assert min(sizes) * points >= 8.5


@pytest.mark.long
def test_on_a_wide_screen_the_answer_is_beside_what_it_answers(browser, site):
    page = visit(browser, site, width=1600)
    boxes = {
        name: page.locator(f"#{name}").bounding_box() for name in ("controls", "answers", "left-examples", "depth")
    }
    assert boxes["answers"]["x"] >= boxes["controls"]["x"] + boxes["controls"]["width"]
    assert abs(boxes["answers"]["y"] - boxes["controls"]["y"]) < 30
    first = page.locator("#left-answer img").first.bounding_box()
    assert first["y"] + first["height"] < 900  # a screen's height: nobody has to scroll for it
    assert boxes["left-examples"]["y"] < 900
    page.mouse.wheel(0, 2000)
    page.wait_for_function("window.scrollY > 0 || document.documentElement.scrollHeight <= innerHeight")
    assert page.locator("#controls").bounding_box()["y"] >= -1  # they stay in sight
    page.context.close()


@pytest.mark.long
def test_the_network_of_the_package(browser):
    with served(cwd=empty_folder()) as site:
        page = visit(browser, site)
        expect(page.locator("#left-answer h2")).to_contain_text("cmpe_se_preact_resnet20.cifar10 (test top-1")
        expect(page.locator("#left-answer")).to_contain_text("No test images: they do not come with the network")
        before = said(page).inner_text()
        page.locator("#to").get_by_label("mean").check()
        expect(said(page)).to_contain_text("held at their mean")
        assert said(page).inner_text() != before
        page.context.close()


@pytest.mark.long
def test_on_a_phone(browser, site):
    page = visit(browser, site, width=390)
    nothing_covers_the_examples_and_words_in_plots_are_large_enough(page)
    page.set_viewport_size({"width": 360, "height": 900})
    for mode in ("One", "Two networks", "Two images"):
        page.locator("#mode").get_by_label(mode, exact=True).check()
        if mode != "One":
            expect(said(page, "right")).to_contain_text("prediction")
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
    boxes = page.locator("#left-answer img").evaluate_all("images => images.map(image => image.clientWidth)")
    assert min(boxes) > 280  # as wide as the screen, not a part of it
    page.context.close()


@pytest.mark.long
def test_all_is_reached_with_the_keyboard(page, network):
    wanted = {"mode", "left-network", "left-examples", "left-file", "depth", "to", "at", "attribution"}
    place = "() => document.activeElement.closest('[id]:is(#" + ",#".join(wanted) + ")')?.id"
    seen, examples = set(), 0
    while seen != wanted:
        page.keyboard.press("Tab")
        where = page.evaluate(place)
        assert where or len(seen) == 0, f"the keyboard left the page after {seen}"
        seen |= {where} if where else set()
        examples += where == "left-examples"
        if where == "left-examples" and examples == 3:
            page.keyboard.press("Enter")
            expect(said(page)).to_contain_text(network.examples[2].name)
    assert examples == len(network.examples)
    page.locator("#to input[value=closed]").focus()
    page.keyboard.press("Space")
    expect(said(page)).to_contain_text("held closed")


def test_pictures_have_words_and_fields_have_labels(page):
    nothing_covers_the_examples_and_words_in_plots_are_large_enough(page)
    alternatives = page.locator("#left-answer img").evaluate_all("images => images.map(image => image.alt)")
    assert len(alternatives) == 4
    assert all(len(text) > 60 for text in alternatives)
    nameless = page.locator("input:visible, button:visible").evaluate_all(
        "all => all.filter(e => !(e.labels?.length || e.ariaLabel || e.title || e.textContent.trim()"
        " || e.closest('fieldset,label') || e.getAttribute('aria-labelledby'))).map(e => e.outerHTML.slice(0, 200))"
    )
    assert nameless == []


@pytest.mark.long
def test_many_at_once_wait_their_turn(browser, site, network):
    pages = [browser.new_context().new_page() for _ in range(4)]
    for page in pages:
        page.goto(site.address, wait_until="commit")
    for number, page in enumerate(pages):
        page.locator("#left-examples button.thumbnail-item").nth(number).click()
        if number % 2:
            page.locator("#to").get_by_label("closed").check()
    block = network.blocks[(len(network.blocks) + 1) // 2 - 1]
    for number, page in enumerate(pages):
        picture = network.examples[number]
        answer = f"prediction {percent(network, number)}, "
        if number % 2:
            held = percent(network, number, Force(block, "closed"))
            answer = f"with the gates of {block} held closed: prediction {held}, "
        expect(said(page)).to_contain_text(f"{picture.name} (true class {truth(picture)}): {answer}")
        expect(page.locator("#message [role=alert]")).to_have_count(0)
        page.context.close()


@pytest.mark.long
def test_what_is_missing_is_said(browser, runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    text = (run / "config.yaml").read_text().replace("data: digits", "data: folder")
    (run / "config.yaml").write_text(text.replace("data_dir: null", "data_dir: gone"))
    with served(run) as site:
        page = visit(browser, site)
        expect(page.locator("#left-answer")).to_contain_text(re.compile("No test images: .*gone"))
        expect(said(page)).to_contain_text("Photograph of a temple: prediction")
        page.locator("#to").get_by_label("mean").check()
        expect(page.locator("#message [role=alert]")).to_contain_text("not known without test images")
        page.context.close()
