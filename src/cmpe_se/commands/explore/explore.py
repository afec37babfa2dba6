"""The ``explore`` command."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cmpe_se.commands.explore.settings import only_our_settings
from cmpe_se.errors import UserError
from cmpe_se.shipped import shipped_names
from cmpe_se.training.interruption import Interruption
from cmpe_se.training.run_folder import RunFolder
from cmpe_se.utils.packages import require
from cmpe_se.utils.terminal import Terminal

if TYPE_CHECKING:
    from cmpe_se.commands.explore.network import Networks

_RUNS = Path("runs")  # where `cmpe-se train` puts them


def explore(runs: str | Sequence[str] = (), *, port: int | None = None) -> None:
    """Serve a page for exploring finished runs on this machine: predictions, pictures, gates, their effects.

    The page is at http://127.0.0.1:PORT for this machine alone, until Ctrl-C; `ssh -L PORT:127.0.0.1:PORT MACHINE`
    reaches it from another one. It needs no internet.

    Args:
        runs: run folders, or networks that come with the package, by name; the first one is shown first. If left out,
            all finished ones in runs/, the newest first, and after them those of the package.
        port: port of the page; the first free one from 7860 on if left out.

    Raises:
        UserError: a run that is none, or has not finished, a port that is taken, or a missing package.
    """
    if port is not None and not 1 <= port <= 65535:
        raise UserError(f"port is {port}, should be from 1 to 65535")
    folders = _folders(runs)
    with only_our_settings():
        require(("captum", "gradio", "jinja2"), "cmpe-se explore", extra="explore")
        from cmpe_se.commands.explore.images import LARGEST_FILE
        from cmpe_se.commands.explore.network import Networks
        from cmpe_se.commands.explore.page import build
        from cmpe_se.commands.explore.serving import serve

        networks = Networks(folders)
        while not runs and len(folders) > 1 and (reason := _broken(networks)):
            Terminal(stderr=True).print(f"cmpe-se: left out: {reason}", soft_wrap=True)
            folders = folders[1:]
            networks = Networks(folders)
        with serve(build(networks), port=port, largest_file=LARGEST_FILE) as address:
            console = Terminal()
            console.print(f"{', '.join(networks.names)}: {address} (stop with Ctrl-C)", soft_wrap=True, highlight=False)
            with Interruption() as interruption:
                while not interruption.requested:
                    time.sleep(0.2)


def _folders(runs: str | Sequence[str]) -> list[RunFolder]:
    given = [runs] if isinstance(runs, (str, Path)) else list(runs)
    if given:
        folders = [RunFolder.open(run) for run in dict.fromkeys(given)]
        for folder in folders:
            folder.read_result()  # raises for one that has not finished
        return folders
    found = []
    for result in sorted(_RUNS.glob("*/result.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            found.append(RunFolder.open(result.parent))
        except UserError as error:
            Terminal(stderr=True).print(f"cmpe-se: left out: {error}", soft_wrap=True)
    return found + [RunFolder.open(name) for name in shipped_names()]


def _broken(networks: "Networks") -> str | None:
    """Why the network that would be shown first cannot be loaded, if so."""
    try:
        networks[networks.names[0]]
    except UserError as error:
        return str(error)
    return None
