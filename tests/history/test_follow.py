"""A run that is read while it is written: each record once, from its beginning where need be."""

import re
import warnings
from pathlib import Path

import pytest
from histories import begin_journal, falling, make_history, write_steps
from watching import assert_same

from gradstat import History, Log2Bins
from gradstat.history.follow import Follower, Look
from gradstat.history.records import Records, joined

STEPS = 12


def recorded(scale: float = 1.0, layers: int = 2) -> History:
    history = make_history(
        Log2Bins(), layers, STEPS, lambda step, layer: scale * falling(step, layer)
    )
    for step in range(STEPS):
        history.add_scalar("loss", step, scale * step)
    return history


class Reader:
    """Looks as often as there is something, and keeps what still holds."""

    def __init__(self, path: Path) -> None:
        self.follower = Follower(path)
        self.parts: list[Records] = []
        self.n_anew = 0

    def read(self) -> list[int]:
        """Steps that are new."""
        new: list[int] = []
        while (look := self.follower.look()) is not None:
            if look.is_anew:
                self.parts, self.n_anew = [], self.n_anew + 1
            if look.records is None:
                assert look.is_all
                break
            self.parts.append(look.records)
            new += look.records.steps.tolist()
        return new

    @property
    def history(self) -> History:
        return History.from_records(joined(self.parts))


def test_look_reads_each_record_once_as_it_is_written(tmp_path: Path) -> None:
    history, reader = recorded(), Reader(tmp_path / "run")
    assert reader.follower.look() is None
    journal = begin_journal(tmp_path / "run", history)
    assert reader.read() == []
    write_steps(journal, history, 0, 1)
    write_steps(journal, history, 2)
    assert reader.read() == [0, 1, 2]
    assert reader.read() == []
    write_steps(journal, history, 3, 4)
    assert reader.read() == [3, 4]
    assert_same(reader.history, History.load(tmp_path / "run"))
    assert reader.n_anew == 1


def test_look_reads_a_long_run_some_megabytes_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gradstat.history.follow._BYTES", 1)
    history = recorded()
    journal = begin_journal(tmp_path, history)
    for step in range(STEPS):
        write_steps(journal, history, step)
    follower = Follower(tmp_path)
    looks = [follower.look() for _ in range(STEPS + 2)]
    assert [look.records.steps for look in looks[1:-1]] == [[step] for step in range(STEPS)]
    assert [look.is_anew for look in looks] == [True] + [False] * (STEPS + 1)
    assert looks[-1] == Look(None, is_anew=False, is_all=True)


def test_look_waits_for_a_block_that_is_being_written(tmp_path: Path) -> None:
    history, reader = recorded(), Reader(tmp_path / "copy")
    journal = begin_journal(tmp_path / "run", history)
    write_steps(journal, history, 0, 1)
    write_steps(journal, history, 2)
    data = (tmp_path / "run" / "00000000.gradstat").read_bytes()
    (tmp_path / "copy").mkdir()
    seen: list[int] = []
    with (tmp_path / "copy" / "00000000.gradstat").open("wb", buffering=0) as file:
        for start in range(0, len(data), 100):
            file.write(data[start : start + 100])
            seen += reader.read()
    assert seen == [0, 1, 2]
    assert reader.n_anew == 1


def test_look_reads_a_resumed_run_from_its_beginning(tmp_path: Path) -> None:
    history, reader = recorded(), Reader(tmp_path)
    write_steps(begin_journal(tmp_path, history), history, *range(8))
    assert reader.read() == list(range(8))
    again = recorded(3.0)
    journal = begin_journal(tmp_path, again, first_step=5)
    assert reader.read() == list(range(5))
    write_steps(journal, again, 5, 6)
    assert reader.read() == [5, 6]
    assert reader.n_anew == 2
    loaded = History.load(tmp_path)
    assert_same(reader.history, loaded)
    assert reader.history.scalar("loss")[1].tolist() == [0, 1, 2, 3, 4, 15, 18]


def test_look_reads_what_takes_the_place_of_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    recorded().save(path)
    reader = Reader(path)
    assert reader.read() == list(range(STEPS))
    assert reader.read() == []
    recorded(2.0, layers=3).save(path)
    assert reader.read() == list(range(STEPS))
    assert_same(reader.history, History.load(path))
    path.unlink()
    assert reader.follower.look() is None
    recorded().save(path)
    assert reader.read() == list(range(STEPS))
    assert reader.n_anew == 3


def test_look_reads_a_file_that_is_written_over_in_its_place(tmp_path: Path) -> None:
    history, other = recorded(), recorded(5.0)
    write_steps(begin_journal(tmp_path / "run", history), history, *range(6))
    write_steps(begin_journal(tmp_path / "other", other), other, 0, 1)
    reader, file = Reader(tmp_path / "run"), tmp_path / "run" / "00000000.gradstat"
    assert reader.read() == list(range(6))
    before = file.stat().st_ino
    file.write_bytes((tmp_path / "other" / "00000000.gradstat").read_bytes())
    assert file.stat().st_ino == before
    assert reader.read() == [0, 1]
    assert_same(reader.history, History.load(tmp_path / "other"))


def test_look_merges_what_all_ranks_have_written(tmp_path: Path) -> None:
    parts = [recorded(), recorded(10.0)]
    reader = Reader(tmp_path)
    journals = [
        begin_journal(tmp_path / f"rank-{rank}", part, rank=rank) for rank, part in enumerate(parts)
    ]
    write_steps(journals[0], parts[0], 0, 1, 2)
    assert reader.read() == []
    write_steps(journals[1], parts[1], 0, 1)
    assert reader.read() == [0, 1]
    write_steps(journals[1], parts[1], 2, 3, 4)
    assert reader.read() == [2]
    write_steps(journals[0], parts[0], 3, 4)
    assert reader.read() == [3, 4]
    assert reader.n_anew == 1
    loaded = History.load(tmp_path)
    assert_same(reader.history, loaded)
    for name in ("rank0/loss", "rank1/loss"):
        assert reader.history.scalar(name)[1].tolist() == loaded.scalar(name)[1].tolist()


def test_look_waits_for_the_rank_that_resumes_last(tmp_path: Path) -> None:
    parts = [recorded(), recorded(10.0)]
    reader = Reader(tmp_path)
    for rank, part in enumerate(parts):
        write_steps(begin_journal(tmp_path / f"rank-{rank}", part, rank=rank), part, *range(6))
    assert reader.read() == list(range(6))
    again = [recorded(3.0), recorded(30.0)]
    first = begin_journal(tmp_path / "rank-0", again[0], 3, rank=0)
    write_steps(first, again[0], 3, 4, 5)
    # Those of step 3 and later are of different attempts.
    assert reader.read() == [0, 1, 2]
    second = begin_journal(tmp_path / "rank-1", again[1], 3, rank=1)
    write_steps(second, again[1], 3, 4, 5)
    assert reader.read() == list(range(6))
    assert_same(reader.history, History.load(tmp_path))


def test_look_takes_a_damaged_run_up_once_it_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.npz"
    path.write_bytes(b"no run")
    follower = Follower(path)
    message = re.escape(f"{path} is damaged or another kind")
    with pytest.raises(ValueError, match=message):
        follower.look()
    with monkeypatch.context() as patch:
        patch.setattr("gradstat.history.reading.followed", None)  # it is not read again
        with pytest.raises(ValueError, match=message):
            follower.look()
    recorded().save(path)
    look = follower.look()
    assert look is not None
    assert look.is_anew
    assert look.records is not None
    assert look.records.steps.tolist() == list(range(STEPS))


def test_look_refuses_a_run_whose_earlier_file_is_cut_off(tmp_path: Path) -> None:
    history = recorded()
    write_steps(begin_journal(tmp_path, history), history, *range(4))
    write_steps(begin_journal(tmp_path, history, first_step=4), history, 4, 5)
    file = tmp_path / "00000000.gradstat"
    file.write_bytes(file.read_bytes()[:-5])
    reader = Reader(tmp_path)
    with pytest.raises(ValueError, match="it is cut off"):
        reader.read()


def test_look_takes_up_a_run_that_it_may_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded().save(tmp_path / "run.npz")
    reader = Reader(tmp_path / "run.npz")

    def refuse(path: Path, n_bytes: float) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("gradstat.history.reading.followed", refuse)
        with pytest.raises(PermissionError):
            reader.follower.look()
    assert reader.read() == list(range(STEPS))


def test_look_refuses_files_of_one_process_beside_ranks(tmp_path: Path) -> None:
    history = recorded()
    begin_journal(tmp_path, history)
    begin_journal(tmp_path / "rank-0", history, rank=0)
    with pytest.raises(ValueError, match="has those of one process and of 1 ranks"):
        Follower(tmp_path).look()


def test_look_knows_another_run_in_the_same_file(tmp_path: Path) -> None:
    """A file system may give a new file the number of the one that was deleted."""
    for n_steps in (5, 3, 7):
        path, reader = tmp_path / str(n_steps), Reader(tmp_path / str(n_steps))
        journal = begin_journal(path, recorded())
        for step in range(5):
            write_steps(journal, recorded(), step)
        assert reader.read() == list(range(5))
        other = tmp_path / f"other {n_steps}"
        journal = begin_journal(other, recorded(7.0))
        for step in range(n_steps):
            write_steps(journal, recorded(7.0), step)
        name = "00000000.gradstat"
        (path / name).write_bytes((other / name).read_bytes())  # of the same inode
        assert reader.read() == list(range(n_steps))
        assert_same(reader.history, History.load(other))


def test_look_takes_a_resumed_run_up_when_its_file_has_a_block(tmp_path: Path) -> None:
    path, reader = tmp_path / "run", Reader(tmp_path / "run")
    write_steps(begin_journal(path, recorded()), recorded(), *range(6))
    journal = begin_journal(path, recorded(2.0), 4)
    write_steps(journal, recorded(2.0), 4, 5)
    newest = path / "00000001.gradstat"
    whole = newest.read_bytes()
    newest.write_bytes(whole[:20])  # as on a full disk
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert reader.read() == list(range(6))
        newest.write_bytes(whole)
        assert reader.read() == list(range(6))
    assert_same(reader.history, History.load(path))
    assert reader.n_anew == 2
