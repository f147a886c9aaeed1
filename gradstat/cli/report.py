"""The command ``gradstat report``: its arguments, and where the page is written."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.arguments import add_run
from gradstat.escaping import escaped

HELP = "write a run as an HTML page to look around in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run(parser)
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        type=Path,
        help="the page; by default RUN's name and .html",
    )


def run(options: argparse.Namespace) -> int:
    """Write the page."""
    from gradstat.cli.runs import check_output, load, run_name

    name = run_name(options.run_path)
    path = options.output or Path(f"{name}.html")
    check_output(options.run_path, path)
    load(options.run_path).report(path, title=name)
    print(escaped(path))
    return 0
