"""What other programs make of the tables that gradstat writes."""

import json
from pathlib import Path

import numpy as np
import pytest
from histories import make_history

from gradstat import History, LinearBins, Log2Bins
from gradstat.bins import Bins
from gradstat.history import FIELDS
from gradstat.results import INTEGERS
from gradstat.tables import COLUMNS

pytestmark = pytest.mark.integrations

SCHEMES = [Log2Bins(), LinearBins(5)]


@pytest.fixture(params=SCHEMES, ids=repr)
def history(request: pytest.FixtureRequest) -> History:
    """Gradients and updates of two layers, the second's gradient absent in step 1."""
    bins: Bins = request.param
    return make_history(bins, 2, 3, absent=[(1, 1)], kinds=("grad", "update"))


def expected_counts(history: History) -> list[list[int]]:
    cells = [
        history.histogram(layer, step)[0]
        for step in range(len(history))
        for layer in history.layers
    ]
    return [counts[counts > 0].tolist() for counts in cells]


def test_to_pandas_holds_every_number_with_its_type(history: History) -> None:
    pytest.importorskip("pandas")
    table = history.to_pandas()
    assert list(table.columns) == list(COLUMNS)
    assert table["step"].tolist() == np.repeat(range(3), 4).tolist()
    assert table["kind"].tolist() == ["grad", "grad", "update", "update"] * 3
    assert table["layer"].tolist() == ["0.weight", "1.weight"] * 6
    for field in FIELDS:
        assert table[field].dtype == (np.int64 if field in INTEGERS else np.float64)
        np.testing.assert_array_equal(table[field].to_numpy(), history[field].ravel())
    assert [cell.tolist() for cell in table["bin_count"]] == expected_counts(history)
    assert [len(cell) for cell in table["bin_low"]] == [len(cell) for cell in table["bin_count"]]
    counts, edges = history.histogram(history.layers[3], 2)
    assert table["bin_low"].iloc[-1].tolist() == edges[:-1][counts > 0].tolist()
    assert table["bin_high"].iloc[-1].tolist() == edges[1:][counts > 0].tolist()


def test_to_pandas_of_no_records_has_the_same_columns(history: History) -> None:
    pytest.importorskip("pandas")
    table, full = History(history.layers, history.bins).to_pandas(), history.to_pandas()
    assert len(table) == 0
    assert list(table.columns) == list(full.columns)
    assert (table[list(FIELDS)].dtypes == full[list(FIELDS)].dtypes).all()


def test_to_pandas_keeps_the_order_over_several_batches() -> None:
    pytest.importorskip("pandas")
    history = make_history(LinearBins(3), 2, 150)
    table = history.to_pandas()
    assert table["step"].tolist() == np.repeat(range(150), 2).tolist()
    np.testing.assert_array_equal(table["std"].to_numpy(), history["std"].ravel())
    assert [cell.tolist() for cell in table["bin_count"]] == expected_counts(history)


def test_pandas_opens_the_parquet_file(history: History, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    history.to_parquet(tmp_path / "run.parquet")
    opened = pandas.read_parquet(tmp_path / "run.parquet")
    pandas.testing.assert_frame_equal(opened, history.to_pandas())


def test_parquet_file_names_the_bins(history: History, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    history.to_parquet(tmp_path / "run.parquet")
    metadata = parquet.read_schema(tmp_path / "run.parquet").metadata
    assert metadata[b"gradstat_bins"].decode() == history.bins.spec


def test_pandas_opens_the_csv_file(history: History, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    history.to_csv(tmp_path / "run.csv")
    # Numbers as text: pandas may read another last digit.
    opened = pandas.read_csv(tmp_path / "run.csv", dtype=str)
    for field in FIELDS:
        values = history[field].ravel()
        expected = np.where(np.isinf(values), np.nan, values)
        np.testing.assert_array_equal(opened[field].astype(float), expected)
    assert [json.loads(cell) for cell in opened["bin_count"]] == expected_counts(history)


def test_polars_opens_both_files(history: History, tmp_path: Path) -> None:
    polars = pytest.importorskip("polars")
    pytest.importorskip("pyarrow")
    history.to_parquet(tmp_path / "run.parquet")
    history.to_csv(tmp_path / "run.csv")
    opened = polars.read_parquet(tmp_path / "run.parquet")
    assert opened["bin_count"].to_list() == expected_counts(history)
    assert opened["bin_low"].dtype == polars.List(polars.Float64)
    updates = opened.filter(polars.col("kind") == "update")
    assert updates["layer"].to_list() == ["0.weight", "1.weight"] * 3
    np.testing.assert_array_equal(updates["rms"].to_numpy(), history["rms"][:, 2:].ravel())
    text = polars.read_csv(tmp_path / "run.csv")
    assert text["kind"].to_list() == opened["kind"].to_list()
    for field in ("numel", "rms", "min"):
        np.testing.assert_array_equal(opened[field].to_numpy(), history[field].ravel())
        assert text[field].dtype == opened[field].dtype
        np.testing.assert_array_equal(text[field].to_numpy(), history[field].ravel())


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_duckdb_queries_both_files(history: History, tmp_path: Path, suffix: str) -> None:
    duckdb = pytest.importorskip("duckdb")
    pytest.importorskip("pyarrow")
    path = tmp_path / f"run.{suffix}"
    getattr(history, f"to_{suffix}")(path)
    found = duckdb.sql(
        f"SELECT kind, layer, sum(numel), max(abs_max), typeof(any_value(rms)) FROM '{path}' "
        "GROUP BY kind, layer ORDER BY kind, layer"
    ).fetchall()
    largest = np.nanmax(history["abs_max"], axis=0)
    assert found == [
        (row.kind, row.name, numel, abs_max, "DOUBLE")
        for row, numel, abs_max in zip(
            history.rows,
            history["numel"].sum(0).tolist(),
            largest.tolist(),
            strict=True,
        )
    ]
    cast = "bin_count" if suffix == "parquet" else "bin_count::BIGINT[]"
    totals = duckdb.sql(
        f"SELECT list_sum({cast}) FROM '{path}' ORDER BY step, kind, layer"
    ).fetchall()
    assert [total or 0 for (total,) in totals] == [sum(cell) for cell in expected_counts(history)]
