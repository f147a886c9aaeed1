"""The page: what `thin` leaves of a history, packed into one file of HTML."""

from __future__ import annotations

import html
import os
import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from gradstat.bins import Log2Bins
from gradstat.diagnosis import diagnose
from gradstat.history import History
from gradstat.history.history import check_history
from gradstat.report import package, series, thin
from gradstat.util import escaped, json_text, replacing

# The scripts are modules. A page holds those that its own one imports, as a single module, since a
# file of HTML can import no others.
_IMPORT = re.compile(r'^import \{ [\w, ]+ \} from "\./(\w+\.js)";\n', re.MULTILINE)
_EXPORT = re.compile(r"^export ", re.MULTILINE)


def write(history: History, path: str | os.PathLike[str], *, title: str = "Gradients") -> None:
    """Write a page that shows a run: findings, a map of magnitudes, every layer's distribution.

    One file of HTML that loads nothing else. It shows one kind of rows at a time, beginning with
    the first. Long runs are thinned, and the page says how: a column of its map is the statistics
    of all elements of several neighbouring records; distributions are those of single records,
    evenly spread, the newest among them.

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
    columns = thin.columns(history)
    findings = package.findings(diagnose(history), history.layers)
    samples = thin.samples(history, [finding["at"] for finding in findings])
    contents = package.contents(
        columns,
        series.series(history, columns),
        samples,
        package.newest(history),
        log2=isinstance(history.bins, Log2Bins),
    )
    data = contents.pop("data")
    contents |= {
        "head": package.head(history),
        "records": len(history),
        "capacity": len(columns.records),
        "from": 0,
        "kept": contents["samples"],
        "findings": findings,
    }
    return render(title, contents, data)


def render(title: str, contents: Mapping[str, Any], data: str = "") -> str:
    """The page of what `package.contents` gives.

    Args:
        title: heading.
        contents: of the page; or ``live`` alone, the address where a server has them.
        data: the arrays of the contents, in base64.

    Returns:
        HTML.
    """
    # In a script element only "<" can end the text early.
    meta = json_text(contents).replace("<", "\\u003c")
    is_live = "live" in contents
    connect = "connect-src 'self'; " if is_live else ""
    script = _bundle("live.js" if is_live else "main.js")
    return _filled("template.html", title, connect=connect, script=script, meta=meta, data=data)


def render_list(title: str) -> str:
    """The page that lists runs, which asks a server for them."""
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
