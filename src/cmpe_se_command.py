"""The ``cmpe-se`` command, as far as it goes without PyTorch: its list of commands, ``--help`` and ``--version``.

It stands beside the package and not in it: importing the package imports PyTorch and timm, which takes seconds.
What is imported here comes before Ctrl-C is handled, so it is what Python has imported for itself: ``signal`` would
import ``enum``, which takes as long as Python's own start.
"""

from __future__ import annotations

import _signal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from typing import Any

COMMANDS = {
    "train": "Train a network and write a run folder: settings, metrics, curves and weights.",
    "compare": "Train networks under one recipe with several seeds, and compare them seed by seed.",
    "evaluate": "Test a finished run's network: accuracy overall and by class, confusion matrix, calibration.",
    "predict": "Print the predictions of a finished run's network for images, as they come.",
    "report": "Write an HTML page on a finished run and the competition in its network, with plots as PNG and CSV.",
    "explore": "Serve a page for exploring finished runs on this machine: predictions, pictures, gates, their effects.",
    "export": "Export a finished run's network to ONNX, torch.export, OpenVINO or AOTInductor, and verify it.",
    "prune": "Take channels and blocks out of a finished run's network, and train it on.",
    "freeze": "Make those gates of a finished run static that it can spare, and train the network on with them.",
    "push": "Publish a finished run's network with a model card, in a folder or on the Hugging Face hub.",
    "models": "List our networks with their parameters and multiply-adds: plain, with SE, with a competitive view.",
    "benchmark": "Measure the time and memory that attention costs on this machine, against the plain network.",
}
"""Name of each command to the first sentence of its function, which is ``cmpe_se.commands.NAME.NAME``."""

_DESCRIPTION = """Competitive inner-imaging squeeze-and-excitation (arXiv 1807.08920): train, test and use residual
networks in which residual and identity compete. `cmpe-se train` alone trains on real handwritten digits."""
_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: of the command line, without the program's name; those of this process if left out.
    """
    before = end_at_once_when_stopped()
    status = None
    try:
        status = _main(list(sys.argv[1:] if arguments is None else arguments))
        return status
    finally:
        for number, handler in before.items():
            # The process of a command takes a moment to end: a launcher's signal then has nothing more to say.
            ending = arguments is None and status is not None
            _signal.signal(number, (lambda *_: os._exit(status)) if ending else handler)


def end_at_once_when_stopped() -> dict[int, Any]:
    """Let Ctrl-C, SIGTERM and SIGHUP end this process without a trace; returns the handlers before.

    For the seconds of imports, in which there is nothing to save, and KeyboardInterrupt would surface anywhere.
    """
    before: dict[int, Any] = {}
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(_signal, name, None)
        if number is None or (name == "SIGHUP" and _signal.getsignal(number) == _signal.SIG_IGN):  # nohup
            continue
        try:
            before[number] = _signal.signal(number, _end)
        except ValueError:  # not in the main thread, where Python lets nobody set handlers
            break
    return before


def _end(*_: object) -> None:
    if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
        try:  # noqa: SIM105  # contextlib would be imported before Ctrl-C is handled
            os.write(2, b"cmpe-se: stopped\n")
        except OSError:  # a terminal that was closed
            pass
    os._exit(_INTERRUPTED)


def _main(arguments: list[str]) -> int:
    first = arguments[0] if arguments else "--help"
    if first in COMMANDS:
        return _run(first, arguments[1:])
    if first in ("-h", "--help"):
        _parser().print_help()
    elif first == "--version":
        from importlib.metadata import version  # not for --help, which is twice as fast without

        print(f"cmpe-se {version('cmpe-se')}")
    elif first.startswith("-"):
        return complain(f"unrecognized arguments: {first} (cmpe-se --help)", _USAGE)
    else:
        from difflib import get_close_matches

        close = get_close_matches(first, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return complain(f"there is no command '{first}'{hint} (cmpe-se --help)", _USAGE)
    return 0


def complain(message: str, status: int) -> int:
    """Print a message as one line on stderr; returns the status."""
    from contextlib import suppress

    line = f"cmpe-se: {' '.join(message.split())}"
    if not (line.isascii() and line.isprintable()):
        from cmpe_se.utils.escaping import for_terminal

        line = for_terminal(line, sys.stderr.encoding)
    with suppress(OSError, ValueError):  # a terminal that was closed, or a closed file
        print(line, file=sys.stderr, flush=True)
    return status


def temporary_files_fail() -> bool:
    """Complain where no folder takes temporary files: packages that PyTorch imports would raise at their import."""
    import tempfile

    try:
        tempfile.gettempdir()
    except OSError as error:
        complain(f"error: {error.strerror}; set TMPDIR to a folder that can be written", _FAILED)
        return True
    return False


def _run(command: str, arguments: list[str]) -> int:
    if temporary_files_fail():
        return _FAILED
    from cmpe_se.errors import MissingPackageError
    from cmpe_se.utils.packages import require_train

    try:
        require_train(f"cmpe-se {command}", command=command)
    except MissingPackageError as error:
        return complain(str(error), _FAILED)
    from cmpe_se.cli import main as run

    return run([command, *arguments])


def _parser() -> argparse.ArgumentParser:
    """What the help is printed from; a command's own arguments are parsed by ``cmpe_se.cli``."""
    import argparse

    parser = argparse.ArgumentParser(prog="cmpe-se", description=_DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(
        title="commands", description="`cmpe-se COMMAND --help` explains each.", metavar="COMMAND"
    )
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser
