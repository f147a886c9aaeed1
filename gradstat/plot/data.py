"""What the figures of `plot` draw: checked arguments, and arrays of times, means and histograms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import TypeAlias

import numpy as np

from gradstat.bins import OCTAVES, Log2Bins, octaves
from gradstat.history import FIELDS, History, check_history, first_rows
from gradstat.record import GRAD, NOUNS, UNIT, UPDATE, Row
from gradstat.util import Array, divide, escaped, evenly_spread, one_of

Histories: TypeAlias = History | Mapping[str, History] | Sequence[History]
Layers: TypeAlias = Sequence[str] | Mapping[str, str]
Limits: TypeAlias = tuple[float, float]

# Fields that follow from rows of several kinds, and the kind of row that each is drawn for.
DERIVED = {"update_ratio": UPDATE, "dead_units": UNIT}
MAX_PANELS = 100  # 25 rows of four: six feet of figure
MAX_COLUMNS = 200  # of an image against time
# Matplotlib widens limits before it draws, which must not overflow: on a linear axis and a log one.
_LARGEST, _LOG_LARGEST = 1e300, 1e250


def literal(name: str) -> str:
    """A name that Matplotlib writes as it is, and does not take dollar signs for mathematics."""
    return escaped(name).replace("$", r"\$")


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
    return {
        name: check_history(function, each, f"history[{name!r}]" if name else "history")
        for name, each in named.items()
    }


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
    """Return the title of each layer to draw, in order; by default of each history's first kind."""
    kind = DERIVED.get(field, GRAD) if field else GRAD
    of_kind = {r.name: str(r) for each in named.values() for r in each.rows if r.kind == kind}
    if field in DERIVED and not of_kind:
        what = "'update'" if kind == UPDATE else "'activation'"
        kinds = dict.fromkeys(kind for each in named.values() for kind in each.kinds)
        raise ValueError(
            f"{function}() needs a history of watch(what={what}) for {field!r}; history has "
            f"{', '.join(kinds)}"
        )
    if layers is None:
        layers = [layer for each in named.values() for layer in first_rows(each)]
        if field in DERIVED:
            layers = list(of_kind.values())
    names = isinstance(layers, (Mapping, Sequence)) and not isinstance(layers, str)
    if not names or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"{function}() needs a sequence of layer names; layers is {layers!r}")
    if isinstance(layers, Mapping):
        titles = dict(layers)
    else:
        titles = {layer: literal(Row.printed(kind, layer).name) for layer in layers}
    # For a field that follows from several kinds, parameters or modules may name the layers.
    titles = {of_kind.get(layer, layer): title for layer, title in titles.items()}
    if not titles:
        raise ValueError(f"{function}() needs at least one layer; layers is empty")
    known = list(dict.fromkeys(layer for each in named.values() for layer in each.layers))
    for layer in titles:
        if layer not in known:
            raise ValueError(
                f"{function}() needs layers, each {one_of(layer, known)}; layers has {layer!r}"
            )
    return titles


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
    names = (*also, "mean_abs", *DERIVED, *FIELDS)
    if field not in names:
        logged = "what w.log() has logged, as by w.log(loss=loss), or " * (function == "curves")
        raise ValueError(
            f"{function}() needs {logged}one of {', '.join(names)}; field is {field!r}"
        )


def check_limits(function: str, limits: Limits | None) -> Limits | None:
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


def drawable(x: Array, *, log: bool) -> Array:
    """The values, cut off at the largest and smallest that Matplotlib can draw."""
    x = np.asarray(x, np.float64)  # float32 does not hold the ends
    largest = _LOG_LARGEST if log else _LARGEST
    clipped: Array = np.where(np.isfinite(x), np.clip(x, -largest, largest), x)
    return np.where(clipped > 0, np.maximum(clipped, 1 / largest), clipped) if log else clipped


def times(steps: Array, steps_per_epoch: int | None) -> Array:
    done = steps if steps_per_epoch is None else (steps + 1) / steps_per_epoch
    return np.asarray(done, np.float64)


def select(steps: Array, steps_per_epoch: int | None, most: int) -> Array:
    """Indices of at most so many records, the last of each epoch, evenly spread, the newest too."""
    indices = np.arange(len(steps))
    if steps_per_epoch is not None:
        epoch = steps // steps_per_epoch
        indices = np.flatnonzero(np.append(epoch[1:] != epoch[:-1], True))
    return indices[evenly_spread(len(indices), most)]


def values(history: History, layer: str, field: str) -> Array:
    """A field of one layer, float64 ``(S,)``; NaN where it has no gradient or is unknown."""
    if layer not in history.layers:
        return np.full(len(history), math.nan)
    column = history.layers.index(layer)
    if field in DERIVED:
        derived: Array = getattr(history, field)()
        return derived[:, history.kinds[:column].count(DERIVED[field])]
    if field != "mean_abs":
        return history[field][:, column].astype(np.float64)
    total, finite = history["l1"][:, column], history["finite"][:, column].astype(np.float64)
    return divide(total, finite)


def block_mean(x: Array, size: int) -> Array:
    """Mean of the finite values, NaN of none, in each run of ``size`` along the first axis."""
    # The last one is shorter.
    starts = np.arange(0, len(x), size)
    finite = np.isfinite(x)
    total: Array = np.add.reduceat(np.where(finite, x, 0.0), starts, axis=0)
    count = np.add.reduceat(finite.astype(np.float64), starts, axis=0)
    return divide(total, count)


def block_last(x: Array, size: int) -> Array:
    last = np.minimum(np.arange(size - 1, len(x) + size - 1, size), len(x) - 1)
    return np.asarray(x[last])


def histograms(history: History, layer: str, kept: Array) -> tuple[Array, Array]:
    """Counts ``(K, B)`` and edges ``(K, B + 1)`` of some records; all zero for an unknown layer."""
    if layer not in history.layers:
        return np.zeros((len(kept), 1), np.int64), np.zeros((len(kept), 2))
    # One by one: edges take time to find, and a long run has many more records.
    found = [history.histogram(layer, step) for step in history.steps[kept].tolist()]
    counts = np.stack([each for each, _ in found])
    if isinstance(history.bins, Log2Bins):
        zeros = values(history, layer, "zeros")[kept].astype(np.int64)
        return octaves(counts, zeros), np.broadcast_to(OCTAVES, (len(kept), 257))
    return counts, np.stack([edges for _, edges in found])


def octave_shares(history: History, layer: str, size: int) -> Array:
    """Share of the finite elements in each octave, ``(S / size, 256)``; NaN where none are."""
    # So many records are taken together. An unknown layer has no elements.
    if layer not in history.layers:
        return np.full((-(-len(history) // size), 256), math.nan)
    starts = np.arange(0, len(history), size)
    finite, zeros = (history[name][:, history.layers.index(layer)] for name in ("finite", "zeros"))
    counts = np.add.reduceat(octaves(history.histograms(layer)[0], zeros), starts, axis=0)
    return divide(counts, np.add.reduceat(finite, starts)[:, None])


def extent(drawn: Sequence[tuple[Array, Array]], *, symmetric: bool) -> Limits:
    """Smallest interval that holds every bin with a count; -1 to 1 where there is none."""
    low, high = math.inf, -math.inf
    for counts, edges in drawn:
        filled = counts > 0
        low = min(low, edges[:, :-1][filled].min(initial=math.inf))
        high = max(high, edges[:, 1:][filled].max(initial=-math.inf))
    if not low < high:
        return -1.0, 1.0
    if symmetric:
        low, high = -max(-low, high), max(-low, high)
    return max(float(low), -_LARGEST), min(float(high), _LARGEST)


def outline(counts: Array, edges: Array, limits: Limits) -> tuple[Array, Array] | None:
    """Polygon of one histogram, cut at the limits and closed at zero; ``None`` for an empty one."""
    low, high = limits
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    counts = counts[filled[0] : filled[-1] + 1]
    edges = edges[filled[0] : filled[-1] + 2]
    x = np.concatenate([edges[:1], edges[:-1] / 2 + edges[1:] / 2, edges[-1:]])
    z = np.concatenate([[0], counts, [0]]).astype(np.float64)
    inside = (x > low) & (x < high)
    ends = np.array([max(low, x[0]), min(high, x[-1])])
    heights = np.interp(ends, x, z)
    if x[-1] <= low or x[0] >= high or not max(heights.max(), z[inside].max(initial=0)) > 0:
        return None
    return (
        np.concatenate([ends[:1], ends[:1], x[inside], ends[1:], ends[1:]]),
        np.concatenate([[0], heights[:1], z[inside], heights[1:], [0]]),
    )
