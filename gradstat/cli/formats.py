"""The command ``gradstat formats``: its arguments. `formats_text` has what it prints."""

from __future__ import annotations

import argparse

from gradstat.cli.arguments import add_run
from gradstat.thresholds import Thresholds

HELP = "say what narrow number formats would do to each layer, and which one fits"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run(parser)
    parser.add_argument(
        "--snr",
        type=float,
        default=Thresholds().format_snr,
        metavar="DB",
        help="signal-to-noise ratio to keep, by default %(default)g dB",
    )
    parser.add_argument("--all", action="store_true", help="every layer of a deep network")
    parser.add_argument(
        "--scales", action="store_true", help="exponents of the smallest and the largest scale too"
    )


def run(options: argparse.Namespace) -> int:
    """Print the table of formats."""
    from gradstat.cli import formats_text, text
    from gradstat.cli.runs import load

    thresholds = Thresholds(format_snr=options.snr)
    history = load(options.run_path)
    if not history.formats:
        raise ValueError(
            f"formats needs a run of watch(formats=...); {options.run_path} has measured none"
        )
    print(text.heading(str(options.run_path), history))
    shown = formats_text.formats(
        history, thresholds, every_layer=options.all, scales=options.scales
    )
    print(shown)
    return 0
