"""Histories made without training, for the tests of the figures."""

import time
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
import torch

import gradstat
from gradstat import History
from gradstat.bins import Bins
from gradstat.history.journal import Journal
from gradstat.record import GRAD, Record, RecordLayout, Row

LONG_NAMES = [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(12)]

Gradient = Callable[[int, int], torch.Tensor]


def falling(step: int, layer: int) -> torch.Tensor:
    """A gradient that is a tenth of the one of two layers before."""
    generator = torch.Generator().manual_seed(100 * step + layer)
    return torch.randn(50, generator=generator) * 10.0 ** (-layer / 2)


def append_rows(
    to: History | Journal,
    step: int,
    integers: np.ndarray,
    floats: np.ndarray,
    counts: np.ndarray,
    formats: np.ndarray | None = None,
    time_s: float | None = None,
) -> None:
    """Add a record to a history or a journal."""
    n_formats = 0 if formats is None else formats.shape[1]
    layout = RecordLayout(len(integers), n_formats, counts.shape[1])
    data = layout.pack(integers, floats, formats, counts)
    if isinstance(to, Journal):
        to.add(Record(step, time.time() if time_s is None else time_s, data))
    else:
        to.append(step, data, time_s=time_s)


def make_history(
    bins: Bins,
    layers: int | list[str] = 2,
    steps: int = 3,
    gradient: Gradient = falling,
    absent: Collection[tuple[int, int]] = (),
    kinds: Collection[str] = (GRAD,),
) -> History:
    """Record ``gradient(step, row)`` but for the absent ones, as `gradstat.watch` does.

    Each kind has a row for each layer.
    """
    layers = [f"{i}.weight" for i in range(layers)] if isinstance(layers, int) else layers
    rows = [Row(kind, layer) for kind in kinds for layer in layers]
    history = History(rows, bins)
    for step in range(steps):
        tensors = [gradient(step, layer) for layer in range(len(rows))]
        s = gradstat.statistics(tensors, bins)
        integers, floats, counts = (part.numpy() for part in (s.integers, s.floats, s.counts))
        for at, layer in absent:
            if at == step:
                integers[layer], floats[layer], counts[layer] = 0, np.nan, 0
        append_rows(history, step, integers, floats, counts)
    return history


def repeat_record(history: History, steps: int) -> History:
    """The newest record of a history as often as asked."""
    repeated = History(history.rows, history.bins)
    for step in range(steps):
        repeated.append(step, history.packed(history.find(-1)).data)
    return repeated


def begin_journal(
    path: Path, history: History, first_step: int | None = None, rank: int | None = None
) -> Journal:
    """A directory for the records of such a run, or of one of its two ranks."""
    like = History(history.rows, history.bins)
    like.rank, like.world = rank, None if rank is None else 2
    return Journal(path, like, first_step)


def write_steps(journal: Journal, history: History, *steps: int) -> None:
    """Put some records of a history on the disk, and what was logged at their steps."""
    for step in steps:
        journal.add(history.packed(history.find(step))._replace(time_s=float(step)))
        for name in history.scalars:
            at, values = history.scalar(name)
            for value in values[at == step].tolist():
                log(journal, name, step, value)
    journal.flush()


def log(journal: Journal, name: str, step: int, value: float) -> None:
    """Log a value in the run that a journal writes."""
    journal._like.logged.add(name, step, value)
    journal.write_soon()
