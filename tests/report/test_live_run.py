"""What pages are told of a run: whether it is there, what is new, and what was found."""

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from histories import begin_journal, falling, log, make_history, write_steps

from gradstat import History, Log2Bins
from gradstat.diagnosis import Finding
from gradstat.history.file import StoredRecord
from gradstat.history.follow import Follower
from gradstat.report import live_run
from gradstat.report.live_run import LiveRun

STEPS = 30


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_run, "_LOOK_S", 0.0)


@pytest.fixture
def history() -> History:
    return make_history(Log2Bins(), 4, STEPS, falling)


@pytest.fixture(autouse=True)
def _wait_for_what_was_begun() -> Iterator[None]:
    """What one test has begun to look for is not found in the next."""
    yield
    is_done = threading.Event()
    live_run._WORKER.submit(is_done.set)
    assert is_done.wait(60)


def ask(live: LiveRun, version: int = 0) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(json.dumps(live.since(version), allow_nan=False))
    return told


def wait_for_findings(live: LiveRun, n_records: int) -> dict[str, Any]:
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        told = ask(live)
        if told.get("findings") is not None and told["findingsOf"] == n_records:
            return told
        time.sleep(0.02)
    raise AssertionError("nothing was found in 30 s")


def test_live_run_tells_what_is_new_and_in_what_state_it_is(
    history: History, tmp_path: Path
) -> None:
    live = LiveRun(tmp_path / "run")
    told = ask(live)
    assert (told["state"], "arrays" in told) == ("waiting", False)
    journal = begin_journal(tmp_path / "run", history)
    told = ask(live, told["version"])
    assert (told["state"], told["records"]) == ("there", 0)
    write_steps(journal, history, 0, 1, 2)
    first = ask(live, told["version"])
    assert (first["records"], first["steps"]) == (3, [[0, 0], [1, 1], [2, 2]])
    write_steps(journal, history, 3)
    second = ask(live, first["version"])
    assert (second["from"], second["steps"], "head" in second) == (3, [[3, 3]], False)
    assert "arrays" not in ask(live, second["version"]) or live._growing.findings_of
    shutil.rmtree(tmp_path / "run")
    assert ask(live, second["version"])["state"] == "gone"
    # What was read can still be seen.
    assert ask(live)["records"] == 4
    write_steps(begin_journal(tmp_path / "run", history), history, 0, 1)
    again = ask(live, second["version"])
    assert (again["state"], again["records"], "head" in again) == ("there", 2, True)


def test_live_run_that_is_resumed_is_told_anew(history: History, tmp_path: Path) -> None:
    live = LiveRun(tmp_path)
    write_steps(begin_journal(tmp_path, history), history, *range(6))
    told = ask(live)
    journal = begin_journal(tmp_path, history, 4)
    resumed = ask(live, told["version"])
    assert (resumed["records"], "head" in resumed) == (4, True)
    write_steps(journal, history, 4, 5, 6)
    told = ask(live, resumed["version"])
    assert (told["from"], told["steps"], told["records"]) == (4, [[4, 4], [5, 5], [6, 6]], 7)


def test_live_run_tells_findings_once_it_has_them(history: History, tmp_path: Path) -> None:
    history.save(tmp_path / "run.npz")
    live = LiveRun(tmp_path / "run.npz")
    first = ask(live)
    assert first["findings"] is None
    told = wait_for_findings(live, STEPS)
    found = history.diagnose()
    assert [each["sentence"] for each in told["findings"]] == [each.sentence for each in found]
    assert found
    # They alone are new to a page that has the rest.
    told = ask(live, first["version"])
    assert (told["steps"], told["findingsOf"], "head" in told) == ([], STEPS, False)


def test_live_run_looks_for_findings_again_when_there_are_more_records(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "_FINDINGS_S", 0.0)
    monkeypatch.setattr(live_run, "_FINDINGS_SHARE", 1.0)
    journal, live = begin_journal(tmp_path, history), LiveRun(tmp_path)
    write_steps(journal, history, *range(5))
    wait_for_findings(live, 5)
    write_steps(journal, history, *range(5, STEPS))
    assert wait_for_findings(live, STEPS)["records"] == STEPS


def test_live_run_tells_when_it_was_written(history: History, tmp_path: Path) -> None:
    history.save(tmp_path / "run.npz")
    hour_ago = time.time() - 3600
    os.utime(tmp_path / "run.npz", (hour_ago, hour_ago))
    assert ask(LiveRun(tmp_path / "run.npz"))["quiet"] == pytest.approx(3600, abs=60)
    write_steps(begin_journal(tmp_path / "run", history), history, 0, 1)
    assert ask(LiveRun(tmp_path / "run"))["quiet"] < 60


def test_live_run_looks_for_findings_a_twentieth_of_the_time(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "_FINDINGS_S", 0.0)
    began = []

    def diagnose(_: History) -> list[Finding]:
        began.append(time.monotonic())
        time.sleep(0.02)
        return []

    monkeypatch.setattr(live_run, "diagnose", diagnose)
    journal, live = begin_journal(tmp_path, history), LiveRun(tmp_path)
    end_s = time.monotonic() + 30
    step = 0
    while len(began) < 4 and time.monotonic() < end_s:
        if step < STEPS:
            write_steps(journal, history, step)
            step += 1
        ask(live)
        time.sleep(0.05)
    assert len(began) > 2
    assert min(b - a for a, b in pairwise(began)) >= 20 * 0.02


def test_live_runs_look_for_findings_in_one_thread(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = []
    monkeypatch.setattr(live_run, "_FINDINGS_S", 0.0)

    def diagnose(_: History) -> list[Finding]:
        threads.append(threading.get_ident())
        if len(threads) == 1:
            raise RuntimeError("of a rule")  # does not end it
        return []

    monkeypatch.setattr(live_run, "diagnose", diagnose)
    for name in ("a", "b", "c"):
        history.save(tmp_path / f"{name}.npz")
        wait_for_findings(LiveRun(tmp_path / f"{name}.npz"), STEPS)
    assert len(threads) == 4
    assert len(set(threads)) == 1
    assert threads[0] != threading.get_ident()


def test_live_run_does_not_tell_what_was_found_in_another_run(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "_FINDINGS_S", 0.0)
    monkeypatch.setattr(live_run, "_FINDINGS_SHARE", 1.0)
    is_read, may_end = threading.Event(), threading.Event()

    def diagnose(given: History) -> list[Finding]:
        is_read.set()
        assert may_end.wait(30)
        name = f"{len(given)} records"
        return [Finding("spike", "note", given.layers[0], (0, 1), {}, name)]

    monkeypatch.setattr(live_run, "diagnose", diagnose)
    history.save(tmp_path / "run.npz")
    live = LiveRun(tmp_path / "run.npz")
    ask(live)
    assert is_read.wait(30)
    make_history(Log2Bins(), 4, 7).save(tmp_path / "run.npz")
    assert ask(live)["records"] == 7
    may_end.set()
    while ask(live)["findings"] is None:
        time.sleep(0.01)
    assert [each["sentence"] for each in ask(live)["findings"]] == ["7 records"]


@pytest.mark.parametrize("n_ranks", [1, 2])
@pytest.mark.parametrize("in_memory", [0, 1 << 20])
def test_live_run_finds_what_the_whole_run_shows_and_reads_it_once(
    n_ranks: int, in_memory: int, history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.history.file._IN_MEMORY", in_memory)
    monkeypatch.setattr("gradstat.history.follow._BYTES", 1)
    followers = []

    class Counted(Follower):
        def __init__(self, path: Path) -> None:
            followers.append(path)
            super().__init__(path)

    monkeypatch.setattr(live_run, "Follower", Counted)
    folders = [tmp_path / f"rank-{rank}" if n_ranks > 1 else tmp_path for rank in range(n_ranks)]
    journals = [
        begin_journal(folder, history, rank=rank if n_ranks > 1 else None)
        for rank, folder in enumerate(folders)
    ]
    for step in range(STEPS):
        for journal in journals:
            log(journal, "loss", step, 1.0 if step < 20 else 30.0)
            write_steps(journal, history, step)
    live = LiveRun(tmp_path)
    told = wait_for_findings(live, STEPS)
    expected = History.load(tmp_path).diagnose()
    assert [each["sentence"] for each in told["findings"]] == [each.sentence for each in expected]
    assert "loss spike" in [each["kind"] for each in told["findings"]]
    assert followers == [tmp_path]
    is_stored = [isinstance(each, StoredRecord) for each in live._records.records]
    assert set(is_stored) == {n_ranks == 1 or not in_memory}


def test_live_run_says_what_cannot_be_read(history: History, tmp_path: Path) -> None:
    path = tmp_path / "run\x1b[2J.npz"
    path.write_bytes(b"no run")
    live = LiveRun(path)
    told = ask(live)
    assert told["state"].startswith("cannot be read: History.load() needs a file that")
    assert told["state"].isprintable()
    assert ask(live)["state"] == told["state"]
    history.save(path)
    assert ask(live)["state"] == "there"


def test_live_run_names_the_file_that_may_not_be_opened(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.npz"
    history.save(path)
    live = LiveRun(path)

    def refuse(path: Path, n_bytes: float) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("gradstat.history.reading.followed", refuse)
        assert ask(live)["state"] == f"cannot be read: Permission denied: {path}"
    assert ask(live)["state"] == "there"


def test_live_run_without_layers_shows_nothing(tmp_path: Path) -> None:
    History([], Log2Bins()).save(tmp_path / "run.npz")
    live = LiveRun(tmp_path / "run.npz")
    assert ask(live)["state"] == ask(live)["state"] == "there"
    assert "arrays" not in ask(live)


def test_live_run_gives_everything_to_a_page_of_an_earlier_server(
    history: History, tmp_path: Path
) -> None:
    history.save(tmp_path / "run.npz")
    version = ask(LiveRun(tmp_path / "run.npz"))["version"]
    time.sleep(0.002)
    live = LiveRun(tmp_path / "run.npz")
    for known in (version, 1, 10**15 - 1):
        assert ask(live, known)["from"] == 0
        assert "head" in ask(live, known)


def test_live_run_reads_a_long_run_in_several_answers(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.history.follow._BYTES", 1)
    monkeypatch.setattr(live_run, "_READ_S", 0.0)
    journal = begin_journal(tmp_path, history)
    for step in range(5):
        write_steps(journal, history, step)
    live, version, seen = LiveRun(tmp_path), 0, []
    # An answer that takes no time reads one block at most.
    monkeypatch.setattr(live_run.time, "monotonic", iter(range(10**6)).__next__)
    monkeypatch.setattr(live_run, "_READ_S", 1.5)
    for _ in range(9):
        told = ask(live, version)
        version = told["version"]
        seen.append((told.get("records"), told["behind"]))
    assert seen[-1][1] is False
    assert ask(live)["records"] == 5
    assert len({each[0] for each in seen}) > 3


def test_live_run_looks_at_the_files_twice_a_second_at_most(
    history: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(live_run, "_LOOK_S", 60.0)
    journal, live = begin_journal(tmp_path, history), LiveRun(tmp_path)
    write_steps(journal, history, 0)
    # However many pages ask.
    assert [ask(live)["records"] for _ in range(3)] == [1, 1, 1]
    write_steps(journal, history, 1)
    assert ask(live)["records"] == 1
    monkeypatch.setattr(live_run, "_LOOK_S", 0.0)
    assert ask(live)["records"] == 2


def test_live_run_may_be_asked_by_several_threads(history: History, tmp_path: Path) -> None:
    journal, live = begin_journal(tmp_path, history), LiveRun(tmp_path)
    failed: list[BaseException] = []
    records = []

    def look() -> None:
        try:
            version, steps = 0, []
            while len(steps) < STEPS:
                told = ask(live, version)
                version = told["version"]
                if "steps" in told:
                    steps = steps[: told["from"]] + told["steps"]
                time.sleep(0.001)
            records.append([first for first, _ in steps])
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for step in range(STEPS):
        write_steps(journal, history, step)
        time.sleep(0.005)
    for thread in threads:
        thread.join(60)
    assert not failed
    assert records == [list(range(STEPS))] * 3
