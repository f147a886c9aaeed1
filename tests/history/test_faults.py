"""Files with any bit flipped, cut off anywhere, or written by a process that is killed."""

import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
import torch
from histories import append_rows
from watching import LAYERS, arrays

from gradstat import History, Log2Bins, statistics
from gradstat.history import file as files
from gradstat.history import journal
from gradstat.history.journal import Journal
from gradstat.record import Record

pytestmark = pytest.mark.faults

NAME = "00000000.gradstat"


def small(n_records: int = 3) -> History:
    history = History(LAYERS, Log2Bins())
    for step in range(n_records):
        s = statistics([torch.arange(4.0) - step, torch.tensor([float("nan"), 2.0])])
        append_rows(history, step, *arrays(s))
    return history


def content(history: History) -> tuple[object, ...]:
    """All that a history holds, times too."""
    packed = tuple(history.packed(record) for record in history.records)
    rows, layers, placements = map(tuple, (history.rows, history.layers, history.placements))
    return rows, layers, history.bins, packed, placements


def write_journal(folder: Path, history: History) -> list[int]:
    """A block for each record; where the blocks end."""
    kept = Journal(folder, history)
    ends = [(folder / NAME).stat().st_size]
    for at, step in enumerate(history.steps.tolist()):
        append_rows(kept, step, *arrays(history.record(step)), time_s=float(history.times[at]))
        kept.flush()
        ends.append((folder / NAME).stat().st_size)
    return ends


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written meanwhile."""
    monkeypatch.setattr(files, "_PATIENCE_S", 0.0)


def reason(path: Path) -> str:
    """Why a file or directory is not loaded; nothing if it is."""
    try:
        History.load(path)
    except ValueError as error:
        return str(error)
    return ""


def flip(file: int, at: int, bit: int) -> None:
    (byte,) = os.pread(file, 1, at)
    os.pwrite(file, bytes([byte ^ 1 << bit]), at)


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A file that is changed in its place."""
    file = os.open(path, os.O_RDWR)
    try:
        yield file
    finally:
        os.close(file)


def assert_each_flipped_bit_is_refused(file_path: Path, path: Path) -> None:
    whole = file_path.read_bytes()
    with opened(file_path) as file:
        for at in range(len(whole)):
            for bit in range(8):
                flip(file, at, bit)
                assert f"{file_path} is damaged" in reason(path), (at, bit)
                flip(file, at, bit)
    assert file_path.read_bytes() == whole
    assert reason(path) == ""


def test_history_load_refuses_each_flipped_bit_of_a_directory(tmp_path: Path) -> None:
    write_journal(tmp_path, small(2))
    assert_each_flipped_bit_is_refused(tmp_path / NAME, tmp_path)


def test_history_load_of_a_file_with_a_flipped_bit_gives_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    small().save(path)
    whole = path.read_bytes()
    expected, n_refused = content(History.load(path)), 0
    with opened(path) as file:
        # One bit of each byte, another one in the next.
        for at in range(len(whole)):
            flip(file, at, 3 * at % 8)
            if why := reason(path):
                assert str(path) in why
                n_refused += 1
            else:  # what an archive does not need, such as a date
                assert content(History.load(path)) == expected
            flip(file, at, 3 * at % 8)
    assert len(whole) / 2 < n_refused < len(whole)


def test_history_load_refuses_a_file_that_is_cut_off_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    small().save(path)
    for n_bytes in reversed(range(path.stat().st_size)):
        os.truncate(path, n_bytes)
        assert f"{path} is damaged" in reason(path), n_bytes


def test_history_load_of_a_directory_cut_off_anywhere_gives_the_blocks_before(
    tmp_path: Path,
) -> None:
    history = small()
    ends = write_journal(tmp_path, history)
    path = tmp_path / NAME
    assert ends[-1] == path.stat().st_size
    for n_bytes in reversed(range(ends[-1])):
        os.truncate(path, n_bytes)
        if n_bytes < ends[0]:
            assert f"{path} is damaged" in reason(tmp_path)
            continue
        n_whole = sum(end <= n_bytes for end in ends) - 1
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            loaded = History.load(tmp_path)
        left = n_bytes - ends[n_whole]
        what = "an unknown number of records" if left < 40 else "at most 1 records"
        message = f"History.load() leaves out the end of {path}, which is cut off: {what}"
        assert [str(each.message) for each in warned] == ([message] if left else [])
        assert loaded.steps.tolist() == list(range(n_whole))
        assert loaded.times.tolist() == history.times[:n_whole].tolist()


def test_history_load_refuses_blocks_out_of_their_places(tmp_path: Path) -> None:
    ends = write_journal(tmp_path, small())
    path = tmp_path / NAME
    whole = path.read_bytes()
    parts = [whole[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)]
    assert len(parts) == 4
    orders = [[0, 2, 3], [0, 1, 3], [0, 1, 1, 2, 3], [0, 2, 1, 3], [1, 2, 3], [0, 1, 2, 3, 3]]
    for order in orders:
        path.write_bytes(b"".join(parts[i] for i in order))
        with pytest.raises(ValueError, match=f"{path} is damaged"):
            History.load(tmp_path)


def extremes(x: np.ndarray) -> list[object]:
    if x.dtype.kind == "f":
        return [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e308, 5e-324]
    limits = np.iinfo(x.dtype)
    return [limits.min, limits.max, 0, 1, 2, limits.max // 2 + 1]


def test_history_load_takes_any_number_in_its_place_or_says_what_is_wrong(tmp_path: Path) -> None:
    small().save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as file:
        data = {name: file[name] for name in file.files}
    path, n_refused, n = tmp_path / "run.npz", 0, 0
    for name, x in data.items():
        for at in range(x.size):
            for value in extremes(x):
                changed = x.copy()
                changed.reshape(-1)[at] = value
                np.savez(path, **data | {name: changed})
                n += 1
                if why := reason(path):
                    assert str(path) in why
                    n_refused += 1
                else:
                    loaded = History.load(path)
                    assert len(loaded) == 3
                    loaded.histograms(loaded.layers[0])
    assert n > 1000
    assert n_refused > n / 3


def in_process(work: Callable[[], object]) -> int:
    """Start a process that works until it is killed."""
    with warnings.catch_warnings():
        # Python 3.12 warns of forks beside threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    return child


def write_for_ever(folder: Path) -> None:
    """Records of a megabyte, whose numbers say which they are."""
    history = History([str(i) for i in range(4_000)], Log2Bins())
    kept = Journal(folder, history)
    integers, floats, counts = (
        np.concatenate([x[:1]] * 4_000) for x in arrays(statistics([torch.ones(2)]))
    )
    for step in range(1_000_000):
        floats[:, 2] = step
        kept.add(Record(step, 0.0, history.layout.pack(integers, floats, None, counts)))
        if step % 3 == 0:
            kept.flush()


def check_is_beginning(history: History) -> None:
    assert history.steps.tolist() == list(range(len(history)))
    expected = np.broadcast_to(np.arange(len(history))[:, None], (len(history), 4_000))
    assert np.array_equal(history["sum"], expected)


def test_directory_of_a_process_that_is_killed_loads(tmp_path: Path) -> None:
    generator = random.Random(20)
    n_records = []
    for number in range(30):
        folder = tmp_path / str(number)
        child = in_process(lambda folder=folder: write_for_ever(folder))
        while not (folder / NAME).exists() or (folder / NAME).stat().st_size < 400_000:
            time.sleep(0.001)
        time.sleep(generator.uniform(0, 0.2))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            history = History.load(folder)
        assert all("which is cut off: " in str(each.message) for each in warned)
        check_is_beginning(history)
        n_records.append(len(history))
        (folder / NAME).unlink()
    assert len(set(n_records)) > 1


def test_directory_can_be_read_all_the_time_while_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # wait for what is being written
    child = in_process(lambda: write_for_ever(tmp_path))
    try:
        while not (tmp_path / NAME).exists() or (tmp_path / NAME).stat().st_size < 400_000:
            time.sleep(0.001)
        n_records = []
        end_s = time.monotonic() + 3
        while time.monotonic() < end_s:
            # A warning would be an error.
            history = History.load(tmp_path)
            check_is_beginning(history)
            n_records.append(len(history))
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert len(set(n_records)) > 3


class Interrupts:
    """Raises KeyboardInterrupt at one line that this thread runs in a file."""

    def __init__(self, file: str, at: int) -> None:
        self._file, self._at = file, at
        self.n_lines = 0

    def __call__(self, frame: FrameType, event: str, _: object) -> object:
        if frame.f_code.co_filename != self._file:
            return None
        if event == "line":
            self.n_lines += 1
            if self.n_lines == self._at:
                raise KeyboardInterrupt
        return self


# The interpreter may leave a file that was being opened to its collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_journal_interrupted_at_any_line_loses_at_most_that_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = small(9)
    monkeypatch.setattr(journal, "_MOST_WAITING_BYTES", 1500)
    records = [record.data for record in history.records]
    n_lines = at = 0
    while at <= n_lines:
        at += 1
        kept = Journal(tmp_path / str(at), history)
        interrupts = Interrupts(journal.__file__, at)
        before = sys.gettrace()
        missing = []
        sys.settrace(interrupts)
        for step, record in enumerate(records):
            try:
                kept.add(Record(step, 0.0, record))
                if step == 6:
                    kept.flush()
            except KeyboardInterrupt:
                missing.append(step)
                sys.settrace(interrupts)
        sys.settrace(before)
        n_lines = interrupts.n_lines
        kept.flush()
        kept.flush()
        loaded = History.load(tmp_path / str(at)).steps.tolist()
        assert loaded in (list(range(9)), [step for step in range(9) if step not in missing]), at
    assert n_lines > 150
