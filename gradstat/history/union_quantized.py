"""What narrow formats would do to the union of many parts, from extremes and sums over the parts.

A part has `PACKED` fields for each row and format, float64, NaN where the row is absent. Counts are
exact: they are far below 2**53.
"""

from __future__ import annotations

import numpy as np

from gradstat.results import PACKED
from gradstat.util import Array

_N_COUNTS = PACKED.index("scale_min")
_LEAST, _GREATEST, _NORM, _ERROR = range(4)  # columns of `extremes_of`


def extremes_of(quantized: Array) -> Array:
    """Numbers whose extremes over the parts are taken, float64 ``(..., 4)``.

    Args:
        quantized: float64 ``(..., 10)``.
    """
    extremes: Array = quantized[..., _N_COUNTS:]
    return extremes


def terms(quantized: Array, greatest: Array) -> Array:
    """What `union_quantized` needs the sum over the parts of, float64 ``(..., 8)``.

    Args:
        quantized: of parts.
        greatest: of `extremes_of`, over all parts; minus infinity where no part has any.
    """
    squares = (quantized[..., _N_COUNTS + _NORM :] / _units(greatest)) ** 2
    found = np.concatenate([quantized[..., :_N_COUNTS], squares], -1)
    # What is absent has nothing to add.
    found[np.isnan(found)] = 0.0
    return found


def union_quantized(sums: Array, least: Array, greatest: Array) -> Array:
    """The fields of the union, float64 ``(..., 10)``.

    Args:
        sums: of `terms`, over the parts.
        least: of `extremes_of`, over all parts; plus infinity where no part has any.
        greatest: as for `terms`.
    """
    norms = _units(greatest) * np.sqrt(sums[..., _N_COUNTS:])
    scales = np.stack([least[..., _LEAST], greatest[..., _GREATEST]], -1)
    whole = np.concatenate([sums[..., :_N_COUNTS], scales, norms], -1)
    whole[least[..., _NORM] > greatest[..., _NORM]] = np.nan
    return whole


def union_of(parts: Array) -> Array:
    """The same of parts that are at hand.

    Args:
        parts: float64 ``(P, ..., 10)``.
    """
    extremes = extremes_of(parts)
    least = np.nan_to_num(np.fmin.reduce(extremes), nan=np.inf, posinf=np.inf)
    greatest = np.nan_to_num(np.fmax.reduce(extremes), nan=-np.inf, posinf=np.inf)
    return union_quantized(terms(parts, greatest).sum(0), least, greatest)


def _units(greatest: Array) -> Array:
    """What makes squares of norms neither overflow nor underflow, ``(..., 2)``."""
    norms = greatest[..., _NORM:]
    units: Array = np.where(np.isfinite(norms) & (norms > 0), norms, 1.0)
    return units
