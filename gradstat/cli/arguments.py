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


def add_runs(parser: argparse.ArgumentParser, what: str) -> None:
    """Ask for runs, one or more; ``what`` says what each may be."""
    parser.add_argument("run_paths", metavar="RUN", type=Path, nargs="+", help=what)
