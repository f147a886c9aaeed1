"""Directories that a run has written, whole and not: what is loaded, and what is refused."""

import re
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows
from watching import LAYERS, arrays, assert_same, make_history

from gradstat import History, Log2Bins
from gradstat.history.file import Reader, encode
from gradstat.history.follow import Follower
from gradstat.history.journal import Journal

NAME = "00000000.gradstat"


def damage_middle(path: Path) -> str:
    data = bytearray((path / NAME).read_bytes())
    data[len(data) // 2] ^= 1
    (path / NAME).write_bytes(data)
    return f"a file that History.save() or watch() wrote; {path / NAME} is damaged"


def remove_first(path: Path) -> str:
    (path / NAME).rename(path / "00000001.gradstat")
    return f"all files that watch() wrote; {path} lacks number 0"


def remove_all(path: Path) -> str:
    (path / NAME).unlink()
    return f"a directory that watch() wrote; {path} has no records"


def repeat(path: Path) -> str:
    (path / "00000001.gradstat").write_bytes((path / NAME).read_bytes())
    return f"the files of a run in their places; {path / '00000001.gradstat'} is number 0 of"


def cut_off_in_first_block(path: Path) -> str:
    (path / NAME).write_bytes((path / NAME).read_bytes()[:200])
    return f"a file that History.save() or watch() wrote; {path / NAME} is damaged"


@pytest.mark.parametrize(
    "change",
    [
        damage_middle,
        remove_first,
        remove_all,
        repeat,
        cut_off_in_first_block,
    ],
)
def test_history_load_refuses_a_directory_that_is_not_whole(
    change: Callable[[Path], str], generator: torch.Generator, tmp_path: Path
) -> None:
    write_in_blocks(tmp_path, make_history(Log2Bins(), generator)[0], 1)
    message = change(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape('History.load() needs ' + message)}"):
        History.load(tmp_path)


def exchange(path: Path, a: int, b: int) -> None:
    files = [path / f"{number:08}.gradstat" for number in (a, b)]
    data = [file.read_bytes() for file in files]
    for file, other in zip(files, reversed(data), strict=True):
        file.write_bytes(other)


def copy_to_the_end(path: Path) -> str:
    (path / "00000003.gradstat").write_bytes((path / "00000001.gradstat").read_bytes())
    return "in their places; {}/00000003.gradstat is number 1 of its run"


def exchange_two(path: Path) -> str:
    exchange(path, 1, 2)
    return "in their places; {}/00000002.gradstat is number 1 of its run"


def lose_the_first(path: Path) -> str:
    for number in (1, 2):
        (path / f"{number:08}.gradstat").rename(path / f"{number - 1:08}.gradstat")
    return "in their places; {}/00000001.gradstat is number 2 of its run"


def take_another_run(path: Path) -> str:
    write_resumed(path / "other")
    data = (path / "other" / "00000001.gradstat").read_bytes()
    (path / "00000001.gradstat").write_bytes(data)
    return "of one run; {0}/00000001.gradstat and {0}/00000002.gradstat are of two"


def write_resumed(path: Path) -> None:
    """A run that was resumed twice."""
    history, _ = make_history(Log2Bins(), torch.Generator().manual_seed(1), 7)
    for first_step in (None, 4, 8):
        journal = Journal(path, history, first_step)
        for record in history.records:
            if record.step >= (first_step or 0):
                journal.add(record)
        journal.flush()


@pytest.mark.parametrize(
    "change", [copy_to_the_end, exchange_two, lose_the_first, take_another_run]
)
def test_history_load_refuses_files_of_a_resumed_run_in_other_places(
    change: Callable[[Path], str], tmp_path: Path
) -> None:
    write_resumed(tmp_path)
    assert History.load(tmp_path).steps.tolist() == list(range(0, 14, 2))
    message = "History.load() needs the files " + change(tmp_path).format(tmp_path)
    message = message.replace("files in", "files of a run in")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        History.load(tmp_path)
    with pytest.raises(ValueError, match=re.escape(message)):
        Follower(tmp_path).look()


def test_history_load_passes_over_files_that_watch_did_not_write(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(Log2Bins(), generator)
    write_in_blocks(tmp_path, history, 1)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "figures.npz").write_bytes(b"mine")
    (tmp_path / ".00000002.npz.123.tmp").write_bytes(b"half a file of a process that was killed")
    assert_same(History.load(tmp_path), history)


def write_in_blocks(path: Path, history: History, size: int) -> list[int]:
    """Write a history in blocks of so many records; where each block ends."""
    kept, ends = Journal(path, history), []
    for at, step in enumerate(history.steps.tolist()):
        append_rows(kept, step, *arrays(history.record(step)))
        if (at + 1) % size == 0 or at + 1 == len(history):
            kept.flush()
            ends.append((path / NAME).stat().st_size)
    return ends


@pytest.mark.parametrize("lost", [1, 100, -1])
def test_history_load_leaves_out_the_end_that_is_cut_off_with_a_warning(
    lost: int, generator: torch.Generator, tmp_path: Path
) -> None:
    history, records = make_history(Log2Bins(), generator, 5)
    first, second = write_in_blocks(tmp_path, history, 2)[:2]
    file = tmp_path / NAME
    # One byte less, many, or of the last block one byte alone.
    kept = first + 1 if lost < 0 else second - lost
    file.write_bytes(file.read_bytes()[:kept])
    expected = History(LAYERS, Log2Bins())
    for step, record in zip((0, 2), records[:2], strict=True):
        append_rows(expected, step, *arrays(record))
    what = "an unknown number of records" if lost < 0 else "at most 2 records"
    message = f"History.load() leaves out the end of {file}, which is cut off: {what}"
    for path in (tmp_path, file):
        with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
            assert_same(History.load(path), expected)


def test_history_load_waits_for_a_block_that_is_being_written(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(Log2Bins(), generator, 5)
    ends = write_in_blocks(tmp_path, history, 2)
    file = tmp_path / NAME
    whole = file.read_bytes()
    at = [ends[0] + 10, ends[1] - 100, ends[1] + 100, len(whole)]

    def write() -> None:
        for before, after in pairwise(at):
            time.sleep(0.05)
            with file.open("ab") as end:
                end.write(whole[before:after])

    file.write_bytes(whole[: at[0]])
    writer = threading.Thread(target=write)
    writer.start()
    loaded = History.load(tmp_path)
    writer.join()
    assert loaded.steps.tolist() == history.steps.tolist()


def test_history_load_of_a_day_of_blocks_takes_two_seconds(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(Log2Bins(), generator, 1)
    record = history.records[0]
    Journal(tmp_path, history)
    reader = Reader(tmp_path / NAME)
    assert len(list(reader.blocks())) == 1
    link = reader._link
    with (tmp_path / NAME).open("ab") as file:
        for step in range(17_280):
            parts, link = encode({"scalars": {}}, [record._replace(step=step)], link)
            file.writelines(parts)
    seconds = []
    for _ in range(3):
        start_s = time.process_time()
        loaded = History.load(tmp_path)
        seconds.append(time.process_time() - start_s)
    assert np.array_equal(loaded.steps, np.arange(17_280))
    assert min(seconds) < 2


def test_load_says_that_a_file_is_a_checkpoint(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(3)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"is a checkpoint that torch\.save"):
        History.load(tmp_path / "model.pt")
