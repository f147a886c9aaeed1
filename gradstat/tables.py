"""A `History` as a table: a row for each step, kind and layer, for pandas, Parquet and CSV.

Every field of `Statistics` is a column, and the bins that are not empty are three lists. Scalars
come after all records: a row for each value, of kind ``"scalar"``, with its name as the layer and
the statistics of one element. Narrow formats that were measured have the columns of
`QUANTIZATION_FIELDS` before the lists, such as ``nvfp4_snr``. A layer without a gradient has a row
of zero counts, NaN (null in Parquet) and empty lists. In CSV, lists are JSON, and NaN and
infinities are empty cells (null within a list).
"""

from __future__ import annotations

import csv
import importlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradstat.history import FIELDS, History
from gradstat.results import QUANTIZATION_COUNTS, QUANTIZATION_FIELDS
from gradstat.util import Array, as_path, encodable, json_text, replacing

if TYPE_CHECKING:
    import pandas

LISTS = ("bin_low", "bin_high", "bin_count")
TEXTS = ("kind", "layer")
COLUMNS = ("step", *TEXTS, *FIELDS, *LISTS)  # where no formats were measured
_COUNTS = tuple(f"_{name}" for name in QUANTIZATION_FIELDS if name in QUANTIZATION_COUNTS)

Progress = Callable[[int], object]  # called with a number of records when they are done


class TableRows(NamedTuple):
    """R rows of the table."""

    columns: dict[str, Array]  # the plain ones by name, each (R,); the texts are objects
    sizes: Array  # of each row's lists, int64 (R,)
    lists: dict[str, Array]  # entries of all rows' lists, one row after the other, by name


def to_pandas(history: History) -> pandas.DataFrame:
    """As `History.to_pandas`."""
    pandas = _import("to_pandas", "pandas")
    parts = list(rows(history))
    data: dict[str, Any] = {
        name: np.concatenate([np.empty(0, _dtype(name)), *(part.columns[name] for part in parts)])
        for name in _plain(history)
    }
    data |= {name: [cell for part in parts for cell in _cells(part, name)] for name in LISTS}
    return pandas.DataFrame(data)


def to_parquet(
    history: History, path: str | os.PathLike[str], *, progress: Progress | None = None
) -> None:
    """As `History.to_parquet`."""
    pa, parquet = _import("to_parquet", "pyarrow"), _import("to_parquet", "pyarrow.parquet")
    plain = {
        name: pa.string() if name in TEXTS else pa.from_numpy_dtype(_dtype(name))
        for name in _plain(history)
    }
    lists = {"bin_low": pa.float64(), "bin_high": pa.float64(), "bin_count": pa.int64()}
    types = plain | {name: pa.list_(each) for name, each in lists.items()}
    schema = pa.schema(list(types.items()), metadata={"gradstat_bins": history.bins.spec})
    path = as_path("to_parquet", path)
    with replacing(path) as unfinished, parquet.ParquetWriter(unfinished, schema) as writer:
        for part in rows(history, progress):
            offsets = np.concatenate([[0], np.cumsum(part.sizes)]).astype(np.int32)
            arrays = [
                pa.array(part.columns[name], type_, from_pandas=True)
                for name, type_ in plain.items()
            ]
            arrays += [pa.ListArray.from_arrays(offsets, part.lists[name]) for name in LISTS]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))


def to_csv(
    history: History, path: str | os.PathLike[str], *, progress: Progress | None = None
) -> None:
    """As `History.to_csv`."""
    path = as_path("to_csv", path)
    with (
        replacing(path) as unfinished,
        unfinished.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.writer(file)
        names = _plain(history)
        writer.writerow([*names, *LISTS])
        for part in rows(history, progress):
            plain = [_texts(part.columns[name]) for name in names]
            lists = [[json_text(cell.tolist()) for cell in _cells(part, name)] for name in LISTS]
            writer.writerows(zip(*plain, *lists, strict=True))


def rows(history: History, progress: Progress | None = None) -> Iterator[TableRows]:
    """Rows of the table, some records at a time."""
    history = history.snapshot()
    n_layers, steps, start = len(history.layers), history.steps, 0
    fields = {name: history[name] for name in FIELDS} | {
        f"{form}_{name}": values
        for form in history.formats
        for name, values in history.quantization(form).items()
    }
    layers = np.array([encodable(row.name) for row in history.rows], dtype=object)
    kinds = np.array(history.kinds, dtype=object)
    for records in history.unpacked():
        n = len(records.integers)
        batch, start = slice(start, start + n), start + n
        columns = {
            "step": np.repeat(steps[batch], n_layers),
            "kind": np.tile(kinds, n),
            "layer": np.tile(layers, n),
        } | {name: values[batch].ravel() for name, values in fields.items()}
        low, high = records.edges(history.bins).T
        lists = dict(zip(LISTS, (low, high, records.counts.astype(np.int64)), strict=True))
        yield TableRows(columns, np.diff(records.ends, prepend=0), lists)
        if progress is not None:
            progress(n)
    for name in history.scalars:
        yield _scalar_rows(name, *history.scalar(name), _plain(history))


def _plain(history: History) -> list[str]:
    of_formats = [f"{form}_{name}" for form in history.formats for name in QUANTIZATION_FIELDS]
    return [*COLUMNS[: -len(LISTS)], *of_formats]


def _scalar_rows(name: str, steps: Array, values: Array, names: Sequence[str]) -> TableRows:
    n = len(steps)
    finite = np.isfinite(values)
    known = np.where(finite, values, math.nan)
    given: dict[str, Any] = {
        "step": steps,
        "kind": "scalar",
        "layer": encodable(name),
        "numel": 1,
        "finite": finite,
        "zeros": values == 0,
        "nan": np.isnan(values),
        "posinf": values == math.inf,
        "neginf": values == -math.inf,
    }
    given |= dict.fromkeys(("min", "max", "sum", "mean"), known)
    given |= dict.fromkeys(("l1", "l2", "rms", "abs_max"), abs(known))
    # There is no histogram, nothing outside one, and no format.
    columns = {}
    for field in names:
        dtype = _dtype(field)
        value = given.get(field, 0 if dtype.kind == "i" else math.nan)
        columns[field] = np.broadcast_to(value, n).astype(dtype)
    empty = {"bin_low": np.empty(0), "bin_high": np.empty(0), "bin_count": np.empty(0, np.int64)}
    return TableRows(columns, np.zeros(n, np.int64), empty)


def _cells(part: TableRows, name: str) -> list[Array]:
    return np.split(part.lists[name], np.cumsum(part.sizes))[:-1]


def _texts(column: Array) -> list[Any]:
    """Cells of a CSV file; empty for NaN and infinities, which each reader spells differently."""
    values: list[Any] = column.tolist()
    if column.dtype.kind == "f":
        values = [repr(value) if math.isfinite(value) else "" for value in values]
    return values


def _dtype(name: str) -> np.dtype[Any]:
    if name in TEXTS:
        return np.dtype(object)
    integer = name == "step" or name in FIELDS[:8] or name.endswith(_COUNTS)
    return np.dtype(np.int64 if integer else np.float64)


def _import(function: str, name: str) -> Any:  # noqa: ANN401 (a module without types)
    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f'{function}() needs {package}: pip install "gradstat[tables]"'
        ) from error
