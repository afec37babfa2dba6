"""The page: its parts, and what follows from their events."""

import logging
import traceback
from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import gradio as gr

from cmpe_se.commands.explore.answers import ATTRIBUTIONS
from cmpe_se.commands.explore.guests import Guests
from cmpe_se.commands.explore.images import FORMATS, LARGEST_FILE, UPLOADS_KEPT, read_upload
from cmpe_se.commands.explore.network import FORCES, Network, Networks
from cmpe_se.commands.explore.serving import NOT_KNOWN
from cmpe_se.commands.explore.visit import AS_TRAINED, HERE, ONE, TWO_IMAGES, TWO_NETWORKS, Answers, Choices, Chosen
from cmpe_se.errors import UserError
from cmpe_se.utils.escaping import visible
from cmpe_se.utils.text import in_one_line

_log = logging.getLogger(__name__)


class Page(gr.Blocks):
    """Gradio's page, whose events end in words and not in traces, and are not computed for nobody."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.guests = Guests()

    async def process_api(self, *args: Any, **settings: Any) -> dict[str, Any]:
        """Answer an event.

        Raises:
            gr.Error: nobody waits for it any more, or it cannot be answered; the browser shows its words.
        """
        session_hash = settings.get("session_hash")
        if session_hash is not None and not await self.guests.waits(session_hash):
            raise gr.Error("nobody waits for this answer", print_exception=False)
        try:
            return await super().process_api(*args, **settings)
        except gr.Error as error:  # a value that is none of a part's
            words = error.message
        except Exception as error:
            words = NOT_KNOWN
            place = traceback.extract_tb(error.__traceback__)[-1]
            name = type(error).__name__
            _log.warning(f"an event was not answered: {name} at {place.filename}:{place.lineno}: {in_one_line(error)}")
        raise gr.Error(escape(visible(words)), print_exception=False)


class _Picker(NamedTuple):
    """Where a visitor picks an image, and what he picked."""

    group: gr.Column
    examples: gr.Gallery
    file: gr.File
    image: gr.State


def build(networks: Networks) -> Page:
    """The page, with the first network and its first example on it.

    Args:
        networks: of which the first is loaded now, and the others when they are chosen.
    """
    answers, names = Answers(networks), networks.names
    first = answers.network(names[0])
    several = len(names) > 1
    with Page(title="cmpe-se explore", analytics_enabled=False, delete_cache=(UPLOADS_KEPT // 3, UPLOADS_KEPT)) as page:
        gr.Markdown(
            "# Competition inside a network\nPick an image and a block. Hold gates closed, open or at their mean to "
            "see their effect on the prediction."
        )
        message = gr.HTML(elem_id="message")
        with gr.Row(elem_id="desk"):
            with gr.Column(elem_id="controls", min_width=320):
                modes = [ONE, TWO_NETWORKS, TWO_IMAGES] if several else [ONE, TWO_IMAGES]
                mode = gr.Radio(modes, value=ONE, label="Side by side", elem_id="mode")
                left = gr.Dropdown(names, value=names[0], label="Network", visible=several, elem_id="left-network")
                right = gr.Dropdown(
                    names, value=names[several], label="Network on the right", visible=False, elem_id="right-network"
                )
                with gr.Row():
                    left_picker = _picker("left", first, Chosen(names[0], 0), visible=True)
                    right_picker = _picker("right", first, Chosen(names[0], 1 % len(first.examples)), visible=False)
                with gr.Column(min_width=160, elem_classes="depth"):
                    depth = _depth(first.blocks, (len(first.blocks) + 1) // 2)
                    block = gr.HTML(elem_id="block")
                to = gr.Radio([AS_TRAINED, *FORCES], value=AS_TRAINED, label="Gates", elem_id="to")
                at = _at(first.blocks)
                attribution = gr.Radio(
                    list(ATTRIBUTIONS), value=ATTRIBUTIONS[0], label="Attribution", elem_id="attribution"
                )
            with gr.Column(elem_id="answers", min_width=320), gr.Row():
                with gr.Column():
                    left_answer = gr.HTML(elem_id="left-answer")
                with gr.Column(visible=False) as right_side:
                    right_answer = gr.HTML(elem_id="right-answer")

        # One event at a time looks into a network, and the others wait in the queue.
        one_by_one = {"concurrency_id": "networks", "concurrency_limit": 1, "api_visibility": "private"}
        loads: dict[str, Any] = {**one_by_one, "show_progress": "hidden"}
        show = {
            "fn": _telling(lambda *values: _answer(answers, Choices(*values)), outputs=3),
            "inputs": [mode, left, right, left_picker.image, right_picker.image, depth, to, at, attribution],
            "outputs": [left_answer, right_answer, block, message],
            "show_progress": "minimal",
            "show_progress_on": [left_answer, right_answer],
            **one_by_one,
        }

        def layout(mode: str, left: str, right: str, depth: int, at: int, *images: Chosen) -> list:
            blocks = answers.blocks(mode, left, right)
            return [
                *(answers.image_for(left, image, place) for place, image in enumerate(images)),
                _depth(blocks, depth, render=False),
                _at(blocks, at, render=False),
                gr.Dropdown(visible=mode == TWO_NETWORKS),
                gr.Column(visible=mode == TWO_IMAGES),
                gr.Column(visible=mode != ONE),
            ]

        page.load(**show)
        touched = [depth.change, to.change, at.change, attribution.change]
        gr.on([*touched, left_picker.image.change, right_picker.image.change], trigger_mode="always_last", **show)
        gr.on(
            [mode.change, left.change, right.change],
            _telling(layout, outputs=7),
            [mode, left, right, depth, at, left_picker.image, right_picker.image],
            [left_picker.image, right_picker.image, depth, at, right, right_picker.group, right_side, message],
            **loads,
        ).success(**show)
        left.change(
            _telling(lambda run: [_examples(answers.network(run))] * 2, outputs=2),
            left,
            [left_picker.examples, right_picker.examples, message],
            **loads,
        )
        for picker in (left_picker, right_picker):
            # The answer follows once the image has become another, so what was said of a bad file stays to be read.
            picker.examples.select(_pick, left, [picker.image, picker.file, message], api_visibility="private")
            picker.file.upload(_telling(_receive, outputs=1), picker.file, [picker.image, message], **loads)
    return page


def _picker(place: str, network: Network, chosen: Chosen, *, visible: bool) -> _Picker:
    with gr.Column(visible=visible) as group:
        examples = gr.Gallery(
            **_gallery(network),
            height="auto",
            object_fit="contain",
            format="png",
            allow_preview=False,
            interactive=False,
            buttons=[],
            elem_id=f"{place}-examples",
            elem_classes="examples",
        )
        file = gr.File(
            label=f"Your own image, at most {LARGEST_FILE // 2**20} MB",
            file_types=[f".{name.lower()}" for name in (*FORMATS, "jpg")],
            type="binary",
            height=100,
            elem_id=f"{place}-file",
            elem_classes="file",
        )
    return _Picker(group, examples, file, gr.State(chosen))


def _depth(blocks: list[str], value: int, **settings: Any) -> gr.Slider:
    count = len(blocks)
    return gr.Slider(
        1,
        max(2, count),  # a slider of one place is none to Gradio
        value=max(1, min(value, count)),
        step=1,
        label="Depth (block)",
        visible=count > 1,
        buttons=[],
        elem_id="depth",
        **settings,
    )


def _at(blocks: list[str], value: int = HERE, **settings: Any) -> gr.Dropdown:
    choices = [("the block shown", HERE), *((name, depth + 1) for depth, name in enumerate(blocks))]
    return gr.Dropdown(
        choices, value=min(value, len(blocks)), label="Block whose gates are held", elem_id="at", **settings
    )


def _gallery(network: Network) -> dict[str, Any]:
    known = any(picture.truth is not None for picture in network.examples)
    return {
        "value": [(picture.thumbnail, picture.caption) for picture in network.examples],
        "label": "True class → prediction, where it is wrong" if known else "Photographs",
    }


def _examples(network: Network) -> gr.Gallery:
    return gr.Gallery(**_gallery(network), selected_index=None)


def _pick(run: str, event: gr.SelectData) -> tuple[Chosen, None, str]:
    return Chosen(run, int(event.index)), None, _told("")


def _receive(content: bytes | None) -> list:
    """An uploaded file becomes the visitor's image, if it is one."""
    if content is None:
        return [gr.skip()]
    read_upload(content)
    return [Chosen("", content=content)]


def _answer(answers: Answers, choices: Choices) -> tuple[str, str | None, str]:
    """Both answers, and which block the slider is at."""
    blocks = answers.blocks(*choices[:3])
    said = ""
    if blocks:
        depth = max(1, min(choices.depth, len(blocks)))
        said = f"{escape(visible(blocks[depth - 1]))} ({depth} of {len(blocks)})"
    return *answers.show(choices), said


def _telling(answer: Callable[..., Any], outputs: int) -> Callable[..., list]:
    """A handler whose last output says what a visitor did wrong, in words; the others stay as they are then."""

    def told(*values: Any) -> list:
        try:
            return [*answer(*values), _told("")]
        except UserError as error:
            return [*[gr.skip()] * outputs, _told(str(error))]

    return told


def _told(sentence: str) -> str:
    return f'<p role="alert">{escape(visible(sentence[:1].upper() + sentence[1:]))}.</p>' if sentence else ""
