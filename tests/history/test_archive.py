import json
import os
import pickle
import re
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows, log
from watching import LAYERS, SCHEMES, absent, arrays, assert_same, make_history

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.bins import Bins
from gradstat.history import file, reading
from gradstat.history.journal import Journal
from gradstat.record import Placement, Row
from gradstat.results import FLOATS, INTEGERS


@pytest.mark.parametrize("path", [None, 3, b"run.npz"], ids=repr)
def test_what_is_no_path_is_refused_by_its_name(path: object, generator: torch.Generator) -> None:
    history, _ = make_history(Log2Bins(), generator, 1)
    methods: dict[str, Callable[[object], object]] = {
        "History.save": history.save,
        "History.load": History.load,
        "to_csv": history.to_csv,
        "to_parquet": history.to_parquet,
        "report": history.report,
    }
    for name, method in methods.items():
        message = f"^{re.escape(f'{name}() needs a path; path is {path!r}')}$"
        with pytest.raises(TypeError, match=message):
            method(path)


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
@pytest.mark.parametrize("n_steps", [0, 1, 40])
def test_history_survives_save_and_load(
    bins: Bins, n_steps: int, generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(bins, generator, n_steps)
    pairs = zip(absent(bins), absent(bins), strict=True)
    if n_steps:
        append_rows(history, 100, *(np.concatenate(pair) for pair in pairs))
    history.save(tmp_path / "run.npz")
    loaded = History.load(str(tmp_path / "run.npz"))
    assert_same(loaded, history)
    # What was loaded goes on recording.
    more = arrays(gradstat.statistics([torch.ones(3), torch.zeros(2)], bins))
    for each in (history, loaded):
        append_rows(each, 101, *more)
    assert_same(loaded, history)


def test_history_survives_pickling(generator: torch.Generator) -> None:
    history, _ = make_history(LinearBins(30), generator)
    assert_same(pickle.loads(pickle.dumps(history)), history)


@pytest.mark.parametrize("name", ["run", "run.1", "run.npz"])
def test_history_save_keeps_the_name_as_it_is(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(Log2Bins(), generator)
    history.save(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same(History.load(tmp_path / name), history)


def test_history_save_that_fails_leaves_the_old_file_alone(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.npz"
    history, records = make_history(Log2Bins(), generator)
    history.save(path)
    before = path.read_bytes()

    def fail(path: Path, _: object) -> None:
        path.write_bytes(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(reading, "write_npz", fail)
    append_rows(history, 9, *arrays(records[0]))
    with pytest.raises(OSError, match="No space left"):
        history.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    assert path.read_bytes() == before


def test_history_save_replaces_an_older_file(generator: torch.Generator, tmp_path: Path) -> None:
    history, records = make_history(Log2Bins(), generator)
    history.save(tmp_path / "run.npz")
    append_rows(history, 9, *arrays(records[0]))
    history.save(tmp_path / "run.npz")
    assert History.load(tmp_path / "run.npz").steps.tolist() == [0, 2, 4, 9]


def test_history_load_says_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "run.npz")


def test_history_saves_when_each_step_was_recorded(
    generator: torch.Generator, tmp_path: Path
) -> None:
    before = time.time()
    history, records = make_history(Log2Bins(), generator)
    append_rows(history, 9, *arrays(records[0]), time_s=12.5)
    assert all(before <= each <= time.time() for each in history.times[:3])
    history.save(tmp_path / "run.npz")
    loaded = History.load(tmp_path / "run.npz")
    assert loaded.times.tolist() == history.times.tolist()
    assert loaded.times[3] == 12.5
    assert history.select("grad").times.tolist() == history.times.tolist()


def test_history_capacity_thins_times_with_steps(generator: torch.Generator) -> None:
    _, (record, *_) = make_history(Log2Bins(), generator)
    history = History(LAYERS, Log2Bins(), capacity=4)
    for step in range(21):
        append_rows(history, step, *arrays(record), time_s=float(step))
    assert history.times.tolist() == history.steps.tolist()


NAMES = [
    Row("grad", "param/x"),
    Row("grad", "x"),
    Row("grad", "x\0"),
    Row("grad", ""),
    Row("grad", "ünï\ud800 \n"),
    Row("grad", "n" * 40_000),
    Row("param", "x"),
    Row("param", "param/x"),
    Row("activation", "grad/x"),
]


@pytest.mark.parametrize("is_selected", [False, True])
def test_history_names_of_any_kind_survive_save_and_load(is_selected: bool, tmp_path: Path) -> None:
    history = History(NAMES, Log2Bins())
    s = gradstat.statistics([torch.full((3,), float(i)) for i in range(len(NAMES))])
    append_rows(history, 0, *arrays(s))
    if is_selected:
        history = history.select("param")
    history.save(tmp_path / "run.npz")
    loaded = History.load(tmp_path / "run.npz")
    assert loaded.rows == history.rows
    assert loaded.layers == history.layers
    assert_same(loaded, history)
    kept = Journal(tmp_path / "run", history)
    append_rows(kept, 0, *arrays(history.record()))
    kept.flush()
    assert History.load(tmp_path / "run").rows == history.rows
    if not is_selected:
        assert loaded.select("param")["max"].tolist() == [[6.0, 7.0]]


def test_history_load_of_a_long_name_takes_its_own_size(tmp_path: Path) -> None:
    layers = ["n" * 40_000, *map(str, range(1_500))]
    History(layers, Log2Bins()).save(tmp_path / "run.npz")
    tracemalloc.start()
    assert History.load(tmp_path / "run.npz").layers == layers
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3_000_000


def test_saved_file_can_be_read_with_numpy_alone(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(LinearBins(6), generator)
    history.save(tmp_path / "run.npz")
    with np.load(tmp_path / "run.npz") as file:
        run = json.loads(file["run"].tobytes())
        assert run["format"] == "gradstat history 1"
        assert run["bins"] == LinearBins(6).spec
        assert run["rows"] == [["grad", layer] for layer in LAYERS]
        assert np.array_equal(file["steps"], history.steps)
        assert np.array_equal(file["times"], history.times)
        for at, name in enumerate(INTEGERS):
            assert np.array_equal(file["integers"][..., at], history[name])
        for at, name in enumerate(FLOATS):
            assert np.array_equal(file["floats"][..., at], history[name], equal_nan=True)
        # The histogram of the second layer in the third record.
        ends = np.cumsum(file["sizes"])
        part = slice(ends[2 * 2 + 1 - 1], ends[2 * 2 + 1])
        counts = np.zeros(6, int)
        counts[file["bins"][part]] = file["counts"][part]
    assert np.array_equal(counts, history.histogram(LAYERS[1])[0])


def with_placements(generator: torch.Generator) -> History:
    history, _ = make_history(Log2Bins(), generator)
    history.rank, history.world = 3, 8
    history.placements[1] = Placement(2, (2, 4), (24, 8))
    return history


def test_history_keeps_what_a_rank_holds_of_which_tensor(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history = with_placements(generator)
    history.save(tmp_path / "run.npz")
    kept = Journal(tmp_path / "run", history)
    append_rows(kept, 0, *arrays(history.record(0)))
    kept.flush()
    log(kept, "loss", 1, 2.0)
    kept.flush()
    for loaded in (History.load(tmp_path / "run.npz"), History.load(tmp_path / "run")):
        assert (loaded.rank, loaded.world) == (3, 8)
        for each in (loaded, loaded.select("grad"), loaded.snapshot()):
            assert each.placements == [(-1, (-1, -1), ()), (2, (2, 4), (24, 8))]


def test_run_file_reads_what_a_system_reads_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(range(100)))
    opened, read = file.RunFile(tmp_path / "x"), os.pread
    monkeypatch.setattr(os, "pread", lambda number, n, at: read(number, min(n, 7), at))
    assert opened.read(3, 50) == bytes(range(3, 53))
    assert opened.read(90, 50) == bytes(range(90, 100))
    monkeypatch.setattr(file, "_MOST_READ", 4)
    assert opened.read(3, 50) == bytes(range(3, 53))
