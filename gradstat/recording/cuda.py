"""CUDA: streams, and passes captured in graphs.

Nothing may be asked of a device while a graph is captured. What a graph computes is asked for after
a replay, which only the user knows of.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from gradstat.ops import choose_engine
from gradstat.recording.torch_internals import (
    call_after_replays,
    capturing_graph,
    is_capturing,
    raw_stream,
)
from gradstat.util import warn

if TYPE_CHECKING:
    from gradstat.engines.triton import PassCounter

# Where a tensor is computed: a stream of a CUDA device, another device, or `None` for the CPU.
Place: TypeAlias = tuple[int, int] | torch.device | None

_MISSED = (
    "replayed() needs to be called once after each replay of a graph that was captured under "
    "watch(); there were more replays, or fewer, and a record that was due may be missing"
)


def place_of(x: Tensor) -> Place:
    """Where the current code computes a tensor."""
    if x.is_cpu:
        return None
    if not x.is_cuda:
        return x.device
    index = x.get_device()
    return index, raw_stream(index)


def stream_of(device: torch.device) -> torch.Stream | None:
    """The current stream of a CUDA device."""
    if device.type != "cuda":
        return None
    # In a fifth of the time of torch.cuda.current_stream().
    return torch.accelerator.current_stream(device)


def take_over(tensors: Iterable[Tensor], stream: torch.Stream | None) -> None:
    """Let the current stream use what another one computes."""
    # It waits for all that the other stream has to do so far. The tensors' memory is given to no
    # other tensor before the current stream has done what it has to do by then.
    if stream is None:
        return
    current = torch.accelerator.current_stream(stream.device)
    if current != stream:
        current.wait_stream(stream)
        for x in tensors:
            x.record_stream(current)


class Computed(NamedTuple):
    """A tensor, and the stream that computes it."""

    x: Tensor
    stream: torch.Stream | None

    @classmethod
    def now(cls, x: Tensor) -> Computed:
        """A tensor that the current stream computes."""
        return cls(x, stream_of(x.device))

    def get(self) -> Tensor:
        """The tensor, for the current stream."""
        take_over([self.x], self.stream)
        return self.x


class SideStream:
    """A stream of each CUDA device on which to measure beside the one that computes gradients."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._busy: set[torch.device] = set()

    @contextmanager
    def beside(self, device: torch.device) -> Iterator[None]:
        """Run what follows on the side stream of a CUDA device."""
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._busy.add(device)
        with torch.cuda.stream(self._streams[device]):
            yield

    def join(self) -> None:
        """Let the current streams wait for what runs beside them: then gradients may change."""
        for device in self._busy:
            torch.cuda.current_stream(device).wait_stream(self._streams[device])

    def forget(self) -> None:
        self._busy.clear()


class Launch(NamedTuple):
    """What was measured at once."""

    rows: tuple[int, ...]  # whose tensors they were, in order
    result: Tensor  # of the engine, int64 on their device
    stream: torch.Stream | None  # that computes it
    scales: Mapping[str, Computed]  # what the values of a kind are still to be divided by


class Schedule:
    """Which passes are recorded: every so many steps the last pass of a step."""

    # The host counts all passes, those of a graph when it is told of a replay. A graph runs without
    # the host, so it counts its own passes on the device.

    def __init__(
        self,
        every: int,  # steps from one record to the next
        accumulation_steps: int,  # passes in a step
        tensors: Iterable[Tensor],  # on the devices where passes may be captured
        engine: str | None,  # Triton's can leave out a replay
        first_step: int,
    ) -> None:
        # Passes that it has been told of; those before the first step count as told.
        self.n_told = first_step * accumulation_steps
        # Replays that nobody told it of, as the device has counted them.
        self.n_missed = 0
        self.accumulation_steps, self._period = accumulation_steps, every * accumulation_steps
        self._counters: dict[torch.device, PassCounter] = {}
        for x in tensors:
            if x.is_cuda and x.device not in self._counters:
                make = getattr(choose_engine(engine, x), "PassCounter", None)
                if make is not None:
                    self._counters[x.device] = make(x.device, self._period)
        # Passes before the first captured one: no device has counted them.
        self._n_uncounted: int | None = None
        # Flags of the pass being captured, each with an event for other streams to wait for.
        self._flags: dict[torch.device, tuple[Tensor, torch.cuda.Event]] = {}
        self.graph: weakref.ref[object] | None = None  # that the pass last asked for is in

    @property
    def n_passes(self) -> int:
        return self.n_told + self.n_missed

    @property
    def step(self) -> int:
        return self.n_passes // self.accumulation_steps

    def is_due(self) -> bool:
        """Whether to record the pass that comes or goes on, outside a graph."""
        n_before = self.n_told + self.n_missed
        return n_before % self._period == self.accumulation_steps - 1

    def has_left_graph(self, *, is_captured: bool) -> bool:
        """Whether this pass is in another graph, or none, than the pass last asked for."""
        # What that pass has kept is then lost: its capture has failed.
        graph = weakref.ref(capturing_graph()) if is_captured else None
        if graph == self.graph:
            return False
        self.graph = graph
        self._flags.clear()
        return True

    def flag(self, device: torch.device) -> Tensor | None:
        """What kernels on the current stream read to know whether the captured pass is due."""
        # It is int64 ``(1,)``; ``None`` outside a capture, where a pass that is not due has no
        # kernels, and for a device without a counter, where all passes are measured.
        counter = self._counters.get(device)
        if counter is None or not is_capturing():
            return None
        stream = torch.cuda.current_stream(device)
        if device not in self._flags:
            if self._n_uncounted is None:
                self._n_uncounted = self.n_passes
            due = counter.flag(self._n_uncounted, self.accumulation_steps - 1)
            self._flags[device] = due, stream.record_event()
        due, is_set = self._flags[device]
        stream.wait_event(is_set)
        return due

    def count(self) -> int:
        """Count a pass that ran outside a graph; return the number of its step."""
        step = (self.n_told + self.n_missed) // self.accumulation_steps
        self.n_told += 1
        if self._n_uncounted is not None:
            for counter in self._counters.values():
                counter.count()
        return step

    def count_captured(self) -> Tensor | None:
        """Let each replay count the pass that has just been captured."""
        # Returns what `take_stamp` reads, int64 ``(2,)``; ``None`` if the replays are not counted.
        if self._counters and not self._flags:  # nothing was measured
            self.flag(torch.device("cuda", torch.cuda.current_device()))
        counters = [self._counters[device] for device in self._flags]
        self._flags.clear()
        stamp = counters[0].stamp() if counters else None
        for counter in counters:
            counter.count()
        return stamp

    def take_stamp(self, stamp: Tensor, n_told: int) -> int | None:
        """Compare what a replay has counted with the passes that the host knew of before."""
        # Returns the number of the step; ``None`` if the replay was not due, and measured nothing.
        n_counted, is_due = stamp.tolist()
        n_passes = n_counted + (self._n_uncounted or 0)
        if n_passes - n_told != self.n_missed:
            self.n_missed = n_passes - n_told
            warn(_MISSED)
        return n_passes // self.accumulation_steps if is_due else None


class CapturedGraph:
    """The passes of a graph, and the stream of its last replay, if that is known."""

    def __init__(self, graph: object) -> None:
        # Results and the stamp of `Schedule.count_captured`; a replay writes both.
        self.passes: list[tuple[list[Launch], Tensor | None]] = []
        self.stream: torch.cuda.Stream | None = None
        call_after_replays(graph, self._on_replay)

    def _on_replay(self) -> None:
        self.stream = torch.cuda.current_stream()


class CapturedPasses:
    """Results of captured passes, on their device; each replay writes those that are due."""

    def __init__(self) -> None:
        # Of the graphs that are alive, the newest last, and of the one that is being captured.
        self._graphs: weakref.WeakKeyDictionary[object, CapturedGraph]
        self._graphs = weakref.WeakKeyDictionary()
        self._open: CapturedGraph | None = None

    def add(self, launches: list[Launch], stamp: Tensor | None) -> None:
        graph = capturing_graph()
        if self._open is None or self._open is not self._graphs.get(graph):
            # A graph that is captured anew no longer has the passes that it had.
            self._graphs.pop(graph, None)
            self._open = self._graphs[graph] = CapturedGraph(graph)
        self._open.passes.append((launches, stamp))

    def of(self, graph: object) -> CapturedGraph | None:
        """What is known of a graph, or of the newest one for ``None``."""
        found = [known for its, known in self._graphs.items() if graph is None or graph is its]
        return found[-1] if found else None

    def end_graph(self) -> None:
        """Let no pass that is captured from now on belong to a graph captured so far."""
        self._open = None
