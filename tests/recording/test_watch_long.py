"""Runs too long for memory: what is kept, what is handed on, what is on disk."""

import os
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
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
from gradstat.history import archive, journal


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
        history.append(n - 1, *arrays(records[-1]))
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
        history.append(step, *arrays(record))
        if step == 30:  # what is packed for that can be thinned too
            history.save(tmp_path / "run.npz")
    kept = history.steps.tolist()
    assert kept == [0, 16, 32, 48, 64, 80, 88]
    expected = History(whole.layers, bins)
    for step in kept:
        expected.append(step, *arrays(records[step // 2]))
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
    command = [sys.executable, "-c", GROWTH, str(n_steps), str(capacity)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
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


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is written at once."""
    monkeypatch.setattr(journal, "_INTERVAL_S", 0.0)


@pytest.mark.host("expects a record as soon as its pass is over")
@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
@pytest.mark.usefixtures("hurried")
def test_watch_path_can_be_read_while_it_is_written(bins: Bins, tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, bins, path=tmp_path / "a" / "run") as w:
        assert len(History.load(tmp_path / "a" / "run")) == 0
        for _ in range(4):
            model.zero_grad()
            backward(model)
            assert_same(History.load(tmp_path / "a" / "run"), w.history)
    names = sorted(file.name for file in (tmp_path / "a" / "run").iterdir())
    assert names == [f"0000000{n}.npz" for n in range(5)]


def test_watch_path_has_everything_after_close(tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, path=str(tmp_path)) as w:
        for _ in range(4):
            backward(model)
        assert len(History.load(tmp_path)) == 0
    assert_same(History.load(tmp_path), w.history)
    # Two files: the empty one of the beginning, and that.
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.host("expects a record as soon as its pass is over")
def test_watch_writes_every_few_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [100.0]
    monkeypatch.setattr(journal.time, "monotonic", lambda: now_s[0])
    model, written = make_model(), []
    with gradstat.watch(model, path=tmp_path):
        for _ in range(7):
            backward(model)
            written.append(len(History.load(tmp_path)))
            now_s[0] += 2.0
    assert written == [0, 0, 0, 4, 4, 4, 7]


RUN = """
import sys, time, torch, gradstat
from gradstat.history import journal
journal._INTERVAL_S = 0.0
model = torch.nn.Linear(3, 2)
w = gradstat.watch(model, path=sys.argv[1])
for step in range(int(sys.argv[2])):
    model(torch.full((1, 3), float(step))).sum().backward()
    model.zero_grad()
    print(step, flush=True)
"""


@pytest.mark.host("trains on the CPU in a process of its own")
def test_watch_path_survives_a_kill(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path), "1000000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        reported = -1
        while reported < 50:
            reported = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    history = History.load(tmp_path)
    assert history.steps.tolist() == list(range(len(history)))
    assert len(history) > reported
    assert history["max"][:, 0].tolist() == history.steps.tolist()


@pytest.mark.host("trains on the CPU in a process of its own")
def test_watch_path_is_complete_when_a_run_just_ends(tmp_path: Path) -> None:
    run = RUN.replace("journal._INTERVAL_S = 0.0", "")
    subprocess.run([sys.executable, "-c", run, str(tmp_path), "7"], check=True, capture_output=True)
    assert History.load(tmp_path).steps.tolist() == list(range(7))


@pytest.mark.host("a forked process has no CUDA device")
def test_watch_path_is_left_alone_by_a_forked_process(tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, path=tmp_path) as w:
        backward(model)
        child = os.fork()
        if child == 0:
            w.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert len(History.load(tmp_path)) == 0
    assert_same(History.load(tmp_path), w.history)


@pytest.mark.usefixtures("hurried")
def test_watch_warns_once_where_it_cannot_write_and_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model = make_model()
    path = tmp_path / "file" / "run"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with gradstat.watch(model, path=path) as w:
            for _ in range(3):
                backward(model)
    assert [str(each.message) for each in warned] == [
        f"watch() cannot write to {path} and keeps its records in memory: [Errno 20] Not a "
        f"directory: '{path}'"
    ]
    assert w.history.steps.tolist() == [0, 1, 2]


@pytest.mark.host("expects a record as soon as its pass is over")
@pytest.mark.usefixtures("hurried")
def test_watch_writes_all_records_once_a_full_disk_has_room_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, savez = make_model(), np.savez

    def full(file: object, **_: object) -> None:
        raise OSError(28, "No space left on device")

    with gradstat.watch(model, path=tmp_path) as w:
        backward(model)
        monkeypatch.setattr(np, "savez", full)
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            backward(model)
        backward(model)
        assert History.load(tmp_path).steps.tolist() == [0]
        monkeypatch.setattr(np, "savez", savez)
        backward(model)
    assert_same(History.load(tmp_path), w.history)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".npz"] * 3


@pytest.mark.usefixtures("hurried")
def test_watch_does_not_fill_the_memory_for_a_disk_that_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    sizes = []

    def full(path: Path, records: archive.Records, **_: object) -> None:
        sizes.append(len(records.steps))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(archive, "write", full)
    monkeypatch.setattr(journal, "_MOST_BYTES", 20_000)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        w = gradstat.watch(model, path=tmp_path, capacity=4)
    for _ in range(50):
        backward(model)
    w.close()
    assert 1 < max(sizes) < 40


def test_watch_refuses_a_directory_with_records(tmp_path: Path) -> None:
    model = make_model()
    gradstat.watch(model, path=tmp_path).close()
    message = (
        f"watch() needs a directory without records; path is {tmp_path}, which has 1 files of them"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        gradstat.watch(model, path=tmp_path)


@pytest.mark.usefixtures("hurried")
def test_watches_that_begin_together_do_not_share_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    with gradstat.watch(model, path=tmp_path) as w:
        # As if both had looked before either has written.
        monkeypatch.setattr(archive, "segments", lambda path: [])
        with pytest.raises(ValueError, match="needs a directory without records"):
            gradstat.watch(model, path=tmp_path)
        monkeypatch.undo()
        backward(model)
    assert_same(History.load(tmp_path), w.history)


def test_history_is_never_written_over_another_run(tmp_path: Path) -> None:
    history = History(["weight"], Log2Bins())
    archive.write(tmp_path / "run.npz", history.to_records(), new=True)
    before = (tmp_path / "run.npz").read_bytes()
    with pytest.raises(FileExistsError):
        archive.write(tmp_path / "run.npz", history.to_records(), new=True)
    assert [file.name for file in tmp_path.iterdir()] == ["run.npz"]
    assert (tmp_path / "run.npz").read_bytes() == before


@pytest.mark.usefixtures("hurried")
def test_watch_writes_where_files_cannot_be_linked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    model = make_model()
    with gradstat.watch(model, path=tmp_path) as w:
        backward(model)
    assert_same(History.load(tmp_path), w.history)


def damage_middle(path: Path) -> str:
    (path / "00000001.npz").write_bytes(b"garbage")
    file = path / "00000001.npz"
    return f"a file that History.save() wrote; {file} is damaged or another kind"


def remove_middle(path: Path) -> str:
    (path / "00000001.npz").unlink()
    return f"all files that watch() wrote; {path} lacks 00000001.npz"


def remove_all(path: Path) -> str:
    for file in path.iterdir():
        file.unlink()
    return f"a directory that watch() wrote; {path} has no records"


def repeat(path: Path) -> str:
    (path / "00000003.npz").write_bytes((path / "00000001.npz").read_bytes())
    return f"the files of one run; {path} has those of several"


def mix(path: Path) -> str:
    History(["other"], Log2Bins()).save(path / "00000003.npz")
    return f"the files of one run; {path} has those of several"


@pytest.mark.parametrize("change", [damage_middle, remove_middle, remove_all, repeat, mix])
@pytest.mark.usefixtures("hurried")
def test_history_load_refuses_a_directory_that_is_not_whole(
    change: Callable[[Path], str], tmp_path: Path
) -> None:
    model = make_model()
    with gradstat.watch(model, path=tmp_path):
        backward(model)
        backward(model)
    message = change(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape('History.load() needs ' + message)}"):
        History.load(tmp_path)


def test_history_load_passes_over_files_that_watch_did_not_write(tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, path=tmp_path) as w:
        backward(model)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures.npz").write_bytes(b"mine")
    (tmp_path / ".00000002.npz.123.tmp").write_bytes(b"half a file of a process that was killed")
    assert_same(History.load(tmp_path), w.history)


def test_history_nbytes_is_what_its_arrays_take(generator: torch.Generator) -> None:
    history, _ = make_history(Log2Bins(), generator, 8)
    # 16 rows of integers and floats with room for 16 more, and dense histograms.
    assert history.nbytes == 16 * 2 * 16 * 8 + 8 * 2 * 2048 * 8
    history.to_records()
    assert history.nbytes < 16 * 2 * 16 * 8 + 20_000
