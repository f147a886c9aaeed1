"""`Recorder`: measures the gradients of one pass after another and hands the results to a History.

Gradients are measured in buckets, each in one launch, and the results travel to the host while the
device goes on: nothing here waits for the device but `Recorder.collect` when it is told to.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.bins import LinearBins
from gradstat.history import History
from gradstat.ops import is_measurable, known_range, measure
from gradstat.statistics import FLOATS, INTEGERS, Statistics


class Recorder:
    """Turns gradients into records.

    A pass is ``begin()``, ``add()`` for each gradient, ``end()``; one that never ends leaves
    nothing. Callers hold `lock` meanwhile: autograd runs hooks in a thread for each device.

    Args:
        history: where the records go.
        every: steps from one record to the next.
        accumulation_steps: passes in a step; the last of them is measured.
        bucket_bytes: gradients measured in one launch.
        engine: name, or ``None``.
    """

    def __init__(
        self,
        history: History,
        every: int,
        accumulation_steps: int,
        bucket_bytes: int,
        engine: str | None,
    ) -> None:
        self.history = history
        self.lock = threading.RLock()
        self._bins = history.bins
        self._every, self._accumulation_steps = every, accumulation_steps
        self._bucket_bytes, self._engine = bucket_bytes, engine
        self._n_passes = 0
        self._recording = False
        self._buckets: dict[torch.device, _Bucket] = {}
        self._parts: list[_Part] = []
        self._pending: deque[_Record] = deque()
        self._ranges = _Ranges()

    def begin(self) -> None:
        """Start a pass."""
        self.drop()
        step, within = divmod(self._n_passes, self._accumulation_steps)
        self._recording = within == self._accumulation_steps - 1 and step % self._every == 0

    def add(self, index: int, gradient: Tensor) -> None:
        """Measure a layer's gradient, now or by the end of the pass; a later one replaces it.

        Args:
            index: of the layer.
            gradient: any tensor; what cannot be measured is passed over.
        """
        if not self._recording:
            return
        with torch.no_grad():
            if gradient.layout == torch.sparse_coo:
                gradient = gradient.coalesce().values()
            if not is_measurable(gradient):
                return
            bucket = self._buckets.setdefault(gradient.device, _Bucket())
            bucket.gradients[index] = gradient
            bucket.n_bytes += gradient.nbytes
            if bucket.n_bytes >= self._bucket_bytes:
                self._measure(bucket)

    def end(self) -> None:
        """Finish the pass; its record is in `history` once it has arrived on the host."""
        with torch.no_grad():
            for bucket in self._buckets.values():
                self._measure(bucket)
        if self._recording:
            step = self._n_passes // self._accumulation_steps
            self._pending.append(_Record(step, self._parts))
        self._n_passes += 1
        self.drop()
        self.collect(wait=False)

    def drop(self) -> None:
        """Forget an unfinished pass."""
        self._recording = False
        self._buckets.clear()
        self._parts = []

    def collect(self, wait: bool) -> None:
        """Move records that have arrived into the history, oldest first.

        Args:
            wait: for all of them.
        """
        while self._pending and self._pending[0].has_arrived(wait):
            record = self._pending.popleft()
            rows = record.rows(len(self.history.layers), self._bins.bins)
            self.history.append(record.step, *rows)

    def _measure(self, bucket: _Bucket) -> None:
        """Launch over a bucket and empty it; the results start on their way to the host."""
        gradients = dict(sorted(bucket.gradients.items()))
        bucket.clear()
        if isinstance(self._bins, LinearBins) and self._bins.track:
            # The first range of a layer is found in a pass of its own.
            known = {i: x for i, x in gradients.items() if self._ranges.knows(i, x.device)}
            groups = [known, {i: x for i, x in gradients.items() if i not in known}]
        else:
            groups = [gradients]
        for group in groups:
            if group:
                indices, tensors = tuple(group), list(group.values())
                previous = self._ranges.previous(indices)
                ends = known_range(self._bins, tensors[0].device, len(tensors), previous)
                result = measure(tensors, self._bins, *ends, self._engine)
                self._parts.append(_Part(indices, result))
                if len(groups) > 1:
                    self._ranges.remember(indices, result)


@dataclass
class _Bucket:
    """Gradients on one device that wait to be measured together, by index of their layer."""

    gradients: dict[int, Tensor] = field(default_factory=dict)
    n_bytes: int = 0

    def clear(self) -> None:
        self.gradients.clear()
        self.n_bytes = 0


class _Ranges:
    """Where the newest result of each layer is, for ``LinearBins(track=True)``."""

    def __init__(self) -> None:
        self._rows: dict[int, tuple[Statistics, int]] = {}

    def knows(self, index: int, device: torch.device) -> bool:
        return index in self._rows and self._rows[index][0].floats.device == device

    def previous(self, indices: tuple[int, ...]) -> Statistics | None:
        """The newest results of layers, all known or none, in the order of their indices."""
        rows = [self._rows[index] for index in indices if index in self._rows]
        if not rows:
            return None
        first = rows[0][0]
        if len(first) == len(rows) and all(
            result is first and row == at for at, (result, row) in enumerate(rows)
        ):
            return first
        # They were measured in other buckets than now.
        return Statistics(
            first.bins,
            torch.stack([result.integers[row] for result, row in rows]),
            torch.stack([result.floats[row] for result, row in rows]),
            torch.stack([result.counts[row] for result, row in rows]),
        )

    def remember(self, indices: tuple[int, ...], result: Statistics) -> None:
        for row, index in enumerate(indices):
            self._rows[index] = (result, row)


class _Part:
    """The result of one launch, on its way to the host.

    Args:
        indices: layer of each row.
        result: Statistics on the device.
    """

    def __init__(self, indices: tuple[int, ...], result: Statistics) -> None:
        self.indices = indices
        self._event: torch.Event | None = None
        arrays = (result.integers, result.floats, result.counts)
        if result.counts.device.type == "cuda":
            # PyTorch's cache of pinned blocks does not reuse one before its copy is over.
            self._arrays = [_copy_to_pinned(array) for array in arrays]
            self._event = torch.Event("cuda")
            self._event.record()
        else:
            self._arrays = [array.cpu() for array in arrays]

    def has_arrived(self, wait: bool) -> bool:
        if self._event is None or self._event.query():
            return True
        if wait:
            self._event.synchronize()
        return wait

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        return tuple(array.numpy() for array in self._arrays)


@dataclass(frozen=True)
class _Record:
    """What one pass measured."""

    step: int
    parts: list[_Part]

    def has_arrived(self, wait: bool) -> bool:
        return all(part.has_arrived(wait) for part in self.parts)

    def rows(self, n_layers: int, n_bins: int) -> tuple[NDArray[np.generic], ...]:
        """Integers ``(L, 8)``, floats ``(L, 8)``, counts ``(L, bins)`` of all layers in order."""
        if len(self.parts) == 1 and len(self.parts[0].indices) == n_layers:
            return self.parts[0].arrays()
        integers = np.zeros((n_layers, len(INTEGERS)), dtype=np.int64)
        floats = np.full((n_layers, len(FLOATS)), np.nan)
        counts = np.zeros((n_layers, n_bins), dtype=np.int64)
        for part in self.parts:
            rows = list(part.indices)
            integers[rows], floats[rows], counts[rows] = part.arrays()
        return integers, floats, counts


def _copy_to_pinned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
