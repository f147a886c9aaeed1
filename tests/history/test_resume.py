"""Runs that are resumed: what is superseded, what stays, and what is refused."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import append_rows, log
from torch import nn
from watching import arrays, assert_record, assert_same, backward, make_history, make_model

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.history.file import Reader
from gradstat.history.follow import Follower
from gradstat.history.journal import Journal
from gradstat.record import SAME, Placement


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(20)


def train(path: Path, n_steps: int, first_step: int | None = None, **options: Any) -> History:
    model = make_model()
    with gradstat.watch(model, path=path, first_step=first_step, **options) as w:
        for step in range(n_steps):
            w.log(loss=100.0 * (first_step or 0) + step)
            backward(model)
            model.zero_grad()
    return w.history


def segment(path: Path, number: int) -> Path:
    return path / f"{number:08}.gradstat"


def test_watch_first_step_supersedes_what_came_from_it_on(tmp_path: Path) -> None:
    first = train(tmp_path, 6)
    second = train(tmp_path, 4, first_step=3)
    assert second.steps.tolist() == [3, 4, 5, 6]
    loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == list(range(7))
    for step in range(7):
        assert_record(loaded.record(step), (first if step < 3 else second).record(step))
    steps, losses = loaded.scalar("loss")
    assert steps.tolist() == list(range(7))
    assert losses.tolist() == [0, 1, 2, 300, 301, 302, 303]
    loaded.save(tmp_path / "whole")
    assert_same(History.load(tmp_path / "whole"), loaded)


def test_history_load_joins_a_run_that_was_resumed_several_times(tmp_path: Path) -> None:
    train(tmp_path, 6)
    train(tmp_path, 6, first_step=4)
    # Further back than the one before, which is superseded as a whole.
    last = train(tmp_path, 2, first_step=2)
    loaded = History.load(tmp_path)
    assert loaded.scalar("loss")[1].tolist() == [0, 1, 200, 201]
    assert_record(loaded.record(3), last.record(3))
    train(tmp_path, 0, first_step=3)
    assert History.load(tmp_path).steps.tolist() == [0, 1, 2]


def test_watch_first_step_needs_no_records_before_it(tmp_path: Path) -> None:
    assert_same(train(tmp_path / "run", 2, first_step=7), History.load(tmp_path / "run"))
    assert History.load(tmp_path / "run").steps.tolist() == [7, 8]


def test_watch_first_step_numbers_records_without_a_path() -> None:
    model = make_model()
    with gradstat.watch(model, every=4, accumulation_steps=2, first_step=6) as w:
        for at in range(16):
            backward(model)
            w.log(loss=at)
    # Those that a run without a stop has.
    assert w.history.steps.tolist() == [8, 12]
    assert w.history.scalar("loss")[0].tolist() == [6 + at // 2 for at in range(16)]


def test_history_load_keeps_a_partial_record_before_the_first_step(tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    w = gradstat.watch(model, path=tmp_path, what=("grad", "activation"))
    model(torch.ones(1, 3)).sum().backward()
    w.log(loss=0.0)
    model(torch.ones(1, 3))
    w.log(loss=np.nan)
    w.close()
    options = {"path": tmp_path, "what": ("grad", "activation")}
    gradstat.watch(model, first_step=2, **options).close()
    assert History.load(tmp_path).partial_step == 1
    gradstat.watch(model, first_step=1, **options).close()
    loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == [0]
    assert loaded.partial_step is None


def tear(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def test_history_load_takes_a_run_that_was_resumed_after_a_torn_end(tmp_path: Path) -> None:
    train(tmp_path, 3)
    tear(segment(tmp_path, 0))
    train(tmp_path, 2, first_step=3)
    message = f"leaves out the end of {segment(tmp_path, 0)}, which is cut off: at most 3 records"
    with pytest.warns(RuntimeWarning, match=re.escape(message)):
        loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == [3, 4]
    # It has become shorter since: that is a copy that was cut off.
    tear(segment(tmp_path, 0))
    with pytest.raises(ValueError, match=re.escape(f"{segment(tmp_path, 0)} is damaged")):
        History.load(tmp_path)


def test_history_load_takes_a_run_that_was_resumed_after_a_torn_beginning(tmp_path: Path) -> None:
    file = segment(tmp_path, 0)
    train(tmp_path, 3)
    file.write_bytes(file.read_bytes()[:50])
    train(tmp_path, 2, first_step=1)
    segment(tmp_path, 1).write_bytes(segment(tmp_path, 1).read_bytes()[:50])
    expected = train(tmp_path, 2, first_step=1)
    with pytest.warns(RuntimeWarning, match="all of its records are lost"):
        assert_same(History.load(tmp_path), expected)


def test_history_load_takes_a_torn_end_before_a_file_that_never_had_a_block(tmp_path: Path) -> None:
    first = train(tmp_path, 3)
    file = segment(tmp_path, 0)
    file.write_bytes(file.read_bytes()[:-1])
    segment(tmp_path, 1).touch()
    with pytest.warns(RuntimeWarning, match="leaves out the end of"):
        loaded = History.load(tmp_path)
    assert set(loaded.steps.tolist()) <= set(first.steps.tolist())
    with pytest.warns(RuntimeWarning, match="leaves out the end of"):
        assert History.load(tmp_path).layers == first.layers


@pytest.mark.parametrize("damage", ["torn", "without a record"])
def test_newest_is_of_the_file_before_where_the_last_has_no_record(
    damage: str, tmp_path: Path
) -> None:
    train(tmp_path, 4)
    train(tmp_path, 0, first_step=2)
    if damage == "torn":
        train(tmp_path, 1, first_step=3)
        file = segment(tmp_path, 2)
        file.write_bytes(file.read_bytes()[:50])
    follower, newest = Follower(tmp_path, newest=True), -1
    while (look := follower.look()) is not None and not look.is_all:
        newest = max(newest, look.records.last_step)
    assert newest == 1


def test_history_load_refuses_a_torn_file_that_was_whole_when_the_run_was_resumed(
    tmp_path: Path,
) -> None:
    train(tmp_path, 3)
    train(tmp_path, 2, first_step=2)
    tear(segment(tmp_path, 0))
    with pytest.raises(ValueError, match=re.escape(f"{segment(tmp_path, 0)} is damaged")):
        History.load(tmp_path)


def test_watch_first_step_refuses_another_run(tmp_path: Path) -> None:
    train(tmp_path, 2)
    files = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for model, bins, there in (
        (nn.Linear(3, 2), Log2Bins(), "1 over Log2Bins()"),
        (make_model(), LinearBins(6, -1.0, 1.0), "3 over LinearBins(6, -1.0, 1.0)"),
    ):
        message = (
            f"watch() needs the layers and bins of the run that it goes on with; path is "
            f"{tmp_path}, which has 3 rows over Log2Bins(), and there are {there}"
        )
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            gradstat.watch(model, bins, path=tmp_path, first_step=2)
    assert files == {file.name: file.read_bytes() for file in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("first_step", "error", "message"),
    [
        (-1, ValueError, "a number of 0 or more; first_step is -1"),
        (1.0, TypeError, "an integer; first_step is 1.0"),
        (True, TypeError, "an integer; first_step is True"),
        (1 << 62, ValueError, f"a number below 2**62; first_step is {1 << 62}"),
    ],
)
def test_watch_refuses_what_is_no_first_step(
    tmp_path: Path, first_step: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(f'watch() needs {message}')}$"):
        gradstat.watch(make_model(), path=tmp_path / "run", first_step=first_step)
    assert list(tmp_path.iterdir()) == []


def test_watch_first_step_leaves_the_files_before_as_they_are(tmp_path: Path) -> None:
    train(tmp_path, 3)
    before = segment(tmp_path, 0).read_bytes()
    train(tmp_path, 3, first_step=0)
    assert segment(tmp_path, 0).read_bytes() == before


def test_journal_keeps_owners_where_its_last_block_has_scalars_alone(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, records = make_history(Log2Bins(), generator, 1)
    kept = Journal(tmp_path, history)
    history.placements = [Placement(SAME), Placement(5)]
    append_rows(kept, 0, *arrays(records[0]))
    kept.flush()
    log(kept, "loss", 1, 2.0)
    kept.flush()
    blocks = Reader(segment(tmp_path, 0)).blocks()
    assert [len(block.records) for block in blocks] == [0, 1, 0]
    assert History.load(tmp_path).placements == history.placements
