"""The page: what `thin` leaves of a history, packed into one file of HTML."""

from __future__ import annotations

import base64
import html
import json
import math
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from gradstat.arrays import Array
from gradstat.bins import Log2Bins
from gradstat.diagnosis import diagnose
from gradstat.diagnosis.run import Run
from gradstat.escaping import escaped
from gradstat.files import replacing
from gradstat.history import History
from gradstat.history.arguments import check_history
from gradstat.kinds import ACTIVATION, NOUNS, PARAM, UNIT, UPDATE
from gradstat.report import thin
from gradstat.version import __version__

_SCRIPTS = ("data.js", "canvas.js", "series.js", "map.js", "layers.js", "detail.js", "main.js")
_NUMBERS = ("numel", "mean", "std", "rms", "l2", "min", "max", "zeros", "nan", "posinf", "neginf")
_WIDTHS = ("<u1", "<u2", "<u4")


def write(history: History, path: str | os.PathLike[str], *, title: str = "Gradients") -> None:
    """Write a page that shows a run: findings, a map of magnitudes, every layer's distribution.

    One file of HTML that loads nothing else. Of several kinds of rows it shows one at a time, the
    first one first. Long runs are thinned, and the page says how: a column of its map is the
    statistics of all elements of some records in a row, together; distributions are those of single
    records, evenly spread, the newest among them.

    Args:
        history: with one record at least.
        path: the file, which appears whole or not at all; one that is there is replaced.
        title: heading of the page.

    Raises:
        TypeError: something other than a History or a text.
        ValueError: a history without records.
        OSError: the file cannot be written.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Linear(3, 2)
        >>> with gradstat.watch(model) as w:
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> w.history.report("report.html")  # doctest: +SKIP
    """
    history = check_history("report", history)
    if not isinstance(title, str):
        raise TypeError(f"report() needs a text; title is {title!r}")
    text = _render(history, title)
    with replacing(Path(path)) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def _render(history: History, title: str) -> str:
    files = resources.files("gradstat.report")

    def read(name: str) -> str:
        return (files / name).read_text(encoding="utf-8")

    meta, data = _contents(history)
    parts = {
        "title": html.escape(escaped(title)),
        "style": read("report.css"),
        "script": "".join(read(name) for name in _SCRIPTS),
        # In a script element only "<" can end the text early.
        "meta": json.dumps(meta, allow_nan=False).replace("<", "\\u003c"),
        "data": data,
    }
    # In one pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], read("template.html"))


def _contents(history: History) -> tuple[dict[str, Any], str]:
    """Everything the page's script reads: JSON, and arrays in base64."""
    columns, samples = thin.columns(history), thin.samples(history)
    series = thin.series(history, columns)
    log2 = isinstance(history.bins, Log2Bins)
    arrays = {
        "level": columns.level,
        "least": columns.least,
        "most": columns.most,
        "zeros": columns.zeros,
        "nonfinite": columns.nonfinite,
        "counts": samples.counts,
        "sampleFinite": samples.finite,
        "sampleZeros": samples.zeros,
        "sampleNonfinite": samples.nonfinite,
    }
    for name in ("mean", "least", "most", "nonfinite"):
        stacked = [getattr(each, name) for each in series.values()]
        arrays[f"series{name.title()}"] = np.concatenate([np.empty(0, np.float32), *stacked])
    if samples.edges is not None:
        arrays["sampleEdges"] = samples.edges
    layout, data = _pack(arrays)
    kinds = list(dict.fromkeys(history.kinds))
    meta = {
        "version": __version__,
        "bins": repr(history.bins),
        "log2": log2,
        "layers": [escaped(row.name) for row in history.rows],
        "nouns": [NOUNS[kind] for kind in kinds],
        "kinds": [kinds.index(kind) for kind in history.kinds],
        # The layer nearest to the input first, among those of its kind.
        "order": [int(at) for at in Run(history, 1, None).columns],
        "series": list(series),
        "records": len(history),
        "findings": [
            {
                "kind": finding.kind,
                "severity": finding.severity,
                "layer": history.layers.index(finding.layer),
                "steps": finding.steps,
                "at": int(finding.numbers.get("first_step", finding.steps[0])),
                "sentence": escaped(finding.sentence),
            }
            for finding in diagnose(history)
        ],
        "steps": columns.steps.tolist(),
        "sizes": columns.records.tolist(),
        "sampleSteps": samples.steps.tolist(),
        "first": samples.first.tolist(),
        "rows": samples.rows.tolist(),
        "newest": _newest(history),
        "arrays": layout,
    }
    return meta, data


def _newest(history: History) -> dict[str, Any]:
    """Numbers of each row in the newest record, by name; of updates and activations one more."""
    kinds = np.array(history.kinds)
    newest = {name: history[name][-1].astype(object) for name in _NUMBERS}
    # Of no finite value there is no norm to speak of.
    newest["l2"][history["finite"][-1] == 0] = math.nan
    found: dict[str, Any] = {
        name: [_json(x) for x in values.tolist()] for name, values in newest.items()
    }
    if {UPDATE, PARAM} <= set(history.kinds):
        found["ratio"] = _by_row(kinds == UPDATE, history.update_ratio()[-1])
    if {ACTIVATION, UNIT} <= set(history.kinds):
        found["dead"] = _by_row(kinds == ACTIVATION, history.dead_units()[-1])
    return found


def _by_row(mask: Array, values: Array) -> dict[int, float | None]:
    rows = np.flatnonzero(mask).tolist()
    return {row: _json(x) for row, x in zip(rows, values.tolist(), strict=True)}


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


def _json(x: float) -> float | None:
    return x if math.isfinite(x) else None
