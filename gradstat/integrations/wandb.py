"""`log`, `write`, `writer`: a run in Weights & Biases, afterwards or while it goes on."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np

from gradstat.history import History, check_history
from gradstat.integrations import viewers
from gradstat.record import NOUNS, UPDATE
from gradstat.recording.transfers import RunWriter
from gradstat.util import Array, evenly_spread

try:
    import wandb
    from wandb.sdk.wandb_run import Run  # older ones have no wandb.Run
except ImportError as error:
    raise ImportError("gradstat needs Weights & Biases here: pip install wandb") from error

_MAX_BUCKETS = 512  # wandb.Histogram takes no more
_MAX_POINTS = 10_000  # of one custom chart
_STEP = "gradients/step"  # what the run's values are drawn against
_log10 = np.errstate(divide="ignore")(np.log10)
_COLUMNS = ("layer", "numel", "mean", "std", "rms", "l2", "zero_fraction", "nonfinite")


def log(
    history: History,
    run: Run,
    *,
    tags: Literal["layer", "kind"] = "layer",
    max_records: int | None = 100,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Log histograms of each layer, charts and tables to a run, named as ``docs/viewers.md`` lists.

    ``scalars/NAME`` is what was logged, such as the loss, against ``gradients/step``: all values,
    or 10,000 evenly spread; the last one of a step that has several. A layer without a gradient in
    a step has no histogram there. The run's own step goes up by one for each step that is logged.

    Args:
        history: with one record at least.
        run: what ``wandb.init()`` returned, online or offline; not finished here.
        tags: what histograms are called: ``"layer"``, ``gradients/histogram/LAYER``, or ``"kind"``,
            ``gradients/LAYER``, as by ``wandb.watch``.
        max_records: most records whose histograms are logged, evenly spread, the newest among them;
            ``None`` logs all.
        progress: called with the number of further records that are done or left out.

    Raises:
        TypeError, ValueError: an argument of another kind, no records, ``max_records`` < 1.
    """
    history = check_history("log", history)
    viewers.check_tags("log", tags)
    steps = set(viewers.chosen_steps("log", history, max_records))
    _check_run("log", run)
    _define_metrics(run, history.kinds, tags)
    logged = _scalars(history)
    for step in viewers.counted(history, sorted({*steps, *logged}), progress):
        histograms = _histograms(history, step, tags) if step in steps else {}
        run.log({_STEP: step} | logged.get(step, {}) | histograms)
    run.log(_summary(history))


def writer(run: Run, *, tags: Literal["layer", "kind"] = "layer", commit: bool = True) -> RunWriter:
    """A sink for `gradstat.watch` that logs to a run while it goes on, under the names of `log`.

    All that belongs to one step is logged together, once a later step begins. The charts and tables
    follow when the watch is closed, which must be before the run is finished. Should logging fail,
    a warning says so and the training goes on. In a distributed run give it to one rank.

    Args:
        run: as for `log`.
        tags: as for `log`.
        commit: whether each step is a row of its own, by which the run's own step goes up. With
            ``False`` it becomes part of the row that your next ``run.log()`` makes, as
            ``wandb.watch`` does: for those who number their rows by ``run.log(..., step=n)``. Log
            at each step then, since a later step replaces what still waits for a row.

    Raises:
        TypeError, ValueError: an argument of another kind, other tags.
    """
    viewers.check_tags("writer", tags)
    _check_run("writer", run)
    if not isinstance(commit, bool):
        raise TypeError(f"writer() needs True or False; commit is {commit!r}")
    return _WandbWriter(run, tags, commit)


class _WandbWriter(RunWriter):
    def __init__(self, run: Run, tags: str, commit: bool) -> None:
        super().__init__("wandb.writer()")
        self._run, self._tags, self._commit = run, tags, commit
        self._row: dict[str, object] = {}  # of the newest step, to which more may come

    def start(self, history: History, first_step: int | None) -> None:
        _define_metrics(self._run, history.kinds, self._tags)
        # So it comes before wandb finishes the run, in a function that was registered earlier.
        atexit.register(self.end_run)

    def write_record(self, record: History, step: int) -> None:
        self._add(step, _histograms(record, step, self._tags))

    def write_scalar(self, name: str, step: int, value: float) -> None:
        self._add(step, {f"scalars/{name}": value})

    def end(self, history: History) -> None:
        atexit.unregister(self.end_run)
        self._log_row()
        if len(history):
            self._run.log(_summary(history.snapshot()), commit=self._commit)

    def _add(self, step: int, values: dict[str, object]) -> None:
        if self._row.get(_STEP) != step:
            self._log_row()
            self._row = {_STEP: step}
        self._row |= values

    def _log_row(self) -> None:
        row, self._row = self._row, {}
        if row:
            self._run.log(row, commit=self._commit)


def write(
    history: History,
    folder: str | os.PathLike[str],
    name: str,
    *,
    tags: Literal["layer", "kind"] = "layer",
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write an offline run, which ``wandb sync`` sends, and return its folder.

    It has a name in the project ``gradstat``. In the folder, which is made if it is not there,
    wandb makes its own folder ``wandb``. The other arguments are as for `log`.

    Raises:
        ValueError: no records, other tags, or another run is going on in this process: use `log`.
    """
    history = check_history("write", history)
    viewers.check_tags("write", tags)
    if wandb.run is not None:
        raise ValueError(f"write() needs a process without a run; {wandb.run.id} is going on")
    Path(folder).mkdir(parents=True, exist_ok=True)
    settings = wandb.Settings(mode="offline", silent=True, console="off")
    with wandb.init(project="gradstat", name=name, dir=folder, settings=settings) as run:
        log(history, run, tags=tags, progress=progress)
        written = Path(run.dir).parent
    # Its other process may still be writing when the run is finished, not when it has ended.
    wandb.teardown()
    return written


def _check_run(function: str, run: object) -> None:
    if not isinstance(run, Run):
        raise TypeError(f"{function}() needs a run of wandb.init(); run is {type(run).__name__}")


def _define_metrics(run: Run, kinds: list[str], tags: str) -> None:
    run.define_metric(_STEP, hidden=True)
    for kind in dict.fromkeys(kinds):
        names = f"{_histogram_name(kind, tags)}*"
        run.define_metric(names, step_metric=_STEP, hidden=tags == "layer")
    run.define_metric("scalars/*", step_metric=_STEP)


def _histogram_name(kind: str, tags: str) -> str:
    return f"{viewers.group(kind)}/" + ("" if tags == "kind" else "histogram/")


def _histograms(history: History, step: int, tags: str) -> dict[str, object]:
    """Those of a record, by name."""
    found: dict[str, object] = {}
    for (kind, layer), _, (counts, ends) in viewers.rows(history, step, _MAX_BUCKETS):
        if len(counts):
            histogram = wandb.Histogram(np_histogram=(counts, ends))
            found[_histogram_name(kind, tags) + layer] = histogram
    return found


def _scalars(history: History) -> dict[int, dict[str, object]]:
    """What was logged, by step and name."""
    found: dict[int, dict[str, object]] = {}
    for name in history.scalars:
        steps, values = history.scalar(name)
        at = evenly_spread(len(steps), _MAX_POINTS)
        for step, value in zip(steps[at].tolist(), values[at].tolist(), strict=True):
            found.setdefault(step, {})[f"scalars/{name}"] = value
    return found


def _summary(history: History) -> dict[str, object]:
    """Tables of the newest record and charts of the whole run, by name."""
    tables: dict[str, list[list[object]]] = {kind: [] for kind in history.kinds}
    for (kind, layer), statistics, _ in viewers.rows(history, int(history.steps[-1])):
        named = viewers.scalars(statistics)
        numbers = [named.get(name, math.nan) for name in _COLUMNS[2:]]
        tables[kind].append([layer, int(statistics.numel), *numbers])
    found: dict[str, object] = {
        f"{viewers.group(kind)}/layers": wandb.Table(columns=list(_COLUMNS), data=table)
        for kind, table in tables.items()
    }
    for name, title, layers, values in _charts(history):
        xs, ys, keys = _lines(history, layers, values)
        if keys:
            found[name] = wandb.plot.line_series(xs, ys, keys, title, "step")
    return found


def _charts(history: History) -> Iterator[tuple[str, str, list[str], Array]]:
    """Name, title, layers and values, ``(S, L)``, of each chart; NaN where there is nothing."""
    log_rms = _log10(history["rms"])
    for kind in dict.fromkeys(history.kinds):
        layers = viewers.layers_of(history, kind)
        title = f"log10 rms of each layer's {NOUNS[kind]}"
        yield f"{viewers.group(kind)}/rms", title, list(layers.values()), log_rms[:, list(layers)]
    for kind, name, names, values in viewers.derived(history):
        title = "share of each layer's units that are dead"
        if kind == UPDATE:
            values, title = _log10(values), "log10 of each layer's update / parameter"
        yield f"{viewers.group(kind)}/{name}", title, names, values


def _lines(
    history: History, layers: list[str], values: Array
) -> tuple[list[list[int]], list[list[float]], list[str]]:
    """Steps and finite values of each layer that has any, 10,000 points in all."""
    most = max(1, _MAX_POINTS // len(layers))
    kept = np.searchsorted(history.steps, viewers.chosen_steps("log", history, most))
    steps, values = history.steps[kept], values[kept]
    xs, ys, keys = [], [], []
    for layer, line in zip(layers, values.T, strict=True):
        known = np.isfinite(line)
        if known.any():
            xs.append(steps[known].tolist())
            ys.append(line[known].tolist())
            keys.append(layer)
    return xs, ys, keys
