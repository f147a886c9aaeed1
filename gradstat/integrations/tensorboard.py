"""`write`: a History as TensorBoard's event files."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import isfinite
from typing import Literal

import numpy as np

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

_HISTOGRAM = {GRAD: "gradient"}  # others: "histogram"


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
    by_kind = tags == "kind"
    steps = chosen_steps("write", history, max_records)
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import histogram_raw, scalar
    except ImportError as error:
        raise ImportError("write() needs TensorBoard: pip install tensorboard") from error
    over_time = {
        f"{_prefix(Row(kind, layer), by_kind)}/{name}": column
        for kind, name, layers, values in derived(history)
        for layer, column in zip(layers, values.T, strict=True)
    }
    time_at = _times(history)
    writer = FileWriter(os.fspath(log_dir))
    try:
        for step in counted(history, steps, progress):
            at = np.searchsorted(history.steps, step)
            points = {tag: column[at] for tag, column in over_time.items() if isfinite(column[at])}
            # One event a step: each costs the writer's thread a turn.
            event = Summary()
            for row, statistics, edges in rows(history, step):
                prefix = _prefix(row, by_kind)
                points |= {f"{prefix}/{name}": value for name, value in scalars(statistics).items()}
                counts, ends = buckets(statistics, edges)
                if len(counts):
                    histogram = histogram_raw(  # type: ignore[no-untyped-call]
                        prefix if by_kind else f"{prefix}/{_HISTOGRAM.get(row.kind, 'histogram')}",
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
                event.MergeFrom(scalar(tag, value))  # type: ignore[no-untyped-call]
            writer.add_summary(event, step, time_at(step))
        for name in history.scalars:
            for step, value in zip(*(x.tolist() for x in history.scalar(name)), strict=True):
                point = scalar(name, value)  # type: ignore[no-untyped-call]
                writer.add_summary(point, step, time_at(step))
    finally:
        writer.close()


def _prefix(row: Row, by_kind: bool) -> str:
    return f"{group(row.kind)}/{row.name}" if by_kind else str(row)


def _times(history: History) -> Callable[[int], float | None]:
    """When a step was, by the records around it; ``None`` where no time is known."""
    known = np.isfinite(history.times)
    steps, times = history.steps[known], history.times[known]
    if not len(steps):
        return lambda step: None
    return lambda step: float(np.interp(step, steps, times))
