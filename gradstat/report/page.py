"""The page: what `thin` leaves of a history, as arrays in base64 and JSON, in one file of HTML."""

from __future__ import annotations

import base64
import html
import math
import os
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from gradstat.bins import Log2Bins
from gradstat.diagnosis import Finding, diagnose
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.findings import began
from gradstat.history import History, check_history
from gradstat.record import ACTIVATION, NOUNS, OF_PARAMETERS, PARAM, UNIT, UPDATE
from gradstat.report import thin
from gradstat.util import Array, __version__, as_path, escaped, json_text, replacing

_NUMBERS = ("numel", "mean", "std", "rms", "l2", "min", "max", "zeros", "nan", "posinf", "neginf")
# The scripts are modules. A page holds those that its own one imports, as a single module, since a
# file of HTML can import no others.
_IMPORT = re.compile(r'^import \{ [\w, ]+ \} from "\./(\w+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def write(history: History, path: str | os.PathLike[str], *, title: str = "Gradients") -> None:
    history, path = check_history("report", history), as_path("report", path)
    if not isinstance(title, str):
        raise TypeError(f"report() needs a text; title is {title!r}")
    columns = thin.columns(history)
    found = findings(diagnose(history), history.layers)
    told = contents(
        columns,
        thin.series(history, columns),
        thin.samples(history, [finding["at"] for finding in found]),
        newest(history),
    )
    data = told.pop("data")
    told |= {
        "head": head(history),
        "records": len(history),
        "capacity": len(columns.records),
        "from": 0,
        "kept": told["samples"],
        "findings": found,
    }
    text = render(title, told, data)
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


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
            "at": int(began(finding)),
            "sentence": escaped(finding.sentence),
        }
        for finding in found
    ]


def newest(history: History) -> dict[str, Array]:
    """Numbers of each row in the newest record: ``(L,)`` each, NaN where one is not finite."""
    kinds, history = np.array(history.kinds), history.newest(1)
    found = {name: history[name][-1].astype(np.float64) for name in _NUMBERS}
    # Without a finite value there is no norm.
    found["l2"][history["finite"][-1] == 0] = math.nan
    if {UPDATE, PARAM} <= set(history.kinds):
        found["ratio"] = np.full(len(kinds), math.nan)
        found["ratio"][kinds == UPDATE] = history.update_ratio()[-1]
    if {ACTIVATION, UNIT} <= set(history.kinds):
        found["dead"] = np.full(len(kinds), math.nan)
        found["dead"][kinds == ACTIVATION] = history.dead_units()[-1]
    return {name: np.where(np.isfinite(x), x, np.nan) for name, x in found.items()}


def contents(
    columns: thin.Columns,
    series: Mapping[str, thin.Series],
    samples: Sequence[thin.Sample],
    newest: Mapping[str, Array],
) -> dict[str, Any]:
    """Columns, series and samples that a page is to add to its own, and the newest numbers."""
    arrays: dict[str, Array] = columns._asdict()
    steps, sizes = arrays.pop("steps").tolist(), arrays.pop("records").tolist()
    for name in thin.Series._fields:
        stacked = [getattr(each, name) for each in series.values()]
        arrays[f"series{name.capitalize()}"] = np.concatenate([np.empty(0, np.float32), *stacked])
    for name in thin.Sample._fields[1:]:
        parts = [getattr(each, name).ravel() for each in samples]
        arrays[f"sample{name.capitalize()}"] = np.concatenate([np.empty(0, np.int64), *parts])
    arrays |= {f"newest{name.capitalize()}": x for name, x in newest.items()}
    layout, data = _pack(arrays)
    return {
        "steps": steps,
        "sizes": sizes,
        "series": list(series),
        "samples": [each.step for each in samples],
        "arrays": layout,
        "data": data,
    }


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
    """The same numbers as a page reads them: counts in as few bytes as hold them."""
    dtype = array.dtype
    if dtype.kind != "f":
        largest = int(array.max(initial=0))
        dtype = np.min_scalar_type(largest) if largest < 1 << 32 else np.dtype(np.float64)
    return array.astype(dtype.newbyteorder("<"))


def render(title: str, told: Mapping[str, Any], data: str = "") -> str:
    """The page of what `contents` gives, or of ``live``, the address where a server has that."""
    # In a script element only "<" can end the text early.
    meta = json_text(told).replace("<", "\\u003c")
    is_live = "live" in told
    connect = "connect-src 'self'; " if is_live else ""
    script = _bundle("live.js" if is_live else "main.js")
    return _filled("template.html", title, connect=connect, script=script, meta=meta, data=data)


def render_list(title: str) -> str:
    style = _read("list.css")
    return _filled("list.html", title, script=_bundle("list.js"), list_style=style)


def _filled(template: str, title: str, **parts: str) -> str:
    parts |= {"title": html.escape(escaped(title)), "style": _read("report.css")}
    # In one pass, so that what is put in is not searched again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _read(template))


@cache
def _bundle(name: str) -> str:
    """A module and those that it imports, each once and after those that it imports itself."""
    modules: dict[str, str] = {}

    def add(name: str) -> None:
        text = _read(name)
        for imported in _IMPORT.findall(text):
            if imported not in modules:
                add(imported)
        modules[name] = _EXPORT.sub("", _IMPORT.sub("", text))

    add(name)
    return "\n".join(modules.values())


@cache
def _read(name: str) -> str:
    return (resources.files("gradstat.report") / name).read_text(encoding="utf-8")
