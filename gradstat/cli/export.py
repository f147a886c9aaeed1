"""The command ``gradstat export``: its arguments, and what it writes (`TARGETS`)."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from gradstat.cli.arguments import add_run
from gradstat.escaping import escaped

# Whatever imports PyTorch is imported when it is used.
if TYPE_CHECKING:
    from gradstat.history import History

Progress: TypeAlias = Callable[[int], object]
Tags: TypeAlias = Literal["layer", "kind"]
Target: TypeAlias = Callable[..., Path]

HELP = "write a run for other programs"


def _parquet(history: History, folder: Path, name: str, progress: Progress) -> Path:
    from gradstat import tables

    tables.to_parquet(history, folder / f"{name}.parquet", progress=progress)
    return folder / f"{name}.parquet"


def _csv(history: History, folder: Path, name: str, progress: Progress) -> Path:
    from gradstat import tables

    tables.to_csv(history, folder / f"{name}.csv", progress=progress)
    return folder / f"{name}.csv"


def _tensorboard(
    history: History, folder: Path, name: str, progress: Progress, tags: Tags = "layer"
) -> Path:
    from gradstat.integrations import tensorboard

    # Every point would be there twice.
    if list((folder / name).glob("events.out.tfevents.*")):
        raise ValueError(f"{folder / name} holds event files already")
    tensorboard.write(history, folder / name, tags=tags, progress=progress)
    return folder / name


def _wandb(
    history: History, folder: Path, name: str, progress: Progress, tags: Tags = "layer"
) -> Path:
    from gradstat.integrations import wandb

    return wandb.write(history, folder, name, tags=tags, progress=progress)


# Each is given the history, the directory, the run's name and what to call with the number of
# records that are done, and returns what it wrote.
TARGETS: dict[str, Target] = {
    "parquet": _parquet,
    "csv": _csv,
    "tensorboard": _tensorboard,
    "wandb": _wandb,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    add_run(parser)
    parser.add_argument(
        "--to", required=True, choices=list(TARGETS), help="what to write; wandb: an offline run"
    )
    parser.add_argument(
        "--tags",
        choices=["layer", "kind"],
        help="of tensorboard and wandb: kind names them as wandb.watch, gradients/LAYER",
    )
    parser.add_argument(
        "directory", metavar="DIR", type=Path, help="where to; made if it is not there"
    )


def run(options: argparse.Namespace) -> int:
    """Write the run."""
    from tqdm import tqdm

    from gradstat.cli.runs import check_output, load, run_name

    write = TARGETS[options.to]
    if options.tags is not None:
        if options.to not in ("tensorboard", "wandb"):
            raise ValueError(f"--tags needs --to tensorboard or wandb; --to is {options.to}")
        write = functools.partial(write, tags=options.tags)
    name = run_name(options.run_path)
    check_output(options.run_path, options.directory / f"{name}.{options.to}")
    history = load(options.run_path)
    options.directory.mkdir(parents=True, exist_ok=True)
    # Silent where stderr is not a terminal.
    with tqdm(total=len(history), desc=options.to, unit="record", disable=None) as bar:
        written = write(history, options.directory, name, bar.update)
    print(escaped(written))
    return 0
