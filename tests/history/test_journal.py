"""Records on their way to the disk, and what becomes of them when a run or a disk fails."""

import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows
from programs import run_python
from watching import SCHEMES, arrays, assert_same, backward, make_history, make_model

import gradstat
from gradstat import History, Log2Bins
from gradstat.bins import Bins
from gradstat.history import file, journal
from gradstat.history.journal import Journal
from gradstat.record import Record

NAME = "00000000.gradstat"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every record is written at once."""
    add = Journal.add

    def add_and_flush(self: Journal, record: Record) -> None:
        add(self, record)
        self.flush()

    monkeypatch.setattr(Journal, "add", add_and_flush)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Nothing can be written until it is undone; what is, is half a block."""

    def write_half(self: Journal) -> None:
        if self._is_created:
            with (self._path / NAME).open("ab") as file:
                file.write(b"half a block")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "_write_block", write_half)
        yield patch


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
    assert [file.name for file in (tmp_path / "a" / "run").iterdir()] == [NAME]


def test_watch_path_has_everything_after_close(tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, path=str(tmp_path)) as w:
        for _ in range(4):
            backward(model)
        assert len(History.load(tmp_path)) == 0
    assert_same(History.load(tmp_path), w.history)


@pytest.mark.host("expects a record as soon as its pass is over")
def test_watch_writes_a_few_seconds_after_a_record_though_no_more_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_INTERVAL_S", 0.1)
    model = make_model()
    with gradstat.watch(model, path=tmp_path):
        for expected in (3, 6):
            for _ in range(3):
                backward(model)
            deadline_s = time.monotonic() + 10
            while len(History.load(tmp_path)) < expected and time.monotonic() < deadline_s:
                time.sleep(0.02)
            assert len(History.load(tmp_path)) == expected


ENDING = """
import atexit, sys, threading
atexit.register(lambda: print(sorted(type(x).__name__ for x in threading.enumerate())))
import torch, gradstat
model = torch.nn.Linear(2, 1)
w = gradstat.watch(model, path=sys.argv[1])
model(torch.ones(1, 2)).sum().backward()
print(any(type(x).__name__ == "_Timer" for x in threading.enumerate()))
"""


def test_no_timer_of_a_journal_outlives_the_interpreter(tmp_path: Path) -> None:
    done = run_python("-c", ENDING, tmp_path / "run", check=True)
    assert done.stdout == "True\n['_MainThread']\n"
    assert len(History.load(tmp_path / "run")) == 1


def test_many_journals_share_one_timer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "_INTERVAL_S", 0.5)
    model, n_before = make_model(), threading.active_count()
    with ExitStack() as stack:
        for number in range(60):
            w = gradstat.watch(model, path=tmp_path / str(number), name=str(number))
            stack.enter_context(w)
        backward(model)
        assert threading.active_count() <= n_before + 1
        deadline_s = time.monotonic() + 10
        while time.monotonic() < deadline_s and any(
            len(History.load(tmp_path / str(number))) == 0 for number in range(60)
        ):
            time.sleep(0.05)
        assert len(History.load(tmp_path / "59")) == 1
        monkeypatch.setattr(journal, "_INTERVAL_S", 60.0)
        backward(model)
    deadline_s = time.monotonic() + 10
    while threading.active_count() > n_before and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert threading.active_count() <= n_before
    assert [len(History.load(tmp_path / str(number))) for number in range(60)] == [2] * 60


def test_journal_writes_the_records_of_a_few_seconds_in_one_block(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_INTERVAL_S", 0.2)
    history, records = make_history(Log2Bins(), generator, 40)
    kept = Journal(tmp_path, history)
    for step, record in zip(history.steps.tolist(), records, strict=True):
        append_rows(kept, step, *arrays(record))
        time.sleep(0.01)
    kept.flush()
    assert_same(History.load(tmp_path), history)
    sizes = [len(block.records) for block in file.Reader(tmp_path / NAME).blocks()]
    assert sizes[0] == 0
    assert 2 <= len(sizes[1:]) <= 5


def test_journal_writes_early_rather_than_fill_the_memory(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "_MOST_WAITING_BYTES", 2_000)
    history, records = make_history(Log2Bins(), generator, 40)
    kept = Journal(tmp_path, history)
    for step, record in zip(history.steps.tolist(), records, strict=True):
        append_rows(kept, step, *arrays(record))
    assert len(History.load(tmp_path)) > 30


def test_journal_does_not_wait_for_the_disk_to_take_a_record(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, records = make_history(Log2Bins(), generator, 40)
    kept = Journal(tmp_path, history)
    write, may_go_on = Journal._write_block, threading.Event()

    def write_slowly(self: Journal) -> None:
        assert may_go_on.wait(10)
        write(self)

    monkeypatch.setattr(Journal, "_write_block", write_slowly)
    append_rows(kept, 0, *arrays(records[0]))
    writer = threading.Thread(target=kept.flush)
    writer.start()
    for step, record in zip(history.steps.tolist()[1:], records[1:], strict=True):
        append_rows(kept, step, *arrays(record))
    assert writer.is_alive()
    may_go_on.set()
    writer.join()
    assert_same(History.load(tmp_path), history)


RUN = """
import sys, time, torch, gradstat
from gradstat.history import journal
journal._INTERVAL_S = float(sys.argv[3])
model = torch.nn.Linear(3, 2)
w = gradstat.watch(model, path=sys.argv[1])
for step in range(int(sys.argv[2])):
    model(torch.full((1, 3), float(step))).sum().backward()
    model.zero_grad()
    print(step, flush=True)
time.sleep(float(sys.argv[4]))
"""


def command(path: Path, n_steps: int, interval_s: float, sleep_s: float) -> list[str]:
    return [sys.executable, "-c", RUN, *map(str, (path, n_steps, interval_s, sleep_s))]


@pytest.mark.host("trains on the CPU in a process of its own")
def test_watch_path_survives_a_kill_of_a_run_that_stands_still(tmp_path: Path) -> None:
    run = command(tmp_path, 100, 0.2, 60)
    with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
        assert [int(process.stdout.readline()) for _ in range(100)] == list(range(100))
        time.sleep(1)
        process.send_signal(signal.SIGKILL)
    history = History.load(tmp_path)
    assert history.steps.tolist() == history["max"][:, 0].tolist() == list(range(100))


@pytest.mark.host("trains on the CPU in a process of its own")
def test_watch_path_is_complete_when_a_run_just_ends(tmp_path: Path) -> None:
    run_python("-c", RUN, tmp_path, 7, 5, 0, check=True)
    assert History.load(tmp_path).steps.tolist() == list(range(7))


def test_watch_path_is_where_it_was_when_the_run_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    model = make_model()
    with gradstat.watch(model, path="run") as w:
        os.chdir("elsewhere")
        backward(model)
    assert_same(History.load(tmp_path / "run"), w.history)
    assert list((tmp_path / "elsewhere").iterdir()) == []


def in_fork(work: Callable[[], object]) -> None:
    """Do something in a forked process, which must succeed."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.host("a forked process has no CUDA device")
def test_watch_path_is_left_alone_by_a_forked_process(tmp_path: Path) -> None:
    model = make_model()
    with gradstat.watch(model, path=tmp_path) as w:
        backward(model)
        in_fork(w.close)
        assert len(History.load(tmp_path)) == 0
    assert_same(History.load(tmp_path), w.history)


# In a process of its own: autograd refuses to work in a fork of one in which it has run threads, as
# other tests may have it do.
FORKED = """
import os, sys, warnings
import torch, gradstat

model = torch.nn.Linear(3, 2)
with gradstat.watch(model, path=sys.argv[1]) as w:
    model(torch.ones(1, 3)).sum().backward()
    child = os.fork()
    if child == 0:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for _ in range(3):
                model(torch.ones(1, 3)).sum().backward()
            w.close()
        print(*(each.message for each in warned), w.history.steps.tolist(), sep="\\n", flush=True)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    model(torch.ones(1, 3)).sum().backward()
print(w.history.steps.tolist(), gradstat.History.load(sys.argv[1]).steps.tolist())
"""


@pytest.mark.host("a forked process has no CUDA device")
def test_watch_in_a_forked_process_warns_once_and_records_into_memory(tmp_path: Path) -> None:
    done = run_python("-c", FORKED, tmp_path, check=True)
    assert done.stdout.splitlines() == [
        "watch() keeps the records of a forked process in memory alone: path and sink belong to "
        "the process that it was forked from",
        "[0, 1, 2, 3]",
        "[0, 1] [0, 1]",
    ]


@pytest.mark.host("a forked process has no CUDA device")
def test_close_in_a_forked_process_does_not_wait_for_a_thread_that_writes(tmp_path: Path) -> None:
    model = make_model()
    w = gradstat.watch(model, path=tmp_path)
    backward(model)
    kept = w._recorder._delivery._journal
    is_held, may_go_on = threading.Event(), threading.Event()

    def hold() -> None:
        with kept._lock, kept._writing:
            is_held.set()
            may_go_on.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(10)
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        in_fork(w.close)
    may_go_on.set()
    holder.join()
    w.close()


def test_journal_flush_within_a_flush_leaves_the_file_whole(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, records = make_history(Log2Bins(), generator)
    kept = Journal(tmp_path, history)
    append_rows(kept, 0, *arrays(records[0]))
    write = Journal._write_block

    def write_with_signal(self: Journal) -> None:
        monkeypatch.undo()
        # As a signal's handler does that closes the watch.
        append_rows(self, 2, *arrays(records[1]))
        self.flush()
        write(self)

    monkeypatch.setattr(Journal, "_write_block", write_with_signal)
    kept.flush()
    append_rows(kept, 4, *arrays(records[2]))
    kept.flush()
    assert_same(History.load(tmp_path), history)


def test_journal_that_is_interrupted_in_a_write_loses_nothing(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, records = make_history(Log2Bins(), generator)
    kept = Journal(tmp_path, history)
    append_rows(kept, 0, *arrays(records[0]))
    encode = file.encode

    def encode_half(*arguments: object) -> tuple[list[bytes], file.Link]:
        parts, link = encode(*arguments)

        def half() -> Iterator[bytes]:
            yield from parts[:2]
            raise KeyboardInterrupt

        return half(), link

    monkeypatch.setattr(journal, "encode", encode_half)
    with pytest.raises(KeyboardInterrupt):
        kept.flush()
    monkeypatch.undo()
    with pytest.warns(RuntimeWarning, match="which is cut off: at most 1 records"):
        assert len(History.load(tmp_path)) == 0
    for step, record in zip((2, 4), records[1:], strict=True):
        append_rows(kept, step, *arrays(record))
    kept.flush()
    assert_same(History.load(tmp_path), history)


def test_journal_leaves_nothing_of_a_longer_attempt_that_was_given_up(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, records = make_history(Log2Bins(), generator)
    kept = Journal(tmp_path, history)
    encode = file.encode

    def encode_in_vain(*arguments: object) -> tuple[Iterator[bytes], file.Link]:
        parts, link = encode(*arguments)

        def all_and_fail() -> Iterator[bytes]:
            yield from parts
            raise OSError(28, "No space left on device")

        return all_and_fail(), link

    monkeypatch.setattr(journal, "encode", encode_in_vain)
    monkeypatch.setattr(journal, "_MOST_BYTES", 0)  # what cannot be written is given up at once
    for step, record in zip((0, 2), records, strict=False):
        append_rows(kept, step, *arrays(record))
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        kept.flush()
    monkeypatch.undo()
    append_rows(kept, 4, *arrays(records[2]))
    kept.flush()
    assert History.load(tmp_path).steps.tolist() == [4]  # and no warning of a rest


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
        f"directory: '{path}'",
        f"watch() could not write 3 records to {path}: what the history holds of them is in memory "
        f"alone; History.save() may write it elsewhere",
    ]
    assert w.history.steps.tolist() == [0, 1, 2]


@pytest.mark.host("expects a record as soon as its pass is over")
@pytest.mark.usefixtures("hurried")
def test_watch_writes_all_records_once_a_full_disk_has_room_again(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = make_model()
    with gradstat.watch(model, path=tmp_path) as w:
        backward(model)
        disk = request.getfixturevalue("full_disk")
        with pytest.warns(RuntimeWarning, match="No space left on device"):
            backward(model)
        backward(model)
        with pytest.warns(RuntimeWarning, match="which is cut off"):
            assert History.load(tmp_path).steps.tolist() == [0]
        disk.undo()
        backward(model)
    assert_same(History.load(tmp_path), w.history)
    assert [file.name for file in tmp_path.iterdir()] == [NAME]


def test_watch_begins_a_directory_later_where_it_could_not_at_first(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = make_model()
    disk = request.getfixturevalue("full_disk")
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        w = gradstat.watch(model, path=tmp_path / "run")
    disk.undo()
    backward(model)
    w.close()
    assert_same(History.load(tmp_path / "run"), w.history)


@pytest.mark.usefixtures("hurried")
def test_watch_does_not_fill_the_memory_for_a_disk_that_stays_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model()
    sizes = []

    def full(self: Journal) -> None:
        sizes.append(sum(len(record.data) for record in self._state.waiting))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Journal, "_write_block", full)
    monkeypatch.setattr(journal, "_MOST_BYTES", 20_000)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        w = gradstat.watch(model, path=tmp_path, capacity=4)
    for _ in range(50):
        backward(model)
    # Those that were forgotten count, too; it is said once.
    with pytest.warns(RuntimeWarning, match="could not write 50 records to"):
        w.close()
    w.close()
    assert 10_000 < max(sizes) < 30_000


def test_watch_refuses_a_directory_with_records(tmp_path: Path) -> None:
    model = make_model()
    gradstat.watch(model, path=tmp_path).close()
    message = (
        f"watch() needs a directory without records, or first_step to go on with them; path is "
        f"{tmp_path}, which has 1 files of them"
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
        monkeypatch.setattr(journal, "segments", lambda path: [])
        with pytest.raises(ValueError, match="needs a directory of its own"):
            gradstat.watch(model, path=tmp_path)
        monkeypatch.undo()
        backward(model)
    assert_same(History.load(tmp_path), w.history)


def test_journal_writes_what_is_logged_beside_its_records(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What other tests have compiled in this process would hide the order.
    monkeypatch.setattr("gradstat.recording.passes.has_compiled", lambda: False)
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    w = gradstat.watch(model, path=tmp_path / "run", every=2, optimizer=optimizer)
    journal = w._recorder._delivery._journal
    assert journal is not None
    for step in range(6):
        w.log(loss=float(step), **({"tokens": 7} if step > 2 else {}))
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
        if step % 2:
            journal.flush()
    w.log(loss=math.nan)
    w.close()
    for loaded in (History.load(tmp_path / "run"), _saved_and_loaded(w.history, tmp_path)):
        assert loaded.scalars == w.history.scalars == ["loss", "lr", "tokens"]
        for name in loaded.scalars:
            for one, other in zip(loaded.scalar(name), w.history.scalar(name), strict=True):
                np.testing.assert_array_equal(one, other)
                assert one.dtype == other.dtype
        assert loaded.order == w.history.order
        assert loaded.depth is not None
        assert loaded.partial_step is None


def test_journal_marks_a_partial_record(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 2)
    w = gradstat.watch(model, path=tmp_path / "run", what=("grad", "activation"))
    for step in range(3):
        loss = model(torch.randn(4, 3)).sum()
        w.log(loss=math.nan if step == 2 else loss)
        if step < 2:
            loss.backward()
    w.close()
    for loaded in (History.load(tmp_path / "run"), _saved_and_loaded(w.history, tmp_path)):
        assert loaded.steps.tolist() == [0, 1, 2]
        assert loaded.partial_step == 2
        assert loaded.select("activation").partial_step == 2


def test_journal_keeps_scalars_of_a_run_without_records(tmp_path: Path) -> None:
    w = gradstat.watch(torch.nn.Linear(3, 2), path=tmp_path / "run")
    w.log(loss=1.0)
    w.close()
    assert History.load(tmp_path / "run").scalar("loss")[1].tolist() == [1.0]


def test_files_have_no_number_that_json_lacks(tmp_path: Path) -> None:
    values = [1.5, math.nan, math.inf, -math.inf]
    w = gradstat.watch(torch.nn.Linear(3, 2), path=tmp_path / "run")
    for value in values:
        w.log(loss=value)
    w.close()
    saved = _saved_and_loaded(w.history, tmp_path)
    with np.load(tmp_path / "run.npz") as file:
        said = file["run"].tobytes()
    for text in ((tmp_path / "run" / "00000000.gradstat").read_bytes(), said):
        assert b"loss" in text
        assert b"NaN" not in text
        assert b"Infinity" not in text
    for loaded in (saved, History.load(tmp_path / "run")):
        np.testing.assert_array_equal(loaded.scalar("loss")[1], values)


def _saved_and_loaded(history: History, tmp_path: Path) -> History:
    history.save(tmp_path / "run.npz")
    return History.load(tmp_path / "run.npz")
