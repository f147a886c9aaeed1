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

from gradstat.bins import Bins, LinearBins, widen
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
        self._scale: Tensor | None = None
        self._buckets: dict[torch.device, _Bucket] = {}
        self._parts: list[_Part] = []
        self._pending: deque[_Record] = deque()
        self._ranges = _Ranges()

    def begin(self, scale: Tensor | None = None) -> None:
        """Start a pass.

        Args:
            scale: what the gradients of this pass are to be divided by, 0-dim, on any device; it
                may be changed in place afterwards.
        """
        self.drop()
        step, within = divmod(self._n_passes, self._accumulation_steps)
        self._recording = within == self._accumulation_steps - 1 and step % self._every == 0
        if self._recording and scale is not None:
            self._scale = scale.detach().clone()

    def add(self, index: int, gradient: Tensor) -> None:
        """Measure a layer's gradient, now or by the end of the pass; a later one replaces it.

        Args:
            index: of the layer.
            gradient: any tensor; what cannot be measured is passed over.
        """
        if not self._recording:
            return
        if gradient.layout == torch.sparse_coo:
            gradient = gradient.detach().coalesce().values()
        if not is_measurable(gradient):
            return
        bucket = self._buckets.get(gradient.device)
        if bucket is None:
            bucket = self._buckets[gradient.device] = _Bucket()
        bucket.gradients[index] = gradient
        bucket.n_bytes += gradient.nbytes
        if bucket.n_bytes >= self._bucket_bytes:
            self._measure(bucket)

    def end(self) -> None:
        """Finish the pass; its record is in `history` once it has arrived on the host."""
        for bucket in self._buckets.values():
            self._measure(bucket)
        if self._recording:
            step = self._n_passes // self._accumulation_steps
            scale = None if self._scale is None else _Transfer(self._scale)
            self._pending.append(_Record(step, self._bins, self._parts, scale))
        self._n_passes += 1
        self.drop()
        self.collect(wait=False)

    def drop(self) -> None:
        """Forget an unfinished pass."""
        self._recording = False
        self._scale = None
        self._buckets.clear()
        self._parts = []

    def collect(self, wait: bool) -> None:
        """Move records that have arrived into the history, oldest first.

        Args:
            wait: for all of them.
        """
        while self._pending and self._pending[0].has_arrived(wait):
            record = self._pending.popleft()
            self.history.append(record.step, *record.rows(len(self.history.layers)))

    @torch.no_grad()
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
                if self._scale is not None and isinstance(self._bins, LinearBins):
                    tensors = _divide(tensors, self._scale)
                previous = self._ranges.previous(indices)
                ends = known_range(self._bins, tensors[0].device, len(tensors), previous)
                result = measure(tensors, self._bins, *ends, self._engine)
                transfer = _Transfer(result.integers, result.floats, result.counts)
                self._parts.append(_Part(indices, transfer))
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


class _Transfer:
    """Tensors on their way to the host."""

    def __init__(self, *tensors: Tensor) -> None:
        self._event: torch.Event | None = None
        if tensors[0].device.type == "cuda":
            # PyTorch's cache of pinned blocks does not reuse one before its copy is over.
            self._tensors = [_copy_to_pinned(x) for x in tensors]
            self._event = torch.Event("cuda")
            self._event.record()
        else:
            self._tensors = [x.cpu() for x in tensors]

    def has_arrived(self, wait: bool) -> bool:
        if self._event is None or self._event.query():
            return True
        if wait:
            self._event.synchronize()
        return wait

    def arrays(self) -> tuple[NDArray[np.generic], ...]:
        return tuple(x.numpy() for x in self._tensors)


@dataclass(frozen=True)
class _Part:
    """The result of one launch: the layer of each row, and integers, floats and counts."""

    indices: tuple[int, ...]
    result: _Transfer


@dataclass(frozen=True)
class _Record:
    """What one pass measured; what is over `Log2Bins` is still to be divided by the scale."""

    step: int
    bins: Bins
    parts: list[_Part]
    scale: _Transfer | None

    def has_arrived(self, wait: bool) -> bool:
        transfers = [part.result for part in self.parts]
        if self.scale is not None:
            transfers.append(self.scale)
        return all(transfer.has_arrived(wait) for transfer in transfers)

    def rows(self, n_layers: int) -> tuple[NDArray[np.generic], ...]:
        """Integers ``(L, 8)``, floats ``(L, 8)``, counts ``(L, bins)`` of all layers in order."""
        if len(self.parts) == 1 and len(self.parts[0].indices) == n_layers:
            integers, floats, counts = self.parts[0].result.arrays()
        else:
            integers = np.zeros((n_layers, len(INTEGERS)), dtype=np.int64)
            floats = np.full((n_layers, len(FLOATS)), np.nan)
            counts = np.zeros((n_layers, self.bins.bins), dtype=np.int64)
            for part in self.parts:
                rows = list(part.indices)
                integers[rows], floats[rows], counts[rows] = part.result.arrays()
        if self.scale is None or isinstance(self.bins, LinearBins):
            return integers, floats, counts
        (scale,) = self.scale.arrays()
        scaled = Statistics(self.bins, *(torch.from_numpy(x) for x in (integers, floats, counts)))
        unscaled = scaled.unscale(torch.from_numpy(scale).double())
        return unscaled.integers.numpy(), unscaled.floats.numpy(), unscaled.counts.numpy()


def _divide(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Unscaled copies, by the arithmetic of `torch.amp.GradScaler`; in float32 at least."""
    wide = [x.float() if x.itemsize < 4 else x for x in gradients]
    inverse = widen(scale.to(wide[0].device, non_blocking=True)).reciprocal().float()
    return list(torch._foreach_mul(wide, inverse))


def _copy_to_pinned(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
