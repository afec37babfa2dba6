"""The ``cmpe-se`` command: its subcommands are functions of the library, its flags those functions' parameters."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial
from importlib import import_module

from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from cmpe_se import __version__
from cmpe_se.errors import UserError
from cmpe_se.training.config import DEFAULT_RECIPE, TrainingConfig, read_recipe, recipe_names
from cmpe_se.training.interruption import Interrupted
from cmpe_se.training.launching import failed_elsewhere, is_main_process, launch, missing_processes

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
# Switches that a positional argument may follow.
_BEFORE_WORDS = {"as_json", "private", "merged", "channels_last", "int8", "merge", "corruptions"}
_SWITCHES = (
    _BEFORE_WORDS
    | {"dry_run", "plan"}
    | {field.name for field in fields(TrainingConfig) if field.type in (bool, "bool")}
)

COMMANDS = {
    "train": "Train a network, and leave a run folder with settings, metrics, curves and weights.",
    "compare": "Train networks under one recipe with several seeds, and compare them seed by seed.",
    "evaluate": "Test a finished run: accuracy, each class, confusion matrix and calibration.",
    "predict": "Say what a finished run's network sees in images.",
    "report": "Show a finished run and the competition inside its network: one HTML page, plots as PNG and CSV.",
    "explore": (
        "Open a page on this machine to play with finished runs: predictions, pictures, gates and what hangs on them."
    ),
    "export": "Write a finished run's network for ONNX, torch.export or OpenVINO, verified against PyTorch.",
    "push": "Share a finished run's network: config.json, model.safetensors and a card with the run's figures.",
    "models": "List our networks with parameters and multiply-adds: plain, SE, and a competitive view.",
    "benchmark": "Measure what attention costs on this machine, against the plain network in the same run.",
}
"""Name of each command to what it does: it is the function of that name in ``cmpe_se.commands.NAME``. Only the one that
is asked for is imported: all of them together take as long as PyTorch."""

_DESCRIPTION = """Competitive inner-imaging squeeze-and-excitation (arXiv 1807.08920): train, test and use residual
networks in which residual and identity compete. `cmpe-se train` alone trains on real handwritten digits."""

_COMPARE_HELP = """Train networks under one recipe with several seeds, and compare them seed by seed.

cmpe-se compare --models preact_resnet20,se_preact_resnet20,cmpe_se_preact_resnet20 --views pair_view_1x1,folded_3x3

For one seed, all networks see the same images in the same order with the same augmentation. The same command goes on
after Ctrl-C, leaves finished runs alone, and takes more networks and seeds. It ends with compare.md, compare.csv,
cells.csv and figures. A recipe sets everything else and flags win over it; the defaults below are those of the recipe
that you name."""

_TRAIN_HELP = """Train a network, and leave a run folder with settings, figures, curves and weights.

A recipe sets everything and flags win over it; the defaults shown below are those of the recipe that you name. Ctrl-C
saves; `--resume RUN` goes on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Args:
        arguments: of the command line, without the program's name; those of this process if left out.
    """
    arguments = _as_parsed(sys.argv[1:] if arguments is None else arguments)
    try:
        parser = _parser(arguments)
        if not arguments:
            parser.print_help()
            return 0
        parsed = parser.parse_args(arguments)
        command = parsed.pop("subcommand")
        if command == "train" and (processes := missing_processes()):
            return launch(processes, arguments)
        _run(command, parsed[command], arguments)
        return 0
    except ArgumentError as error:
        known = [word for word in arguments[:1] if word in COMMANDS]
        return _complain(f"{error.message or error} ({' '.join(['cmpe-se', *known, '--help'])})", _USAGE)
    except Interrupted as interruption:
        return _complain(str(interruption), _INTERRUPTED) if is_main_process() else _INTERRUPTED
    except KeyboardInterrupt:
        return _complain("stopped", _INTERRUPTED)
    except UserError as error:
        return _complain(f"error: {error}", _FAILED)
    except BrokenPipeError:  # `cmpe-se models | head`
        sys.stderr.close()
        return 0
    except RuntimeError as error:
        if failed_elsewhere(error):
            return _FAILED
        raise
    except OSError as error:  # a full disk, or no permission, where nobody foresaw it
        return _complain(f"error: {error}", _FAILED)


def _run(command: str, parsed: Namespace, arguments: Sequence[str]) -> None:
    """Call the command's function."""
    values = {name: value for name, value in vars(parsed).items() if name not in ("config", "__default_config__")}
    if command in ("train", "compare"):  # what was typed wins over the recipe, and says more than its default would
        typed = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
        values = {name: value for name, value in values.items() if name in typed}
    _function(command)(**values)


def _function(command: str) -> Callable:
    return getattr(import_module(f"cmpe_se.commands.{command}"), command)


def _parser(arguments: Sequence[str]) -> ArgumentParser:
    parser = _new_parser(description=_DESCRIPTION, prog="cmpe-se", version=__version__)
    subcommands = parser.add_subcommands(required=True)
    asked = next((word for word in arguments if not word.startswith("-")), None)
    for name, summary in COMMANDS.items():
        make = _train_parser if name == "train" else partial(_command_parser, name)
        subcommands.add_subcommand(name, make(arguments) if asked == name else _new_parser(), help=summary)
    return parser


def _command_parser(name: str, arguments: Sequence[str]) -> ArgumentParser:
    """The flags of a command: its function's parameters."""
    command = _new_parser(description=COMMANDS[name])
    command.add_function_arguments(_function(name), as_positional=True, skip={"images", "runs"})
    if name == "compare":
        _add_settings(command, arguments)
    elif name == "predict":  # a list of them, which no type says
        command.add_argument("images", type=str, nargs="+", help="image files and folders of them")
    elif name == "explore":
        command.add_argument(
            "runs", type=str, nargs="*", default=[], help="run folders; all finished ones in runs/ if left out"
        )
    elif name == "report":
        command.add_argument("--images", type=str, nargs="+", help="image files and folders to show the inside for")
    return command


def _train_parser(arguments: Sequence[str]) -> ArgumentParser:
    parser = _new_parser(
        description=_TRAIN_HELP, usage="%(prog)s [--recipe RECIPE | --resume RUN] [--SETTING VALUE ...]"
    )
    parser.add_argument(
        "--recipe", default=DEFAULT_RECIPE, help=f"{', '.join(recipe_names())}, or the path of a YAML file"
    )
    parser.add_argument("--resume", type=str | None, help="run folder to go on with, under its own settings")
    parser.add_argument("--output", type=str | None, help="run folder to make (default: runs/MODEL-DATA-seedN)")
    parser.add_class_arguments(TrainingConfig, as_group=False)
    parser.set_defaults(_recipe_values(arguments[1:]))
    return parser


def _add_settings(command: ArgumentParser, arguments: Sequence[str]) -> None:
    """A comparison's settings: those of a training run, but for what it varies."""
    from cmpe_se.commands.compare.compare import VARIED

    command.description = _COMPARE_HELP
    command.add_class_arguments(TrainingConfig, as_group=False, skip=set(VARIED))
    values = _recipe_values(arguments[1:])
    command.set_defaults({name: value for name, value in values.items() if name not in VARIED})


def _recipe_values(arguments: Sequence[str]) -> dict:
    """What the named recipe, or the run to resume, makes the defaults."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--recipe", default=DEFAULT_RECIPE)
    first_look.add_argument("--resume")
    try:
        named, _ = first_look.parse_known_args(arguments)
    except argparse.ArgumentError:
        return {}  # the whole parser will say what is wrong
    if named.resume:
        from cmpe_se.training.run_folder import RunFolder

        return asdict(RunFolder.open(named.resume).read_config())
    return read_recipe(named.recipe)


class _HelpFormatter(DefaultHelpFormatter):
    """Shows flags with dashes, as people type them."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        shown = super()._format_action_invocation(action)
        return shown.replace("_", "-") if action.option_strings else shown


def _new_parser(**settings) -> ArgumentParser:
    # An abbreviated --recipe would not be seen by the first look, and its recipe be lost.
    return ArgumentParser(exit_on_error=False, formatter_class=_HelpFormatter, allow_abbrev=False, **settings)


def _as_parsed(arguments: Sequence[str]) -> list[str]:
    """--batch-size=8 as --batch_size=8, the parameter's name, and a lone --flip as --flip=true."""
    parsed = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            argument = "--" + name[2:].replace("-", "_") + equals + value
            value_follows = following and not following.startswith("--")
            if argument[2:] in _BEFORE_WORDS:
                value_follows = following.lower() in ("true", "false")
            if argument[2:] in _SWITCHES and not value_follows:
                argument += "=true"
        parsed.append(argument)
    return parsed


def _complain(message: str, status: int) -> int:
    print(f"cmpe-se: {' '.join(message.split())}", file=sys.stderr)
    return status
