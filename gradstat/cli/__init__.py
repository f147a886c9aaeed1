"""The command ``gradstat``: what a run's record says, without writing a script.

Each command is a file of its name, which imports PyTorch only when it runs: that takes a second or
two. What a command prints is in ``NAME_text.py`` where that is long, and in `text` what several do.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn, Protocol

from gradstat.cli import compare, diagnose, export, formats, info, merge, report, serve, tail
from gradstat.escaping import escaped
from gradstat.version import __version__

_FAILED = 2  # exit code


class _Command(Protocol):
    """The file of a command: its line in the help, its arguments, and what it does."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, options: argparse.Namespace) -> int: ...


COMMANDS: dict[str, _Command] = {
    "info": info,
    "diagnose": diagnose,
    "formats": formats,
    "export": export,
    "report": report,
    "compare": compare,
    "merge": merge,
    "tail": tail,
    "serve": serve,
}


class _Parser(argparse.ArgumentParser):
    """Parses arguments, and shows what a wrong one holds without obeying it."""

    def error(self, message: str) -> NoReturn:
        super().error(escaped(message))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments; by default those of the process.

    Returns:
        0; 1 when ``diagnose`` finds something severe; 2 when a command cannot be carried out, with
        a line on stderr that says why; 130 when Ctrl-C ended it.

    Raises:
        SystemExit: arguments that are no command, or ``--help``.
    """
    options = _parser().parse_args(argv)
    before, warnings.formatwarning = warnings.formatwarning, _one_line
    out, errors = sys.stdout, sys.stdout.errors
    try:
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # as stderr: a terminal may know ASCII alone
        code: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has read enough, as in `gradstat diagnose RUN | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        return _fail(options, f"{error.strerror}: {error.filename}" if error.filename else error)
    except (ImportError, ValueError) as error:
        return _fail(options, error)
    finally:
        warnings.formatwarning = before
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors=errors)
    return code


def _one_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning without the line of code that gives it."""
    return f"gradstat: warning: {escaped(message)}\n"


def _fail(options: argparse.Namespace, why: object) -> int:
    print(f"gradstat {options.command}: error: {escaped(why)}", file=sys.stderr)
    return _FAILED


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradstat",
        description="Read the gradient statistics of a training run.",
        epilog="RUN is a file that History.save() wrote, or a directory that watch(path=...) "
        "writes. Exit codes: 0; 1 when diagnose finds something severe; 2 for an error.",
    )
    parser.add_argument("--version", action="version", version=f"gradstat {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        added = commands.add_parser(name, help=command.HELP, description=command.HELP)
        command.add_arguments(added)
        added.set_defaults(run=command.run)
    return parser
