"""The command ``gradstat compare``: its arguments. `compare_text` has what it prints."""

from __future__ import annotations

import argparse
from pathlib import Path

from gradstat.cli.arguments import add_run
from gradstat.escaping import escaped

HELP = "compare two runs layer by layer"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run(parser)
    add_run(parser, "other")
    parser.add_argument("--all", action="store_true", help="every layer of a deep network")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="also draw the curves of both into a PNG"
    )


def run(options: argparse.Namespace) -> int:
    """Print both runs side by side, and draw them if asked to."""
    from gradstat.cli import compare_text
    from gradstat.cli.runs import check_output, load, run_name

    paths = (options.run_path, options.other)
    names = [run_name(path) for path in paths]
    if names[0] == names[1]:
        names = [str(path) for path in paths]
    if names[0] == names[1]:
        raise ValueError(f"compare needs two runs; both are {names[0]}")
    if options.output:
        for path in paths:
            check_output(path, options.output)
    runs = {name: load(path) for name, path in zip(names, paths, strict=True)}
    print(compare_text.compare(runs, every_layer=options.all))
    if options.output:
        compare_text.draw(runs, options.output)
        print(f"\n{escaped(options.output)}")
    return 0
