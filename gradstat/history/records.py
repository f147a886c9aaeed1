"""`Records`: what a history holds, and what must hold between its numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import numpy as np

from gradstat.bins import Bins
from gradstat.formats import parse_format
from gradstat.history.packed_counts import SparseRows
from gradstat.history.placements import Placements
from gradstat.history.scalars import Scalars
from gradstat.record import KINDS, UNIT, Row
from gradstat.results import FLOATS, INTEGERS, NO_SCALE_MAX, NO_SCALE_MIN, PACKED
from gradstat.util import Array

# Origins that are no rank: values are of this rank alone, or the same ones on each rank.
OWN, SAME = -1, -2

_MOST_RANKS = 1 << 31
_N_COUNTS = PACKED.index("scale_min")
_MOST_CHARACTERS = 80  # of a format's name
_MOST_ERROR = 1 + 1e-6  # of a norm: rounding takes nothing further away than zero
_MOST_ELEMENTS = 1 << 60  # no sum of a row's numbers overflows
# A device may count what is smaller as zero: float16's smallest normal number.
_FLUSHED = 2.0**-14
# Rows and histogram entries that are checked together: what it takes is small beside a history.
_ROWS, _ENTRIES = 1 << 13, 1 << 17


@dataclass(frozen=True)
class Records:
    """What a history holds: S steps, L layers.

    Args:
        rows: L of them.
        layers: their L names, as printed; those of one kind that was selected go without it.
        bins: scheme.
        steps: S numbers.
        times: when each was recorded, in seconds since 1970: float64 ``(S,)``; NaN where unknown.
        integers: int64 ``(S, L, 8)``.
        floats: float64 ``(S, L, 8)``.
        quantized: float64 ``(S, L, F, 10)``, the fields of `gradstat.results.PACKED`; NaN where a
            layer is absent.
        counts: S times L histograms.
        origins: int64 ``(L,)``: the first rank of a distributed run that holds the same values of
            a layer, `OWN` or `SAME`.
        scalars: what was logged at the steps.
        depth: int64 ``(L,)``, as `History.depth`, or ``None``.
        partial_step: as `History.partial_step`.
        rank: of the process that recorded them in a distributed run, if it is known.
        world: how many ranks that run had.
        layout: what this rank holds of each layer, if that is known of any.
        resumption: of a resumed run's file: its first step, and how many files were there.
        formats: names of F narrow formats that were measured.
    """

    rows: list[Row]
    layers: list[str]
    bins: Bins
    steps: list[int]
    times: Array
    integers: Array
    floats: Array
    quantized: Array
    counts: SparseRows
    origins: Array
    scalars: Scalars = field(default_factory=Scalars)
    depth: Array | None = None
    partial_step: int | None = None
    rank: int | None = None
    world: int | None = None
    layout: Placements | None = None
    resumption: tuple[int, int] | None = None
    formats: list[str] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        numbers = self.integers.nbytes + self.floats.nbytes + self.quantized.nbytes
        return numbers + self.counts.nbytes

    def before(self, step: float) -> Records:
        """Those of lower steps, their scalars too."""
        n = bisect_left(self.steps, step)
        counts = self.counts.part(0, n * len(self.rows))
        part = self._part(self.steps[:n], slice(n), counts)
        return replace(part, scalars=self.scalars.between(end=step))

    def since(self, step: int) -> Records:
        """Those of this step and higher ones, without scalars."""
        n = bisect_left(self.steps, step)
        counts = self.counts.part(n * len(self.rows), len(self.counts))
        part = self._part(self.steps[n:], slice(n, None), counts)
        return replace(part, scalars=Scalars())

    def at_steps(self, steps: Sequence[int]) -> Records:
        """Those of some of the steps, all of which there are; scalars stay."""
        if self.steps == list(steps):
            return self
        at = np.searchsorted(np.array(self.steps, np.int64), np.array(steps, np.int64))
        rows = at[:, None] * len(self.rows) + np.arange(len(self.rows))
        return self._part(list(steps), at, self.counts.keep(rows.ravel()))

    def _part(self, steps: list[int], at: slice | Array, counts: SparseRows) -> Records:
        """Those of some steps, which are at these places and have these histograms."""
        return replace(
            self,
            steps=steps,
            times=self.times[at],
            integers=self.integers[at],
            floats=self.floats[at],
            quantized=self.quantized[at],
            counts=counts,
            partial_step=self.partial_step if self.partial_step in steps else None,
        )


def no_formats(n_steps: int, n_layers: int) -> Array:
    """What `Records` has as ``quantized`` where no formats were measured."""
    return np.empty((n_steps, n_layers, 0, len(PACKED)))


def concatenate(parts: Sequence[Records]) -> Records:
    """Records of one run after the other; what is of all records, as the last ones have it."""
    first = parts[0]
    if len(parts) == 1:
        return first
    said = [part for part in parts if part.steps] or parts
    depths = [part.depth for part in parts if part.depth is not None]
    counts = zip(*(part.counts.arrays() for part in parts), strict=True)
    scalars = Scalars()
    for part in parts:
        scalars.extend(part.scalars)
    return replace(
        first,
        steps=[step for part in parts for step in part.steps],
        times=np.concatenate([part.times for part in parts]),
        integers=np.concatenate([part.integers for part in parts]),
        floats=np.concatenate([part.floats for part in parts]),
        quantized=np.concatenate([part.quantized for part in parts]),
        counts=SparseRows(*(np.concatenate(each) for each in counts)),
        origins=said[-1].origins,
        layout=said[-1].layout,
        world=said[-1].world,
        resumption=said[-1].resumption,
        scalars=scalars,
        depth=depths[-1] if depths else None,
        partial_step=said[-1].partial_step,
    )


def check(records: Records) -> None:
    """Refuse what no measurement gives.

    Args:
        records: arrays of shapes that fit each other.

    Raises:
        ValueError: the first thing that is wrong, and where.
    """
    if unknown := {row.kind for row in records.rows} - set(KINDS):
        raise ValueError(f"its kinds hold {min(unknown)!r}, which is none of {', '.join(KINDS)}")
    if len(set(records.rows)) < len(records.rows):
        raise ValueError("its rows are not all different")
    steps = records.steps
    if any(step < 0 for step in steps[:1]) or any(a >= b for a, b in pairwise(steps)):
        raise ValueError("its steps do not rise from 0 or more")
    origins = records.origins
    if len(bad := origins[(origins < SAME) | (origins >= _MOST_RANKS)]):
        raise ValueError(f"its origins hold {bad[0]}, which is no rank")
    for name in records.formats:
        if len(name) > _MOST_CHARACTERS or parse_format("History.load", name).name != name:
            raise ValueError(f"its formats hold {name!r:.80}, which is none")
    if len(set(records.formats)) < len(records.formats):
        raise ValueError("its formats are not all different")
    if records.depth is not None and (abs(records.depth) > len(records.rows)).any():
        raise ValueError("its order is none of its rows")
    sizes, indices, values = records.counts.arrays()
    if len(bad := sizes[sizes < 0]):
        raise ValueError(f"its sizes hold {bad[0]}")
    edges = np.append(0, np.cumsum(sizes, dtype=np.int64))
    if edges[-1] != len(indices):
        raise ValueError(f"its sizes do not sum to its {len(indices)} indices")
    integers = records.integers.reshape(-1, len(INTEGERS))
    floats = records.floats.reshape(-1, len(FLOATS))
    quantized = records.quantized.reshape(len(integers), len(records.formats), len(PACKED))
    is_cast = np.tile(np.array([row.kind != UNIT for row in records.rows], bool), len(steps))
    for rows in _portions(edges):
        part = slice(edges[rows.start], edges[rows.stop])
        wrong = [
            *_wrong_integers(integers[rows]),
            *_wrong_floats(integers[rows], floats[rows]),
            *_wrong_formats(integers[rows], quantized[rows], is_cast[rows]),
            *_wrong_counts(
                integers[rows], sizes[rows], indices[part], values[part], records.bins.bins
            ),
        ]
        for mask, what in wrong:
            if mask.any():
                step, column = divmod(rows.start + int(mask.argmax()), len(records.rows))
                layer = f"{records.layers[column]!r:.80}"
                raise ValueError(f"its {what}, in step {steps[step]} of {layer}")


def _portions(edges: Array) -> Iterator[slice]:
    """Rows in portions of so many, or of one row, from where their entries begin and end."""
    start = 0
    while start < len(edges) - 1:
        stop = int(np.searchsorted(edges, edges[start] + _ENTRIES, side="right")) - 1
        stop = max(start + 1, min(stop, start + _ROWS))
        yield slice(start, stop)
        start = stop


_Wrong = tuple[Array, str]  # where, bool (N,), and what


def _wrong_integers(integers: Array) -> list[_Wrong]:
    numel, finite, zeros, nan, posinf, neginf, _, _ = integers.T
    return [
        ((integers < 0).any(1), "numbers of elements are negative"),
        ((integers > _MOST_ELEMENTS).any(1), "numbers of elements are too large"),
        (numel != finite + nan + posinf + neginf, "elements are not those finite and not"),
        (zeros > finite, "zeros are more than its finite elements"),
    ]


def _wrong_floats(integers: Array, floats: Array) -> list[_Wrong]:
    _, finite, zeros, *_ = integers.T
    least, most, _, std, l1, l2, low, high = floats.T
    undefined = np.isnan(floats)
    # Where the sum of magnitudes is beyond float64, the sum and the deviation may be anything.
    undefined[np.isinf(l1), 2:4] = False
    undefined[finite < 2, 3] = False
    return [
        ((finite > 0) & undefined.any(1), "statistics are NaN beside finite elements"),
        (least > most, "min is above its max"),
        ((finite == 0) & ~(np.isnan(least) & np.isnan(most)), "min and max are of no element"),
        ((zeros > 0) & ((least > _FLUSHED) | (most < -_FLUSHED)), "zeros are outside min and max"),
        ((std < 0) | (l1 < 0) | (l2 < 0), "std and norms are negative"),
        (low > high, "range ends below where it begins"),
    ]


def _wrong_formats(integers: Array, quantized: Array, is_cast: Array) -> list[_Wrong]:
    """What is wrong with what formats would do to N rows, ``(N, F, 10)``."""
    numel = integers[:, :1]
    counts, scales, norms = np.split(quantized, [_N_COUNTS, _N_COUNTS + 2], -1)
    nonzero, underflowed, saturated, nonfinite, blocks, empty_blocks = np.moveaxis(counts, -1, 0)
    is_there = ~np.isnan(quantized)
    expected = ((numel[:, 0] > 0) & is_cast)[:, None, None]
    # An empty tensor may have been measured.
    absent = (is_there != expected) & ((numel[:, 0] > 0) | ~is_cast)[:, None, None]
    least, most = np.moveaxis(scales, -1, 0)
    norm, error = np.moveaxis(norms, -1, 0)
    with np.errstate(invalid="ignore"):
        wrong = [
            ((counts < 0).any(-1) | (np.maximum(nonzero, nonfinite) > numel), "elements"),
            (underflowed + saturated > nonzero, "lost elements"),
            ((blocks > numel) | (empty_blocks > blocks), "blocks"),
            ((abs(scales) > NO_SCALE_MIN).any(-1), "scales"),
            ((least > most) & ((least < NO_SCALE_MIN) | (most > NO_SCALE_MAX)), "scales"),
            ((norms < 0).any(-1) | (error > norm * _MOST_ERROR), "norms"),
            ((nonzero == 0) & (norm > 0), "norms"),
            ((np.floor(quantized) != quantized)[..., : _N_COUNTS + 2].any(-1), "counts"),
        ]
        # Comparisons with NaN say that it differs from itself.
        wrong[-1] = (wrong[-1][0] & is_there.all(-1), wrong[-1][1])
    found = [(mask.any(1), f"formats have {what} that no tensor has") for mask, what in wrong]
    return [(absent.any((1, 2)), "formats are not of the rows that have values"), *found]


def _wrong_counts(
    integers: Array, sizes: Array, indices: Array, values: Array, bins: int
) -> list[_Wrong]:
    """What is wrong with N histograms; a wrong entry makes its row wrong."""
    finite, below, above = integers[:, 1], integers[:, 6], integers[:, 7]
    ends = np.cumsum(sizes, dtype=np.int64)
    at = indices.astype(np.int64)
    rises = np.diff(at, prepend=-1)
    rises[(ends - sizes)[sizes > 0]] = 1
    entry = (rises <= 0) | (at < 0) | (at >= bins) | (values <= 0) | (values > _MOST_ELEMENTS)
    bad = np.zeros(len(sizes), bool)
    bad[np.searchsorted(ends, np.flatnonzero(entry), side="right")] = True
    total = np.append(0, np.cumsum(np.where(entry, 0, values), dtype=np.int64))
    sums = total[ends] - total[ends - sizes]
    # What overflows int64 does not overflow float64.
    huge = float(values.sum(dtype=np.float64)) > 2.0**62
    return [
        (bad, f"histogram has counts that are not positive or not in the order of {bins} bins"),
        (np.full(len(sizes), huge), "counts are too large"),
        (sums != finite - below - above, "counts do not sum to its finite elements in the range"),
    ]
