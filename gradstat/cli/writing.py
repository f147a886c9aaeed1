"""The commands that write files of a run: ``export``, ``report`` and ``merge``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from gradstat import tables
from gradstat.cli.printing import heading
from gradstat.cli.runs import check_output, load, run_name
from gradstat.history import History
from gradstat.util import escaped


def export(options: argparse.Namespace) -> int:
    """Write a run for other programs."""
    if options.tags is not None and options.to not in ("tensorboard", "wandb"):
        raise ValueError(f"--tags needs --to tensorboard or wandb; --to is {options.to}")
    name = run_name(options.run_path)
    check_output(options.run_path, options.directory / f"{name}.{options.to}")
    history = load(options.run_path)
    options.directory.mkdir(parents=True, exist_ok=True)
    # Silent where stderr is not a terminal.
    with tqdm(total=len(history), desc=options.to, unit="record", disable=None) as bar:
        written = _export(history, options, name, bar.update)
    print(escaped(written))
    return 0


def _export(
    history: History, options: argparse.Namespace, name: str, progress: Callable[[int], object]
) -> Path:
    """Write a run, and return what was written."""
    folder, to = options.directory, options.to
    tags: Literal["layer", "kind"] = options.tags or "layer"
    path: Path = folder / (f"{name}.{to}" if to in ("parquet", "csv") else name)
    if to == "parquet":
        tables.to_parquet(history, path, progress=progress)
    elif to == "csv":
        tables.to_csv(history, path, progress=progress)
    elif to == "tensorboard":
        from gradstat.integrations import tensorboard

        # Every point would be there twice.
        if list(path.glob("events.out.tfevents.*")):
            raise ValueError(f"{path} holds event files already")
        tensorboard.write(history, path, tags=tags, progress=progress)
    else:
        from gradstat.integrations import wandb

        return wandb.write(history, folder, name, tags=tags, progress=progress)
    return path


def report(options: argparse.Namespace) -> int:
    """Write a run as an HTML page."""
    name = run_name(options.run_path)
    path = options.output or Path(f"{name}.html")
    check_output(options.run_path, path)
    load(options.run_path).report(path, title=name)
    print(escaped(path))
    return 0


def merge(options: argparse.Namespace) -> int:
    """Write the ranks' records as one run."""
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
    print(heading(str(options.output), history))
    return 0
