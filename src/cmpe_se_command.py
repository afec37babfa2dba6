"""The ``cmpe-se`` command, as far as it goes without PyTorch: its list of commands, ``--help`` and ``--version``.

It stands beside the package and not in it: importing the package imports PyTorch and timm, which takes seconds.
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches

COMMANDS = {
    "train": "Train a network and write a run folder: settings, metrics, curves and weights.",
    "compare": "Train networks under one recipe with several seeds, and compare them seed by seed.",
    "evaluate": "Test a finished run's network: accuracy overall and by class, confusion matrix, calibration.",
    "predict": "Print the predictions of a finished run's network for images.",
    "report": "Write an HTML page on a finished run and the competition in its network, with plots as PNG and CSV.",
    "explore": "Serve a page for exploring finished runs on this machine: predictions, pictures, gates, their effects.",
    "export": "Export a finished run's network to ONNX, torch.export or OpenVINO, and verify it against PyTorch.",
    "push": "Publish a finished run's network with a model card, in a folder or on the Hugging Face hub.",
    "models": "List our networks with their parameters and multiply-adds: plain, with SE, with a competitive view.",
    "benchmark": "Measure the time and memory that attention costs on this machine, against the plain network.",
}
"""Name of each command to the first sentence of its function, which is ``cmpe_se.commands.NAME.NAME``."""

_DESCRIPTION = """Competitive inner-imaging squeeze-and-excitation (arXiv 1807.08920): train, test and use residual
networks in which residual and identity compete. `cmpe-se train` alone trains on real handwritten digits."""
_FAILED, _USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: of the command line, without the program's name; those of this process if left out.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
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
        close = get_close_matches(first, COMMANDS, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        return complain(f"there is no command '{first}'{hint} (cmpe-se --help)", _USAGE)
    return 0


def complain(message: str, status: int) -> int:
    """Print a message as one line on stderr; returns the status."""
    print(f"cmpe-se: {' '.join(message.split())}", file=sys.stderr)
    return status


def _run(command: str, arguments: list[str]) -> int:
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
    parser = argparse.ArgumentParser(prog="cmpe-se", description=_DESCRIPTION)
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(
        title="commands", description="`cmpe-se COMMAND --help` explains each.", metavar="COMMAND"
    )
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary)
    return parser
