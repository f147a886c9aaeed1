"""What the ranks of a distributed run measured, merged while they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from gradstat.history import union_quantized
from gradstat.history.alignment import join_depths, union, with_rows
from gradstat.history.copies import Copies, Holding
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import SAME, Records
from gradstat.history.scalars import Scalars
from gradstat.history.union_floats import check_ranges, extremes_of, terms, union_floats
from gradstat.util import Array

_FUNCTION = "reduce()"


def merge(mine: Records, group: dist.ProcessGroup | None) -> Records:
    """Statistics of what all ranks of a group hold together; what several hold counts once.

    One gathering and three sums or minima, however many records and layers there are.

    Args:
        mine: this rank's.
        group: by default all ranks.

    Returns:
        The same on each rank, of origin `SAME`.

    Raises:
        ValueError: on each rank: other bins, steps or ranges elsewhere, or a layer that should be
            the same on several ranks and is not.
    """
    ranks = _Ranks(group)
    mine, sends, times, scalars = _agree(mine, ranks)

    stretches = _Stretches(mine)
    values = extremes_of(mine.bins, mine.integers, mine.floats)
    ends, scales = stretches.ends(), union_quantized.extremes_of(mine.quantized)
    found = [
        _split(each, values, ends, scales) for each in ranks.extremes(_flat(values, ends, scales))
    ]
    (least, (first, _), least_scale), (greatest, (_, last), greatest_scale) = found
    stretches.widen(first, last)
    check_ranges(_FUNCTION, mine, least, greatest)

    # Sums of int64 are exact: counts are right to the last one.
    integers = np.where(sends[:, None], mine.integers, 0)
    sums = ranks.sum(np.concatenate([integers.ravel(), stretches.dense(sends)]))
    integers = sums[: integers.size].reshape(integers.shape)
    parts = np.where(
        sends[:, None], terms(mine.bins, mine.integers, mine.floats, least, greatest), 0.0
    )
    narrow = np.where(
        sends[:, None, None], union_quantized.terms(mine.quantized, greatest_scale), 0.0
    )
    parts, narrow = _split(ranks.sum(_flat(parts, narrow)), parts, narrow)
    floats = union_floats(integers[..., 1], parts, least, greatest)
    quantized = union_quantized.union_quantized(narrow, least_scale, greatest_scale)
    counts = stretches.pack(sums[integers.size :])
    origins = np.full(len(mine.rows), SAME, np.int64)
    return replace(
        mine,
        times=times,
        integers=integers,
        floats=floats,
        quantized=quantized,
        counts=counts,
        origins=origins,
        scalars=scalars,
        rank=None,
        world=None,
        layout=None,
    )


def _flat(*arrays: Array) -> Array:
    return np.concatenate([x.ravel() for x in arrays])


def _split(flat: Array, *like: Array) -> list[Array]:
    """What `_flat` has put together."""
    ends = np.cumsum([x.size for x in like])[:-1]
    return [x.reshape(y.shape) for x, y in zip(np.split(flat, ends), like, strict=True)]


class _Ranks:
    """Collectives of a group on NumPy arrays."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.me, self.n = dist.get_rank(group), dist.get_world_size(group)
        kinds = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
        self._device = torch.device("cpu" if "cpu" in kinds else kinds[0])

    def number(self, at: int) -> int:
        """Number of a rank in the whole world."""
        return dist.get_process_group_ranks(self._group)[at]

    def gather(self, x: object) -> list[Any]:
        gathered: list[Any] = [None] * self.n
        dist.all_gather_object(gathered, x, self._group)
        return gathered

    def sum(self, x: Array) -> Array:
        return self._reduce(x, dist.ReduceOp.SUM)

    def extremes(self, x: Array) -> tuple[Array, Array]:
        """Least and greatest float64 of each place; plus and minus infinity where all are NaN."""
        both = np.stack([x, -x])
        least, negated = self._reduce(np.where(np.isnan(both), np.inf, both), dist.ReduceOp.MIN)
        return least, -negated

    def _reduce(self, x: Array, op: dist.ReduceOp.RedOpType) -> Array:
        sent = torch.from_numpy(x).to(self._device)
        dist.all_reduce(sent, op, self._group)
        reduced: Array = sent.cpu().numpy()
        return reduced


def _agree(mine: Records, ranks: _Ranks) -> tuple[Records, Array, Array, Scalars]:
    """What the ranks tell each other if all of them have records of the same steps.

    Returns:
        This rank's records with the rows of all ranks; which of them it sends, being the first of
        those that hold the same, bool ``(L,)``; times on the first rank, float64 ``(S,)``; and the
        scalars of all, by rank: ``rank0/loss``, ``rank1/loss`` and so on.
    """
    run = {"bins": mine.bins.spec, "formats": mine.formats, "steps": mine.steps}
    gathered = ranks.gather((run, Holding.of(mine), mine.times, mine.scalars))
    for rank, (theirs, *_) in enumerate(gathered):
        for what, first in gathered[0][0].items():
            if theirs[what] != first:
                raise ValueError(
                    f"{_FUNCTION} needs the same {what} on each rank; {what} on rank {rank} is "
                    f"{_shorten(theirs[what])}, on rank 0 {_shorten(first)}"
                )
    copies, scalars = Copies(_FUNCTION), Scalars()
    holdings: list[Holding] = [holding for _, holding, *_ in gathered]
    firsts = [copies.add(ranks.number(at), holding) for at, holding in enumerate(holdings)]
    for rank, (*_, theirs) in enumerate(gathered):
        scalars.extend(theirs, f"rank{rank}/")
    rows, layers = union([(holding.rows, holding.layers) for holding in holdings])
    sends = dict(zip(mine.rows, firsts[ranks.me].tolist(), strict=True))
    whole = with_rows(mine, rows, layers)
    depth = join_depths(rows, [(holding.rows, holding.depth) for holding in holdings])
    is_sent = np.array([sends.get(row, False) for row in rows], bool)
    return replace(whole, depth=depth), is_sent, gathered[0][2], scalars


def _shorten(x: list[Any] | str) -> str:
    if isinstance(x, str) or len(x) < 6:
        return str(x)
    return f"[{x[0]!r}, {x[1]!r}, ... {x[-1]!r}] of {len(x)}"


class _Stretches:
    """Histograms as what is between their first and last filled bins.

    Each has two stretches, in the lower and in the upper half of the bins: for `Log2Bins` they are
    the negative and the positive values.

    Args:
        records: whose counts they are.
    """

    def __init__(self, records: Records) -> None:
        sizes, indices, self._values = records.counts.arrays()
        self._indices = indices.astype(np.int64)
        self._n_rows, self._bins = len(sizes), records.bins.bins
        row = np.repeat(np.arange(self._n_rows), sizes)
        self._column = row % max(len(records.rows), 1)
        self._stretch = 2 * row + (self._indices >= self._bins // 2)

    def ends(self) -> Array:
        """First and last filled bin of each stretch, float64 ``(2, N)``; NaN of an empty one."""
        filled = np.full((2, 2 * self._n_rows), np.nan)
        begins = np.flatnonzero(np.diff(self._stretch, prepend=-1))
        ends = np.flatnonzero(np.diff(self._stretch, append=-1))
        filled[0, self._stretch[begins]] = self._indices[begins]
        filled[1, self._stretch[ends]] = self._indices[ends]
        return filled

    def widen(self, first: Array, last: Array) -> None:
        """Stretch them to others' ends, an empty one having its first after its last."""
        filled = first <= last
        self._first = np.where(filled, first, 0).astype(np.int64)
        self._width = np.where(filled, last - first + 1, 0).astype(np.int64)
        self._start = np.cumsum(self._width) - self._width

    def dense(self, columns: Array) -> Array:
        """Counts of all stretches in a row, int64, zero but for some layers: bool ``(L,)``."""
        dense = np.zeros(int(self._width.sum()), np.int64)
        at = self._start[self._stretch] + self._indices - self._first[self._stretch]
        dense[at] = np.where(columns[self._column], self._values, 0)
        return dense

    def pack(self, dense: Array) -> SparseRows:
        """Histograms from such counts."""
        at = np.flatnonzero(dense)
        stretch = np.repeat(np.arange(2 * self._n_rows), self._width)[at]
        indices = at - self._start[stretch] + self._first[stretch]
        sizes = np.bincount(stretch // 2, minlength=self._n_rows)
        return SparseRows.narrowed(sizes, indices, dense[at], self._bins)
