"""`Scalars`: numbers that a run logs at its steps, such as its loss."""

from __future__ import annotations

import math
from array import array
from bisect import bisect_left
from collections.abc import Iterable

import numpy as np

from gradstat.util import Array

_NOT_FINITE = ("nan", "inf", "-inf")


class Scalars:
    """Values by name, each with its step: 16 bytes a value.

    One thread adds; others, and handlers of signals, may read meanwhile: a step is added before its
    value, and is there once its value is.
    """

    def __init__(self) -> None:
        self._series: dict[str, tuple[array[int], array[float]]] = {}

    def add(self, name: str, step: int, value: float) -> None:
        """Append a value.

        Args:
            name: of the scalar; a new one is made.
            step: no lower than that of the value before; several may belong to one step.
            value: any number, NaN and infinities among them.

        Raises:
            ValueError: a lower step.
        """
        series = self._series.get(name)
        if series is None:
            series = self._series[name] = (array("q"), array("d"))
        steps, values = series
        if steps and step < steps[-1]:
            raise ValueError(f"add_scalar() needs steps from {steps[-1]} on; step is {step}")
        del steps[len(values) :]  # what an interrupt has left
        steps.append(step)
        values.append(value)

    def extend(self, other: Scalars, prefix: str = "") -> None:
        """Append the values of another run, or of a later part of this one."""
        for name, (steps, values) in other._series.items():
            self.add_all(prefix + name, steps, values)

    def add_all(self, name: str, steps: Iterable[int], values: Iterable[float]) -> None:
        """Append values of one name."""
        for step, value in zip(steps, values, strict=True):
            self.add(name, step, value)

    def between(self, start: float = -math.inf, end: float = math.inf) -> Scalars:
        """Those of the steps from a first one on and before a last one."""
        kept = Scalars()
        for name, series in list(self._series.items()):
            steps, values = _cut(series)
            part = slice(bisect_left(steps, start), bisect_left(steps, end))
            if part.start < part.stop:
                kept._series[name] = steps[part], values[part]
        return kept

    @property
    def names(self) -> list[str]:
        """In the order in which they were first logged."""
        return list(self._series)

    def get(self, name: str) -> tuple[Array, Array]:
        """Steps, int64 ``(N,)``, and values, float64 ``(N,)``: copies."""
        steps, values = _cut(self._series[name])
        return np.array(steps, np.int64), np.array(values, np.float64)

    def copy(self) -> Scalars:
        """The same values, to which later ones are not added."""
        copied = Scalars()
        copied._series = {name: _cut(each) for name, each in list(self._series.items())}
        return copied

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the values take."""
        return sum(16 * len(steps) for steps, _ in list(self._series.values()))


def _cut(series: tuple[array[int], array[float]]) -> tuple[array[int], array[float]]:
    """A copy of as many steps as have values; to look into the arrays would keep them small."""
    steps, values = series
    copied = values[:]
    return steps[: len(copied)], copied


def json_number(value: float) -> float | str:
    """A value as files have it: JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(float(value))


def parse_json_number(value: object) -> float:
    """A value from what files have of it.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, int | float) or value in _NOT_FINITE:
        return float(value)
    raise ValueError(f"its scalars hold {value!r:.80}, which is no number")
