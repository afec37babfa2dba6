"""A command of ``cmpe-se``: it is a function of the library, and its flags are that function's parameters."""

import argparse
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any

import docstring_parser
from jsonargparse import ArgumentError, ArgumentParser, DefaultHelpFormatter, Namespace

from cmpe_se.errors import UserError
from cmpe_se.moved import renamed
from cmpe_se.training.config import DEFAULT_RECIPE, TrainingConfig, read_recipe
from cmpe_se.training.interruption import Interrupted
from cmpe_se.training.launching import is_main_process, is_one_of_several, lost, may_speak, processes_left_out
from cmpe_se.utils.packages import import_asked_for
from cmpe_se.utils.signals import end_with_parent, handled, raised
from cmpe_se.utils.terminal import print_plainly
from cmpe_se_command import complain

_FAILED, _USAGE, _INTERRUPTED = 1, 2, 130
_NAMED_RUN = "named_run"
_IMAGES_OR_RUNS = str | Sequence[str]
"""Type of a parameter that is one path or several: as many as are given on a command line."""


def main(arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status.

    ``cmpe_se_command.main``, the entry point, answers ``--help`` and ``--version`` before PyTorch is imported, and
    calls this for the rest.

    Args:
        arguments: of the command line; the first is a command's name.
    """
    command, *arguments = arguments
    print_plainly()
    end_with_parent()
    with _one_warns():
        return _status(command, arguments)


@contextmanager
def _one_warns() -> Iterator[None]:
    """Of several processes the main one logs warnings. Who calls :func:`main` as a function has its own level back."""
    logger = logging.getLogger("cmpe_se")
    before = logger.level
    if not is_main_process():
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _status(command: str, arguments: Sequence[str]) -> int:
    """Run a command; returns the exit status, with whatever went wrong in one line."""
    try:
        import_asked_for()
        function = _function(command)
        arguments = _as_parsed(function, arguments)
        parsed = _parser(command, arguments).parse_args(arguments)
        if command == "train" and (warning := processes_left_out()):
            complain(warning, 0)
        with raised():
            result = _as_command(command, function)(**_values(function, parsed, arguments))
            _flush()
        if message := _complaint_about(command, result):
            return _say(f"error: {message}", _FAILED)
        return 0
    except ArgumentError as error:
        return _say(f"{error.message or error} (cmpe-se {command} --help)", _USAGE)
    except Interrupted as interruption:
        return _say(str(interruption), _INTERRUPTED)
    except KeyboardInterrupt as stop:
        if failure := _failed_before(stop):
            return _say(f"error: {failure}", _FAILED)
        return _say("stopped", _INTERRUPTED)
    except UserError as error:
        return _say(f"error: {error}", _FAILED)
    except BrokenPipeError:  # `cmpe-se models | head`
        sys.stderr.close()
        return 0
    except OSError as error:  # a full disk, or no permission, in a place without a message of its own
        return _say(f"error: {error}", _FAILED)
    except Exception as error:
        if reason := lost(error):
            return _say(f"error: {reason}", _FAILED)
        if not may_speak():  # the same fault, or what follows from another process's end
            return _FAILED
        raise


def _failed_before(stop: BaseException) -> UserError | None:
    """Of several processes: the error that was on its way when a launcher stopped this one, as another had failed."""
    error = stop.__context__
    while is_one_of_several() and error is not None:
        if isinstance(error, UserError):
            return error
        error = error.__context__
    return None


def _say(message: str, status: int) -> int:
    """Print why a command ends, unless another process of the same run has said so; returns the status."""
    with handled(lambda *_: None):  # a launcher ends the others where one has failed: that is no second reason
        return complain(message, status) if may_speak() else status


def _flush() -> None:
    """Write what is still in stdout's buffer, while there is a sentence for a disk that is full."""
    try:
        sys.stdout.flush()
    except OSError as error:
        with suppress(OSError, ValueError):  # else Python tries once more as it ends, and prints a trace
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            raise
        raise UserError(f"cannot write to the standard output: {error.strerror}") from None


def _function(command: str) -> Callable:
    """Only the command that is asked for is imported: all of them together take as long as PyTorch."""
    return getattr(import_module(f"cmpe_se.commands.{command}"), command)


def _as_command(command: str, function: Callable) -> Callable:
    """What a command line runs: its module may have a function that keeps nothing of what it prints."""
    return getattr(import_module(f"cmpe_se.commands.{command}"), "as_command", function)


def _complaint_about(command: str, result: Any) -> str | None:
    """What is wrong with a result that is there all the same, where the command's module has a function for it."""
    look = getattr(import_module(f"cmpe_se.commands.{command}"), "complaint", None)
    return look(result) if look else None


def _parameters(function: Callable) -> list[inspect.Parameter]:
    return [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]


def _takes_settings(function: Callable) -> bool:
    """Whether a command takes the settings of a training run beside its own parameters: as ``**settings``."""
    return any(one.kind is one.VAR_KEYWORD for one in inspect.signature(function).parameters.values())


def _switches(function: Callable) -> set[str]:
    """Names of the flags that need no value, which are those of parameters that are, or may be, true or false."""
    own = {one.name for one in _parameters(function) if one.annotation in (bool, bool | str | None)}
    settings = fields(TrainingConfig) if _takes_settings(function) else ()
    return own | {field.name for field in settings if field.type in (bool, "bool")}


def _values(function: Callable, parsed: Namespace, arguments: Sequence[str]) -> dict:
    """Arguments of the command's function."""
    values = vars(parsed)
    if _NAMED_RUN in values:
        named, word = values.pop(_NAMED_RUN), values.pop("run", None)
        if named and word:
            raise UserError(f"two runs are named, {word} and {named}; name one")
        if named or word:
            values["run"] = named or word
    if _takes_settings(function):  # what was typed wins over the recipe, and says more than its default would
        typed = {argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")}
        values = {name: value for name, value in values.items() if name in typed}
    return values


def _parser(command: str, arguments: Sequence[str]) -> ArgumentParser:
    """A command's parser: the parameters of its function, explained by the function's docstring."""
    function = _function(command)
    documented = docstring_parser.parse(inspect.cleandoc(function.__doc__ or ""))
    description = "\n\n".join(filter(None, [documented.short_description, documented.long_description]))
    # An abbreviated --recipe would not be seen by the first look, and its recipe be lost.
    parser = ArgumentParser(
        prog=f"cmpe-se {command}",
        description=description,
        exit_on_error=False,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    several = [one for one in _parameters(function) if one.annotation in (_IMAGES_OR_RUNS, _IMAGES_OR_RUNS | None)]
    run = inspect.signature(_as_command(command, function)).parameters.get("run")
    run_is_optional = run is not None and run.default is not run.empty
    skipped = [one.name for one in several] + ["settings"] * _takes_settings(function) + ["run"] * run_is_optional
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip={*skipped})
    helps = {param.arg_name: param.description for param in documented.params}
    if run_is_optional:
        if not any(one.kind is one.POSITIONAL_OR_KEYWORD for one in several):  # else it is the first word of the list
            parser.add_argument("run", type=str, nargs="?", help=helps["run"])
        parser.add_argument("--run", dest=_NAMED_RUN, type=str, metavar="RUN", help=helps["run"])
    for one in several:  # a list on the command line, which no type says
        required, positional = one.default is one.empty, one.kind is not one.KEYWORD_ONLY
        options: dict[str, Any] = {} if required else {"default": list(one.default) if positional else one.default}
        if run_is_optional and positional:
            parser.usage = f"%(prog)s [--FLAG VALUE ...] [run] {one.name} [{one.name} ...]"
        parser.add_argument(
            one.name if positional else f"--{one.name}",
            type=str,
            nargs="+" if required or not positional else "*",
            help=helps[one.name],
            **options,
        )
    if _takes_settings(function):
        _add_settings(parser, command, arguments)
    return parser


def _add_settings(parser: ArgumentParser, command: str, arguments: Sequence[str]) -> None:
    """The settings of a training run; not those that a comparison varies by itself."""
    varied = set()
    if command == "compare":
        from cmpe_se.commands.compare.compare import VARIED

        varied = set(VARIED)
    parser.usage = "%(prog)s [--recipe RECIPE] [--SETTING VALUE ...]"
    parser.add_class_arguments(TrainingConfig, skip=varied)
    parser.set_defaults({name: value for name, value in _recipe_values(arguments).items() if name not in varied})


def _recipe_values(arguments: Sequence[str]) -> dict:
    """What the named recipe, or the run to resume, makes the defaults."""
    first_look = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first_look.add_argument("--recipe", default=DEFAULT_RECIPE)
    first_look.add_argument("--resume")
    try:
        named, _ = first_look.parse_known_args(arguments)
    except argparse.ArgumentError:
        return {}  # the whole parser will say what is wrong
    if is_one_of_several():
        return {}  # one machine may have it; a process that refused it here would leave the others waiting for itself
    if named.resume:
        from cmpe_se.training.run_folder import RunFolder

        return asdict(RunFolder.open(named.resume).read_config())
    return read_recipe(named.recipe)


class _HelpFormatter(DefaultHelpFormatter):
    """Flags with dashes, as people type them, and docstrings without their markup."""

    def _format_usage(self, *args, **kwargs) -> str:
        return _with_dashes(super()._format_usage(*args, **kwargs))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return _with_dashes(super()._format_action_invocation(action))

    def _split_lines(self, text: str, width: int) -> list[str]:
        return super()._split_lines(text.replace("``", "`"), width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        paragraphs = text.replace("``", "`").split("\n\n")
        return "\n\n".join(super(_HelpFormatter, self)._fill_text(one, width, indent) for one in paragraphs)


def _with_dashes(text: str) -> str:
    return re.sub(r"--\w+", lambda flag: flag[0].replace("_", "-"), text)


def _words_together(arguments: Sequence[str]) -> list[str]:
    """Words behind the flags: argparse takes those of one list from one place alone."""
    flags: list[str] = []
    words: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument == "--":
            words += rest
        elif argument.startswith("--"):
            flags.append(argument)
            if "=" not in argument and argument != "--help" and (value := next(rest, None)) is not None:
                flags.append(value)
        else:
            (flags if argument.startswith("-") else words).append(argument)
    return [*flags, *(["--"] if words else []), *words]


def _as_parsed(function: Callable, arguments: Sequence[str]) -> list[str]:
    """--batch-size=8 as --batch_size=8, the parameter's name, and a lone --flip as --flip=true."""
    switches, old_names = _switches(function), renamed(function)
    words_follow = any(one.kind is one.POSITIONAL_OR_KEYWORD for one in _parameters(function))
    parsed = []
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            name = name[2:].replace("-", "_")
            if name in old_names:
                complain(_with_dashes(f"--{name} is --{old_names[name]} now"), 0)
            argument = "--" + old_names.get(name, name) + equals + value
            value_follows = following and not following.startswith("--")
            if words_follow:  # else whatever follows is meant as the value, even a wrong one
                value_follows = following.lower() in ("true", "false")
            if argument[2:] in switches and not value_follows:
                argument += "=true"
        parsed.append(argument)
    words = [one for one in _parameters(function) if one.kind is one.POSITIONAL_OR_KEYWORD]
    return _words_together(parsed) if len(words) > 1 and words[-1].annotation == _IMAGES_OR_RUNS else parsed
