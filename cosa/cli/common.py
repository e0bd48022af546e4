"""What all commands share: exit codes, one line for a mistake, the parser, a flag per setting."""

from __future__ import annotations

import argparse
import inspect
import os
import signal
import sys
import typing
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from cosa.cli.console import print_error
from cosa.config import Config, fields, flatten, nearest
from cosa.tracking import TrackingError
from cosa.training.stop import StoppedError

if TYPE_CHECKING:
    from cosa.storage.model_files import NetworkName, StoredModel

MISTAKE, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
"""Exit codes: what the user can put right, a run that broke, Ctrl-C, SIGTERM."""


def run_command(
    name: str,
    command: Callable[[str, Sequence[str]], int],
    arguments: Sequence[str] | None = None,
    *,
    goes_on: str = "",
) -> int:
    """Run a command; what the user can put right becomes one line, and an exit code that is not 0.

    Args:
        name: As the command is called.
        command: Takes that name and the arguments; its value is the exit code.
        arguments: What stands behind the name on the command line; by default that of the process.
        goes_on: What an interrupted command says of going on.
    """
    signal.signal(signal.SIGTERM, _terminate)
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        return command(name, arguments)
    except KeyboardInterrupt:
        print_error(f"{name}: interrupted" + (f"; {goes_on}" if goes_on else ""))
        return INTERRUPTED
    except StoppedError as error:
        print_error(f"{name}: {error}")
        return TERMINATED
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "--traceback" in arguments:
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print_error(f"{name}: error: {text}")
        return FAILED if isinstance(error, RuntimeError) and not isinstance(error, TrackingError) else MISTAKE


def _terminate(number: int, frame: object) -> NoReturn:  # noqa: ARG001 (the signal's own signature)
    """End in order when told to: a job that is stopped closes its tracked run."""
    raise SystemExit(128 + number)


class Parser(argparse.ArgumentParser):
    """Reports a bad command line as every other mistake is reported, without the usage of 80 flags."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def flag(self, name: str, metavar: str, text: str, **options: Any) -> None:
        """Add a flag or an argument that takes a value; `text` is its help."""
        self.add_argument(name, metavar=metavar, help=text, **options)

    def switch(self, name: str, text: str) -> None:
        """Add a flag that is given or not; `text` is its help."""
        self.add_argument(name, action="store_true", help=text)

    def traceback(self) -> None:
        """Add the flag that has `run_command` show where an error arose."""
        self.switch("--traceback", "show where in the code an error arose")

    def source(self) -> None:
        """Add what names the trained network a command works with."""
        places = "a run's folder, a checkpoint, an exported model's folder, or an MLflow run id"
        self.flag("source", "SOURCE", places)
        store = "MLflow store of a run id (default MLFLOW_TRACKING_URI, else runs/mlflow.db)"
        self.flag("--tracking-uri", "URI", store)

    def experiment(self) -> None:
        """Add what names the experiment of MLflow."""
        text = "MLflow experiment (default MLFLOW_EXPERIMENT_NAME, else cosa)"
        self.flag("--experiment", "NAME", text, default=os.environ.get("MLFLOW_EXPERIMENT_NAME") or "cosa")

    def system_metrics(self) -> None:
        """Add the flag that leaves the machine's metrics out."""
        self.switch("--no-system-metrics", "leave the load of CPU, memory and GPUs out of MLflow")

    def settings(self, base: Config, only: Sequence[str] = ()) -> None:
        """Add a flag per setting, by section, with the defaults of `base`; `only` these where given."""
        groups: dict[str, argparse._ArgumentGroup] = {}
        for name, default in flatten(base).items():
            section = name.partition(".")[0]
            if only and section not in only and name not in only:
                continue
            if section not in groups:
                title = first_line(type(getattr(base, section)))
                groups[section] = self.add_argument_group(f"{section}: {title}")
            known = fields()[name]
            kind = _kind(known.annotation)
            text = f"{known.description} [{kind}; default {as_text(default) or 'empty'}]".replace("%", "%%")
            metavar = kind if "|" in kind else "VALUE"
            groups[section].add_argument(f"--{name}", dest=name, metavar=metavar, help=text)

    def error(self, message: str) -> NoReturn:
        """Called by argparse."""
        raise ValueError(f"{message}; see {self.prog} --help")

    def parse_known(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all arguments; an unknown flag is answered with the nearest known one."""
        parsed, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [flag for action in self._actions for flag in action.option_strings]
            name = unknown[0].partition("=")[0]
            hint = nearest(name, known) if name.startswith("-") else ""
            raise ValueError(
                f"argument must be one that exists, got {name!r}{hint or f'; see {self.prog} --help'}"
            )
        return parsed


def whole_number(text: str) -> int:
    """Reads a flag's value; argparse tells the user what was wrong with it."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number >= 0, got {text!r}")
    return int(text)


def find_model(given: argparse.Namespace, network: NetworkName | None = None) -> StoredModel:
    """What `Parser.source` lets the user name."""
    from cosa.model import resolve_model

    return resolve_model(given.source, network=network, tracking_uri=store_of(given))


def store_of(given: argparse.Namespace) -> str:
    """The tracking URI that the user means; by default that of sweeps."""
    return given.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///runs/mlflow.db"


def first_line(documented: object) -> str:
    """The first line of a docstring, without its full stop."""
    return (inspect.getdoc(documented) or "").partition("\n")[0].rstrip(".")


_KINDS = {bool: "true|false", int: "whole number", float: "number", str: "text"}


def _kind(kind: Any) -> str:
    """How `--help` calls the type of a setting."""
    if typing.get_origin(kind) is Literal:
        return "|".join(typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return f"{_KINDS[typing.get_args(kind)[0]]}s with commas between"
    return _KINDS[kind]


def as_text(value: object) -> str:
    """A setting's value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def changed_settings(given: argparse.Namespace) -> dict[str, str]:
    """The settings that were given as flags."""
    return {name: value for name, value in vars(given).items() if name in fields() and value is not None}
