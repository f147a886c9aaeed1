"""`write`, `writer`: a run as TensorBoard's event files, afterwards or while it goes on."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, Literal

import numpy as np

from gradstat.history import History, check_history
from gradstat.integrations import viewers
from gradstat.record import GRAD, Row
from gradstat.recording.options import check_directory
from gradstat.recording.transfers import RunWriter
from gradstat.util import encodable

try:
    from tensorboard.compat import tf
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter
    from torch.utils.tensorboard import summary
except ImportError as error:
    raise ImportError("gradstat needs TensorBoard here: pip install tensorboard") from error

_NUMBERS = itertools.count()  # of files of this process


def write(
    history: History,
    log_dir: str | os.PathLike[str],
    *,
    tags: Literal["layer", "kind"] = "layer",
    max_records: int | None = 1000,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write histograms and scalars of each layer for TensorBoard; ``docs/viewers.md`` has the tags.

    What was logged, such as ``loss`` and ``lr``, has its own name as its tag and all of its values.
    A layer without a gradient in a step has no point there. Each point has the time at which its
    step was recorded.

    Args:
        history: with one record at least.
        log_dir: folder of the run; made if it is not there. Files in it stay.
        tags: what the tags begin with: ``"layer"``, or ``"kind"``, as by ``wandb.watch``:
            ``gradients/LAYER``, the histogram, ``gradients/LAYER/rms`` and so on, and so for
            ``parameters``, ``updates``, ``activations``, ``unit_peaks`` and ``output_gradients``.
        max_records: most records to write, evenly spread, the newest among them; ``None``: all.
        progress: called with the number of further records that are done or left out.

    Raises:
        TypeError, ValueError: an argument of another kind, no records, ``max_records`` < 1.
    """
    history = check_history("write", history)
    viewers.check_tags("write", tags)
    steps = viewers.chosen_steps("write", history, max_records)
    events = _Events(log_dir, by_kind=tags == "kind")
    events.start(history, None)
    known = np.isfinite(history.times)
    recorded, times = history.steps[known], history.times[known]

    def time_at(step: int) -> float | None:
        return float(np.interp(step, recorded, times)) if len(times) else None

    try:
        for step in viewers.counted(history, steps, progress):
            events.write_record(history, step, time_at(step))
        for name in history.scalars:
            for step, value in zip(*(x.tolist() for x in history.scalar(name)), strict=True):
                events.write_scalar(name, step, value, time_at(step))
    except OSError as error:
        # What TensorBoard raises does not say where.
        raise OSError(error.errno, error.strerror, os.fspath(log_dir)) from error
    finally:
        events.end(history)


def writer(
    log_dir: str | os.PathLike[str], *, tags: Literal["layer", "kind"] = "layer"
) -> RunWriter:
    """A sink for `gradstat.watch` that writes a run for TensorBoard while it goes on.

    Each record and each logged value is written as it comes, in the thread that trains, which waits
    for the disk. Should that fail, a warning says so and the training goes on. In a distributed run
    give it to one rank, or each its own folder. A run that is resumed, by ``first_step``,
    supersedes what the folder has from that step on: let nothing else write there. The arguments
    are as for `write`.

    Raises:
        TypeError, ValueError: a folder that is no path, empty or a file's; other tags.
    """
    viewers.check_tags("writer", tags)
    check_directory("writer", "log_dir", log_dir)
    return _Events(log_dir, by_kind=tags == "kind")


class _Events(RunWriter):
    """An event file, and what `writer` returns, which opens a new one for each run."""

    def __init__(self, log_dir: str | os.PathLike[str], *, by_kind: bool) -> None:
        super().__init__("tensorboard.writer()")
        self._by_kind, self._folder = by_kind, os.fspath(log_dir)
        if "://" not in self._folder:  # as of gs://
            self._folder = str(Path(log_dir).absolute())  # the process may change directory

    def start(self, history: History, first_step: int | None) -> None:
        tf.io.gfile.makedirs(self._folder)
        name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}"
        # TensorBoard's own class for this writes in a thread, which hides an error at the end.
        file = tf.io.gfile.GFile(f"{self._folder}/{name}.{next(_NUMBERS)}", "wb")
        self._file = RecordWriter(file)
        self._add(file_version="brain.Event:2")
        if first_step is not None:
            # TensorBoard forgets what the folder has of this step and later ones.
            self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def write_scalar(self, name: str, step: int, value: float, time_s: float | None = None) -> None:
        self._add(time_s, step=step, summary=summary.scalar(encodable(name), value))

    def end(self, history: History) -> None:
        self._file.close()

    def write_record(self, record: History, step: int, time_s: float | None = None) -> None:
        record, points = record.of_steps([step]), {}
        for kind, name, layers, values in viewers.derived(record):
            for layer, value in zip(layers, values[0].tolist(), strict=True):
                if isfinite(value):
                    points[f"{self._prefix(Row(kind, layer))}/{name}"] = value
        written = Summary()
        for row, statistics, (counts, ends) in viewers.rows(record, step):
            prefix = tag = self._prefix(row)
            for name, value in viewers.scalars(statistics).items():
                points[f"{prefix}/{name}"] = value
            if not self._by_kind:
                tag += "/gradient" if row.kind == GRAD else "/histogram"
            if len(counts):
                histogram = summary.histogram_raw(
                    tag,
                    min=float(statistics.min),
                    max=float(statistics.max),
                    num=int(statistics.finite),
                    sum=float(statistics.sum),
                    sum_squares=float(statistics.l2) * float(statistics.l2),  # may be infinite
                    # Right ends. An empty bucket before the first says where that begins.
                    bucket_limits=ends.tolist(),
                    bucket_counts=[0, *counts.tolist()],
                )
                written.MergeFrom(histogram)
        for tag, value in points.items():
            written.MergeFrom(summary.scalar(tag, value))
        self._add(time_s, step=step, summary=written)

    def _add(self, time_s: float | None = None, **content: Any) -> None:
        event = Event(wall_time=time.time() if time_s is None else time_s, **content)
        self._file.write(event.SerializeToString())
        self._file.flush()

    def _prefix(self, row: Row) -> str:
        return encodable(f"{viewers.group(row.kind)}/{row.name}" if self._by_kind else str(row))
