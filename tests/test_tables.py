import csv
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import make_history

from gradstat import History, LinearBins, Log2Bins
from gradstat.bins import Bins
from gradstat.history import FIELDS
from gradstat.record import Unpacked
from gradstat.results import INTEGERS
from gradstat.tables import COLUMNS, LISTS, rows

SCHEMES = [Log2Bins(), LinearBins(5)]


def make(bins: Bins, steps: int = 3) -> History:
    """Two layers, the second absent in step 1."""
    return make_history(bins, 2, steps, absent=[(1, 1)])


def spell(value: float) -> str:
    return repr(value) if math.isfinite(value) else ""


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_to_csv_has_a_row_for_each_step_and_layer_with_every_field(
    bins: Bins, tmp_path: Path
) -> None:
    history = make(bins)
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert list(table[0]) == list(COLUMNS)
    assert COLUMNS[:3] + COLUMNS[-3:] == ("step", "kind", "layer", *LISTS)
    order = [(step, layer) for step in (0, 1, 2) for layer in (0, 1)]
    assert len(table) == len(order)
    for row, (step, layer) in zip(table, order, strict=True):
        names = (row["step"], row["kind"], row["layer"])
        assert names == (str(step), "grad", history.layers[layer])
        for field in FIELDS:
            value = history[field][step, layer].item()
            assert row[field] == (str(value) if field in INTEGERS else spell(value)), field
        counts, edges = history.histogram(history.layers[layer], step)
        filled = np.flatnonzero(counts)
        assert json.loads(row["bin_count"]) == counts[filled].tolist()
        assert json.loads(row["bin_low"]) == edges[filled].tolist()
        assert json.loads(row["bin_high"]) == edges[filled + 1].tolist()
    assert json.loads(table[3]["bin_count"]) == []
    assert table[3]["mean"] == ""
    assert json.loads(table[0]["bin_count"]) != []


def test_to_csv_names_a_row_by_step_kind_and_layer(tmp_path: Path) -> None:
    history = make_history(Log2Bins(), ["a", "update/b"], 2, kinds=("grad", "update", "unit"))
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    names = [(row["step"], row["kind"], row["layer"]) for row in table]
    assert names == [
        (str(step), kind, layer)
        for step in range(2)
        for kind in ("grad", "update", "unit")
        for layer in ("a", "update/b")
    ]
    assert [row["rms"] for row in table] == [repr(x) for x in history["rms"].ravel().tolist()]


def test_to_csv_lists_stay_json_where_a_bin_has_no_end(tmp_path: Path) -> None:
    history = make_history(Log2Bins(), 1, 1, lambda *_: torch.tensor([3.4e38, -3.4e38]))
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert json.loads(row["bin_low"])[0] is None
    assert json.loads(row["bin_high"])[1] is None
    assert "Infinity" not in row["bin_low"] + row["bin_high"]


def test_rows_come_in_batches_and_report_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history, done = make(Log2Bins(), 150), []
    monkeypatch.setattr("gradstat.history.records.WINDOW_BYTES", 30_000)
    sizes = [len(part.sizes) for part in rows(history, done.append)]
    assert len(done) > 2
    assert sizes == [2 * n for n in done]
    assert sum(done) == 150
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file)]
    assert steps == [str(step) for step in range(150) for _ in range(2)]


def test_a_table_has_escapes_of_what_is_no_letter_of_a_name(tmp_path: Path) -> None:
    history = make_history(Log2Bins(), ["a\udce9b"], 1)
    history.add_scalar("lo\udcffss", 0, 1.0)
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="", encoding="utf-8") as file:
        assert [row["layer"] for row in csv.DictReader(file)] == ["a\\udce9b", "lo\\udcffss"]


def test_a_table_of_no_records_has_its_columns(tmp_path: Path) -> None:
    History(["weight"], Log2Bins()).to_csv(tmp_path / "run.csv")
    assert (tmp_path / "run.csv").read_text() == ",".join(COLUMNS) + "\n"


def write_csv(history: History, path: Path) -> None:
    history.to_csv(path)


def write_parquet(history: History, path: Path) -> None:
    pytest.importorskip("pyarrow")
    history.to_parquet(path)


@pytest.mark.parametrize("write", [write_csv, write_parquet])
def test_a_table_appears_whole_or_not_at_all(
    write: Callable[[History, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "run"
    target.write_text("what was there")
    history, unpacked = make(Log2Bins(), 150), History.unpacked

    def fails_late(self: History) -> Iterator[Unpacked]:
        yield from unpacked(self.at(range(100)))
        raise RuntimeError("interrupted")

    monkeypatch.setattr(History, "unpacked", fails_late)
    with pytest.raises(RuntimeError, match="interrupted"):
        write(history, target)
    assert target.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [target]
    monkeypatch.undo()
    write(history, target)
    assert target.stat().st_size > 10_000
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize(
    ("package", "read"),
    [
        ("pandas", lambda h, path: h.to_pandas()),
        ("pyarrow", lambda h, path: h.to_parquet(path)),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str,
    read: Callable[[History, Path], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # None in sys.modules is how Python remembers that there is no such module.
    monkeypatch.setitem(sys.modules, package, None)
    function = "to_pandas" if package == "pandas" else "to_parquet"
    with pytest.raises(ImportError) as raised:
        read(make(Log2Bins()), tmp_path / "run")
    assert str(raised.value) == f'{function}() needs {package}: pip install "gradstat[tables]"'
    assert list(tmp_path.iterdir()) == []


def test_tables_have_a_row_for_each_scalar(tmp_path: Path) -> None:
    history = make_history(Log2Bins(), 2, 3)
    logged = [(0, 0.5), (1, -2.0), (1, math.nan), (5, math.inf), (7, 0.0)]
    for step, value in logged:
        history.add_scalar("loss", step, value)
    history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 6 + len(logged)
    rows = table[6:]
    assert {(row["kind"], row["layer"]) for row in rows} == {("scalar", "loss")}
    assert [int(row["step"]) for row in rows] == [step for step, _ in logged]
    assert [row["mean"] for row in rows] == ["0.5", "-2.0", "", "", "0.0"]
    assert [row["l2"] for row in rows] == ["0.5", "2.0", "", "", "0.0"]
    for field, expected in (
        ("numel", "11111"),
        ("finite", "11001"),
        ("zeros", "00001"),
        ("nan", "00100"),
        ("posinf", "00010"),
        ("neginf", "00000"),
        ("below", "00000"),
    ):
        assert "".join(row[field] for row in rows) == expected
    assert {row["bin_count"] for row in rows} == {"[]"}
