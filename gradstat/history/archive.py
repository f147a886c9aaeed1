"""Records on disk: a ``.npz`` file, or a directory of numbered ones, each whole or not there."""

from __future__ import annotations

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gradstat.bins import Bins, parse_bins
from gradstat.files import replacing
from gradstat.history.packed_counts import SparseRows
from gradstat.kinds import GRAD, KINDS, Row
from gradstat.results import FLOATS, INTEGERS

FORMAT = "gradstat history 1"
_SAVED = ["format", "bins", "layers", "steps", "integers", "floats", "sizes", "indices", "values"]

# In place of a rank as a layer's origin: values of this rank alone, or the same ones on each rank.
OWN, SAME = -1, -2

Array = NDArray[Any]


@dataclass(frozen=True)
class Records:
    """What a history holds: S steps, L layers.

    Args:
        rows: L of them.
        layers: their L names, as printed; those of one kind that was selected go without it.
        bins: scheme.
        steps: S numbers.
        integers: int64 ``(S, L, 8)``.
        floats: float64 ``(S, L, 8)``.
        counts: S times L histograms.
        origins: int64 ``(L,)``: the first rank of a distributed run that holds the same values of
            a layer, `OWN` or `SAME`.
    """

    rows: list[Row]
    layers: list[str]
    bins: Bins
    steps: list[int]
    integers: Array
    floats: Array
    counts: SparseRows
    origins: Array


def segment_name(number: int) -> str:
    """Name of a file in a directory of them."""
    return f"{number:08}.npz"


def write(path: Path, records: Records, *, compress: bool = True, new: bool = False) -> None:
    """Write a file, which appears whole or not at all.

    Args:
        path: the file; one that is there is replaced.
        records: what it is to hold.
        compress: it; takes ten times as long.
        new: rather fail than replace a file.

    Raises:
        FileExistsError: there is one, for ``new``.
        OSError: it cannot be written.
    """
    sizes, indices, values = records.counts.arrays()
    save = np.savez_compressed if compress else np.savez
    with replacing(path) as unfinished:
        with unfinished.open("wb") as file:
            save(
                file,
                format=np.array(FORMAT),
                bins=np.array(records.bins.spec),
                layers=np.array(records.layers, dtype=np.str_),
                steps=np.array(records.steps, dtype=np.int64),
                integers=records.integers,
                floats=records.floats,
                sizes=sizes,
                indices=indices,
                values=values,
                origins=records.origins,
                kinds=np.array([row.kind for row in records.rows], dtype=np.str_),
            )
        if new:
            _claim(path, unfinished)


def read(path: Path) -> Records:
    """Read a file, or all files of a directory.

    Args:
        path: of what `write` wrote.

    Returns:
        All its records.

    Raises:
        FileNotFoundError: there is no such file; another OSError: it cannot be opened.
        ValueError: a damaged file or one that `write` did not write, a directory without files or
            without one of them.
    """
    return _join(path, _read_segments(path)) if path.is_dir() else _read_file(path)


def segments(path: Path) -> list[Path]:
    """Files of a directory, in their order."""
    return sorted(file for file in path.glob("*.npz") if file.stem.isdigit())


def _claim(path: Path, file: Path) -> None:
    """Make a name one of a file that is there, or fail if it is taken; some file systems cannot."""
    try:
        path.hardlink_to(file)
    except FileExistsError:
        raise
    except OSError:
        return


def _read_file(path: Path) -> Records:
    with path.open("rb") as file:
        try:
            if not zipfile.is_zipfile(file):
                # NumPy would advise to load it as a pickle.
                raise ValueError("it is no .npz file")
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                return _check({name: arrays[name] for name in arrays.files})
        except Exception as error:  # zipfile, zlib and NumPy meet damage with a dozen kinds
            raise ValueError(
                f"History.load() needs a file that History.save() wrote; {path} is damaged or "
                f"another kind: {error}"
            ) from error


def _read_segments(path: Path) -> Iterable[Records]:
    files = segments(path)
    if not files:
        raise ValueError(
            f"History.load() needs a directory that watch() wrote; {path} has no records"
        )
    for number, file in enumerate(files):
        if file.name != segment_name(number):
            raise ValueError(
                f"History.load() needs all files that watch() wrote; {path} lacks "
                f"{segment_name(number)}"
            )
        yield _read_file(file)


def _join(path: Path, parts: Iterable[Records]) -> Records:
    records = list(parts)
    first = records[0]
    steps = [step for part in records for step in part.steps]
    run = (first.rows, first.layers, first.bins)
    fit = all((part.rows, part.layers, part.bins) == run for part in records)
    if not fit or any(a >= b for a, b in pairwise(steps)):
        raise ValueError(f"History.load() needs the files of one run; {path} has those of several")
    arrays = zip(*(part.counts.arrays() for part in records), strict=True)
    return Records(
        first.rows,
        first.layers,
        first.bins,
        steps,
        np.concatenate([part.integers for part in records]),
        np.concatenate([part.floats for part in records]),
        SparseRows(*(np.concatenate(each) for each in arrays)),
        records[-1].origins,
    )


def _check(data: dict[str, Array]) -> Records:
    if missing := [name for name in _SAVED if name not in data]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if str(data["format"]) != FORMAT:
        raise ValueError(f"its format is {data['format']}, not {FORMAT}")
    layers, bins = [str(name) for name in data["layers"].flat], parse_bins(str(data["bins"]))
    data.setdefault("origins", np.full(len(layers), OWN))
    kinds = [str(kind) for kind in data.get("kinds", np.full(len(layers), GRAD)).flat]
    # A "safe" cast refuses what could lose anything, such as floats for integers.
    steps, integers, sizes, indices, values, origins = (
        data[name].astype(np.int64, casting="safe")
        for name in ("steps", "integers", "sizes", "indices", "values", "origins")
    )
    floats = data["floats"].astype(np.float64, casting="safe")
    shape = (len(steps), len(layers))
    fit = (
        data["layers"].ndim == steps.ndim == 1
        and len(set(layers)) == shape[1]
        and integers.shape == (*shape, len(INTEGERS))
        and floats.shape == (*shape, len(FLOATS))
        and _rise(steps, np.zeros(1, dtype=np.int64))
        and sizes.shape == (shape[0] * shape[1],)
        and bool((sizes >= 0).all())
        and indices.shape == values.shape == (sizes.sum(),)
        and bool((indices < bins.bins).all())
        and _rise(indices, np.cumsum(sizes) - sizes)
        and bool((values > 0).all())
        and origins.shape == (shape[1],)
        and len(kinds) == shape[1]
        and set(kinds) <= set(KINDS)
    )
    if not fit:
        raise ValueError("its arrays do not fit each other")
    counts = SparseRows(sizes, data["indices"], data["values"])
    rows = [Row.printed(kind, layer) for kind, layer in zip(kinds, layers, strict=True)]
    return Records(rows, layers, bins, steps.tolist(), integers, floats, counts, origins)


def _rise(x: Array, starts: Array) -> bool:
    """Whether integers are non-negative and, between one start and the next, increase."""
    steps = np.diff(x, prepend=0)
    steps[starts[starts < len(x)]] = 1
    return bool((x >= 0).all() and (steps > 0).all())
