"""What the page's script reads: arrays in base64, and JSON, which says where each array is."""

from __future__ import annotations

import base64
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradstat.bins import Log2Bins
from gradstat.diagnosis import Finding
from gradstat.diagnosis.evidence import Evidence
from gradstat.history import History
from gradstat.record import ACTIVATION, NOUNS, OF_PARAMETERS, PARAM, UNIT, UPDATE
from gradstat.report.series import Series
from gradstat.report.thin import Columns, Sample
from gradstat.util import Array, escaped
from gradstat.version import __version__

_NUMBERS = ("numel", "mean", "std", "rms", "l2", "min", "max", "zeros", "nan", "posinf", "neginf")
_WIDTHS = ("<u1", "<u2", "<u4")
_COLUMNS = ("level", "least", "most", "zeros", "nonfinite", "snr", "lost")
_SAMPLE = ("first", "rows", "counts", "finite", "zeros", "nonfinite")
_SERIES = ("mean", "least", "most", "nonfinite")


def head(history: History) -> dict[str, Any]:
    """What holds for all records of a run."""
    kinds = list(dict.fromkeys(history.kinds))
    return {
        "version": __version__,
        "bins": repr(history.bins),
        "log2": isinstance(history.bins, Log2Bins),
        "formats": history.formats,
        "layers": [escaped(row.name) for row in history.rows],
        "nouns": [NOUNS[kind] for kind in kinds],
        # Whose values they are.
        "owners": ["parameter" if kind in OF_PARAMETERS else "module" for kind in kinds],
        "kinds": [kinds.index(kind) for kind in history.kinds],
        # The layer nearest to the input first, among those of its kind.
        "order": [int(at) for at in Evidence(history, 1).columns],
    }


def findings(found: Sequence[Finding], layers: Sequence[str]) -> list[dict[str, Any]]:
    """Findings, each with the number of its layer and the step to look at."""
    return [
        {
            "kind": finding.kind,
            "severity": finding.severity,
            "layer": layers.index(finding.layer),
            "steps": finding.steps,
            "at": int(finding.numbers.get("first_step", finding.steps[0])),
            "sentence": escaped(finding.sentence),
        }
        for finding in found
    ]


def newest(history: History) -> dict[str, Array]:
    """Numbers of each row in the newest record: ``(L,)`` each, NaN where one is not finite."""
    kinds = np.array(history.kinds)
    found = {name: history[name][-1].astype(np.float64) for name in _NUMBERS}
    # Without a finite value there is no norm.
    found["l2"][history["finite"][-1] == 0] = math.nan
    if {UPDATE, PARAM} <= set(history.kinds):
        found["ratio"] = _of(kinds == UPDATE, history.update_ratio()[-1])
    if {ACTIVATION, UNIT} <= set(history.kinds):
        found["dead"] = _of(kinds == ACTIVATION, history.dead_units()[-1])
    return {name: np.where(np.isfinite(x), x, np.nan) for name, x in found.items()}


def _of(mask: Array, values: Array) -> Array:
    found = np.full(mask.shape, math.nan)
    found[mask] = values
    return found


def contents(
    columns: Columns,
    series: Mapping[str, Series],
    samples: Sequence[Sample],
    newest: Mapping[str, Array],
    *,
    log2: bool,
) -> dict[str, Any]:
    """Columns, series and samples that a page is to add to its own, and the newest numbers."""
    arrays = {name: getattr(columns, name) for name in _COLUMNS}
    for name in _SERIES:
        stacked = [getattr(each, name) for each in series.values()]
        arrays[_named("series", name)] = np.concatenate([np.empty(0, np.float32), *stacked])
    for name in _SAMPLE:
        parts = [getattr(each, name) for each in samples]
        arrays[_named("sample", name)] = np.concatenate([np.empty(0, np.int64), *parts])
    if not log2:
        arrays["sampleEdges"] = np.concatenate([np.empty((0, 2)), *(x.edges for x in samples)])
    arrays |= {_named("newest", name): x for name, x in newest.items()}
    layout, data = _pack(arrays)
    return {
        "steps": columns.steps.tolist(),
        "sizes": columns.records.tolist(),
        "series": list(series),
        "samples": [each.step for each in samples],
        "arrays": layout,
        "data": data,
    }


def _named(of: str, name: str) -> str:
    return of + name[0].upper() + name[1:]


def _pack(arrays: Mapping[str, Array]) -> tuple[dict[str, tuple[str, int, int]], str]:
    """Arrays one after the other in base64, and the type, offset in bytes and length of each."""
    layout, parts, offset = {}, [], 0
    for name, array in arrays.items():
        little = _narrow(array).ravel()
        layout[name] = (little.dtype.str[1:], offset, little.size)
        padding = -little.nbytes % 8
        parts.append(little.tobytes() + bytes(padding))
        offset += little.nbytes + padding
    return layout, base64.b64encode(b"".join(parts)).decode("ascii")


def _narrow(array: Array) -> Array:
    """The same numbers in fewer bytes: counts in as few as hold them."""
    if array.dtype.kind == "f":
        return array.astype(array.dtype.newbyteorder("<"))
    largest = int(array.max(initial=0))
    for width in _WIDTHS:
        if largest <= np.iinfo(width).max:
            return array.astype(width)
    return array.astype("<f8")
