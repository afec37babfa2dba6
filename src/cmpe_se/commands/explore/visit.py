"""The choices of a visitor of the page, and the answers to them."""

import hashlib
import threading
from dataclasses import replace
from typing import NamedTuple

from cmpe_se.commands.explore.answers import render
from cmpe_se.commands.explore.images import Picture, read_upload
from cmpe_se.commands.explore.network import Force, Network, Networks
from cmpe_se.errors import UserError
from cmpe_se.exhibits.choosing import Photo

ONE, TWO_NETWORKS, TWO_IMAGES = "One", "Two networks", "Two images"
"""What stands side by side."""
AS_TRAINED = "as trained"
HERE = 0
"""In place of a depth: that of the block that is shown."""
_KEPT = 16  # images


class Chosen(NamedTuple):
    """An image: an example of a run, or the content of an uploaded file."""

    run: str
    example: int = 0
    content: bytes | None = None


class Choices(NamedTuple):
    """Of everything on the page; the values of its parts, in this order.

    Args:
        mode: what stands side by side.
        left, right: names of runs; the right one counts with two networks.
        left_image, right_image: the right one counts with two images.
        depth: of the block to show, from 1, among the blocks of the deeper network.
        to: AS_TRAINED, or what gates are held to.
        at: depth of the block whose gates are held, or HERE.
        attribution: method of attribution.
    """

    mode: str
    left: str
    right: str
    left_image: Chosen
    right_image: Chosen
    depth: int
    to: str
    at: int
    attribution: str


class Answers:
    """Answers to visitors, one at a time: recording gates puts hooks on a network, which other calls must not trigger.

    It holds nothing of theirs but for the last few images, brought to what networks take.
    """

    def __init__(self, networks: Networks):
        self._networks, self._alone = networks, threading.RLock()
        self._photos: dict[tuple, Photo] = {}

    @property
    def runs(self) -> list[str]:
        """Names of the runs that there are to choose from."""
        return self._networks.names

    def network(self, run: str) -> Network:
        """A run's network, to be read; it is loaded if it is not there."""
        with self._alone:
            return self._networks[run]

    def blocks(self, mode: str, left: str, right: str) -> list[str]:
        """Names of the blocks of what is shown, of the deeper network if there are two."""
        shown = [left, right] if mode == TWO_NETWORKS else [left]
        return max((self.network(name).blocks for name in shown), key=len)

    def image_for(self, run: str, image: Chosen, otherwise: int) -> Chosen:
        """The image to go on with once a network is chosen: the same, unless it is an example of other data.

        Args:
            run: that has been chosen.
            image: that was shown before.
            otherwise: number of the example to take in its place.
        """
        network = self.network(run)
        if image.content is not None or self.network(image.run).data == network.data:
            return image
        return Chosen(run, otherwise % len(network.examples))

    def show(self, choices: Choices) -> tuple[str, str | None]:
        """HTML for the left side, and for the right one if there is any.

        Raises:
            UserError: something that cannot be shown, such as an image that is none.
        """
        with self._alone:
            left = self._side(choices, choices.left, choices.left_image)
            if choices.mode == TWO_NETWORKS:
                return left, self._side(choices, choices.right, choices.left_image)
            if choices.mode == TWO_IMAGES:
                return left, self._side(choices, choices.left, choices.right_image)
            return left, None

    def _side(self, choices: Choices, run: str, image: Chosen) -> str:
        network, depths = self.network(run), len(self.blocks(*choices[:3]))

        def block(depth: int) -> str:  # at the same part of the way, where the other network has more blocks
            way = (depth - 1) / max(1, depths - 1)
            return network.blocks[round(min(1.0, max(0.0, way)) * (len(network.blocks) - 1))]

        shown = force = None
        if network.blocks:
            shown = block(choices.depth)
            if choices.to != AS_TRAINED:
                force = Force(shown if choices.at == HERE else block(choices.at), choices.to)
        heading = f"{run} (test top-1 {network.result['test_top1']:.2f} %)"
        return render(
            heading, network, self._photo(run, image), block=shown, force=force, attribution=choices.attribution
        )

    def _photo(self, run: str, image: Chosen) -> Photo:
        network, source = self.network(run), None if image.content is not None else self.network(image.run)
        content = None if image.content is None else hashlib.sha256(image.content).digest()
        key = (network.number, source and source.number, image.example, content)
        if key not in self._photos:
            if len(self._photos) >= _KEPT:
                del self._photos[next(iter(self._photos))]
            photo = network.photo(self._picture(image))
            if source and source.data != network.data:
                photo = replace(photo, name=f"{photo.name} of {image.run}")
            self._photos[key] = photo
        return self._photos[key]

    def _picture(self, image: Chosen) -> Picture:
        if image.content is not None:
            return read_upload(image.content)
        examples = self.network(image.run).examples
        if not 0 <= image.example < len(examples):
            raise UserError(f"{image.run} has no example {image.example}; pick one of those shown")
        return examples[image.example]
