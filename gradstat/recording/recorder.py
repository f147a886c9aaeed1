"""`Recorder`: measures the gradients of one pass after another and hands the results on.

Gradients are measured in buckets, each in one launch. The results travel to the host while the
device goes on: only `Recorder.collect` waits for it, when it is told to.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from gradstat.forks import call_after_fork
from gradstat.history import History
from gradstat.ops import is_measurable
from gradstat.record import GRAD, OF_OUTPUTS
from gradstat.recording.arrivals import Part, Record, Transfer, combine_arrived, send
from gradstat.recording.cuda_graphs import Cadence, CapturedPasses, is_capturing
from gradstat.recording.delivery import Delivery
from gradstat.recording.launcher import Launcher
from gradstat.recording.logged import Logged
from gradstat.recording.order import Order
from gradstat.recording.selection import Replaced
from gradstat.recording.shards import local_part, note_holding
from gradstat.recording.streams import Computed, SideStream
from gradstat.recording.torch_internals import running_pass
from gradstat.recording.unfinished import Unfinished
from gradstat.recording.units import unit_peaks
from gradstat.recording.waiting import Waiting
from gradstat.warning import warn

_SMALL_BYTES = 1 << 16
_MOST_ROWS = 256  # that wait on their device, 16 KB each over Log2Bins
_NO_OUTPUTS = (
    "watch() has seen no output of the model's modules, which are NaN in its records: they must be "
    "run in training mode, and compiled after watch()"
)


class Recorder:
    """Turns gradients into records.

    A pass is ``begin()``, ``add()`` for each gradient, ``end()``; what `add_output` took before
    belongs to it too. A pass that never ends, after an exception or an interrupt, leaves nothing.
    Callers hold `lock` meanwhile: autograd runs hooks in a thread for each device.

    Args:
        history: where the records go.
        cadence: which passes are recorded.
        logged: the values that the run logs.
        delivery: takes the records there.
        replaced: tells of parameters that make no pass any more.
        bucket_bytes: gradients measured in one launch.
        engine: name, or ``None``.
        side: where launches run; ``None`` for the stream that computes the gradients.
    """

    def __init__(
        self,
        history: History,
        cadence: Cadence,
        logged: Logged,
        delivery: Delivery,
        replaced: Replaced,
        bucket_bytes: int,
        engine: str | None,
        side: SideStream | None,
    ) -> None:
        self.history = history
        self.lock, self.is_closed = threading.RLock(), False
        self._cadence, self.logged, self.order = cadence, logged, Order(history)
        self._launcher = Launcher(history, engine, cadence)
        self._bucket_bytes, self._side = bucket_bytes, side
        # The first row of each kind that is recorded.
        self.first_rows = {kind: history.kinds.index(kind) for kind in dict.fromkeys(history.kinds)}
        self._sees_outputs = not self.first_rows.keys().isdisjoint(OF_OUTPUTS)
        self._lacks_outputs = self._sees_outputs  # so far
        self.drop()
        self._captured, self._delivery = CapturedPasses(), delivery
        self._replaced = replaced
        call_after_fork(self)

    @property
    def is_recording(self) -> bool:
        """Whether a pass has begun that has not ended."""
        return self._unfinished.is_recording

    def is_due(self) -> bool:
        """Whether to record the pass that comes or goes on; a captured one may be due later."""
        is_captured = is_capturing()
        if self._cadence.has_left_graph(is_captured=is_captured):
            self.drop()
        return is_captured or self._cadence.is_due()

    @property
    def n_passes(self) -> int:
        """Passes that have ended, those of graphs included."""
        return self._cadence.n_passes

    def begin(self, scale: Tensor | None = None) -> None:
        """Start a pass whose gradients are to be divided by a scale, as for `take_scale`."""
        if self._unfinished.is_recording:
            self.drop()
        if self.is_due():
            self._unfinished.is_recording = True
            self.take_scale(GRAD, scale)

    def take_scale(self, kind: str, scale: Tensor | None) -> None:
        """Remember what a record's values of a kind are multiplied by in this run of autograd.

        Args:
            kind: of the values.
            scale: 0-dim, on any device; it may be changed in place afterwards.
        """
        if scale is None:
            return
        run, unfinished = running_pass(), self._unfinished
        if unfinished.scaled_in.get(kind) == run:
            return
        if kind in unfinished.scales:
            # Tensors that wait have the scale before.
            self.measure_waiting()
        computed = Computed.now(scale.detach().clone())
        unfinished.scales = {**unfinished.scales, kind: computed}
        unfinished.scaled_in[kind] = run

    def add(self, index: int, gradient: Tensor) -> None:
        """Measure a layer's gradient, now or by the end of the pass; a later one replaces it.

        A tensor that cannot be measured is passed over.
        """
        unfinished = self._unfinished
        if not unfinished.is_recording:
            return
        # A part of a larger buffer may be changed in it meanwhile, as DistributedDataParallel does;
        # a shard is nobody else's.
        at_once = gradient._is_view()
        # Detached, since gradients may be enabled here. To disable them is not for a hook, which an
        # interrupt may end before it enables them again.
        if gradient.requires_grad:
            gradient = gradient.detach()
        if type(gradient) is not Tensor:
            gradient = self._own_part(index, gradient)
        if gradient.is_sparse:
            gradient = gradient.coalesce().values()
        if is_measurable(gradient) and not gradient.is_meta:
            unfinished.waiting.replace(index, gradient, self._measure, at_once=at_once)

    def add_output(self, index: int, x: Tensor) -> bool:
        """Measure a layer's output, if `is_due`, and count it together with those before.

        It may be changed in place afterwards. Returns whether it can be measured.
        """
        x = self._own_part(index, x)
        if not is_measurable(x):
            return False
        self._lacks_outputs = False
        # A copy of a small one costs less than a launch of its own.
        is_small = x.nbytes <= _SMALL_BYTES
        x = x.clone() if is_small else x
        self._unfinished.waiting.join(index, x, self._measure, at_once=not is_small)
        return True

    def add_peaks(self, index: int, x: Tensor, unit: int | None) -> None:
        """Take the largest magnitude of each unit in this output and those before.

        ``unit`` is their dimension in the output, if it has units; the layer is that of the peaks.
        """
        if unit is None:
            return
        peaks = unit_peaks(self._own_part(index, x), unit)
        key = index, peaks.shape, peaks.device
        before = self._unfinished.peaks.get(key)
        if before is not None:
            peaks = torch.maximum(before.get(), peaks)
        self._unfinished.peaks[key] = Computed.now(peaks)

    def measure_waiting(self) -> None:
        """Measure now what `add` has taken; afterwards it may change."""
        self._unfinished.waiting.measure_all(self._measure)

    def end(self) -> None:
        """Finish the pass; its record is in `history` once it has arrived on the host.

        A captured pass has a record each time that `replayed` is called.
        """
        record, unfinished = None, self._unfinished
        if unfinished.is_recording:
            for (index, _, _), peaks in unfinished.peaks.items():
                unfinished.waiting.join(index, peaks.get(), self._measure, at_once=False)
            if self._lacks_outputs:
                self._lacks_outputs = False
                warn(_NO_OUTPUTS)
            self.measure_waiting()
            if is_capturing():
                # It has not run yet, and nothing may be asked of the device now.
                self._captured.add(unfinished.launches, self._cadence.count_captured())
                self.drop()
                return
            if not self.order.is_known:
                self.order.settle()
            record = self._record([*unfinished.parts, *send(unfinished.launches)], None)
            # After an interrupt from here on the record is missing, or there as a whole.
            self.drop()
        self._captured.end_graph()
        self._replaced.glance()
        self._cadence.count()
        if record is not None:
            self._delivery.add(record)
        self._collect_pending()

    def replayed(self, graph: object) -> bool:
        """Take the results of captured passes that are due, which a replay has written anew.

        Args:
            graph: that was replayed; ``None`` for the newest one.

        Returns:
            Whether any pass was captured in it.
        """
        self._captured.end_graph()
        captured = self._captured.of(graph)
        if captured is None:
            return False
        for launches, stamp in captured.passes:
            record = None
            if self.is_due():
                # After this replay, and before the next one on its stream.
                with torch.cuda.stream(captured.stream):
                    record = self._record(send(launches), stamp)
            self._cadence.count_replayed()
            if record is not None:
                self._delivery.add(record)
        self._collect_pending()
        return True

    def drop(self) -> None:
        """Forget an unfinished pass."""
        self._unfinished = Unfinished(Waiting(self._bucket_bytes, self._side))
        self.order.forget()

    def has_failed(self) -> bool:
        """Whether a value that is not finite was logged for the pass that has not ended."""
        self.logged.collect(wait=True)
        return self.logged.broken_step == self._cadence.step

    def end_early(self) -> None:
        """Keep what an unfinished pass has measured so far as the last record, a partial one."""
        if is_capturing() or not self.is_due():
            return
        unfinished = self._unfinished
        has_measured = unfinished.launches or unfinished.parts or unfinished.peaks
        if has_measured or not unfinished.waiting.is_empty:
            unfinished.is_recording = True
            self.history.partial_step = self._cadence.step
            self.end()

    def collect(self, wait: bool) -> None:
        """Move records and logged values into the history: those that have arrived, or all."""
        if wait and not self.is_closed:
            self._replaced.look()
        self.logged.collect(wait)
        self._delivery.collect(wait)

    def tell_alerts(self) -> None:
        """Tell of what is new and severe, if anybody is to be told."""
        self._delivery.tell_alerts()

    def finish(self) -> None:
        """Wait for all records if anybody else is to have them, and hand them on."""
        with self.lock:
            self.drop()
            self._captured = CapturedPasses()
            self._replaced.look()
            self.logged.collect(wait=True)
            self._delivery.finish()

    def _collect_pending(self) -> None:
        # A pass without a record says nothing of what alerts have told of.
        if self._delivery.is_pending or self.logged.is_pending:
            self.collect(wait=False)

    def forget_other_threads(self) -> None:
        """In a forked process: leave to the other one what it records."""
        self.lock = threading.RLock()
        self.drop()
        self.logged.forget_pending()
        self._delivery.forget_other_threads()

    def _record(self, parts: list[Part], stamp: Tensor | None) -> Record:
        arriving = None if stamp is None else Transfer((stamp,))
        return Record(self._cadence.step, self.history, parts, self._cadence.n_told, arriving)

    def _send_early(self) -> None:
        """Keep what waits for the end of a record from growing with the outputs it counts."""
        unfinished = self._unfinished
        n_rows = sum(len(launch.indices) for launch in unfinished.launches)
        if n_rows <= _MOST_ROWS or is_capturing():
            return
        parts = combine_arrived([*unfinished.parts, *send(unfinished.launches)], self.history)
        unfinished.launches, unfinished.parts = [], parts

    def _own_part(self, index: int, x: Tensor) -> Tensor:
        """What this rank holds of a tensor; for a DTensor the history is told of it."""
        return local_part(x) if note_holding(self.history, index, x) else x

    def _measure(self, tensors: dict[int, Tensor]) -> None:
        unfinished = self._unfinished
        unfinished.launches.append(self._launcher.measure(tensors, unfinished.scales))
        if self._sees_outputs:
            self._send_early()
