"""The command ``gradstat merge``: its arguments, and the file that it writes."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.arguments import add_runs

HELP = "put what the ranks of a run wrote into one file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_runs(parser, "directory that all ranks of a run write, or what each of them wrote")
    parser.add_argument(
        "-o", "--output", required=True, metavar="FILE", type=Path, help="the .npz file to write"
    )
    parser.add_argument(
        "--not-replicated",
        action="store_true",
        help="count what each rank has as its own, but for replicas on one mesh",
    )


def run(options: argparse.Namespace) -> int:
    """Write the ranks' records as one run."""
    from gradstat.cli import text
    from gradstat.cli.runs import check_output, load
    from gradstat.history import History

    paths: list[Path] = options.run_paths
    for path in paths:
        check_output(path, options.output)
    if options.not_replicated:
        history = History.merge(paths, replicated=False)
    else:
        history = load(paths[0]) if len(paths) == 1 else History.merge(paths)
    if not len(history):
        raise ValueError("merge needs ranks with a step in common; they have none")
    history.save(options.output)
    print(text.heading(str(options.output), history))
    return 0
