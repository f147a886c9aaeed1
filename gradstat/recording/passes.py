"""`Recorder`: a pass, from its first gradient to its record or its failure.

Where all gradients of a model fit in a bucket their hooks note them, and they are measured together
when the pass ends. Others come through `Recorder.add` and wait in buckets, one for each stream that
computes some, which are measured when they are full. What is the same each time that the same rows
are measured is in a plan, made once; with it each tensor is looked at once, and an engine is called
once. Results travel to the host while the device goes on: only `Recorder.collect` waits for it,
when it is told to.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from gradstat.bins import LinearBins, widen
from gradstat.engines import Plan
from gradstat.formats import parse_format
from gradstat.history import History
from gradstat.ops import choose_engine, has_values, is_measurable, measure_formats
from gradstat.record import ACTIVATION, GRAD, GRAD_OUTPUT, OF_OUTPUTS, UNIT
from gradstat.recording.cuda import (
    CapturedPasses,
    Computed,
    Launch,
    Place,
    Schedule,
    SideStream,
    place_of,
    stream_of,
    take_over,
)
from gradstat.recording.options import LOOKS, Replaced
from gradstat.recording.scalars import ScalarLog
from gradstat.recording.shards import own_part
from gradstat.recording.torch_internals import (
    alike,
    has_compiled,
    is_capturing,
    multiplied,
    running_pass,
)
from gradstat.recording.transfers import Delivery, Part, Transfer, send, sent
from gradstat.results import packed
from gradstat.util import call_after_fork, warn

_SMALL_BYTES = 1 << 16
_UNSCALED: dict[str, Computed] = {}
_MOST_ROWS = 256  # beyond those of one record that wait to become one: 16 KB each over Log2Bins
_NO_OUTPUTS = (
    "watch() has seen no output of the model's modules, which are NaN in its records: they must be "
    "run in training mode, and compiled after watch()"
)


class _RowsPlan(NamedTuple):
    """How the tensors of some rows are measured."""

    rows: tuple[int, ...]  # in the order of a record
    take: Callable[[Mapping[int, Tensor]], Sequence[Tensor]]  # a bucket's tensors in that order
    fits: Callable[..., bool]  # says of tensors whether they are like those it was made for
    measuring: Plan


class _Pass:
    """What there is of a pass that has not ended, or of one to come."""

    def __init__(self) -> None:
        self.buckets: dict[Place, dict[int, Tensor]] = {}  # tensors that wait, by row
        self.n_bytes: dict[Place, int] = {}  # theirs, where they are measured when they are many
        self.launches: list[Launch] = []  # what is measured already
        self.parts: list[Part] = []  # of the record, on their way already
        self.n_rows = 0  # of the launches, and of the parts that are on the host
        self.scales: dict[str, Computed] = {}  # what values of a kind are multiplied by
        self.scaled_in: dict[str, int] = {}  # the run of autograd in which each was taken
        # Of units, by row.
        self.peaks: dict[tuple[int, torch.Size, torch.device], Computed] = {}


class Recorder:
    """Turns gradients into records."""

    # A pass is ``begin()``, ``note`` or ``add()`` for each gradient, ``end()``; what `add_output`
    # took before belongs to it too. A pass that never ends, after an exception or an interrupt,
    # leaves nothing, unless `end_early` keeps it. Callers of all but ``note`` hold `lock`: autograd
    # runs hooks in a thread for each device.

    def __init__(
        self,
        history: History,
        schedule: Schedule,
        scalars: ScalarLog,
        delivery: Delivery,
        replaced: Replaced,
        bucket_bytes: int,
        engine: str | None,
        side: SideStream | None,  # where launches run, if not where gradients are computed
    ) -> None:
        self.history, self.lock, self.is_closed = history, threading.RLock(), False
        self.is_recording = False  # a pass has begun that is recorded, and has not ended
        self.schedule, self.scalars, self.order = schedule, scalars, Order(history)
        self.bucket_bytes, self._engine, self._side = bucket_bytes, engine, side
        # Gradients that hooks have noted: they append, in whatever thread, and need no lock.
        self._noted: list[tuple[int, Tensor]] = []  # on the CPU
        self._noted_on: list[tuple[int, Tensor, Place]] = []  # of a stream
        self.note, self.note_on = self._noted.append, self._noted_on.append
        self.streams: dict[Place, torch.Stream | None] = {}  # that have computed gradients
        self._formats = [parse_format("watch", name) for name in history.formats]
        self._kinds = history.kinds
        self._is_linear, self._n_rows = isinstance(history.bins, LinearBins), len(history.rows)
        self._plans: dict[tuple[Any, ...], _RowsPlan] = {}  # by device and rows
        self._most_plans = 2 * len(history.rows) + 16
        # The first row of each kind that is recorded.
        self.first_rows = {kind: history.kinds.index(kind) for kind in dict.fromkeys(history.kinds)}
        self.sees_outputs = not self.first_rows.keys().isdisjoint(OF_OUTPUTS)
        self._lacks_outputs = self.sees_outputs  # so far
        self.drop()
        self._captured, self._delivery, self._replaced = CapturedPasses(), delivery, replaced
        call_after_fork(self)

    def is_due(self) -> bool:
        """Whether to record the pass that comes or goes on; a captured one may be due later."""
        is_captured, schedule = is_capturing(), self.schedule
        if (is_captured or schedule.graph is not None) and schedule.has_left_graph(
            is_captured=is_captured
        ):
            self.drop()
            self._captured.end_graph()
        return is_captured or schedule.is_due()

    def begin(self, scale: Tensor | None = None) -> None:
        """Start a pass whose gradients are to be divided by a scale, as for `take_scale`."""
        if self.is_recording:
            self.drop()
        if self.is_due():
            if scale is not None:
                self.take_scale(GRAD, scale)
            self.is_recording = True

    def take_scale(self, kind: str, scale: Tensor | None) -> None:
        """Remember what a record's values of a kind are multiplied by in this run of autograd."""
        if scale is None:
            return
        run, unfinished = running_pass(), self._pass
        if unfinished.scaled_in.get(kind) == run:
            return
        if kind in unfinished.scales:
            # Tensors that wait have the scale before.
            self.measure_waiting()
        # 0-dim, on any device; it may be changed in place afterwards.
        computed = Computed.now(scale.detach().clone())
        unfinished.scales = {**unfinished.scales, kind: computed}
        unfinished.scaled_in[kind] = run

    def add(self, row: int, gradient: Tensor) -> None:
        """Measure a row's tensor, if it can be, by the end of the pass; a later one replaces it."""
        if not self.is_recording:
            return
        self._put_noted()
        # A part of a larger buffer may be changed in it meanwhile, as DistributedDataParallel does;
        # a shard is nobody else's.
        self._take(row, gradient, joins=False, at_once=gradient._is_view())

    def add_output(self, row: int, x: Tensor) -> bool:
        """Measure a row's output and count it with those before; say whether it can be measured."""
        x = own_part(self.history, row, x)
        if not is_measurable(x):
            return False
        self._lacks_outputs = False
        # It may be changed in place afterwards. A copy of a small one costs less than a launch.
        is_small = x.nbytes <= _SMALL_BYTES
        self._take(row, x.clone() if is_small else x, joins=True, at_once=not is_small)
        return True

    def add_peaks(self, row: int, x: Tensor, unit: int | None) -> None:
        """Take the largest magnitude of each unit in this output and those before."""
        # ``unit`` is their dimension in the output, if it has units; the row is that of the peaks.
        x = own_part(self.history, row, x)
        if unit is None or not has_values(x):
            return
        peaks = choose_engine(self._engine, x).unit_peaks(x, unit)
        key = row, peaks.shape, peaks.device
        before = self._pass.peaks.get(key)
        if before is not None:
            peaks = torch.maximum(before.get(), peaks)
        self._pass.peaks[key] = Computed.now(peaks)

    def measure_waiting(self) -> None:
        """Measure now what waits; afterwards it may change, on the current streams."""
        if self._noted and not self._pass.buckets:  # all of it, on a CPU, where a bucket holds it
            self._measure(self._take_noted(), None)
        self._put_noted()
        for place in list(self._pass.buckets):
            self._measure_bucket(place, is_to_change=False)
        if self._side is not None:
            self._side.join()

    def end(self) -> None:
        """Finish the pass; its record is in `history` once it has arrived on the host."""
        parts, unfinished, schedule = None, self._pass, self.schedule
        if self.is_recording:
            for (row, _, _), peaks in unfinished.peaks.items():
                self._take(row, peaks.get(), joins=True, at_once=False)
            if self._lacks_outputs:
                self._lacks_outputs = False
                warn(_NO_OUTPUTS)
            self.measure_waiting()
            if is_capturing():
                # It has not run yet, and nothing may be asked of the device now. It has a record
                # each time that `replayed` is called.
                self._captured.add(unfinished.launches, schedule.count_captured())
                self.drop()
                return
            if not self.order.is_known:
                self.order.settle()
            parts = unfinished.parts
            if unfinished.launches:
                parts = [*parts, *send(unfinished.launches)]
            # After an interrupt from here on the record is missing, or there as a whole.
            self.drop()
        n_told = schedule.n_told
        if n_told % LOOKS == 0:
            self._replaced.look()
        step = schedule.count()
        if parts is not None:
            self._delivery.add(step, parts, n_told)
        # Where nothing waits no alert is due either, which `collect` would call.
        if self._delivery.pending or self.scalars.pending:
            self.collect(wait=False)

    def replayed(self, graph: object) -> bool:
        """Take what a replay of a graph, by default the newest, has written of passes that are due.

        Returns whether any pass was captured in it.
        """
        self._captured.end_graph()
        captured = self._captured.of(graph)
        if captured is None:
            return False
        for launches, stamp in captured.passes:
            step, n_told, is_due = self.schedule.step, self.schedule.n_told, self.is_due()
            self.schedule.n_told += 1
            if is_due:
                # After this replay, and before the next one on its stream.
                with torch.cuda.stream(captured.stream):
                    arriving = None if stamp is None else Transfer(stamp)
                    parts = send(launches)
                self._delivery.add(step, parts, n_told, arriving)
        if self._delivery.pending or self.scalars.pending:
            self.collect(wait=False)
        return True

    def drop(self) -> None:
        self.is_recording, self._pass = False, _Pass()
        self._noted.clear()
        self._noted_on.clear()
        if self._side is not None:
            self._side.forget()
        if not self.order.is_known:
            self.order.seen.clear()

    def has_failed(self) -> bool:
        """Whether a value that is not finite was logged for the pass that has not ended."""
        self.scalars.collect(wait=True)
        return self.scalars.broken_step == self.schedule.step

    def end_early(self) -> None:
        """Keep what an unfinished pass has measured so far as the last record, a partial one."""
        if is_capturing() or not self.is_due():
            return
        unfinished = self._pass
        waits = self._noted or self._noted_on or unfinished.buckets or unfinished.peaks
        if waits or unfinished.launches or unfinished.parts:
            self.is_recording = True
            self.history.partial_step = self.schedule.step
            self.end()

    def collect(self, wait: bool) -> None:
        """Move records and logged values into the history: those that have arrived, or all."""
        if wait and not self.is_closed:
            self._replaced.look()
        self.scalars.collect(wait)
        self._delivery.collect(wait)

    def finish(self) -> None:
        """Wait for all records if anybody else is to have them, and hand them on."""
        with self.lock:
            self.drop()
            self._captured = CapturedPasses()
            self._replaced.look()
            self.scalars.collect(wait=True)
            self._delivery.finish()

    def forget_other_threads(self) -> None:
        self.lock = threading.RLock()
        self.drop()
        self.scalars.pending.clear()  # which are the other process's
        self._delivery.forget_other_threads()

    def _put_noted(self) -> None:
        """Put gradients that hooks have noted so far into buckets."""
        if self._noted:
            self._pass.buckets.setdefault(None, {}).update(self._take_noted())
        if self._noted_on:
            n = len(self._noted_on)
            noted_on = self._noted_on[:n]
            del self._noted_on[:n]
            if not self.order.is_known:
                self._note_order(row for row, *_ in noted_on)
            for row, gradient, place in noted_on:
                self._put(row, gradient, place)

    def _take_noted(self) -> dict[int, Tensor]:
        n = len(self._noted)  # another thread may note one meanwhile
        noted = dict(self._noted[:n])
        del self._noted[:n]
        if not self.order.is_known:
            self._note_order(noted)
        return noted

    def _note_order(self, rows: Iterable[int]) -> None:
        for row in rows:
            self.order.note(GRAD, row - self.first_rows[GRAD])

    def _take(self, row: int, x: Tensor, *, joins: bool, at_once: bool) -> None:
        """Add a tensor to those that wait, or measure it now."""
        # It takes the place of one of the same row, or is counted after it, where it joins.
        place = place_of(x)
        if place not in self.streams:
            self.streams[place] = stream_of(x.device)
        if joins and row in self._pass.buckets.get(place, ()):
            self._measure_bucket(place, is_to_change=False)
        self._put(row, x, place, joins=joins)
        n_bytes = self._pass.n_bytes.get(place, 0) + x.element_size() * x.numel()
        self._pass.n_bytes[place] = n_bytes
        if at_once or n_bytes >= self.bucket_bytes:
            self._measure_bucket(place, is_to_change=at_once)

    def _put(self, row: int, x: Tensor, place: Place, *, joins: bool = False) -> None:
        """Put a tensor into its bucket; where it does not join, no other has one of its row."""
        buckets = self._pass.buckets
        bucket = buckets.setdefault(place, {})
        if len(buckets) > 1 and not joins:
            for each in buckets.values():
                each.pop(row, None)
        bucket[row] = x

    def _measure_bucket(self, place: Place, *, is_to_change: bool) -> None:
        """Measure what waits in a bucket, whose tensors may be changed as soon as this returns."""
        tensors, stream = self._pass.buckets.pop(place), self.streams.get(place)
        self._pass.n_bytes.pop(place, None)
        if not tensors:  # others, in another bucket, have replaced them
            return
        if stream is None:
            self._measure(tensors, None)
            return
        with nullcontext() if self._side is None else self._side.beside(stream.device):
            take_over(tensors.values(), stream)
            self._measure(tensors, stream.device)
        if is_to_change and self._side is not None:
            self._side.join()

    def _measure(self, tensors: dict[int, Tensor], device: torch.device | None) -> None:
        """Measure tensors by row, all on one CUDA device or none, by a plan where one fits."""
        # By the rows as they came: a plan is found without sorting them.
        unfinished, key, formats = self._pass, (device, *tensors), None
        # Taken out while it is used: whoever measures within that, as the handler of a signal may,
        # has another one.
        plan = self._plans.pop(key, None)
        listed = () if plan is None else plan.take(tensors)
        if (
            plan is None
            or self._formats
            or (self._is_linear and unfinished.scales)
            or not plan.fits(*listed)
        ):
            # Plain tensors stay what they are: another plan is made where a tensor is another.
            tensors = self._prepared(tensors)
            if not tensors:
                return
            rows, listed = zip(*sorted(tensors.items()), strict=True)
            formats = self._measured_formats(rows, listed) if self._formats else None
            key = (device, *tensors)
            plan = self._plans.pop(key, plan)
            if plan is None or not plan.fits(*listed):
                take = itemgetter(*rows) if len(rows) > 1 else lambda tensors: (tensors[rows[0]],)
                measuring = choose_engine(self._engine, listed[0]).Plan(listed, self.history.bins)
                plan = _RowsPlan(rows, take, alike(listed), measuring)
        due = None if device is None else self.schedule.flag(device)
        result = plan.measuring.run(listed, formats, due)
        self._plans[key] = plan
        if len(self._plans) > self._most_plans:
            del self._plans[next(iter(self._plans))]
        scales = _UNSCALED if self._is_linear else unfinished.scales
        if isinstance(result, bytes):
            unfinished.parts.append(Part(plan.rows, result, 0, sent(scales)))
        else:
            stream = None if device is None else stream_of(device)
            unfinished.launches.append(Launch(plan.rows, result, stream, scales))
        unfinished.n_rows += len(plan.rows)
        # What waits for the end of a record is not to grow with the outputs that it counts.
        if unfinished.n_rows > self._n_rows + _MOST_ROWS and not is_capturing():
            parts = [*unfinished.parts, *send(unfinished.launches)]
            unfinished.launches, unfinished.parts = [], self._delivery.combined(parts)
            there = [x for x in unfinished.parts if isinstance(x.data, bytes)]
            unfinished.n_rows = sum(len(x.rows) for x in there)

    def _prepared(self, tensors: dict[int, Tensor]) -> dict[int, Tensor]:
        """What is measured of tensors of any kind; those that cannot be measured are left out."""
        prepared = {}
        for row, x in tensors.items():
            # Detached, not under `torch.no_grad`: an interrupt could leave gradients disabled.
            x = own_part(self.history, row, x.detach() if x.requires_grad else x)
            if x.is_sparse:
                x = x.coalesce().values()
            if is_measurable(x) and has_values(x):
                prepared[row] = x.resolve_neg() if x.is_neg() else x
        if self._is_linear:
            for kind, scale in self._pass.scales.items():
                scaled = [row for row in prepared if self._kinds[row] == kind]
                if scaled:
                    divided = _divide([prepared[row] for row in scaled], scale.get())
                    prepared.update(zip(scaled, divided, strict=True))
        return prepared

    def _measured_formats(self, rows: Sequence[int], tensors: Sequence[Tensor]) -> Tensor:
        """What the formats would do to the tensors, ``(L, F, 10)``; NaN for peaks of units."""
        # They are given scaled gradients, as a cast would be. Peaks would not be cast.
        tensors = [x.detach() for x in tensors]
        fields = packed(*measure_formats(tensors, self._formats, engine=self._engine))
        peaks = [at for at, row in enumerate(rows) if self._kinds[row] == UNIT]
        if peaks:
            fields[peaks] = math.nan
        return fields


class Order:
    """The order in which gradients arrive and modules run, as the first recorded pass shows it."""

    # A model that torch.compile has compiled runs as a whole, and its gradients arrive in no order:
    # then the history keeps the order of registration.

    def __init__(self, history: History) -> None:
        self._history = history
        self.is_known = False
        # Numbers of parameters and modules, by what has come of them: a dict keeps their order.
        self.seen: dict[tuple[str, int], None] = {}

    def note(self, kind: str, number: int) -> None:
        """A gradient has arrived (GRAD, GRAD_OUTPUT), or a module has run (ACTIVATION)."""
        if not self.is_known:
            self.seen.setdefault((kind, number))

    def settle(self) -> None:
        self.is_known = True
        if has_compiled():
            return
        gradients, outputs, output_gradients = (
            [number for its_kind, number in self.seen if its_kind == kind]
            for kind in (GRAD, ACTIVATION, GRAD_OUTPUT)
        )
        parameters, modules = gradients[::-1], outputs or output_gradients[::-1]
        if parameters or modules:
            self._history.depth = np.concatenate(
                [
                    _depths(n, modules if kind in OF_OUTPUTS else parameters)
                    for kind, n in Counter(self._history.kinds).items()
                ]
            )


def _depths(n: int, seen: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Place of each of n things; one that was not seen comes after the one before it."""
    place = dict(zip(seen, range(len(seen)), strict=True))
    keys, key = [], -1
    for each in range(n):
        key = place.get(each, key)
        keys.append(key)
    return np.argsort(np.argsort(keys, kind="stable"))


def _divide(gradients: list[Tensor], scale: Tensor) -> list[Tensor]:
    """Unscaled copies, by the arithmetic of `torch.amp.GradScaler`; in float32 at least."""
    wide = [x.float() if x.itemsize < 4 else x for x in gradients]
    inverse = widen(scale.to(wide[0].device, non_blocking=True)).reciprocal().float()
    return multiplied(wide, inverse)
