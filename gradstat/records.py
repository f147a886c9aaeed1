"""`Recorder`: measures the gradients of one pass after another and hands the results on.

Gradients are measured in buckets, each in one launch, and the results travel to the host while the
device goes on: nothing here waits for the device but `Recorder.collect` when it is told to.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.bins import Bins, LinearBins, widen
from gradstat.history import History
from gradstat.journal import Journal
from gradstat.ops import choose_engine, is_measurable, known_range
from gradstat.ranks import local_part, origin_of
from gradstat.statistics import FLOATS, INTEGERS, Statistics
from gradstat.streams import SideStream
from gradstat.transfers import Ranges, Transfer

Sink = Callable[[int, Statistics], object]
Rows = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


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
        sink: is given each record too.
        journal: so is it.
        side: where launches run; ``None`` for the stream that computes the gradients.
    """

    def __init__(
        self,
        history: History,
        every: int,
        accumulation_steps: int,
        bucket_bytes: int,
        engine: str | None,
        sink: Sink | None = None,
        journal: Journal | None = None,
        side: SideStream | None = None,
    ) -> None:
        self.history = history
        self.lock = threading.RLock()
        self._bins = history.bins
        self._is_linear = isinstance(history.bins, LinearBins)
        self._every, self._accumulation_steps = every, accumulation_steps
        self._bucket_bytes, self._engine = bucket_bytes, engine
        self._sink, self._journal, self._side = sink, journal, side
        self._engines: dict[str, ModuleType] = {}
        self._n_passes = 0
        self._recording = False
        self._scale: Tensor | None = None
        # Gradients that wait to be measured together, by device (-1 for the CPU) and layer.
        self._waiting: dict[int, dict[int, Tensor]] = {}
        self._n_bytes: dict[int, int] = {}
        self._parts: list[_Part] = []
        self._pending: deque[_Record] = deque()
        self._arrived: deque[tuple[int, Rows]] = deque()
        self._is_handing_on = False
        self._ranges = Ranges()

    def begin(self, scale: Tensor | None = None) -> None:
        """Start a pass.

        Args:
            scale: what the gradients of this pass are to be divided by, 0-dim, on any device; it
                may be changed in place afterwards.
        """
        if self._recording:
            self.drop()
        step, within = divmod(self._n_passes, self._accumulation_steps)
        if within == self._accumulation_steps - 1 and step % self._every == 0:
            self._recording = True
            self._scale = None if scale is None else scale.detach().clone()

    def add(self, index: int, gradient: Tensor) -> None:
        """Measure a layer's gradient, now or by the end of the pass; a later one replaces it.

        Args:
            index: of the layer.
            gradient: any tensor; what cannot be measured is passed over.
        """
        if not self._recording:
            return
        # What is part of a larger buffer may be changed in it meanwhile, as DistributedDataParallel
        # does; a shard is nobody else's.
        at_once = gradient._is_view()
        if type(gradient) is not Tensor:
            origin = origin_of(gradient)
            if origin is not None:
                self.history.origins[index] = origin
                gradient = local_part(gradient)
        if gradient.is_sparse:
            gradient = gradient.detach().coalesce().values()
        if not is_measurable(gradient):
            return
        device = gradient.get_device()
        waiting = self._waiting.get(device)
        if waiting is None:
            waiting = self._waiting[device] = {}
        waiting[index] = gradient
        n_bytes = self._n_bytes[device] = self._n_bytes.get(device, 0) + gradient.nbytes
        if at_once or n_bytes >= self._bucket_bytes:
            self._measure_waiting(device)

    def measure_waiting(self) -> None:
        """Measure now what `add` has taken."""
        for device in list(self._waiting):
            self._measure_waiting(device)

    def end(self) -> None:
        """Finish the pass; its record is in `history` once it has arrived on the host."""
        if self._recording:
            self.measure_waiting()
            step = self._n_passes // self._accumulation_steps
            if self._side is not None:
                self._side.join()
            scale = None if self._scale is None else Transfer((self._scale,))
            self._pending.append(_Record(step, self._bins, self._parts, scale))
            self._parts = []
            self._recording = False
        self._n_passes += 1
        if self._pending:
            self.collect(wait=False)

    def drop(self) -> None:
        """Forget an unfinished pass."""
        if self._side is not None:
            self._side.join()
        self._recording = False
        self._parts = []
        self._waiting.clear()
        self._n_bytes.clear()

    def collect(self, wait: bool) -> None:
        """Move records that have arrived into the history, oldest first.

        Args:
            wait: for all of them.
        """
        while self._pending and self._pending[0].has_arrived(wait):
            record = self._pending.popleft()
            rows = record.rows(len(self.history.layers))
            self.history.append(record.step, *rows)
            if self._journal is not None:
                self._journal.append(record.step, *rows)
            if self._sink is not None:
                self._arrived.append((record.step, rows))
        if self._sink is not None and not self._is_handing_on:
            self._hand_on(self._sink)

    def finish(self) -> None:
        """Wait for all records if anybody else is to have them, and hand them on."""
        with self.lock:
            if self._sink is not None or self._journal is not None:
                self.collect(wait=True)
            if self._journal is not None:
                self._journal.flush()

    def _hand_on(self, sink: Sink) -> None:
        # A sink that reads the history may find another record, which is then the next one here.
        self._is_handing_on = True
        try:
            while self._arrived:
                step, rows = self._arrived.popleft()
                sink(step, Statistics(self._bins, *(torch.from_numpy(each) for each in rows)))
        finally:
            self._is_handing_on = False

    def _measure_waiting(self, device: int) -> None:
        """Launch over a bucket and empty it; the results start on their way to the host."""
        gradients = dict(sorted(self._waiting.pop(device).items()))
        self._n_bytes[device] = 0
        if self._side is not None:
            with torch.no_grad(), self._side.beside(list(gradients.values())):
                self._measure(gradients)
        elif torch.is_grad_enabled():
            with torch.no_grad():
                self._measure(gradients)
        else:
            self._measure(gradients)

    def _measure(self, gradients: dict[int, Tensor]) -> None:
        if not self._is_linear:
            self._launch(gradients, None, None)
        elif isinstance(self._bins, LinearBins) and self._bins.track:
            # The first range of a layer is found in a pass of its own.
            known = {i: x for i, x in gradients.items() if self._ranges.knows(i, x.device)}
            for group in (known, {i: x for i, x in gradients.items() if i not in known}):
                if group:
                    self._measure_linear(group)
        else:
            self._measure_linear(gradients)

    def _measure_linear(self, gradients: dict[int, Tensor]) -> None:
        indices, tensors = tuple(gradients), list(gradients.values())
        if self._scale is not None:
            gradients = dict(zip(indices, _divide(tensors, self._scale), strict=True))
        previous = self._ranges.previous(indices)
        ends = known_range(self._bins, tensors[0].device, len(tensors), previous)
        result = self._launch(gradients, *ends)
        if isinstance(self._bins, LinearBins) and self._bins.track:
            self._ranges.remember(indices, result)

    def _launch(
        self, gradients: dict[int, Tensor], low: Tensor | None, high: Tensor | None
    ) -> Statistics:
        tensors = list(gradients.values())
        kind = tensors[0].device.type
        engine = self._engines.get(kind)
        if engine is None:
            engine = self._engines[kind] = choose_engine(self._engine, tensors[0])
        result: Statistics = engine.measure(tensors, self._bins, low, high)
        transfer = Transfer((result.integers, result.floats, result.counts))
        self._parts.append(_Part(tuple(gradients), transfer))
        return result


class _Part(NamedTuple):
    """The result of one launch: the layer of each row, and integers, floats and counts."""

    indices: tuple[int, ...]
    result: Transfer


class _Record(NamedTuple):
    """What one pass measured; what is over `Log2Bins` is still to be divided by the scale."""

    step: int
    bins: Bins
    parts: list[_Part]
    scale: Transfer | None

    def has_arrived(self, wait: bool) -> bool:
        for part in self.parts:
            if not part.result.has_arrived(wait):
                return False
        return self.scale is None or self.scale.has_arrived(wait)

    def rows(self, n_layers: int) -> Rows:
        """Integers ``(L, 8)``, floats ``(L, 8)``, counts ``(L, bins)`` of all layers in order."""
        integers: NDArray[Any]
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
