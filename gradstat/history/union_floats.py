"""Floats of the union of many parts, from extremes and sums over the parts.

The arithmetic of `Statistics.merge` for many parts at once: deviations are taken from the least of
their means.
"""

from __future__ import annotations

import numpy as np
import torch

from gradstat.bins import Bins, LinearBins
from gradstat.history.records import Records
from gradstat.results import FLOATS, Statistics, mean_between_extremes
from gradstat.util import Array

# Columns whose extremes over the parts are taken; the mean comes after them.
_COLUMNS = ("min", "max", "low", "high", "std", "l2")
_MIN, _MAX, _LOW, _HIGH, _STD, _L2, _MEAN = range(7)


def extremes_of(bins: Bins, integers: Array, floats: Array) -> Array:
    """Numbers whose extremes over the parts are taken, float64 ``(..., 7)``; NaN for none.

    Args:
        bins: scheme.
        integers: int64 ``(..., 8)``, as in `Statistics`.
        floats: float64 ``(..., 8)``.
    """
    mean = np.where(integers[..., 1] > 0, _means(bins, integers, floats), np.nan)
    return np.stack([*(floats[..., FLOATS.index(name)] for name in _COLUMNS), mean], -1)


def check_ranges(function: str, records: Records, least: Array, greatest: Array) -> None:
    """Refuse parts whose histograms have other ranges.

    Args:
        function: what the error is of.
        records: of one part.
        least: of `extremes_of`, over all parts.
        greatest: so is it.

    Raises:
        ValueError: the first layer of such parts.
    """
    if not isinstance(records.bins, LinearBins):
        return
    ends = [_LOW, _HIGH]
    differs = (least != greatest)[..., ends] & (least <= greatest)[..., ends]
    for step, column in np.argwhere(differs.any(-1))[:1]:
        raise ValueError(
            f"{function} needs Log2Bins, or LinearBins with a range; the range of {records.bins} "
            f"of {records.layers[column]} in step {records.steps[step]} is not the same on all"
        )


@np.errstate(over="ignore", invalid="ignore")
def terms(bins: Bins, integers: Array, floats: Array, least: Array, greatest: Array) -> Array:
    """What `union_floats` needs the sum over the parts of, float64 ``(..., 5)``.

    Args:
        bins: as for `extremes_of`, like ``integers`` and ``floats``, which may have more axes in
            front, over parts.
        integers: of parts.
        floats: of parts.
        least: of `extremes_of` over all parts; plus infinity where no part has any.
        greatest: minus infinity there.
    """
    at = {name: floats[..., i] for i, name in enumerate(FLOATS)}
    n = integers[..., 1]
    low, _, shrink, unit, norm = _units(least, greatest)
    means = _means(bins, integers, floats)
    shift = np.where(n > 0, (means * shrink - low * shrink) / unit, 0.0)
    std = np.where(n > 1, at["std"], 0.0)
    squares = (n - 1).clip(0) * (std * shrink / unit) ** 2 + n * shift**2
    found = np.stack([at["sum"], at["l1"], (at["l2"] / norm) ** 2, n * shift, squares], -1)
    # What is absent has nothing to add.
    return np.where(np.isnan(at["l2"])[..., None], 0.0, found)


@np.errstate(over="ignore", invalid="ignore")
def union_floats(n: Array, sums: Array, least: Array, greatest: Array) -> Array:
    """Floats of the union, float64 ``(..., 8)``.

    Args:
        n: finite elements of all parts, int64 ``(...)``.
        sums: of `terms`, over the parts.
        least: as for `terms`.
        greatest: as for `terms`.
    """
    _, _, shrink, unit, norm = _units(least, greatest)
    total, l1, l2, moment, squares = np.moveaxis(sums, -1, 0)
    squares = (squares - moment**2 / n.clip(1)).clip(0)
    std = unit * np.sqrt(squares / (n - 1).clip(1)) / shrink
    rows = {
        "min": np.where(n > 0, least[..., _MIN], np.nan),
        "max": np.where(n > 0, greatest[..., _MAX], np.nan),
        "sum": total,
        "std": np.where(n > 1, std, np.nan),
        "l1": l1,
        "l2": norm * np.sqrt(l2),
        "low": least[..., _LOW],
        "high": greatest[..., _HIGH],
    }
    is_absent = least[..., _L2] > greatest[..., _L2]
    no_range = least[..., _LOW] > greatest[..., _LOW]
    floats = np.where(is_absent[..., None], np.nan, np.stack([rows[name] for name in FLOATS], -1))
    floats[no_range, -2:] = np.nan
    return floats


@np.errstate(invalid="ignore")
def _units(least: Array, greatest: Array) -> tuple[Array, Array, Array, Array, Array]:
    """Least and greatest mean, and what makes squares neither overflow nor underflow."""
    is_any = least[..., _MEAN] <= greatest[..., _MEAN]
    low, high = (np.where(is_any, each[..., _MEAN], 0.0) for each in (least, greatest))
    # A quarter of two large means differs by a number that float64 holds.
    shrink = np.where(np.fmax(abs(low), abs(high)) > 1, 0.25, 1.0)
    unit = np.fmax(greatest[..., _STD] * shrink, high * shrink - low * shrink)
    unit = np.where(unit > 0, unit, 1.0)
    norm = greatest[..., _L2]
    norm = np.where(np.isfinite(norm) & (norm > 0), norm, 1.0)
    return low, high, shrink, unit, norm


def _means(bins: Bins, integers: Array, floats: Array) -> Array:
    """Means as `Statistics.merge` takes them, float64 ``(...)``: `mean_between_extremes`."""
    n, total = integers[..., 1], floats[..., FLOATS.index("sum")]
    least, most = floats[..., FLOATS.index("min")], floats[..., FLOATS.index("max")]
    mean: Array = np.divide(total, n, out=np.zeros_like(total), where=n > 0)
    mean = np.where(n > 0, np.where(least == most, least, mean.clip(least, most)), 0.0)
    # Only sums that overflow need all of it: PyTorch's threads wait for each other at each step.
    rows = np.isinf(total)
    if rows.any():
        some, others = torch.from_numpy(integers[rows]), torch.from_numpy(floats[rows])
        mean[rows] = mean_between_extremes(Statistics(bins, some, others, torch.empty(0))).numpy()
    return mean
