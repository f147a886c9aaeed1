"""What the figures of `plot` draw, as arrays: checked arguments, times, means, histograms."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gradstat.bins import Log2Bins
from gradstat.history import FIELDS, History
from gradstat.kinds import ACTIVATION, GRAD, GRAD_OUTPUT, PARAM, UNIT, UPDATE

Histories: TypeAlias = History | Mapping[str, History] | Sequence[History]
Layers: TypeAlias = Sequence[str] | Mapping[str, str]
Limits: TypeAlias = tuple[float, float]
Array: TypeAlias = NDArray[Any]

# What a value of each kind is called.
NOUNS = {
    GRAD: "gradient",
    PARAM: "parameter",
    UPDATE: "update",
    ACTIVATION: "activation",
    UNIT: "unit peak",
    GRAD_OUTPUT: "output gradient",
}

# Each float32 exponent is an octave; the first also holds zeros, the last nothing finite.
OCTAVES = np.arange(-127.0, 130.0)


def check_histories(function: str, history: Histories) -> dict[str, History]:
    """Return the histories by name; a single one has the name ""."""
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
    return named


def check_history(function: str, history: History) -> None:
    """Refuse what is no single History with records."""
    if not isinstance(history, History):
        raise TypeError(f"{function}() needs a History; history is {type(history).__name__}")
    if len(history) == 0 or not history.layers:
        raise ValueError(f"{function}() needs a History with records; history is {history!r}")


def check_layers(function: str, named: dict[str, History], layers: Layers | None) -> dict[str, str]:
    """Return the title of each layer to draw, in order; by default of each history's first kind."""
    if layers is None:
        return {layer: layer for each in named.values() for layer in first_rows(each)}
    names = isinstance(layers, (Mapping, Sequence)) and not isinstance(layers, str)
    if not names or not all(isinstance(layer, str) for layer in layers):
        raise TypeError(f"{function}() needs a sequence of layer names; layers is {layers!r}")
    titles = dict(layers) if isinstance(layers, Mapping) else {layer: layer for layer in layers}
    if not titles:
        raise ValueError(f"{function}() needs at least one layer; layers is empty")
    known = list(dict.fromkeys(layer for each in named.values() for layer in each.layers))
    for layer in titles:
        if layer not in known:
            raise ValueError(f"{function}() needs layers among {known}; layers has {layer!r}")
    return titles


def first_rows(history: History) -> list[str]:
    """Names of the rows of a history's first kind: gradients where they were recorded."""
    rows = zip(history.layers, history.kinds, strict=True)
    return [layer for layer, kind in rows if kind == history.kinds[0]]


def noun(named: dict[str, History], layers: Collection[str]) -> str:
    """What the values of some layers are called; "value" if they are of several kinds."""
    kinds = {
        kind
        for each in named.values()
        for layer, kind in zip(each.layers, each.kinds, strict=True)
        if layer in layers
    }
    return NOUNS[kinds.pop()] if len(kinds) == 1 else "value"


def check_count(function: str, name: str, value: int, unit: str = "step") -> None:
    """Refuse what is not a positive integer."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{function}() needs an integer number of {unit}s; {name} is {value!r}")
    if value < 1:
        raise ValueError(f"{function}() needs one {unit} or more; {name} is {value}")


def check_field(function: str, field: str, *also: str) -> None:
    """Refuse what no History holds."""
    names = (*also, "mean_abs", *FIELDS)
    if field not in names:
        raise ValueError(f"{function}() needs one of {', '.join(names)}; field is {field!r}")


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


def times(history: History, steps_per_epoch: int | None) -> Array:
    """Time of each record: its step, or the epochs done with it."""
    if steps_per_epoch is None:
        return history.steps.astype(np.float64)
    done: Array = (history.steps + 1) / steps_per_epoch
    return done


def select(steps: Array, steps_per_epoch: int | None, most: int) -> Array:
    """Indices of at most so many records, the last of each epoch, evenly spread, the newest too."""
    indices = np.arange(len(steps))
    if steps_per_epoch is not None:
        epoch = steps // steps_per_epoch
        indices = np.flatnonzero(np.append(epoch[1:] != epoch[:-1], True))
    if len(indices) > most:
        indices = indices[np.linspace(0, len(indices) - 1, most).round().astype(np.int64)]
    return indices


def values(history: History, layer: str, field: str) -> Array:
    """A field of one layer, float64 ``(S,)``; NaN where it has no gradient or is unknown."""
    if layer not in history.layers:
        return np.full(len(history), math.nan)
    column = history.layers.index(layer)
    if field != "mean_abs":
        return history[field][:, column].astype(np.float64)
    total, finite = history["l1"][:, column], history["finite"][:, column].astype(np.float64)
    return divide(total, finite)


def divide(total: Array, count: Array) -> Array:
    """Quotient; NaN where there is nothing to divide by."""
    quotient = np.full(np.broadcast_shapes(total.shape, count.shape), math.nan)
    np.divide(total, count, out=quotient, where=count > 0)
    return quotient


def block_mean(x: Array, size: int) -> Array:
    """Mean of the finite values in each run of ``size`` along the first axis; the last is shorter.

    NaN where a run has none.
    """
    starts = np.arange(0, len(x), size)
    finite = np.isfinite(x)
    total: Array = np.add.reduceat(np.where(finite, x, 0.0), starts, axis=0)
    count = np.add.reduceat(finite.astype(np.float64), starts, axis=0)
    return divide(total, count)


def block_last(x: Array, size: int) -> Array:
    """Last value of each run of ``size``."""
    last = np.minimum(np.arange(size - 1, len(x) + size - 1, size), len(x) - 1)
    return np.asarray(x[last])


def histograms(history: History, layer: str, kept: Array) -> tuple[Array, Array]:
    """Counts ``(K, B)`` and edges ``(K, B + 1)`` of some records; all zero for an unknown layer."""
    if layer not in history.layers:
        return np.zeros((len(kept), 1), np.int64), np.zeros((len(kept), 2))
    # One by one: of a long run only these few, whose edges take time to find.
    found = [history.histogram(layer, step) for step in history.steps[kept].tolist()]
    counts = np.stack([each for each, _ in found])
    if isinstance(history.bins, Log2Bins):
        return octaves(counts), np.broadcast_to(OCTAVES, (len(kept), 257))
    return counts, np.stack([edges for _, edges in found])


def octaves(counts: Array) -> Array:
    """Histogram of magnitudes over `OCTAVES`, ``(S, 256)``, of one over `Log2Bins`, ``(S, 2048)``.

    Zeros and subnormals, which share the first octave, are left out.
    """
    magnitudes = counts[:, 1024:] + counts[:, 1023::-1]
    summed: Array = magnitudes.reshape(len(counts), 256, 4).sum(2)
    summed[:, 0] = 0
    return summed


def octave_shares(history: History, layer: str, size: int) -> Array:
    """Share of the finite elements in each octave, ``(S / size, 256)``; NaN where there are none.

    Args:
        history: over `Log2Bins`.
        layer: name; an unknown one has no elements.
        size: how many records are taken together.
    """
    if layer not in history.layers:
        return np.full((-(-len(history) // size), 256), math.nan)
    starts = np.arange(0, len(history), size)
    finite = np.nan_to_num(history["finite"][:, history.layers.index(layer)])
    counts = np.add.reduceat(octaves(history.histograms(layer)[0]), starts, axis=0)
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
    return float(low), float(high)


def outline(counts: Array, edges: Array, limits: Limits) -> tuple[Array, Array] | None:
    """Polygon of one histogram, cut at the limits and closed at zero; ``None`` for an empty one."""
    low, high = limits
    filled = np.flatnonzero(counts)
    if not len(filled):
        return None
    counts = counts[filled[0] : filled[-1] + 1]
    edges = edges[filled[0] : filled[-1] + 2]
    x = np.concatenate([edges[:1], (edges[:-1] + edges[1:]) / 2, edges[-1:]])
    z = np.concatenate([[0], counts, [0]]).astype(np.float64)
    if x[-1] <= low or x[0] >= high:
        return None
    inside = (x > low) & (x < high)
    ends = np.array([max(low, x[0]), min(high, x[-1])])
    heights = np.interp(ends, x, z)
    return (
        np.concatenate([ends[:1], ends[:1], x[inside], ends[1:], ends[1:]]),
        np.concatenate([[0], heights[:1], z[inside], heights[1:], [0]]),
    )
