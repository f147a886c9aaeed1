"""What several ranks have measured, put together from histories, files and directories."""

import pickle
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import append_rows, log
from programs import run_python
from torch import Tensor
from watching import absent, arrays, assert_same

import gradstat
from gradstat import History, LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.cli import main
from gradstat.history import ranks as merging
from gradstat.history.file import Reader, StoredRecord
from gradstat.history.journal import Journal
from gradstat.history.records import Scalars
from gradstat.record import OWN, PARTIAL, SAME, Placement, Row

ROWS = ["a.weight", "b.weight"]


def values(rank: int, step: int, row: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + 10 * step + row)
    n = (40, 7, 1, 0)[(rank + row) % 4]
    return torch.randn(n, generator=generator, dtype=torch.float64) * 10.0 ** (rank - row)


def make_rank(
    rank: int,
    world: int = 3,
    steps: Sequence[int] = range(5),
    rows: Sequence[str | Row] = ROWS,
    bins: Bins | None = None,
    origin: int | None = None,
) -> History:
    """A rank's shards, or, of one origin, what several ranks hold."""
    history = History(rows, bins or Log2Bins())
    history.rank, history.world = rank, world
    history.placements = [Placement(OWN if origin is None else origin)] * len(rows)
    for step in steps:
        source = rank if origin is None else 0
        tensors = [values(source, step, row) for row in range(len(rows))]
        append_rows(history, step, *arrays(gradstat.statistics(tensors, history.bins)))
        history.add_scalar("loss", step, 10.0 * rank + step)
    return history


def write(path: Path, history: History, size: int, first_step: int | None = None) -> None:
    """Write a rank's directory, so many records in a block."""
    like = history.snapshot()
    like.logged = Scalars()
    kept = Journal(path / f"rank-{history.rank}", like, first_step)
    losses = history.scalar("loss")[1] if len(history) else []
    for at, step in enumerate(history.steps.tolist()):
        append_rows(kept, step, *arrays(history.record(step)), time_s=float(step))
        log(kept, "loss", step, losses[at])
        if at % size == size - 1:
            kept.flush()
    kept.flush()


def write_ranks(
    path: Path,
    n: int,
    steps: Sequence[int] = range(5),
    size: int = 5,
    first_step: int | None = None,
    world: int | None = None,
    origin: int | None = None,
) -> None:
    """Write the directories of the first n ranks, which are all unless a world is given."""
    for rank in range(n):
        write(path, make_rank(rank, world or n, steps, origin=origin), size, first_step)


def file_of(path: Path, rank: int, number: int = 0) -> Path:
    return path / f"rank-{rank}" / f"{number:08}.gradstat"


def cut(file: Path, end: int) -> None:
    """Leave a file's bytes up to an end."""
    file.write_bytes(file.read_bytes()[:end])


@pytest.fixture
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merging, "_MOST_BYTES", 1)


@pytest.fixture(params=[1, 1 << 20])
def any_windows(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Records are put together one by one and kept in a file, or many at a time in memory."""
    monkeypatch.setattr(merging, "_MOST_BYTES", request.param)
    monkeypatch.setattr("gradstat.history.file._IN_MEMORY", request.param)


def assert_close(got: Statistics, right: Statistics) -> None:
    assert torch.equal(got.integers, right.integers)
    assert torch.equal(got.counts, right.counts)
    exact, rest = [0, 1, 6, 7], [2, 3, 4, 5]
    assert got.floats[:, exact].numpy().tobytes() == right.floats[:, exact].numpy().tobytes()
    torch.testing.assert_close(
        got.floats[:, rest], right.floats[:, rest], rtol=1e-12, atol=0, equal_nan=True
    )


def assert_union(
    got: History,
    ranks: Sequence[int],
    bins: Bins | None = None,
    steps: Sequence[int] | None = None,
) -> None:
    """At these steps, or all, the history has what these ranks have, put together."""
    for step in got.steps.tolist() if steps is None else steps:
        tensors = [torch.cat([values(rank, step, row) for rank in ranks]) for row in range(2)]
        right = gradstat.statistics(tensors, bins or Log2Bins(), engine="reference")
        assert_close(got.record(step), right)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(16, -2.0, 2.0)], ids=repr)
def test_history_merge_puts_shards_together(bins: Bins) -> None:
    ranks = [make_rank(rank, bins=bins) for rank in range(3)]
    merged = History.merge(ranks)
    assert merged.steps.tolist() == list(range(5))
    assert merged.layers == ROWS
    assert_union(merged, range(3), bins)
    assert merged.placements == [Placement(SAME)] * 2
    assert merged.scalars == ["rank0/loss", "rank1/loss", "rank2/loss"]
    assert merged.scalar("rank2/loss")[1].tolist() == [20, 21, 22, 23, 24]
    assert merged.rank is None
    # What is merged already counts once.
    assert_same(History.merge([merged, merged]), merged)


@pytest.mark.parametrize("origin", [SAME, 0])
def test_history_merge_counts_copies_once(origin: int) -> None:
    ranks = [make_rank(rank, origin=origin) for rank in range(3)]
    assert_union(History.merge(ranks), [0])


def test_history_merge_counts_gradients_as_it_is_told() -> None:
    same = [make_rank(rank, origin=SAME) for rank in range(3)]
    assert_union(History.merge(same, replicated=False), [0, 0, 0])
    with pytest.raises(ValueError, match="not the same on ranks 0 and 1"):
        History.merge([make_rank(rank) for rank in range(2)], replicated=True)


def test_history_merge_refuses_copies_that_differ() -> None:
    ranks = [make_rank(rank, 5, origin=SAME) for rank in range(3)]
    other = make_rank(4, 5, origin=SAME, steps=range(4))
    append_rows(other, 4, *arrays(gradstat.statistics([values(0, 4, 0), values(1, 4, 1)])))
    message = (
        "History.merge() needs what is the same on several ranks to be equal there; the gradient "
        "of b.weight in step 4 is not the same on ranks 0 and 4: measure it when it is whole, as "
        "with when='step', or pass replicated=False if each rank has its own"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        History.merge([*ranks, other])


def make_on_mesh(rank: int, source: int, origin: int, part: int, kind: str = "grad") -> History:
    """A rank's part of two, of what is on the mesh that begins with a rank."""
    history = History([Row(kind, "a")], Log2Bins())
    history.rank = rank
    history.placements = [Placement(origin, (part, 2), (80,))]
    append_rows(history, 0, *arrays(gradstat.statistics([values(source, 0, 0)])))
    return history


def make_meshes(
    sources: Sequence[int], kind: str = "grad", part: int | None = None
) -> list[History]:
    """Ranks 0 and 1 are one mesh, 2 and 3 another one; each has another part, or all one."""
    ranks = []
    for rank, source in enumerate(sources):
        origin, own = (rank, rank % 2) if part is None else (rank // 2 * 2, part)
        ranks.append(make_on_mesh(rank, source, origin, own, kind))
    return ranks


@pytest.mark.parametrize(
    ("ranks", "replicated", "sources"),
    [
        (make_meshes([0, 1, 0, 1]), None, [0, 1]),
        (make_meshes([0, 1, 0, 1]), False, [0, 1, 0, 1]),
        # Outputs of two meshes are of two batches; what is partial is each rank's own.
        (make_meshes([0, 1, 4, 5], "activation"), None, [0, 1, 4, 5]),
        (make_meshes([0, 1, 4, 5], "activation", PARTIAL), None, [0, 1, 4, 5]),
        (make_meshes([0, 0, 4, 4], "activation", 0), None, [0, 4]),
        (make_meshes([0, 1, 4, 5], "grad", PARTIAL), False, [0, 1, 4, 5]),
    ],
)
def test_history_merge_knows_what_is_on_which_mesh(
    ranks: list[History], replicated: bool | None, sources: list[int]
) -> None:
    merged = History.merge(ranks, replicated=replicated)
    tensors = [torch.cat([values(source, 0, 0) for source in sources])]
    assert_close(merged.record(0), gradstat.statistics(tensors, engine="reference"))


def test_history_merge_has_the_layers_of_all_stages() -> None:
    kinds = [("grad", "activation"), ("grad", "activation")]
    rows = [[Row(kind, f"{stage}.{kind}") for kind in kinds[stage]] for stage in range(2)]
    stages = [make_rank(stage, 2, rows=rows[stage]) for stage in range(2)]
    for stage in stages:
        stage.depth = np.array([0, 0])
        stage.modules = {stage.rows[1].name: "ReLU"}
    merged = History.merge(stages)
    assert merged.layers == [
        "0.grad",
        "1.grad",
        "activation/0.activation",
        "activation/1.activation",
    ]
    assert merged.modules == {"0.activation": "ReLU", "1.activation": "ReLU"}
    assert merged.depth is not None
    assert merged.depth.tolist() == [0, 1, 0, 1]
    assert merged.order == ["1.grad", "0.grad"]
    for stage in range(2):
        for step in range(5):
            got, right = merged.record(step), stages[stage].record(step)
            assert torch.equal(got.counts[stage::2], right.counts)
            assert torch.equal(got.integers[stage::2], right.integers)
    assert History.merge([stages[1], stages[0]]).order == ["0.grad", "1.grad"]


def test_history_merge_takes_layers_that_some_ranks_lack_or_have_at_times() -> None:
    ranks = [make_rank(0, 2, steps=range(2)), History(ROWS[:1], Log2Bins())]
    ranks[1].rank = 1
    append_rows(ranks[1], 0, *absent(Log2Bins()))
    append_rows(ranks[1], 1, *arrays(gradstat.statistics([values(1, 1, 0)])))
    merged = History.merge(ranks)
    whole = torch.cat([values(0, 1, 0), values(1, 1, 0)])
    for step, first in ((0, values(0, 0, 0)), (1, whole)):
        right = gradstat.statistics([first, values(0, step, 1)], engine="reference")
        assert_close(merged.record(step), right)
    none = History(ROWS[:1], Log2Bins())
    append_rows(none, 0, *absent(Log2Bins()))
    assert np.isnan(History.merge([none, none])["l2"]).all()


@pytest.mark.usefixtures("small_windows")
def test_history_merge_has_the_steps_that_all_have_and_says_so(tmp_path: Path) -> None:
    steps = [range(9), [0, 1, 3, 4, 5, 8], range(7)]
    ranks = [make_rank(rank, steps=steps[rank]) for rank in range(3)]
    message = "^History.merge\\(\\) leaves out 4 steps that not all ranks have: 2, 6 to 8$"
    with pytest.warns(RuntimeWarning, match=message):
        merged = History.merge(ranks)
    assert merged.steps.tolist() == [0, 1, 3, 4, 5]
    assert_union(merged, range(3))
    for rank, size in zip(ranks, (2, 3, 4), strict=True):
        write(tmp_path, rank, size)
    with pytest.warns(RuntimeWarning, match=message):
        assert_same(History.load(tmp_path), merged)


def test_history_merge_of_ranks_without_a_step_in_common_has_none() -> None:
    ranks = [make_rank(0, steps=[0, 1]), make_rank(1, steps=[]), make_rank(2, steps=[1, 2])]
    with pytest.warns(RuntimeWarning, match="leaves out 3 steps that not all ranks have: 0 to 2"):
        merged = History.merge(ranks)
    assert len(merged) == 0
    assert merged.layers == ROWS
    assert merged.scalar("rank2/loss")[0].tolist() == [1, 2]


@pytest.mark.usefixtures("any_windows")
def test_history_load_takes_a_directory_of_ranks_as_one_run(tmp_path: Path) -> None:
    # Written at different times, so in different blocks.
    for rank, size in enumerate((1, 2, 5)):
        write(tmp_path, make_rank(rank), size)
    loaded = History.load(tmp_path)
    assert_same(loaded, History.merge([make_rank(rank) for rank in range(3)]))
    assert loaded.times.tolist() == list(range(5))
    assert loaded.scalar("rank1/loss")[1].tolist() == [10, 11, 12, 13, 14]
    folders = sorted(tmp_path.iterdir())
    assert_same(History.merge(folders), loaded)
    assert_same(History.merge([tmp_path]), loaded)
    history = History.load(folders[2])
    assert (history.rank, history.world) == (2, 3)
    history.save(tmp_path / "saved.npz")
    assert_same(History.merge([*folders[:2], tmp_path / "saved.npz"]), loaded)


def test_history_of_ranks_in_a_temporary_file_is_read_copied_and_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_ranks(tmp_path, 3)
    expected = History.load(tmp_path)
    monkeypatch.setattr("gradstat.history.file._IN_MEMORY", 0)
    got = History.load(tmp_path)
    shutil.rmtree(tmp_path)
    assert {type(each) for each in got.records} == {StoredRecord}
    copied = pickle.loads(pickle.dumps(got))
    got.append(5, got.packed(got.find(4)).data)
    assert_same(got.between(end=5), expected)
    assert_same(copied, expected)


@pytest.mark.usefixtures("small_windows")
def test_history_load_takes_ranks_that_were_resumed(tmp_path: Path) -> None:
    for rank in range(2):
        before = make_rank(rank, 2, steps=range(4), origin=5)
        write(tmp_path, before, 1 + rank)
    file = file_of(tmp_path, 1)
    cut(file, -3)
    for rank in range(2):
        write(tmp_path, make_rank(rank, 2, steps=range(1, 5)), 1 + rank, first_step=1)
    with pytest.warns(RuntimeWarning, match=f"leaves out the end of {file}"):
        loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == list(range(5))
    assert_union(loaded, range(2), steps=range(1, 5))
    assert loaded.scalar("rank0/loss")[0].tolist() == list(range(5))


@pytest.mark.usefixtures("any_windows")
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4)])
def test_history_load_takes_a_run_that_was_resumed_with_other_ranks(
    tmp_path: Path, before: int, after: int
) -> None:
    write_ranks(tmp_path, before, size=2)
    write_ranks(tmp_path, after, range(3, 7), size=3, first_step=3)
    loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == list(range(7))
    assert_union(loaded, range(before), steps=range(3))
    assert_union(loaded, range(after), steps=range(3, 7))


def make_sharded(rank: int, parts: int, steps: Sequence[int]) -> History:
    """Of four ranks one of a mesh that cuts into so many parts, and else has replicas."""
    history = make_rank(rank % parts, 4, steps)
    history.rank = rank
    history.placements = [Placement(rank % parts, (rank % parts, parts), (80,))] * len(ROWS)
    return history


@pytest.mark.usefixtures("any_windows")
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_history_load_takes_a_run_that_was_resumed_on_another_mesh(
    tmp_path: Path, before: int, after: int
) -> None:
    for rank in range(4):
        write(tmp_path, make_sharded(rank, before, range(5)), 2 + rank)
        write(tmp_path, make_sharded(rank, after, range(3, 7)), 2, first_step=3)
    loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == list(range(7))
    assert_union(loaded, range(before), steps=range(3))
    assert_union(loaded, range(after), steps=range(3, 7))


@pytest.mark.parametrize("origins", [(SAME, None), (None, SAME)])
def test_history_load_takes_a_run_that_was_resumed_with_gradients_of_another_moment(
    tmp_path: Path, origins: tuple[int | None, int | None]
) -> None:
    write_ranks(tmp_path, 2, size=2, origin=origins[0])
    write_ranks(tmp_path, 2, range(3, 7), size=2, first_step=3, origin=origins[1])
    loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == list(range(7))
    for origin, steps in zip(origins, (range(3), range(3, 7)), strict=True):
        assert_union(loaded, [0, 1] if origin is None else [0], steps=steps)


@pytest.mark.usefixtures("any_windows")
@pytest.mark.parametrize("lacking", [0, 1])
@pytest.mark.parametrize("n_times", [1, 2])
def test_history_load_does_not_mix_attempts(tmp_path: Path, lacking: int, n_times: int) -> None:
    write_ranks(tmp_path, 2, range(6), size=2)
    for _ in range(n_times):
        write_ranks(tmp_path, 2, range(3, 5), size=2, first_step=3)
    whole = History.load(tmp_path)
    assert whole.steps.tolist() == list(range(5))
    # Not copied yet.
    file_of(tmp_path, lacking, n_times).unlink()
    last = 6 if n_times == 1 else 5
    message = (
        f"History.merge() leaves out {last - 3} steps that were superseded when the run was "
        f"resumed, of which some ranks lack the new records: 3 to {last - 1}"
    )
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
        loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == [0, 1, 2]
    assert_union(loaded, range(2))
    assert loaded.scalar(f"rank{lacking}/loss")[0].tolist() == [0, 1, 2]
    assert loaded.scalar(f"rank{1 - lacking}/loss")[0].tolist() == [0, 1, 2, 3, 4]


def test_history_load_does_not_mix_attempts_where_the_newest_is_torn(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2, range(6), size=2)
    write_ranks(tmp_path, 2, range(3, 5), size=2, first_step=3)
    file = file_of(tmp_path, 1, 1)
    cut(file, 30)
    with (
        pytest.warns(RuntimeWarning, match=f"leaves out the end of {file}"),
        pytest.warns(RuntimeWarning, match="that were superseded when the run was resumed"),
    ):
        assert History.load(tmp_path).steps.tolist() == [0, 1, 2]
    write_ranks(tmp_path, 2, range(4, 8), size=2, first_step=4)
    with (
        pytest.warns(RuntimeWarning, match=f"leaves out the end of {file}"),
        pytest.warns(RuntimeWarning, match="1 steps that were superseded .*: 3$"),
    ):
        assert History.load(tmp_path).steps.tolist() == [0, 1, 2, 4, 5, 6, 7]


def test_history_load_does_not_mix_attempts_of_ranks_that_have_one_each(tmp_path: Path) -> None:
    write(tmp_path, make_rank(0, 2, steps=range(6)), 10)
    write(tmp_path, make_rank(1, 2, steps=range(3, 5)), 10, first_step=3)
    with (
        pytest.warns(RuntimeWarning, match="3 steps that not all ranks have: 0 to 2$"),
        pytest.warns(RuntimeWarning, match="some ranks lack the new records: 3 to 5$"),
    ):
        assert History.load(tmp_path).steps.tolist() == []


def test_history_load_drops_scalars_that_were_superseded_by_fewer_ranks(tmp_path: Path) -> None:
    write_ranks(tmp_path, 4, range(6), size=2)
    write_ranks(tmp_path, 2, range(3, 5), size=2, first_step=3)
    loaded = History.load(tmp_path)
    for rank in range(4):
        steps = loaded.scalar(f"rank{rank}/loss")[0].tolist()
        assert steps == ([0, 1, 2, 3, 4] if rank < 2 else [0, 1, 2])
    write_ranks(tmp_path, 4, range(4, 7), size=2, first_step=4)
    loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == list(range(7))
    for rank in range(4):
        steps = loaded.scalar(f"rank{rank}/loss")[0].tolist()
        assert steps == ([0, 1, 2, 3, 4, 5, 6] if rank < 2 else [0, 1, 2, 4, 5, 6])


@pytest.mark.usefixtures("small_windows")
def test_history_load_takes_a_run_that_was_resumed_after_a_rank_had_died(tmp_path: Path) -> None:
    for rank in range(4):
        write(tmp_path, make_rank(rank, 4, steps=range(1 if rank == 3 else 5)), rank + 1)
    for rank in range(2):
        write(tmp_path, make_rank(rank, 2, steps=range(3, 7)), 4 - rank, first_step=3)
    with pytest.warns(RuntimeWarning, match="leaves out 2 steps that not all ranks have: 1 to 2$"):
        loaded = History.load(tmp_path)
    assert loaded.steps.tolist() == [0, 3, 4, 5, 6]
    late = History.merge([make_rank(rank, 2, steps=range(3, 7)) for rank in range(2)])
    for step in range(3, 7):
        assert_close(loaded.record(step), late.record(step))


def test_history_load_says_which_ranks_are_lacking(tmp_path: Path) -> None:
    write_ranks(tmp_path, 4, world=5)
    shutil.rmtree(tmp_path / "rank-1")
    cut(file_of(tmp_path, 3), 10)
    message = f"History.load() lacks 3 of 5 ranks in {tmp_path}: 1, 3 to 4"
    with pytest.warns(RuntimeWarning, match=f"^{re.escape(message)}$"):
        loaded = History.load(tmp_path)
    assert_union(loaded, [0, 2])


def test_history_merge_says_which_ranks_are_lacking(tmp_path: Path) -> None:
    message = "^History.merge\\(\\) lacks 2 of 4 ranks: 0, 2$"
    ranks = [make_rank(rank, 4) for rank in (1, 3)]
    with pytest.warns(RuntimeWarning, match=message):
        merged = History.merge(ranks)
    assert_union(merged, [1, 3])
    for rank in ranks:
        write(tmp_path, rank, 5)
    with pytest.warns(RuntimeWarning, match=message):
        assert_same(History.merge(sorted(tmp_path.iterdir())), merged)


def test_history_load_says_which_ranks_are_lacking_of_a_run_that_has_grown(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2)
    write_ranks(tmp_path, 2, range(3, 5), first_step=3, world=3)
    with pytest.warns(RuntimeWarning, match="lacks 1 of 3 ranks in .*: 2$"):
        History.load(tmp_path)


def test_history_merge_passes_over_a_rank_that_was_torn_in_its_first_block(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2)
    folders = sorted(tmp_path.iterdir())
    cut(file_of(tmp_path, 1), 20)
    with pytest.warns(RuntimeWarning, match="^History.load\\(\\) lacks 1 of 2 ranks in .*: 1$"):
        loaded = History.load(tmp_path)
    with pytest.warns(RuntimeWarning, match="^History.merge\\(\\) lacks 1 of 2 ranks: 1$"):
        assert_same(History.merge(folders), loaded)
    with pytest.raises(ValueError, match="ends within its first block"):
        History.merge(folders[1:])


def test_history_load_refuses_two_directories_of_a_rank(tmp_path: Path) -> None:
    write_ranks(tmp_path, 2)
    shutil.copytree(tmp_path / "rank-1", tmp_path / "rank-01")
    message = (
        f"History.load() needs one directory for each rank; {tmp_path / 'rank-01'} and "
        f"{tmp_path / 'rank-1'} are both of rank 1"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        History.load(tmp_path)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        History.merge([tmp_path])


def test_history_load_refuses_a_rank_in_the_directory_of_another(tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path, make_rank(rank), 5)
    shutil.rmtree(tmp_path / "rank-2")
    shutil.copytree(tmp_path / "rank-1", tmp_path / "rank-2")
    message = f"needs the files of a rank in its directory; {tmp_path}/rank-2 has those of rank 1"
    with pytest.raises(ValueError, match=message):
        History.load(tmp_path)


def test_history_merge_refuses_what_comes_twice(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_ranks(run, 2)
    one, whole = tmp_path / "one.npz", tmp_path / "whole.npz"
    History.load(run / "rank-1").save(one)
    History.load(run).save(whole)
    rank_1 = run / "rank-1"
    again = run.parent / "run" / ".." / "run" / "rank-1"
    for parts, message in (
        ([rank_1, again], f"each path once; {rank_1} is there twice"),
        ([run, rank_1], f"each path once; {rank_1} is there twice"),
        ([whole, whole], f"each path once; {whole} is there twice"),
        ([run, one], f"each rank once; {one} is another one of rank 1"),
        (
            [whole, rank_1],
            f"parts of which each is of a rank, or none; {whole} is of none, and {rank_1} of "
            f"rank 1",
        ),
        (
            [rank_1, whole],
            f"parts of which each is of a rank, or none; {whole} is of none, and {rank_1} of "
            f"rank 1",
        ),
    ):
        with pytest.raises(ValueError, match=f"^{re.escape(f'History.merge() needs {message}')}$"):
            History.merge(parts)


def test_history_load_takes_one_rank_as_it_is(tmp_path: Path) -> None:
    write(tmp_path, make_rank(0, 1), 5)
    loaded = History.load(tmp_path)
    assert_same(loaded, make_rank(0, 1))
    assert loaded.scalars == ["loss"]
    assert loaded.placements == [Placement(OWN)] * 2


def test_history_load_refuses_records_of_a_process_beside_those_of_ranks(tmp_path: Path) -> None:
    write(tmp_path, make_rank(0), 5)
    Journal(tmp_path, make_rank(0))
    message = f"needs the files of one run; {tmp_path} has those of one process and of 1 ranks"
    with pytest.raises(ValueError, match=re.escape(message)):
        History.load(tmp_path)


def test_watch_refuses_a_directory_of_ranks_without_a_process_group(tmp_path: Path) -> None:
    write(tmp_path, make_rank(0), 5)
    message = f"a directory of its own; path is {tmp_path}, which has records of ranks"
    with pytest.raises(ValueError, match=re.escape(message)):
        gradstat.watch(torch.nn.Linear(3, 2), path=tmp_path)


@pytest.mark.parametrize(
    ("parts", "error", "message"),
    [
        ([], ValueError, "one rank or more; parts is empty"),
        ("run", TypeError, "a list of ranks; parts is str"),
        (make_rank(0), TypeError, "a list of ranks; parts is History"),
        (3, TypeError, "a list of ranks; parts is int"),
        ([make_rank(0), 3], TypeError, "histories or paths; parts[1] is int"),
        (
            [make_rank(2), make_rank(2)],
            ValueError,
            "each rank once; number 1 of the parts is another one of rank 2",
        ),
        (
            [make_rank(0), make_rank(1, bins=LinearBins(4, 0.0, 1.0))],
            ValueError,
            "the same bins on each rank; bins on rank 1 is LinearBins(4, 0.0, 1.0), on rank 0 "
            "Log2Bins()",
        ),
        (
            [make_rank(0, bins=LinearBins(4)), make_rank(1, bins=LinearBins(4))],
            ValueError,
            "Log2Bins, or LinearBins with a range; the range of LinearBins(4) of a.weight in step "
            "0 is not the same on all",
        ),
    ],
)
def test_history_merge_refuses(parts: Any, error: type[Exception], message: str) -> None:
    message = f"History.merge() needs {message}"
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        History.merge(parts)


def test_history_merge_refuses_what_is_no_answer() -> None:
    message = "History.merge() needs True, False or None; replicated is 'no'"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        History.merge([make_rank(0)], replicated="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values",
    [
        [[-1e307] * 100, [1e307] * 100],
        [[1e307] * 100, [1.5e308] * 3],
        [[0.1] * 3, [0.1] * 7, [0.1]],
        [[-1e300] * 3, [-1e300] * 5],
        [[1e-310] * 3, [1e-310, 3e-310]],
        [[float("nan")], [], [float("inf"), 2.0]],
    ],
    ids=["opposite", "huge", "equal", "equal huge", "tiny", "not finite"],
)
def test_history_merge_has_the_arithmetic_of_statistics_merge(values: list[list[float]]) -> None:
    tensors = [torch.tensor(x, dtype=torch.float64) for x in values]
    parts = [gradstat.statistics([x], engine="reference") for x in tensors]
    ranks = []
    for part in parts:
        ranks.append(History(["a"], Log2Bins()))
        append_rows(ranks[-1], 0, *arrays(part))
    got = History.merge(ranks).record(0)
    right = parts[0]
    for part in parts[1:]:
        right = right.merge(part)
    assert torch.equal(got.integers, right.integers)
    torch.testing.assert_close(got.floats, right.floats, rtol=1e-12, atol=0, equal_nan=True)
    if got.min == got.max and got.finite > 1:
        assert got.std == 0


def test_commands_take_a_directory_of_ranks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    for rank in range(2):
        write(run, make_rank(rank, 2, steps=range(25)), 10 + rank)
    whole = tmp_path / "whole.npz"
    assert main(["merge", str(run), "-o", str(whole)]) == 0
    assert capsys.readouterr().out.startswith(f"{whole}: 25 records of 2 layers, steps 0 to 24")
    assert_same(History.load(whole), History.load(run))
    assert main(["merge", *map(str, sorted(run.iterdir())), "-o", str(tmp_path / "again.npz")]) == 0
    assert_same(History.load(tmp_path / "again.npz"), History.load(run))
    for arguments in (
        ["info", run],
        ["export", run, "--to", "csv", tmp_path],
        ["compare", run, whole],
        ["tail", run, "--updates", "1"],
    ):
        assert main([str(each) for each in arguments]) == 0
    shown = capsys.readouterr().out
    assert "rank1/loss" in shown
    assert f"{run}: step 24" in shown
    assert main(["merge", str(run), "-o", str(file_of(run, 1))]) == 2
    assert "is the run itself, or a file of it" in capsys.readouterr().err


def test_merge_counts_what_each_rank_has_if_it_is_told(tmp_path: Path) -> None:
    write_ranks(tmp_path / "run", 2, origin=SAME)
    whole = tmp_path / "whole.npz"
    for options, ranks in (([], [0]), (["--not-replicated"], [0, 0])):
        assert main(["merge", str(tmp_path / "run"), "-o", str(whole), *options]) == 0
        assert_union(History.load(whole), ranks)


def test_merge_says_what_it_leaves_out_in_one_line(tmp_path: Path) -> None:
    for rank in range(2):
        write(tmp_path / "run", make_rank(rank, 2, steps=range(5 - rank)), 5)
    command = "-m", "gradstat", "merge", "run", "-o", "whole.npz"
    done = run_python(*command, cwd=tmp_path, check=True)
    assert done.stderr == (
        "gradstat: warning: History.merge() leaves out 1 steps that not all ranks have: 4\n"
    )


def test_merge_refuses_ranks_without_a_step_in_common(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rank in range(2):
        write(tmp_path, make_rank(rank, 2, steps=[rank]), 5)
    paths = [str(tmp_path / f"rank-{rank}") for rank in range(2)]
    with pytest.warns(RuntimeWarning, match="leaves out 2 steps"):
        assert main(["merge", *paths, "-o", str(tmp_path / "whole.npz")]) == 2
    assert "merge needs ranks with a step in common; they have none" in capsys.readouterr().err
    assert not (tmp_path / "whole.npz").exists()


def test_tail_shows_ranks_that_have_written_at_different_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, make_rank(0, 2, steps=range(3)), 1)
    write(tmp_path, make_rank(1, 2, steps=range(2)), 1)
    assert main(["tail", str(tmp_path), "--updates", "1"]) == 0
    assert f"{tmp_path}: step 1" in capsys.readouterr().out


def begin(path: Path, rank: int, world: int, run: str | None = None) -> Path:
    """A rank's directory of a run that begins, with three records."""
    history = make_rank(rank, world, steps=range(3))
    kept = Journal(path / f"rank-{rank}", history, run=run)
    for record in history.records:
        kept.add(record)
    kept.flush()
    return path / f"rank-{rank}"


def test_history_refuses_a_rank_of_another_world(tmp_path: Path) -> None:
    ranks = [begin(tmp_path, rank, 8 if rank == 2 else 4) for rank in range(4)]
    message = (
        f"History.merge() needs the ranks of one run; {ranks[0]} is of a run of 4 ranks, {ranks[2]}"
        f" of one of 8"
    )
    for read in (lambda: History.load(tmp_path), lambda: History.merge(ranks)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            read()
    with pytest.raises(ValueError, match=re.escape("is of a run of 4 ranks, number 1 of the par")):
        History.merge([make_rank(0, 4), make_rank(1, 8)])


def test_history_refuses_a_rank_of_another_run(tmp_path: Path) -> None:
    ranks = [begin(tmp_path, rank, 3, "other" if rank == 1 else "mine") for rank in range(3)]
    message = f"History.merge() needs the ranks of one run; {ranks[0]} and {ranks[1]} are of two"
    for read in (lambda: History.load(tmp_path), lambda: History.merge(ranks)):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            read()


@pytest.mark.parametrize("n_bytes", [0, 5, 39, 40, 41, 200, -1])
def test_history_load_goes_without_a_rank_whose_first_block_is_torn(
    n_bytes: int, tmp_path: Path
) -> None:
    ranks = [begin(tmp_path, rank, 3, "run") for rank in range(3)]
    file = ranks[1] / "00000000.gradstat"
    reader = Reader(file)
    next(reader.blocks())
    cut(file, n_bytes % reader._at)
    for read in (lambda: History.load(tmp_path), lambda: History.merge(ranks)):
        with pytest.warns(RuntimeWarning, match="lacks 1 of 3 ranks.*: 1$"):
            merged = read()
        assert_union(merged, [0, 2])
        assert len(merged) == 3
