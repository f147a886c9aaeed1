"""Files of the last version, as its code at commit ba79627 wrote them, still load."""

from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows
from torch import Tensor
from watching import arrays, assert_same

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.bins import Bins
from gradstat.record import Row

SAVED = Path(__file__).parent / "saved"
ROWS = [
    Row("grad", "0.weight"),
    Row("grad", "ünï.weight"),
    Row("param", "0.weight"),
    Row("activation", "0"),
]


def values(step: int, row: int) -> Tensor:
    x = torch.arange(-3.0, 5.0) * 10.0 ** (row - step)
    if step == 1:
        x[:3] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    return x


def expected(rows: list[Row], bins: Bins) -> History:
    """What was recorded: four records, and in one of them no first row."""
    history = History(rows, bins)
    for step in range(4):
        tensors = [values(step, row) for row in range(len(rows))]
        integers, floats, counts = arrays(gradstat.statistics(tensors, bins, engine="reference"))
        if step == 2:
            integers[0], floats[0], counts[0] = 0, np.nan, 0
        append_rows(history, 3 * step, integers, floats, counts)
    return history


@pytest.mark.parametrize("name", ["log2.npz", "journal"])
def test_history_load_takes_files_of_the_last_version(name: str) -> None:
    loaded = History.load(SAVED / name)
    assert loaded.rows == ROWS
    assert loaded.origins.tolist() == [-1, 3, -2, -1]
    assert np.isnan(loaded.times).all()
    assert loaded.times.shape == (4,)
    assert_same(loaded, expected(ROWS, Log2Bins()))


def test_history_load_takes_linear_bins_of_the_last_version() -> None:
    rows = [Row("grad", "a"), Row("grad", "b")]
    bins = LinearBins(6, nice=True)
    assert_same(History.load(SAVED / "linear.npz"), expected(rows, bins))


def test_history_load_takes_a_selected_kind_of_the_last_version() -> None:
    loaded = History.load(SAVED / "selected.npz")
    assert loaded.rows == [Row("param", "0.weight")]
    assert_same(loaded, expected(ROWS, Log2Bins()).select("param"))


def test_history_load_takes_a_history_without_records_of_the_last_version() -> None:
    loaded = History.load(SAVED / "empty.npz")
    assert loaded.layers == ["a"]
    assert len(loaded) == 0


def copy_journal(folder: Path) -> list[Path]:
    files = []
    for file in sorted((SAVED / "journal").iterdir()):
        (folder / file.name).write_bytes(file.read_bytes())
        files.append(folder / file.name)
    return files


def test_history_load_leaves_out_a_last_file_of_the_last_version_that_is_cut_off(
    tmp_path: Path,
) -> None:
    last = copy_journal(tmp_path)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match=f"^History.load\\(\\) leaves out the end of {last}, "):
        assert History.load(tmp_path).steps.tolist() == [0, 3]


def test_history_load_refuses_a_file_of_the_last_version_that_is_cut_off_in_the_middle(
    tmp_path: Path,
) -> None:
    middle = copy_journal(tmp_path)[1]
    middle.write_bytes(middle.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"{middle} is damaged"):
        History.load(tmp_path)
    middle.unlink()
    with pytest.raises(ValueError, match=f"{tmp_path} lacks number 1"):
        History.load(tmp_path)


def test_history_load_takes_ranges_that_followed_the_record_before(tmp_path: Path) -> None:
    with np.load(SAVED / "linear.npz") as file:
        data = {name: file[name] for name in file.files}
    # As the last version wrote it for LinearBins(6, track=True).
    data["bins"] = np.array("linear 6 None None False True")
    np.savez(tmp_path / "run.npz", **data)
    loaded = History.load(tmp_path / "run.npz")
    assert loaded.bins == LinearBins(6)
    assert np.array_equal(loaded["low"], History.load(SAVED / "linear.npz")["low"], equal_nan=True)


def test_history_load_takes_files_from_before_there_were_kinds(tmp_path: Path) -> None:
    with np.load(SAVED / "linear.npz") as file:
        data = {name: file[name] for name in file.files if name not in ("kinds", "origins")}
    np.savez(tmp_path / "run.npz", **data)
    loaded = History.load(tmp_path / "run.npz")
    assert loaded.kinds == ["grad", "grad"]
    assert_same(loaded, History.load(SAVED / "linear.npz"))
