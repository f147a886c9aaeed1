"""`Recorder`: measures the gradients of one pass after another and hands the results on.

Gradients are measured in buckets, each in one launch, and the results travel to the host while the
device goes on: nothing here waits for the device but `Recorder.collect` when it is told to.
"""

from __future__ import annotations

import threading
import warnings
from collections import deque
from collections.abc import Callable

import torch
from torch import Tensor

from gradstat.history import History
from gradstat.history.journal import Journal
from gradstat.kinds import GRAD, OF_OUTPUTS
from gradstat.ops import is_measurable
from gradstat.recording.arrivals import (
    Launch,
    Part,
    Record,
    Rows,
    as_statistics,
    combine,
    send,
    unit_peaks,
)
from gradstat.recording.cuda_graphs import Cadence, CapturedPasses, is_capturing
from gradstat.recording.launcher import Launcher
from gradstat.recording.shards import local_part, origin_of
from gradstat.recording.side_stream import SideStream
from gradstat.recording.streams import Computed
from gradstat.recording.torch_internals import running_pass
from gradstat.recording.transfers import Transfer
from gradstat.recording.waiting import Waiting
from gradstat.results import Statistics

Sink = Callable[[int, Statistics], object]

_SMALL_BYTES = 1 << 16
_MOST_ROWS = 256  # that wait on their device, 16 KB each over Log2Bins
_NO_OUTPUTS = (
    "watch() has seen no output of the model's modules, which are NaN in its records: they must be "
    "run in training mode, and compiled after watch()"
)


class Recorder:
    """Turns gradients into records.

    A pass is ``begin()``, ``add()`` for each gradient, ``end()``; one that never ends leaves
    nothing. What `add_output` takes before it belongs to it too. Callers hold `lock` meanwhile:
    autograd runs hooks in a thread for each device.

    Args:
        history: where the records go.
        cadence: which passes are recorded.
        bucket_bytes: gradients measured in one launch.
        engine: name, or ``None``.
        sink: is given each record too.
        journal: so is it.
        side: where launches run; ``None`` for the stream that computes the gradients.
    """

    def __init__(
        self,
        history: History,
        cadence: Cadence,
        bucket_bytes: int,
        engine: str | None,
        sink: Sink | None = None,
        journal: Journal | None = None,
        side: SideStream | None = None,
    ) -> None:
        self.history = history
        self.lock = threading.RLock()
        self._bins = history.bins
        self._cadence = cadence
        self._launcher = Launcher(history.bins, history.kinds, engine, cadence)
        self._sink, self._journal = sink, journal
        self.is_recording = False
        # By the kind of what they multiply, and in which run of autograd they were taken.
        self._scales: dict[str, Computed] = {}
        self._scaled_in: dict[str, int] = {}
        self._outputs = frozenset(i for i, kind in enumerate(history.kinds) if kind in OF_OUTPUTS)
        self._has_outputs = False
        self._peaks: dict[tuple[int, torch.Size, torch.device], Computed] = {}
        self._waiting = Waiting(bucket_bytes, side)
        self._launches: list[Launch] = []
        self._parts: list[Part] = []  # of this record, on their way already
        self._captured = CapturedPasses()
        self._pending: deque[Record] = deque()
        self._newest_step = -1
        self._arrived: deque[tuple[int, Rows]] = deque()
        self._is_handing_on = False

    def is_due(self) -> bool:
        """Whether the pass that comes or goes on is one to record, as a captured one may be."""
        if self._cadence.has_left_graph():
            self.drop()
        return self._cadence.is_due()

    @property
    def n_passes(self) -> int:
        """Passes that have ended, those of graphs included."""
        return self._cadence.n_passes

    def begin(self, scale: Tensor | None = None) -> None:
        """Start a pass.

        Args:
            scale: what the gradients of this pass are to be divided by, 0-dim, on any device; it
                may be changed in place afterwards.
        """
        if self.is_recording:
            self.drop()
        if self.is_due():
            self.is_recording = True
            self.take_scale(GRAD, scale)

    def take_scale(self, kind: str, scale: Tensor | None) -> None:
        """Remember what a record's values of a kind are multiplied by in this run of autograd."""
        if scale is None:
            return
        run = running_pass()
        if self._scaled_in.get(kind) == run:
            return
        if kind in self._scales:
            # What waits has the one before.
            self.measure_waiting()
        self._scales = {**self._scales, kind: Computed.now(scale.detach().clone())}
        self._scaled_in[kind] = run

    def add(self, index: int, gradient: Tensor) -> None:
        """Measure a layer's gradient, now or by the end of the pass; a later one replaces it.

        Args:
            index: of the layer.
            gradient: any tensor; what cannot be measured is passed over.
        """
        if not self.is_recording:
            return
        # What is part of a larger buffer may be changed in it meanwhile, as DistributedDataParallel
        # does; a shard is nobody else's.
        at_once = gradient._is_view()
        if type(gradient) is not Tensor:
            gradient = self._own_part(index, gradient)
        if gradient.is_sparse:
            gradient = gradient.detach().coalesce().values()
        if is_measurable(gradient) and not gradient.is_meta:
            self._waiting.replace(index, gradient, self._measure, at_once=at_once)

    def add_output(self, index: int, x: Tensor) -> bool:
        """Measure a layer's output, if `is_due`, and count it together with those before.

        Args:
            index: of the layer.
            x: any tensor, which may be changed in place afterwards; what cannot be measured is
                passed over.

        Returns:
            Whether it is measured.
        """
        x = self._own_part(index, x)
        if not is_measurable(x):
            return False
        self._has_outputs = True
        # A copy of a small one costs less than a launch of its own.
        is_small = x.nbytes <= _SMALL_BYTES
        x = x.clone() if is_small else x
        self._waiting.join(index, x, self._measure, at_once=not is_small)
        return True

    def add_peaks(self, index: int, x: Tensor, unit: int | None) -> None:
        """Take the largest magnitude of each unit of a layer, in this output and those before.

        Args:
            index: of the layer.
            x: the output.
            unit: the dimension of the units, if there are any.
        """
        if unit is None:
            return
        peaks = unit_peaks(self._own_part(index, x), unit)
        key = index, peaks.shape, peaks.device
        before = self._peaks.get(key)
        if before is not None:
            peaks = torch.maximum(before.get(), peaks)
        self._peaks[key] = Computed.now(peaks)

    def measure_waiting(self) -> None:
        """Measure now what `add` has taken, which may change then."""
        self._waiting.measure_all(self._measure)

    def end(self) -> None:
        """Finish the pass; its record is in `history` once it has arrived on the host.

        One that becomes part of a CUDA graph has a record each time that `replayed` is called.
        """
        if self.is_recording:
            if self._peaks:
                self._take_peaks()
            if self._outputs and not self._has_outputs:
                self._has_outputs = True
                warnings.warn(_NO_OUTPUTS, RuntimeWarning, stacklevel=2)
            self.measure_waiting()
            if is_capturing():
                # It has not run yet, and nothing may be asked of the device now.
                self._captured.add(self._launches, self._cadence.count_captured())
                self._forget()
                return
            self._send(self._launches)
            self._forget()
        self._captured.end_graph()
        self._cadence.count()
        self._collect_pending()

    def replayed(self, graph: object) -> bool:
        """Take the results of captured passes that are due, which a replay has written anew.

        Args:
            graph: what was replayed; ``None`` for the newest graph.

        Returns:
            Whether any pass was captured in it.
        """
        self._captured.end_graph()
        passes = self._captured.of(graph)
        for launches, stamp in passes:
            if self.is_due():
                self._send(launches, stamp)
            self._cadence.count_replayed()
        self._collect_pending()
        return bool(passes)

    def drop(self) -> None:
        """Forget an unfinished pass."""
        self._forget()

    def collect(self, wait: bool) -> None:
        """Move records that have arrived into the history, oldest first.

        Args:
            wait: for all of them.
        """
        while self._pending and self._pending[0].has_arrived(wait):
            record = self._pending.popleft()
            step: int | None = record.step
            if record.stamp is not None:
                step = self._cadence.take_stamp(record.stamp, record.n_told)
            if step is None or step <= self._newest_step:
                continue  # replayed() was not called once for each replay
            self._newest_step = step
            rows = record.rows(self._outputs)
            self.history.append(step, *rows)
            if self._journal is not None:
                self._journal.append(step, *rows)
            if self._sink is not None:
                self._arrived.append((step, rows))
        if self._sink is not None and not self._is_handing_on:
            self._hand_on(self._sink)

    def finish(self) -> None:
        """Wait for all records if anybody else is to have them, and hand them on."""
        with self.lock:
            self.drop()
            self._captured.clear()
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
                sink(step, as_statistics(self._bins, rows))
        finally:
            self._is_handing_on = False

    def _send(self, launches: list[Launch], stamp: Tensor | None = None) -> None:
        parts, self._parts = [*self._parts, *send(launches)], []
        arriving = None if stamp is None else Transfer((stamp,))
        step, n_told = self._cadence.step, self._cadence.n_told
        self._pending.append(Record(step, self.history, parts, n_told, arriving))

    def _send_early(self) -> None:
        """Keep what waits for the end of a record from growing with the outputs it counts."""
        n_rows = sum(len(launch.indices) for launch in self._launches)
        if n_rows <= _MOST_ROWS or is_capturing():
            return
        self._parts += send(self._launches)
        self._launches = []
        n_arrived = 0
        while n_arrived < len(self._parts) and self._parts[n_arrived].has_arrived(wait=False):
            n_arrived += 1
        if n_arrived > 1:
            arrived = combine(self._parts[:n_arrived], self.history, self._outputs)
            self._parts = [arrived, *self._parts[n_arrived:]]

    def _collect_pending(self) -> None:
        if self._pending:
            self.collect(wait=False)

    def _forget(self) -> None:
        self.is_recording = False
        self._launches, self._parts = [], []
        self._scales = {}
        self._scaled_in.clear()
        self._peaks.clear()
        self._waiting.clear()

    def _own_part(self, index: int, x: Tensor) -> Tensor:
        """Of a DTensor what this rank holds, which the history is told."""
        origin = origin_of(x)
        if origin is None:
            return x
        self.history.origins[index] = origin
        return local_part(x)

    def _take_peaks(self) -> None:
        for (index, _, _), peaks in self._peaks.items():
            self._waiting.join(index, peaks.get(), self._measure, at_once=False)
        self._peaks.clear()

    def _measure(self, tensors: dict[int, Tensor]) -> None:
        self._launches.append(self._launcher.measure(tensors, self._scales))
        if self._outputs:
            self._send_early()
