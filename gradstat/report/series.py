"""One number a step, for the lines above the map: losses, the norm, learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from gradstat.diagnosis.evidence import is_loss, is_rate
from gradstat.history import History
from gradstat.record import NOUNS
from gradstat.report.thin import Columns
from gradstat.util import Array, divide

Numbers: TypeAlias = tuple[Array, Array]  # steps, which do not fall, and a value at each

_MAX_SERIES = 3  # of a kind
_FLOAT32 = 1e38


@dataclass(frozen=True)
class Series:
    """One number a step, in the columns of a history; NaN where a column has none.

    Args:
        mean: of the finite values of each column, float32 ``(T,)``.
        least: of them.
        most: of them.
        nonfinite: NaN and infinite values, int64 ``(T,)``.
    """

    mean: Array
    least: Array
    most: Array
    nonfinite: Array


def series(history: History, columns: Columns) -> dict[str, Series]:
    """Losses, the norm of the first kind and learning rates, a few of each, by name."""
    named = {name: history.scalar(name) for name in history.scalars}
    kind = history.kinds[0]
    return series_of(named, kind, (history.steps, norm_of(history, kind)), columns.steps[:, 0])


def norm_of(history: History, kind: str) -> Array:
    """The norm at each step; NaN where an element is not finite: `History.norm` leaves it out."""
    rows = np.array(history.kinds) == kind
    broken = (history["finite"] < history["numel"])[:, rows].any(1)
    return np.where(broken, np.nan, history.norm(kind))


def series_of(
    scalars: Mapping[str, Numbers], kind: str, norm: Numbers, first: Array
) -> dict[str, Series]:
    """As `series`.

    Args:
        scalars: steps and values of each, by name.
        kind: whose norm it is.
        norm: its steps and values.
        first: first step of each column.

    Returns:
        What is drawn of each, by name.
    """
    losses = [name for name in scalars if is_loss(name)]
    rates = list(filter(is_rate, scalars))
    # Of many groups, those whose rate changes.
    rates = [name for name in rates if np.ptp(scalars[name][1]) > 0] or rates[:1]
    named = {name: scalars[name] for name in losses[:_MAX_SERIES]}
    named[f"{NOUNS[kind]} norm"] = norm
    named |= {name: scalars[name] for name in rates[:_MAX_SERIES]}
    return {name: _in_columns(*values, first) for name, values in named.items()}


def _in_columns(steps: Array, values: Array, first: Array) -> Series:
    at = np.maximum(np.searchsorted(first, steps, "right") - 1, 0)
    finite = np.isfinite(values)
    at, known = at[finite], np.clip(values[finite], -_FLOAT32, _FLOAT32)
    least, most = (np.full(len(first), np.nan) for _ in range(2))
    np.fmin.at(least, at, known)
    np.fmax.at(most, at, known)
    n = np.bincount(at, minlength=len(first))
    mean = divide(np.bincount(at, known, len(first)), n)
    broken = np.maximum(np.searchsorted(first, steps[~finite], "right") - 1, 0)
    mean, least, most = (x.astype(np.float32) for x in (mean, least, most))
    return Series(mean, least, most, np.bincount(broken, minlength=len(first)))
