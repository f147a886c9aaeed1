"""Compiled: a tensor's row of results from its partial."""

from __future__ import annotations

import math

import numpy as np

from gradstat.engines.cpu_blocks import (
    CENTRAL,
    FINITE,
    L1,
    LARGEST,
    MAX,
    MIN,
    NEGINF,
    SQUARES,
    SUM,
    UNIT,
    narrow,
)
from gradstat.engines.cpu_compile import Array, compiled
from gradstat.engines.cpu_counts import ABOVE, BELOW
from gradstat.results import FLOATS, INTEGERS

LOW, HIGH = FLOATS.index("low"), FLOATS.index("high")
_NAN, _POSINF, _NEGINF = (INTEGERS.index(name) for name in ("nan", "posinf", "neginf"))


@compiled
def write_values(total: Array, numel: int, integers: Array, floats: Array) -> None:
    """A tensor's integers, but for below and above, and its floats, but for the range."""
    n, unit = total[FINITE], total[UNIT]
    integers[0] = numel
    for k in range(FINITE, NEGINF + 1):  # in the order of `INTEGERS`
        integers[k + 1] = np.int64(total[k])
    floats[0] = total[MIN] if n > 0 else np.nan
    floats[1] = total[MAX] if n > 0 else np.nan
    floats[2] = total[SUM] * unit
    # Of equal values it is zero, whatever the rounding of the means.
    central = total[CENTRAL] if total[MIN] < total[MAX] else 0.0
    floats[3] = unit * math.sqrt(central / (n - 1)) if n > 1 else np.nan
    floats[4] = total[L1] * unit
    floats[5] = unit * math.sqrt(total[SQUARES])


@compiled
def write_range(total: Array, floats: Array) -> None:
    """Range from the extremes, as `LinearBins.automatic_range` without ``nice``."""
    if total[FINITE] == 0:
        floats[LOW], floats[HIGH] = 0.0, 1.0
        return
    low = narrow(total[MIN], False, LARGEST)
    high = np.float32(-narrow(-total[MAX], False, LARGEST))
    if low == high:
        half = max(np.float32(abs(low) * np.float32(2.0**-21)), np.float32(0.5))
        low, high = np.float32(low - half), np.float32(high + half)
    floats[LOW] = max(np.float32(low), np.float32(-LARGEST))
    floats[HIGH] = min(np.float32(high), LARGEST)


@compiled
def close_log2_row(floats: Array, counts: Array) -> None:
    """Write the range, and clear the bins that NaN and infinities were counted in."""
    floats[LOW], floats[HIGH] = -np.inf, np.inf
    counts[:4] = 0
    counts[-4:] = 0


@compiled
def close_linear_row(integers: Array) -> None:
    """Take NaN and infinities out of what was counted outside the range."""
    integers[BELOW] -= integers[_NEGINF]
    integers[ABOVE] -= integers[_NAN] + integers[_POSINF]
