"""Passes captured in CUDA graphs: which of their replays are due, and where their results are."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from gradstat.ops import choose_engine
from gradstat.recording.arrivals import Launch, Transfer
from gradstat.recording.torch_internals import call_after_replays, capturing_graph
from gradstat.warning import warn

if TYPE_CHECKING:
    from gradstat.engines.triton_cadence import PassCounter

_MISSED = (
    "replayed() needs to be called once after each replay of a graph that was captured under "
    "watch(); there were more replays, or fewer, and a record that was due may be missing"
)


def is_capturing() -> bool:
    """Whether what runs now becomes part of a CUDA graph, and runs when that is replayed."""
    is_initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return is_initialized and torch.cuda.is_current_stream_capturing()


class Cadence:
    """Which passes are recorded: every so many steps the last pass of a step.

    The host counts all passes, those of a graph when it is told of a replay. A graph runs without
    the host, so it counts its own passes on the device.

    Args:
        every: steps from one record to the next.
        accumulation_steps: passes in a step.
        tensors: on the devices where passes may be captured.
        engine: name, or ``None``; Triton's can leave out a replay.
        first_step: number of the step that comes first.
    """

    def __init__(
        self,
        every: int,
        accumulation_steps: int,
        tensors: Iterable[Tensor],
        engine: str | None,
        first_step: int = 0,
    ) -> None:
        # Passes that it has been told of; those before the first step count as told.
        self.n_told = first_step * accumulation_steps
        # Replays that nobody told it of, as the device has counted them.
        self._n_missed = 0
        self._every, self._accumulation_steps = every, accumulation_steps
        self._counters: dict[torch.device, PassCounter] = {}
        for x in tensors:
            if x.is_cuda and x.device not in self._counters:
                make = getattr(choose_engine(engine, x), "PassCounter", None)
                if make is not None:
                    self._counters[x.device] = make(x.device, every * accumulation_steps)
        # Passes before the first captured one: no device has counted them.
        self._n_uncounted: int | None = None
        # Flags of the pass being captured, each with an event for other streams to wait for.
        self._flags: dict[torch.device, tuple[Tensor, torch.cuda.Event]] = {}
        self._graph: weakref.ref[object] | None = None

    @property
    def n_passes(self) -> int:
        """Passes that have ended."""
        return self.n_told + self._n_missed

    @property
    def step(self) -> int:
        """Number of the step that the pass belongs to."""
        return self.step_of(self.n_passes)

    def step_of(self, number: int) -> int:
        """Number of the step that a pass belongs to, by its own number."""
        return number // self._accumulation_steps

    def is_due(self) -> bool:
        """Whether the pass that comes or goes on is one to record, if it is not captured."""
        step, within = divmod(self.n_passes, self._accumulation_steps)
        return within == self._accumulation_steps - 1 and step % self._every == 0

    def has_left_graph(self, *, is_captured: bool) -> bool:
        """Whether this pass is in another graph, or none, than the pass last asked for.

        What that pass has kept is then lost: its capture has failed.
        """
        graph = weakref.ref(capturing_graph()) if is_captured else None
        if graph == self._graph:
            return False
        self._graph = graph
        self._flags.clear()
        return True

    def flag(self, device: torch.device) -> Tensor | None:
        """What kernels on the current stream read to know whether the captured pass is due.

        Returns:
            int64 ``(1,)``; ``None`` outside a capture, where a pass that is not due has no kernels,
            and for a device without a counter, where all passes are measured.
        """
        counter = self._counters.get(device)
        if counter is None or not is_capturing():
            return None
        stream = torch.cuda.current_stream(device)
        if device not in self._flags:
            if self._n_uncounted is None:
                self._n_uncounted = self.n_passes
            due = counter.flag(self._n_uncounted, self._accumulation_steps - 1)
            self._flags[device] = due, stream.record_event()
        due, is_set = self._flags[device]
        stream.wait_event(is_set)
        return due

    def count(self) -> None:
        """Count a pass that ran outside a graph."""
        self.n_told += 1
        if self._n_uncounted is not None:
            for counter in self._counters.values():
                counter.count()

    def count_captured(self) -> Tensor | None:
        """Let each replay count the pass that has just been captured.

        Returns:
            What `take_stamp` reads, int64 ``(2,)``; ``None`` if the replays are not counted.
        """
        if self._counters and not self._flags:  # nothing was measured
            self.flag(torch.device("cuda", torch.cuda.current_device()))
        counters = [self._counters[device] for device in self._flags]
        self._flags.clear()
        stamp = counters[0].stamp() if counters else None
        for counter in counters:
            counter.count()
        return stamp

    def count_replayed(self) -> None:
        """Count a captured pass that was replayed."""
        self.n_told += 1

    def take_stamp(self, stamp: Transfer, n_told: int) -> int | None:
        """Compare what a replay has counted with what the host had been told.

        Args:
            stamp: what the replay has left.
            n_told: passes before that replay.

        Returns:
            Number of the step; ``None`` if the replay was not due, and has measured nothing.
        """
        n_counted, is_due = stamp.arrays()[0].tolist()
        n_passes = n_counted + (self._n_uncounted or 0)
        if n_passes - n_told != self._n_missed:
            self._n_missed = n_passes - n_told
            warn(_MISSED)
        return self.step_of(n_passes) if is_due else None


class CapturedPass(NamedTuple):
    """Results and the stamp of `Cadence.count_captured`; a replay writes both."""

    launches: list[Launch]
    stamp: Tensor | None


class CapturedGraph:
    """The passes of a graph, and the stream of its last replay, if that is known."""

    def __init__(self, graph: object) -> None:
        self.graph = weakref.ref(graph)
        self.passes: list[CapturedPass] = []
        self.stream: torch.cuda.Stream | None = None
        call_after_replays(graph, self._on_replay)

    def _on_replay(self) -> None:
        self.stream = torch.cuda.current_stream()


class CapturedPasses:
    """Results of captured passes, on their device; each replay writes those that are due."""

    def __init__(self) -> None:
        # Those that are alive, the newest graph last.
        self._graphs: list[CapturedGraph] = []
        self._is_open = False

    def add(self, launches: list[Launch], stamp: Tensor | None) -> None:
        """Keep the results of a pass that has just been captured."""
        graph = capturing_graph()
        if not self._is_open or self._graphs[-1].graph() is not graph:
            # A graph that is captured anew no longer has the passes that it had.
            kept = [each for each in self._graphs if each.graph() not in (None, graph)]
            self._graphs = [*kept, CapturedGraph(graph)]
            self._is_open = True
        self._graphs[-1].passes.append(CapturedPass(launches, stamp))

    def of(self, graph: object) -> CapturedGraph | None:
        """What is known of a graph, or of the newest one for ``None``."""
        for each in reversed(self._graphs):
            known = each.graph()
            if known is not None and (graph is None or known is graph):
                return each
        return None

    def end_graph(self) -> None:
        """Let no pass that is captured from now on belong to a graph captured so far."""
        self._is_open = False
