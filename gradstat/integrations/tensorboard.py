"""`write`, `writer`: a run as TensorBoard's event files, afterwards or while it goes on."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from math import isfinite
from typing import Any, Literal, NamedTuple

import numpy as np

from gradstat.arrays import Array
from gradstat.history import History
from gradstat.history.arguments import check_history
from gradstat.integrations.buckets import (
    buckets,
    check_tags,
    chosen_steps,
    counted,
    derived,
    group,
    rows,
    scalars,
)
from gradstat.kinds import GRAD, Row
from gradstat.recording.run_writer import RunWriter

_HISTOGRAM = {GRAD: "gradient"}  # others: "histogram"
_FLUSH_S = 5  # seconds from one write to the disk to the next


def write(
    history: History,
    log_dir: str | os.PathLike[str],
    *,
    tags: Literal["layer", "kind"] = "layer",
    max_records: int | None = 1000,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write histograms and scalars of each layer for TensorBoard.

    The tags of a layer are ``LAYER/gradient``, the histogram, and ``LAYER/mean``, ``/std``,
    ``/rms``, ``/l2``, ``/zero_fraction`` (of the finite elements) and ``/nonfinite`` (a count).
    Rows of another kind have the same under its name, as ``update/LAYER/rms``, and
    ``update/LAYER/histogram``. ``update/LAYER/ratio`` is `History.update_ratio`, and
    ``activation/LAYER/dead_units`` is `History.dead_units`.

    With ``tags="kind"`` they are named as by ``wandb.watch``: ``gradients/LAYER``, the histogram,
    ``gradients/LAYER/rms`` and so on, and so for ``parameters``, ``updates``, ``activations``,
    ``unit_peaks`` and ``output_gradients``.

    What was logged, such as ``loss`` and ``lr``, has its own name as its tag and all of its values.

    The buckets are the record's own, from the first filled one to the last: no count is estimated.
    A layer without a gradient in a step has no point there. Each point has the time at which its
    step was recorded, as TensorBoard's relative times tell.

    Args:
        history: with one record at least.
        log_dir: folder of the run; made if it is not there. Files in it stay.
        tags: ``"layer"`` or ``"kind"``: what the tags begin with.
        max_records: most records to write, evenly spread, the newest among them; ``None`` writes
            all. TensorBoard itself shows 1,000 scalars and fewer histograms of a tag unless it is
            started with ``--samples_per_plugin scalars=0,histograms=0``.
        progress: called with the number of further records that are done or left out.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError: an argument of another kind.
        ValueError: no records, ``max_records`` < 1, other tags.

    Example:
        >>> from gradstat.integrations import tensorboard
        >>> tensorboard.write(w.history, "runs/today")  # doctest: +SKIP
    """
    history = check_history("write", history)
    check_tags("write", tags)
    steps = chosen_steps("write", history, max_records)
    events = _Events("write", log_dir, by_kind=tags == "kind")
    time_at, of_several_kinds = _times(history), _of_several_kinds(history)
    try:
        for step in counted(history, steps, progress):
            events.add_record(history, step, of_several_kinds, time_at(step))
        for name in history.scalars:
            for step, value in zip(*(x.tolist() for x in history.scalar(name)), strict=True):
                events.add_scalar(name, step, value, time_at(step))
    except OSError as error:
        # What TensorBoard raises does not say where.
        raise OSError(error.errno, error.strerror, os.fspath(log_dir)) from error
    finally:
        events.close()


def writer(
    log_dir: str | os.PathLike[str], *, tags: Literal["layer", "kind"] = "layer"
) -> RunWriter:
    """A sink that writes a run for TensorBoard while it goes on.

    Each record is written as it arrives, and each value as it is logged, under the tags of `write`;
    TensorBoard shows them within its own reload interval. Should writing fail, a warning says so
    and the training goes on. In a distributed run give it to one rank, or each its own folder.

    Args:
        log_dir: folder of the run; made if it is not there. Files in it stay.
        tags: ``"layer"`` or ``"kind"``, as for `write`.

    Returns:
        What `gradstat.watch` takes as ``sink``, once.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError: a folder that is no path.
        ValueError: other tags.

    Example:
        >>> from gradstat.integrations import tensorboard
        >>> sink = tensorboard.writer("runs/today")  # doctest: +SKIP
        >>> with gradstat.watch(model, sink=sink) as w:  # doctest: +SKIP
        ...     train(model)
    """
    check_tags("writer", tags)
    if not isinstance(log_dir, str | os.PathLike):
        raise TypeError(f"writer() needs a folder's path; log_dir is {log_dir!r}")
    _Api.found("writer")
    return _Writer(log_dir, by_kind=tags == "kind")


class _Writer(RunWriter):
    """What `writer` returns; arguments as of `_Events`."""

    def __init__(self, log_dir: str | os.PathLike[str], *, by_kind: bool) -> None:
        super().__init__("tensorboard.writer()")
        self._log_dir, self._by_kind = log_dir, by_kind

    def start(self, history: History) -> None:
        self._events = _Events("writer", self._log_dir, by_kind=self._by_kind)

    def write_record(self, record: History, step: int) -> None:
        self._events.add_record(record, step, _of_several_kinds(record))

    def write_scalar(self, name: str, step: int, value: float) -> None:
        self._events.add_scalar(name, step, value)

    def end(self, history: History) -> None:
        self._events.close()


class _Api(NamedTuple):
    """What is used of TensorBoard's."""

    FileWriter: Any
    Summary: Any
    histogram_raw: Callable[..., Any]
    scalar: Callable[..., Any]

    @classmethod
    def found(cls, function: str) -> _Api:
        """Import it; ImportError names the function that needs it."""
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary
            from torch.utils.tensorboard import FileWriter
            from torch.utils.tensorboard.summary import histogram_raw, scalar
        except ImportError as error:
            raise ImportError(f"{function}() needs TensorBoard: pip install tensorboard") from error
        return cls(FileWriter, Summary, histogram_raw, scalar)


class _Events:
    """An event file.

    Args:
        function: who opens it, for its errors.
        log_dir: folder of the run.
        by_kind: whether tags begin with the kind.
    """

    def __init__(self, function: str, log_dir: str | os.PathLike[str], *, by_kind: bool) -> None:
        self._api = _Api.found(function)
        self._by_kind = by_kind
        self._file = self._api.FileWriter(os.fspath(log_dir), flush_secs=_FLUSH_S)

    def add_record(
        self,
        history: History,
        step: int,
        of_several_kinds: Mapping[Row, tuple[str, Array]],
        time_s: float | None = None,
    ) -> None:
        """Write what was recorded in a step; ``None`` is now."""
        at = np.searchsorted(history.steps, step)
        points = {}
        for row, (name, column) in of_several_kinds.items():
            if isfinite(column[at]):
                points[f"{self._prefix(row)}/{name}"] = column[at]
        # One event a step: each costs the writer's thread a turn.
        event = self._api.Summary()
        for row, statistics, edges in rows(history, step):
            prefix = self._prefix(row)
            points |= {f"{prefix}/{name}": value for name, value in scalars(statistics).items()}
            counts, ends = buckets(statistics, edges)
            if len(counts):
                histogram = self._api.histogram_raw(
                    prefix
                    if self._by_kind
                    else f"{prefix}/{_HISTOGRAM.get(row.kind, 'histogram')}",
                    min=float(statistics.min),
                    max=float(statistics.max),
                    num=int(statistics.finite),
                    sum=float(statistics.sum),
                    sum_squares=float(statistics.l2) * float(statistics.l2),  # may be infinite
                    # Right ends. An empty bucket before the first says where that begins.
                    bucket_limits=ends.tolist(),
                    bucket_counts=[0, *counts.tolist()],
                )
                event.MergeFrom(histogram)
        for tag, value in points.items():
            event.MergeFrom(self._api.scalar(tag, value))
        self._file.add_summary(event, step, time_s)

    def add_scalar(self, name: str, step: int, value: float, time_s: float | None = None) -> None:
        """Write a logged value."""
        self._file.add_summary(self._api.scalar(name, value), step, time_s)

    def close(self) -> None:
        """Write all of it."""
        self._file.close()

    def _prefix(self, row: Row) -> str:
        return f"{group(row.kind)}/{row.name}" if self._by_kind else str(row)


def _of_several_kinds(history: History) -> dict[Row, tuple[str, Array]]:
    """What `derived` gives by row: its name and ``(S,)``."""
    return {
        Row(kind, layer): (name, column)
        for kind, name, layers, values in derived(history)
        for layer, column in zip(layers, values.T, strict=True)
    }


def _times(history: History) -> Callable[[int], float | None]:
    """When a step was, by the records around it; ``None`` where no time is known."""
    known = np.isfinite(history.times)
    steps, times = history.steps[known], history.times[known]
    if not len(steps):
        return lambda step: None
    return lambda step: float(np.interp(step, steps, times))
