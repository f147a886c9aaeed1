"""The command ``gradstat diagnose``: its arguments, and its exit code."""

from __future__ import annotations

import argparse
import dataclasses

from gradstat.choices import one_of
from gradstat.cli.arguments import add_run
from gradstat.thresholds import Thresholds
from gradstat.util import json_text

HELP = "say what is wrong with a run's gradients; exit code 1 for something severe"
_SEVERE = 1  # exit code


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run(parser)
    parser.add_argument("--all", action="store_true", help="also where many layers show the same")
    parser.add_argument("--json", action="store_true", help="print the findings as a JSON list")
    names = ", ".join(field.name for field in dataclasses.fields(Thresholds))
    parser.add_argument(
        "--threshold",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        type=_threshold,
        help=f"another threshold; may be repeated. Names: {names}",
    )


def _threshold(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    names = [field.name for field in dataclasses.fields(Thresholds)]
    if name not in names:
        raise argparse.ArgumentTypeError(
            f"needs NAME=VALUE with a name, {one_of(name, names)}; got {text!r}"
        )
    try:
        return name, int(value) if name == "window" else float(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"needs a number; got {text!r}") from error


def run(options: argparse.Namespace) -> int:
    """Print the findings."""
    from gradstat.cli import text
    from gradstat.cli.runs import load

    history = load(options.run_path)
    findings = history.diagnose(Thresholds(**dict(options.threshold)))
    if options.json:
        print(json_text([dataclasses.asdict(finding) for finding in findings], indent=1))
    else:
        print(text.heading(str(options.run_path), history))
        print(text.findings(findings, most=None if options.all else 3))
    return _SEVERE if any(each.severity == "severe" for each in findings) else 0
