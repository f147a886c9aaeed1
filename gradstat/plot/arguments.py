"""Arguments of the figures, checked before anything is drawn."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

from gradstat.bins import Log2Bins
from gradstat.history import FIELDS, History
from gradstat.history.history import first_rows
from gradstat.plot.labels import literal
from gradstat.record import NOUNS, UNIT, UPDATE, Row
from gradstat.util import one_of

Histories: TypeAlias = History | Mapping[str, History] | Sequence[History]
Layers: TypeAlias = Sequence[str] | Mapping[str, str]
Limits: TypeAlias = tuple[float, float]

# Fields that follow from rows of several kinds, and the kind of row that each is drawn for.
DERIVED = {"update_ratio": UPDATE, "dead_units": UNIT}
MAX_PANELS = 100  # 25 rows of four: six feet of figure


def check_histories(function: str, history: Histories) -> dict[str, History]:
    """Return the histories by name, as they are now; a single one has the name ""."""
    if isinstance(history, History):
        named: dict[str, History] = {"": history}
    elif isinstance(history, Mapping):
        named = {str(name): each for name, each in history.items()}
    elif isinstance(history, Sequence) and not isinstance(history, str):
        named = {f"run {i + 1}": each for i, each in enumerate(history)}
    else:
        raise TypeError(
            f"{function}() needs a History, or several in a mapping or sequence; history is "
            f"{type(history).__name__}"
        )
    if not named:
        raise ValueError(f"{function}() needs at least one History; history is empty")
    for name, each in named.items():
        where = f"history[{name!r}]" if name else "history"
        if not isinstance(each, History):
            raise TypeError(f"{function}() needs Histories; {where} is {type(each).__name__}")
        if len(each) == 0 or not each.layers:
            raise ValueError(f"{function}() needs a History with records; {where} is {each!r}")
    return {name: each.snapshot() for name, each in named.items()}


def check_panels(function: str, histories: int, layers: int) -> None:
    """Refuse more panels than anyone can look at, before the first is drawn."""
    if histories * layers > MAX_PANELS:
        raise ValueError(
            f"{function}() needs layers for at most {MAX_PANELS} panels: choose some, as in "
            f"layers=history.layers[:8]; layers are {layers}, of {histories} "
            f"histor{'y' if histories == 1 else 'ies'}"
        )


def check_layers(
    function: str, named: dict[str, History], layers: Layers | None, field: str | None = None
) -> dict[str, str]:
    """Return the title of each layer to draw, in order; by default of each history's first kind.

    For a field that follows from several kinds, parameters or modules may name the layers.
    """
    if field in DERIVED:
        return _check_derived(function, named, layers, field)
    if layers is None:
        layers = [layer for each in named.values() for layer in first_rows(each)]
    names = isinstance(layers, (Mapping, Sequence)) and not isinstance(layers, str)
    if not names or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"{function}() needs a sequence of layer names; layers is {layers!r}")
    if isinstance(layers, Mapping):
        titles = dict(layers)
    else:
        titles = {layer: literal(layer) for layer in layers}
    if not titles:
        raise ValueError(f"{function}() needs at least one layer; layers is empty")
    known = list(dict.fromkeys(layer for each in named.values() for layer in each.layers))
    for layer in titles:
        if layer not in known:
            raise ValueError(
                f"{function}() needs layers, each {one_of(layer, known)}; layers has {layer!r}"
            )
    return titles


def _check_derived(
    function: str, named: dict[str, History], layers: Layers | None, field: str
) -> dict[str, str]:
    kind = DERIVED[field]
    rows = {row: None for each in named.values() for row in each.rows if row.kind == kind}
    if not rows:
        what = "'update'" if kind == UPDATE else "'activation'"
        kinds = dict.fromkeys(kind for each in named.values() for kind in each.kinds)
        raise ValueError(
            f"{function}() needs a history of watch(what={what}) for {field!r}; history has "
            f"{', '.join(kinds)}"
        )
    if layers is None:
        return {str(row): literal(row.name) for row in rows}
    titles = check_layers(function, named, _as_rows(layers, kind, {row.name for row in rows}))
    if isinstance(layers, Mapping):
        return dict(zip(titles, layers.values(), strict=True))
    return {layer: literal(Row.printed(kind, layer).name) for layer in titles}


def _as_rows(layers: Layers, kind: str, names: Collection[str]) -> Layers:
    """Layers, with the rows of a kind in place of the names of parameters or modules."""
    if isinstance(layers, str) or not isinstance(layers, (Mapping, Sequence)):
        return layers  # refused by the caller
    return [str(Row(kind, each)) if each in names else each for each in layers]


def noun(named: dict[str, History], layers: Collection[str]) -> str:
    """What the values of some layers are called; "value" if they are of several kinds."""
    kinds = {
        kind
        for each in named.values()
        for layer, kind in zip(each.layers, each.kinds, strict=True)
        if layer in layers
    }
    return NOUNS[kinds.pop()] if len(kinds) == 1 else "value"


def check_field(function: str, field: str, *also: str) -> None:
    """Refuse what no History holds."""
    names = (*also, "mean_abs", *DERIVED, *FIELDS)
    if field not in names:
        logged = "what w.log() has logged, as by w.log(loss=loss), or " * (function == "curves")
        raise ValueError(
            f"{function}() needs {logged}one of {', '.join(names)}; field is {field!r}"
        )


def check_limits(function: str, limits: Limits | None) -> Limits | None:
    """Refuse limits that are not two increasing finite numbers."""
    if limits is None:
        return None
    pair = isinstance(limits, (tuple, list)) and len(limits) == 2
    if not pair or not all(isinstance(end, (int, float)) for end in limits):
        raise TypeError(f"{function}() needs limits of two numbers; limits is {limits!r}")
    low, high = float(limits[0]), float(limits[1])
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"{function}() needs finite limits, low < high; limits is {limits!r}")
    return low, high


def check_bins(function: str, named: dict[str, History]) -> bool:
    """Return whether the histories are over `Log2Bins`; refuse both kinds in one figure."""
    kinds = {isinstance(each.bins, Log2Bins) for each in named.values()}
    if len(kinds) > 1:
        raise ValueError(
            f"{function}() needs histories over one kind of bins; history has Log2Bins and "
            "LinearBins"
        )
    return kinds.pop()
