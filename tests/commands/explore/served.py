"""``cmpe-se explore`` in a real process, and its page's address."""

import re
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.training.processes import Done, Running, start


class Served(NamedTuple):
    """A page that is being served.

    Args:
        address: of it, without a slash at the end.
        running: the process.
        temporary: folder for its temporary files.
    """

    address: str
    running: Running
    temporary: Path

    def end(self, number: int = signal.SIGINT) -> Done:
        """End the process as Ctrl-C does, or with another signal."""
        return self.running.send(number)


def look_for_the_temporary_folder_anew() -> None:
    """To be called before the command."""
    tempfile.tempdir = None  # which the process that this one was forked from had found already


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


@contextmanager
def served(*runs, port: int | None = None, **settings) -> Iterator[Served]:
    """Serve runs for as long as the context lasts."""
    temporary = Path(tempfile.mkdtemp(prefix="explore-test-"))
    port = port or free_port()
    env = {"TMPDIR": str(temporary), **settings.pop("env", {})}
    before = settings.pop("before", look_for_the_temporary_folder_anew)
    running = start("explore", *runs, "--port", port, env=env, before=before, **settings)
    out = running.folder / "out"
    try:
        running.until(lambda: out.exists() and "stop with Ctrl-C" in out.read_text())
        address = re.search(r"http://127\.0\.0\.1:\d+", out.read_text()).group()
        yield Served(address, running, temporary)
    finally:
        if running.process.is_alive():
            running.send(signal.SIGINT)
        shutil.rmtree(temporary, ignore_errors=True)
