"""What a rank of a distributed run has of a gradient, and the merging of what ranks measured."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import distributed as dist

from gradstat.arrays import Array
from gradstat.bins import LinearBins
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import OWN, SAME, Records
from gradstat.history.scalars import Scalars
from gradstat.results import FLOATS

# Columns of what extremes over the ranks are taken of; a record's integers come after them.
_COLUMNS = ("min", "max", "low", "high", "std", "l2")
_MIN, _MAX, _LOW, _HIGH, _STD, _L2, _MEAN, _INTEGERS = range(8)


def merge(mine: Records, group: dist.ProcessGroup | None) -> Records:
    """Statistics of what all ranks of a group hold together; what several hold counts once.

    One gathering and three sums or minima, however many records and layers there are.

    Args:
        mine: this rank's.
        group: by default all ranks.

    Returns:
        The same on each rank, of origin `SAME`.

    Raises:
        ValueError: on each rank: other layers, bins, steps or ranges elsewhere, or a layer that
            should be the same on each rank and is not.
    """
    ranks = _Ranks(group)
    origins, times, scalars = _agree(mine, ranks)
    twins = (origins == origins[ranks.me]) & (origins[ranks.me] != OWN)
    # Of the ranks that hold the same values the first one sends them.
    sends = ~twins[: ranks.me].any(0)

    stretches = _Stretches(mine)
    values = _values(mine)
    ends = stretches.ends()
    least, greatest = ranks.extremes(np.concatenate([values.ravel(), ends.ravel()]))
    first, last = (x[values.size :].reshape(ends.shape) for x in (least, greatest))
    stretches.widen(first[0], last[1])
    least, greatest = (x[: values.size].reshape(values.shape) for x in (least, greatest))
    _check_same(mine, least, greatest, twins.all(0))

    # Sums of int64 are exact: counts are right to the last one.
    integers = np.where(sends[:, None], mine.integers, 0)
    sums = ranks.sum(np.concatenate([integers.ravel(), stretches.dense(sends)]))
    integers = sums[: integers.size].reshape(integers.shape)
    floats = _sum_floats(mine, integers[..., 1], sends, least, greatest, ranks)
    counts = stretches.pack(sums[integers.size :])
    origins = np.full_like(mine.origins, SAME)
    return replace(
        mine,
        times=times,
        integers=integers,
        floats=floats,
        counts=counts,
        origins=origins,
        scalars=scalars,
    )


class _Ranks:
    """Collectives of a group on NumPy arrays."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.me, self.n = dist.get_rank(group), dist.get_world_size(group)
        kinds = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]
        self._device = torch.device("cpu" if "cpu" in kinds else kinds[0])

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


def _agree(mine: Records, ranks: _Ranks) -> tuple[Array, Array, Scalars]:
    """What the ranks tell each other if all of them have the same records.

    Returns:
        Origins of the layers on each rank, int64 ``(W, L)``; times on the first, float64 ``(S,)``;
        and the scalars of all, by rank: ``rank0/loss``, ``rank1/loss`` and so on.
    """
    run = {"layers": mine.layers, "bins": mine.bins.spec, "steps": mine.steps}
    gathered = ranks.gather((run, mine.origins, mine.times, mine.scalars))
    for rank, (theirs, *_) in enumerate(gathered):
        for what, first in gathered[0][0].items():
            if theirs[what] != first:
                raise ValueError(
                    f"reduce() needs the same {what} on each rank; {what} on rank {rank} is "
                    f"{_shorten(theirs[what])}, on rank 0 {_shorten(first)}"
                )
    scalars = Scalars()
    for rank, (*_, theirs) in enumerate(gathered):
        scalars.extend(theirs, f"rank{rank}/")
    return np.stack([origins for _, origins, *_ in gathered]), gathered[0][2], scalars


def _shorten(x: list[Any] | str) -> str:
    if isinstance(x, str) or len(x) < 6:
        return str(x)
    return f"[{x[0]!r}, {x[1]!r}, ... {x[-1]!r}] of {len(x)}"


def _values(mine: Records) -> Array:
    """What extremes are taken of, float64 ``(S, L, columns)``; NaN where a layer is absent."""
    at = {name: mine.floats[..., i] for i, name in enumerate(FLOATS)}
    columns = [*(at[name] for name in _COLUMNS), _mean(at["sum"], mine.integers[..., 1])]
    return np.concatenate([np.stack(columns, -1), mine.integers], -1)


def _mean(total: Array, n: Array) -> Array:
    mean: Array = np.divide(total, n, out=np.full_like(total, np.nan), where=n > 0)
    return mean


def _check_same(mine: Records, least: Array, greatest: Array, is_same: Array) -> None:
    """Refuse replicas that differ and ranges that differ."""
    differs = (least != greatest) & (least <= greatest)
    replicas = differs[..., [_MIN, _MAX, *range(_INTEGERS, least.shape[-1])]].any(-1) & is_same
    ranges = differs[..., [_LOW, _HIGH]].any(-1) & isinstance(mine.bins, LinearBins)
    for wrong, message in (
        (replicas, "gradients that are the same on each rank, or replicated=False; the gradient"),
        (ranges, f"Log2Bins, or LinearBins with a range; the range of {mine.bins}"),
    ):
        if wrong.any():
            step, column = np.argwhere(wrong)[0]
            raise ValueError(
                f"reduce() needs {message} of {mine.layers[column]} in step {mine.steps[step]} is "
                f"not the same on all"
            )


def _sum_floats(
    mine: Records, n: Array, sends: Array, least: Array, greatest: Array, ranks: _Ranks
) -> Array:
    """Floats of the union, ``(S, L, 8)``, from this rank's, extremes and numbers of all.

    Deviations are taken from the least of the ranks' means: Chan's formula for many parts at once.
    """
    at = {name: mine.floats[..., i] for i, name in enumerate(FLOATS)}
    mine_n = mine.integers[..., 1]
    # Nothing that is squared overflows or underflows.
    spread = greatest[..., _MEAN] - least[..., _MEAN]
    scale = np.fmax(np.fmax(greatest[..., _STD], spread), 0)
    scale = np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)
    norm = greatest[..., _L2]
    norm = np.where(np.isfinite(norm) & (norm > 0), norm, 1.0)
    pivot = np.where(n > 0, least[..., _MEAN], 0.0)
    shift = np.nan_to_num((_mean(at["sum"], mine_n) - pivot) / scale)
    squares = (mine_n - 1).clip(0) * np.nan_to_num(at["std"] / scale) ** 2 + mine_n * shift**2
    parts = [at["sum"], at["l1"], (at["l2"] / norm) ** 2, mine_n * shift, squares]
    sent = np.where(sends[:, None], np.nan_to_num(np.stack(parts, -1)), 0.0)
    total, l1, l2, moment, squares = np.moveaxis(ranks.sum(sent), -1, 0)
    squares = (squares - moment**2 / n.clip(1)).clip(0)
    std = np.where(n > 1, scale * np.sqrt(squares / (n - 1).clip(1)), np.nan)
    rows = {
        "min": np.where(n > 0, least[..., _MIN], np.nan),
        "max": np.where(n > 0, greatest[..., _MAX], np.nan),
        "sum": total,
        "std": std,
        "l1": l1,
        "l2": norm * np.sqrt(l2),
        "low": least[..., _LOW],
        "high": greatest[..., _HIGH],
    }
    absent = least[..., _L2] > greatest[..., _L2]
    no_range = least[..., _LOW] > greatest[..., _LOW]
    floats = np.where(absent[..., None], np.nan, np.stack([rows[name] for name in FLOATS], -1))
    floats[no_range, -2:] = np.nan
    return floats


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
