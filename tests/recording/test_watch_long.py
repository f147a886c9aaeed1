"""Runs too long for memory: what is kept, what is handed on, what is on disk."""

import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows
from programs import run_python
from watching import (
    SCHEMES,
    arrays,
    assert_record,
    assert_same,
    backward,
    make_history,
    make_model,
)

import gradstat
from gradstat import History, LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.recording import transfers


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.mark.parametrize("capacity", [2, 3, 4, 7, 64])
def test_history_keeps_the_first_the_last_and_an_even_spread(
    capacity: int, generator: torch.Generator
) -> None:
    bins = LinearBins(5, -2.0, 2.0)
    history = History(["weight"], bins, capacity=capacity)
    records: list[Statistics] = []
    for n in range(1, 150):
        records.append(gradstat.statistics([torch.randn(20, generator=generator)], bins))
        append_rows(history, n - 1, *arrays(records[-1]))
        steps = history.steps.tolist()
        assert len(steps) <= capacity
        assert steps[0] == 0
        assert steps[-1] == n - 1
        *gaps, last = np.diff(steps).tolist() or [0]
        assert len(set(gaps)) <= 1
        assert last <= max([*gaps, last if len(steps) == 2 else 0])
        # Between full and half full, but for the last one.
        assert len(steps) >= min(n, (capacity + 1) // 2)
        if n % 10 == 0:
            for step in steps:
                assert_record(history.record(step), records[step])


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_history_of_limited_capacity_keeps_what_it_keeps_unchanged(
    bins: Bins, generator: torch.Generator, tmp_path: Path
) -> None:
    whole, records = make_history(bins, generator, 45)
    history = History(whole.layers, bins, capacity=10)
    for step, record in zip(whole.steps.tolist(), records, strict=True):
        append_rows(history, step, *arrays(record))
        if step == 30:  # what is packed for that can be thinned too
            history.save(tmp_path / "run.npz")
    kept = history.steps.tolist()
    assert kept == [0, 16, 32, 48, 64, 80, 88]
    expected = History(whole.layers, bins)
    for step in kept:
        append_rows(expected, step, *arrays(records[step // 2]))
    assert_same(history, expected)
    history.save(tmp_path / "run.npz")
    assert_same(History.load(tmp_path / "run.npz"), expected)


def test_watch_capacity_bounds_the_history() -> None:
    model = make_model()
    with gradstat.watch(model, every=2, capacity=4) as w:
        for _ in range(20):
            backward(model)
    assert w.history.steps.tolist() == [0, 8, 16, 18]


def test_watch_capacity_hides_nothing_from_the_sink_and_the_disk(tmp_path: Path) -> None:
    model, steps = make_model(), []
    options = {"sink": lambda step, record: steps.append(step), "path": tmp_path / "run"}
    with gradstat.watch(model, capacity=2, **options) as w:
        for _ in range(9):
            backward(model)
    assert w.history.steps.tolist() == [0, 8]
    assert steps == History.load(tmp_path / "run").steps.tolist() == list(range(9))


GROWTH = """
import gc, resource, sys, torch, tracemalloc, gradstat
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
w = gradstat.watch(model, capacity=int(sys.argv[2]))

def train(n):
    for _ in range(n):
        model(torch.ones(1, 4)).sum().backward()
        model.zero_grad()
    gc.collect()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return w.history.nbytes, tracemalloc.get_traced_memory()[0], peak

tracemalloc.start()
train(500)
before = train(100)
after = train(int(sys.argv[1]))
print(*(b - a for a, b in zip(before, after)))
"""


def growth_bytes(n_steps: int, capacity: int) -> tuple[int, int]:
    """What a training grows by after some steps, beside its history: Python's memory, and all."""
    done = run_python("-c", GROWTH, n_steps, capacity, check=True)
    history, python, peak = map(int, done.stdout.split())
    # A record takes 33 KB until it is packed.
    assert history < capacity * 40_000
    return python - history, peak


@pytest.mark.host("trains on the CPU in a process of its own")
def test_watch_with_a_capacity_does_not_grow() -> None:
    python, peak = growth_bytes(3_000, 16)
    assert python < 50_000
    assert peak < 5 << 20


@pytest.mark.slow
def test_watch_with_a_capacity_does_not_grow_in_a_hundred_thousand_steps() -> None:
    python, peak = growth_bytes(100_000, 16)
    assert python < 50_000
    assert peak < 5 << 20


@pytest.mark.host("expects a record as soon as its pass is over")
def test_watch_hands_each_record_to_the_sink_in_order() -> None:
    model = make_model()
    received: list[tuple[int, Statistics]] = []
    with gradstat.watch(model, every=2, sink=lambda *record: received.append(record)) as w:
        for n in range(1, 6):
            backward(model)
            assert len(received) == (n + 1) // 2
    assert [step for step, _ in received] == w.history.steps.tolist() == [0, 2, 4]
    for step, record in received:
        assert_record(record, w.history.record(step))


@pytest.mark.host("expects a record as soon as its pass is over")
def test_watch_sink_may_read_the_history() -> None:
    model, lengths = make_model(), []
    with gradstat.watch(model, sink=lambda *_: lengths.append(len(w.history))) as w:
        for _ in range(3):
            backward(model)
    assert lengths == [1, 2, 3]


@pytest.mark.host("expects a record as soon as its pass is over")
def test_watch_raises_what_the_sink_raises_and_loses_no_record() -> None:
    model, received = make_model(), []

    def sink(step: int, record: Statistics) -> None:
        if step == 1:
            raise KeyError("mine")
        received.append(step)

    with gradstat.watch(model, sink=sink) as w:
        backward(model)
        with pytest.raises(KeyError, match="mine"):
            backward(model)
        backward(model)
    assert received == [0, 2]
    assert w.history.steps.tolist() == [0, 1, 2]


def test_history_nbytes_is_what_its_arrays_take(generator: torch.Generator) -> None:
    history, _ = make_history(Log2Bins(), generator, 8)
    assert history.nbytes == sum(len(record.data) for record in history.records)
    before = history.nbytes
    assert len(history["std"]) == 8  # reading changes nothing
    assert history.nbytes == before


def test_watch_tells_once_of_the_memory_that_its_records_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(transfers, "MANY_BYTES", 20_000)
    monkeypatch.setattr(transfers, "_LOOK", 4)
    model = make_model()
    w = gradstat.watch(model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(40):
            backward(model)
        assert len(w.history) == 40
    (message,) = (str(each.message) for each in told)
    assert re.match(r"watch\(\) holds 0\.0 GB of records in memory, \d+ of 3 rows: ", message)
    w.close()
