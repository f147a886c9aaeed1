"""The command ``gradstat tail``: its arguments. `tail_text` has what it prints."""

from __future__ import annotations

import argparse

from gradstat.cli.arguments import add_run

HELP = "show a run's newest record as it is written, and wait for the next"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run(parser)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks")
    parser.add_argument("--updates", type=int, help="stop after so many tables")


def run(options: argparse.Namespace) -> int:
    """Print tables until Ctrl-C."""
    if not options.interval > 0:
        raise ValueError(f"--interval needs a number of seconds above 0; it is {options.interval}")
    from gradstat.cli import tail_text

    try:
        tail_text.tail(options.run_path, options.interval, options.updates)
    except KeyboardInterrupt:
        print()
    return 0
