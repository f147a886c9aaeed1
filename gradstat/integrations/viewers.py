"""What viewers are given: histograms with few bins and finite edges, scalars, names, steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import numpy as np

from gradstat.history import History
from gradstat.record import ACTIVATION, NOUNS, PARAM, UNIT, UPDATE, Row
from gradstat.results import Statistics, as_statistics
from gradstat.util import Array, check_integer, evenly_spread


def buckets(
    statistics: Statistics, numbers: Array, counts: Array, edges: Array, most: int | None = None
) -> tuple[Array, Array]:
    """Counts, int64 ``(B,)``, and edges, ``(B + 1,)``, from the first filled bin to the last."""
    # Of the E filled bins: their numbers, which rise, counts, and edges, ``(E, 2)``. Nothing is
    # redistributed: the counts are those of the record, or sums of neighbours, so that there are at
    # the most so many. Empty neighbours are one bucket: between the negative and the positive
    # values `Log2Bins` has hundreds of them. Values outside a linear range have a bucket on either
    # side, and the smallest or largest value takes the place of an infinite edge.
    least, low, high, greatest = (
        float(getattr(statistics, name)) for name in ("min", "low", "high", "max")
    )
    if below := int(statistics.below):
        numbers, counts = np.append(-1, numbers), np.append(below, counts)
        edges = np.concatenate([[[least, low]], edges])
    if above := int(statistics.above):
        numbers, counts = np.append(numbers, statistics.bins.bins), np.append(counts, above)
        edges = np.concatenate([edges, [[high, greatest]]])
    if not len(numbers):
        return np.zeros(0, np.int64), np.zeros(0)
    starts, stops = edges.T
    gaps = np.flatnonzero(np.diff(numbers) > 1) + 1
    counts = np.insert(counts, gaps, 0)
    edges = np.append(np.insert(starts, gaps, stops[gaps - 1]), stops[-1])
    if math.isinf(edges[0]):
        edges[0] = least
    if math.isinf(edges[-1]):
        edges[-1] = greatest
    if most is not None and len(counts) > most:
        first = np.arange(0, len(counts), math.ceil(len(counts) / most))
        counts = np.add.reduceat(counts, first)
        edges = np.append(edges[first], edges[-1])
    return counts, edges


def rows(
    history: History, step: int, most: int | None = None
) -> Iterator[tuple[Row, Statistics, tuple[Array, Array]]]:
    """Each row that has values in a step, its statistics without a histogram, and its `buckets`."""
    record = history.of_steps([step]).unpack()
    numbers, counts = record.bins.astype(np.int64), record.counts.astype(np.int64)
    edges, starts = record.edges(history.bins), np.append(0, record.ends)
    for at, row in enumerate(history.rows):
        if record.integers[0, at, 0]:
            integers, floats = (x[0, at].copy() for x in record[:2])
            part = slice(starts[at], starts[at + 1])
            statistics = as_statistics(history.bins, (integers, floats, np.empty(0)))
            filled = buckets(statistics, numbers[part], counts[part], edges[part], most)
            yield row, statistics, filled


def layers_of(history: History, kind: str) -> dict[int, str]:
    return {at: row.name for at, row in enumerate(history.rows) if row.kind == kind}


def derived(history: History) -> Iterator[tuple[str, str, list[str], Array]]:
    """Update ratios and shares of dead units: the kind, a name, the layers, float64 ``(S, L)``."""
    if {UPDATE, PARAM} <= set(history.kinds):
        yield UPDATE, "ratio", list(layers_of(history, UPDATE).values()), history.update_ratio()
    if UNIT in history.kinds:
        layers = list(layers_of(history, UNIT).values())
        yield ACTIVATION, "dead_units", layers, history.dead_units()


def group(kind: str) -> str:
    """What tags sorted by kind begin with, as those of ``wandb.watch`` do."""
    return f"{NOUNS[kind]}s".replace(" ", "_")


def check_tags(function: str, tags: str) -> None:
    if tags not in ("layer", "kind"):
        raise ValueError(f"{function}() needs tags 'layer' or 'kind'; tags is {tags!r}")


def chosen_steps(function: str, history: History, max_records: int | None) -> list[int]:
    """Steps of at most so many records, evenly spread, the newest among them; ``None`` for all."""
    if max_records is not None:
        check_integer(function, "max_records", max_records, 1)
    steps = history.steps
    if max_records == 1:
        return [int(steps[-1])]
    chosen: list[int] = steps[evenly_spread(len(steps), max_records or len(steps))].tolist()
    return chosen


def counted(
    history: History, steps: list[int], progress: Callable[[int], object] | None
) -> Iterator[int]:
    """The steps one by one; after each, reports how many more records of the history it covers."""
    done = 0
    for step in steps:
        yield step
        covered = int(np.searchsorted(history.steps, step, "right"))
        if progress is not None:
            progress(covered - done)
        done = covered


def scalars(statistics: Statistics) -> dict[str, float]:
    """What to draw of one tensor against time, by name, without what is undefined."""
    finite, numel = int(statistics.finite), int(statistics.numel)
    named: dict[str, float] = {}
    if finite:
        named = {name: float(getattr(statistics, name)) for name in ("mean", "std", "rms", "l2")}
        named["zero_fraction"] = int(statistics.zeros) / finite
    named["nonfinite"] = float(numel - finite)
    return {name: value for name, value in named.items() if not math.isnan(value)}
