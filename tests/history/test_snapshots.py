"""A history that is read while records are added, in the same thread and from others."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from histories import append_rows

from gradstat import History, LinearBins, Log2Bins, plot
from gradstat.bins import Bins
from gradstat.record import Placement, Unpacked
from gradstat.results import FLOATS, INTEGERS

LAYERS = ["first", "second", "third"]


def append(history: History, step: int) -> None:
    """Add a record whose every number tells of its step and its layer."""
    marks = step + 1 + 10_000 * np.arange(len(LAYERS))
    integers = np.zeros((len(LAYERS), len(INTEGERS)), np.int64)
    integers[:, :2] = marks[:, None]  # all elements, and all of them finite
    floats = np.repeat(marks[:, None].astype(np.float64), len(FLOATS), 1)
    bins, places = history.bins.bins, marks % history.bins.bins
    counts = np.zeros((len(LAYERS), bins), np.int64)
    counts[np.arange(len(LAYERS)), places] = marks
    append_rows(history, step, integers, floats, counts)


def check(history: History) -> None:
    """Every number is that of its step and its layer."""
    taken = history.snapshot()
    check_numbers(taken.steps.tolist(), taken.unpack())


def check_numbers(steps: list[int], records: Unpacked) -> None:
    marks = np.array(steps)[:, None] + 1 + 10_000 * np.arange(len(LAYERS))
    assert (records.integers[..., :2] == marks[..., None]).all()
    assert (records.floats == marks[..., None]).all()
    assert records.sizes.tolist() == [1] * marks.size
    assert records.counts.tolist() == marks.ravel().tolist()


@pytest.fixture
def hurried_threads() -> Iterator[None]:
    """Threads take turns a thousand times as often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("capacity", [None, 2, 5, 40])
@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(5, 0.0, 1.0)], ids=repr)
def test_history_snapshot_holds_the_records_of_its_moment(bins: Bins, capacity: int | None) -> None:
    history, taken = History(LAYERS, bins, capacity=capacity), []
    for step in range(600):
        append(history, step)
        if step % 7 == 0 or step > 590:
            taken.append((history.snapshot(), history.steps.tolist(), history.unpack()))
    for snapshot, steps, records in taken:
        assert len(snapshot) == len(steps)
        assert snapshot.steps.tolist() == steps
        check_numbers(steps, records)
        check(snapshot)
        assert snapshot.record().integers[0, 0] == steps[-1] + 1


def test_history_snapshot_goes_its_own_way() -> None:
    history = History(LAYERS, Log2Bins(), capacity=8)
    for step in range(5):
        append(history, step)
    snapshot = history.snapshot()
    snapshot.placements[:] = [Placement(7)] * len(LAYERS)
    for step in range(5, 30, 2):
        append(history, step)
        append(snapshot, step + 1)
    for each in (history, snapshot):
        check(each)
    assert history.steps[-1] == 29
    assert snapshot.steps[-1] == 30
    assert history.placements == [Placement()] * len(LAYERS)


def test_history_reads_the_same_records_however_often_it_is_read() -> None:
    history = History(LAYERS, Log2Bins(), capacity=9)
    for step in range(100):
        append(history, step)
        before = history.nbytes
        check(history)
        assert history.nbytes == before


def read_records(history: History, path: Path) -> None:
    check(history)


def save(history: History, path: Path) -> None:
    history.save(path)
    check(History.load(path))


def diagnose(history: History, path: Path) -> None:
    history.diagnose()


def report(history: History, path: Path) -> None:
    history.report(path)


def to_csv(history: History, path: Path) -> None:
    history.to_csv(path)
    with path.open() as file:
        marks = [line.split(",")[3] for line in file][1:]
    steps = [(int(mark) - 1) % 10_000 for mark in marks]
    assert steps == [step for step in sorted(set(steps)) for _ in LAYERS]


def histograms(history: History, path: Path) -> None:
    counts, edges = history.histograms("second")
    assert (counts.sum(1) == counts.max(1)).all()
    assert len(edges) == counts.shape[1] + 1
    assert np.diff(counts.max(1)).min(initial=1) > 0


def select(history: History, path: Path) -> None:
    check(history.select("grad"))


def heatmap(history: History, path: Path) -> None:
    plot.heatmap(history, "counts").clear()


@pytest.mark.faults
@pytest.mark.parametrize("capacity", [None, 50])
@pytest.mark.parametrize(
    "read", [read_records, save, diagnose, report, to_csv, histograms, select, heatmap]
)
def test_history_can_be_read_by_another_thread(
    read: Callable[[History, Path], None],
    capacity: int | None,
    tmp_path: Path,
    hurried_threads: None,
) -> None:
    history = History(LAYERS, Log2Bins(), capacity=capacity)
    append(history, 0)
    failures: list[BaseException] = []
    ends, n_read = threading.Event(), [0]

    def go_on_reading() -> None:
        try:
            while not ends.is_set():
                read(history, tmp_path / "read")
                n_read[0] += 1
        except BaseException as error:
            failures.append(error)

    reader = threading.Thread(target=go_on_reading)
    reader.start()
    for step in range(1, 9_900):
        append(history, step)
        # Records come as slowly as in training, next to reading them.
        time.sleep(1e-5)
        if failures or (step > 1500 and n_read[0] > 20):
            break
    ends.set()
    reader.join()
    assert failures == []
    assert n_read[0] > 0
    check(history)
