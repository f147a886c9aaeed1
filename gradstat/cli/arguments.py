"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_run(parser: argparse.ArgumentParser, name: str = "run_path") -> None:
    """Ask for a run."""
    parser.add_argument(
        name,
        metavar="RUN",
        type=Path,
        help="file that History.save() wrote, or directory that watch(path=...) writes",
    )
