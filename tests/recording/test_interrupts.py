"""An interrupt at any line of gradstat's: at most one record is missing, and the next ones come."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from programs import run_python
from torch.utils.checkpoint import checkpoint
from watching import assert_same, make_model, n_hooks

import gradstat
from gradstat import History, Statistics
from gradstat.record import OF_OUTPUTS

PACKAGE = str(Path(gradstat.__file__).parent)
Event = Callable[[FrameType], None]


@contextmanager
def at_each_line(event: Event) -> Iterator[None]:
    """Call a function before each line of gradstat's that runs in this thread."""

    def trace(frame: FrameType, what: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        if what == "line":
            event(frame)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line, once."""

    def __init__(self, n: int) -> None:
        self.n, self.n_lines, self.where = n, 0, ""

    def __call__(self, frame: FrameType) -> None:
        self.n_lines += 1
        if self.n_lines == self.n:
            self.where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
            raise KeyboardInterrupt


class Run:
    """A model that makes the same record in each step, as its parameters never change."""

    def __init__(self, options: dict[str, Any], path: Path | None) -> None:
        torch.manual_seed(0)
        self.model = make_model()
        self.x = torch.randn(8, 6)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        options = dict(options)
        if options.pop("needs_optimizer", False):
            options["optimizer"] = self.optimizer
        if options.pop("checkpoint", False):
            self.call = partial(checkpoint, self.model, use_reentrant=True)
        else:
            self.call = self.model
        self.received: list[int] = []
        if options.pop("needs_sink", False):
            options["sink"] = lambda step, record: self.received.append(step)
        if options.pop("needs_path", False):
            options["path"] = path
        self.options = options
        self.watch = gradstat.watch(self.model, **options)

    def step(self) -> None:
        self.optimizer.zero_grad()
        x = self.x.clone().requires_grad_()
        self.call(x).square().mean().backward()
        self.optimizer.step()
        if self.options.get("when") == "call":
            self.watch.measure()

    def goes_on_like(self, expected: Statistics) -> bool:
        """Whether the newest record is the one to expect, or the next one.

        What modules have returned before an interrupt counts with what they return again before a
        record, as it always does.
        """
        record = self.watch.history.record()
        if not is_same(record, expected) and "activation" in self.options.get("what", ()):
            kinds = self.watch.history.kinds
            for kind, mine, theirs in zip(kinds, record, expected, strict=True):
                twice = theirs.merge(theirs)
                wanted = [theirs, twice] if kind in OF_OUTPUTS else [theirs]
                if not any(torch.equal(mine.integers, x.integers) for x in wanted):
                    return False
            self.step()
            record = self.watch.history.record()
        return is_same(record, expected)


def is_same(record: Statistics, expected: Statistics) -> bool:
    fields = ("integers", "floats", "counts")
    pairs = [(getattr(record, name), getattr(expected, name)) for name in fields]
    return all(mine.numpy().tobytes() == theirs.numpy().tobytes() for mine, theirs in pairs)


OPTIONS: dict[str, dict[str, Any]] = {
    "backward": {},
    "step": {"when": "step", "needs_optimizer": True},
    "call": {"when": "call"},
    "sink": {"needs_sink": True},
    "path": {"needs_path": True},
    "capacity": {"capacity": 4},
    "params": {"what": ["grad", "param"], "bucket_bytes": 100},
    "updates": {"what": ["grad", "param", "update"], "when": "step", "needs_optimizer": True},
    "checkpoint": {"checkpoint": True},
    "accumulation": {"accumulation_steps": 2, "every": 2},
    "linear": {"bins": gradstat.LinearBins(5, -1.0, 1.0)},
    "activations": {"what": ["grad", "activation", "grad_output"], "modules": "^[12]$"},
    "activations_step": {
        "what": ["grad", "activation", "grad_output"],
        "modules": "^[12]$",
        "when": "step",
        "needs_optimizer": True,
    },
}


@pytest.mark.faults
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_watch_goes_on_after_an_interrupt_at_any_line(
    options: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(options, tmp_path / "run")
    n_passes = options.get("accumulation_steps", 1) * options.get("every", 1)
    for _ in range(2 * n_passes):
        run.step()
    expected, n, steps = run.watch.history.record(), 0, []
    while True:
        n += 1
        interrupt, before = Interrupt(n), run.watch.history.steps[-1]
        with suppress(KeyboardInterrupt), at_each_line(interrupt):
            run.step()
        if not interrupt.where:
            break
        history = run.watch.history
        between = history.steps[-1]
        for _ in range(n_passes):
            run.step()
        after = run.watch.history.steps[-1]
        assert before <= between < after, interrupt.where
        assert after - before <= 2 * options.get("every", 1), interrupt.where
        assert run.goes_on_like(expected), interrupt.where
        steps.append(after)
    assert n > 100
    run.watch.close()
    if "capacity" not in options:
        assert set(steps) <= set(history.steps.tolist())
    if "needs_sink" in options:
        assert run.received == sorted(set(run.received))
        assert set(steps) <= set(run.received)
    if "needs_path" in options:
        assert set(steps) <= set(History.load(tmp_path / "run").steps.tolist())


# An interrupt at the very end of a `with` leaves its file to the collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.faults
def test_watch_close_can_be_called_again_after_an_interrupt_at_any_line(tmp_path: Path) -> None:
    options, n = OPTIONS["sink"] | OPTIONS["path"], 0
    while True:
        n += 1
        run = Run(options, tmp_path / str(n))
        run.step()
        interrupt = Interrupt(n)
        with suppress(KeyboardInterrupt), at_each_line(interrupt):
            run.watch.close()
        if not interrupt.where:
            break
        run.watch.close()
        assert n_hooks(run.model) == 0, interrupt.where
        run.step()
        assert run.received == run.watch.history.steps.tolist() == [0], interrupt.where
        assert_same(History.load(tmp_path / str(n)), run.watch.history)
    assert n > 50


class Reader:
    """Reads a history at each line, as a signal's handler may, or at one of them."""

    def __init__(self, watch: gradstat.Watch, only: int | None = None) -> None:
        self.watch, self.only, self.n_lines = watch, only, 0

    def __call__(self, frame: FrameType) -> None:
        self.n_lines += 1
        if self.only not in (None, self.n_lines):
            return
        history = self.watch.history
        n = len(history)
        assert history.steps.tolist() == list(range(n))
        assert len(history.times) == n
        records = history.unpack()
        assert (records.integers == records.integers[:1]).all()
        assert (records.sizes.reshape(n, -1) == records.sizes[: len(history.rows)]).all()


@pytest.mark.faults
@pytest.mark.parametrize(
    "options",
    [OPTIONS[name] for name in ("backward", "updates", "checkpoint", "activations")],
    ids=["backward", "updates", "checkpoint", "activations"],
)
@pytest.mark.parametrize("at", ["each", "one"])
def test_watch_history_can_be_read_at_any_line_of_a_step(
    at: str, options: dict[str, Any], tmp_path: Path
) -> None:
    run = Run(options | {"needs_path": True, "needs_sink": True}, tmp_path / "run")
    run.step()
    expected, n = run.watch.history.record(), 0
    while True:
        n += 1
        reader = Reader(run.watch, None if at == "each" else n)
        with at_each_line(reader):
            run.step()
        assert is_same(run.watch.history.record(), expected)
        assert run.watch.history.steps.tolist() == run.received == list(range(n + 1))
        if at == "each" or n > reader.n_lines:
            break
    run.watch.close()
    assert_same(History.load(tmp_path / "run"), run.watch.history)


RUN = """
import signal, sys, torch, gradstat

model = torch.nn.Sequential(*[torch.nn.Linear(8, 8) for _ in range(20)])
read = []

def checkpoint(*_):
    steps = w.history.steps.tolist()
    assert steps == list(range(len(steps)))
    w.history.save(sys.argv[1])
    read.append(len(gradstat.History.load(sys.argv[1])))
    signal.setitimer(signal.ITIMER_REAL, 1e-4 * (len(read) % 17 + 1))

w = gradstat.watch(model, path=sys.argv[2], capacity=None)
# All that either imports is imported by now: CPython 3.11 raises KeyError where a handler imports
# in the middle of another import.
model(torch.ones(2, 8)).sum().backward()
w.history.save(sys.argv[1])
gradstat.History.load(sys.argv[1])
signal.signal(signal.SIGALRM, checkpoint)
signal.setitimer(signal.ITIMER_REAL, 0.001)
while len(read) < 25:
    model(torch.ones(2, 8)).sum().backward()
    model.zero_grad()
signal.setitimer(signal.ITIMER_REAL, 0)
w.close()
assert len(gradstat.History.load(sys.argv[2])) == len(w.history) == w.history.steps[-1] + 1
"""


@pytest.mark.faults
@pytest.mark.host("trains on the CPU in a process of its own")
def test_watch_history_can_be_read_by_a_signal_handler(tmp_path: Path) -> None:
    run_python("-c", RUN, tmp_path / "checkpoint.npz", tmp_path / "run", check=True)
