"""Who waits for answers, and how much has been uploaded: what the server and the page have to know of each other."""

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager

from cmpe_se.utils.text import counted

_ARRIVING = 15.0  # seconds from a question to the stream that its answer goes to; a busy browser opens it late
_SESSIONS = 1000  # that are remembered


class Guests:
    """The sessions that have asked something, and those that listen for answers."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, float] = OrderedDict()  # time of the last question
        self._listening: dict[str, int] = {}  # open streams

    def asks(self, session: str) -> None:
        """A session has asked something."""
        self._asked[session] = time.monotonic()
        self._asked.move_to_end(session)
        while len(self._asked) > _SESSIONS:
            self._asked.popitem(last=False)

    @contextmanager
    def listens(self, session: str) -> Iterator[None]:
        """For as long as a session's stream is open."""
        self._listening[session] = self._listening.get(session, 0) + 1
        opened = time.monotonic()
        try:
            yield
        finally:
            self._listening[session] -= 1
            if not self._listening[session]:
                del self._listening[session]
                if self._asked.get(session, opened) < opened:  # a later question is about to have a stream of its own
                    del self._asked[session]

    async def waits(self, session: str) -> bool:
        """Whether somebody is there to hear the answer; one who has just asked gets a moment to open a stream."""
        while session not in self._listening:
            if time.monotonic() - self._asked.get(session, 0.0) > _ARRIVING:
                return False
            await asyncio.sleep(0.05)
        return True


class Uploads:
    """How many files of what size have been uploaded lately, by all sessions together.

    Args:
        files: that may be kept at a time.
        size: bytes of them together.
        kept: seconds until a file is deleted.
    """

    def __init__(self, files: int, size: int, kept: float):
        self.files, self.size, self.kept = files, size, kept
        self._recent: deque[tuple[float, int, int]] = deque()  # time, files, bytes

    def refusal(self, size: int) -> str | None:
        """Why an upload of so many bytes has to wait; None where it need not."""
        while self._recent and time.monotonic() - self._recent[0][0] > self.kept:
            self._recent.popleft()
        files, total = sum(files for _, files, _ in self._recent), sum(size for _, _, size in self._recent)
        if files < self.files and total + size <= self.size:
            return None
        minutes = counted(math.ceil(self.kept / 60), "minute")
        return f"too many uploads: {counted(files, 'file')} of {total / 1e6:.0f} MB kept; wait {minutes}"

    def add(self, files: int, size: int) -> None:
        """Count an upload."""
        self._recent.append((time.monotonic(), files, size))
