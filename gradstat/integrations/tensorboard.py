"""`write`: a History as TensorBoard's event files."""

from __future__ import annotations

import os
from collections.abc import Callable
from math import isfinite

import numpy as np

from gradstat.history import History
from gradstat.history.arguments import check_history
from gradstat.integrations.buckets import buckets, chosen_steps, counted, derived, rows, scalars
from gradstat.kinds import GRAD, Row


def write(
    history: History,
    log_dir: str | os.PathLike[str],
    *,
    max_records: int | None = 1000,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Write histograms and scalars of each layer for TensorBoard.

    The tags of a layer are ``LAYER/gradient``, the histogram, and ``LAYER/mean``, ``/std``,
    ``/rms``, ``/l2``, ``/zero_fraction`` (of the finite elements) and ``/nonfinite`` (a count).
    Rows of another kind have the same under its name, as ``update/LAYER/rms``, and
    ``update/LAYER/histogram``. ``update/LAYER/ratio`` is `History.update_ratio`, and
    ``activation/LAYER/dead_units`` is `History.dead_units`.

    What was logged, such as ``loss`` and ``lr``, has its own name as its tag and all of its values.

    The buckets are the record's own, from the first filled one to the last: no count is estimated.
    A layer without a gradient in a step has no point there.

    Args:
        history: with one record at least.
        log_dir: folder of the run; made if it is not there. Files in it stay.
        max_records: most records to write, evenly spread, the newest among them; ``None`` writes
            all. TensorBoard itself shows 1,000 scalars and fewer histograms of a tag unless it is
            started with ``--samples_per_plugin scalars=0,histograms=0``.
        progress: called with the number of further records that are done or left out.

    Raises:
        ImportError: TensorBoard is not installed.
        TypeError: an argument of another kind.
        ValueError: no records, ``max_records`` < 1.

    Example:
        >>> from gradstat.integrations import tensorboard
        >>> tensorboard.write(w.history, "runs/today")  # doctest: +SKIP
    """
    history = check_history("write", history)
    steps = chosen_steps("write", history, max_records)
    try:
        from tensorboard.compat.proto.summary_pb2 import Summary
        from torch.utils.tensorboard import FileWriter
        from torch.utils.tensorboard.summary import histogram_raw, scalar
    except ImportError as error:
        raise ImportError("write() needs TensorBoard: pip install tensorboard") from error
    over_time = {
        f"{Row(kind, layer)}/{name}": column
        for kind, name, layers, values in derived(history)
        for layer, column in zip(layers, values.T, strict=True)
    }
    writer = FileWriter(os.fspath(log_dir))
    try:
        for step in counted(history, steps, progress):
            at = np.searchsorted(history.steps, step)
            points = {tag: column[at] for tag, column in over_time.items() if isfinite(column[at])}
            # One event a step: each costs the writer's thread a turn.
            event = Summary()
            for row, statistics, edges in rows(history, step):
                points |= {f"{row}/{name}": value for name, value in scalars(statistics).items()}
                counts, ends = buckets(statistics, edges)
                if len(counts):
                    histogram = histogram_raw(  # type: ignore[no-untyped-call]
                        f"{row}/{'gradient' if row.kind == GRAD else 'histogram'}",
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
            writer.add_summary(event, step)
        for name in history.scalars:
            for step, value in zip(*(x.tolist() for x in history.scalar(name)), strict=True):
                writer.add_summary(scalar(name, value), step)  # type: ignore[no-untyped-call]
    finally:
        writer.close()
