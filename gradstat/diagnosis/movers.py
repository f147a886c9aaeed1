"""Rows that leave their bands, in the order in which they do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from gradstat.diagnosis.bands import WINDOW, log, outside
from gradstat.diagnosis.findings import rounded
from gradstat.diagnosis.run import Run, around
from gradstat.record import ACTIVATION, GRAD, GRAD_OUTPUT, NOUNS, PARAM, UNIT, UPDATE
from gradstat.util import Array

# In the order in which a step computes them; the loss comes after the forward pass.
_PHASES = {PARAM: 0, ACTIVATION: 1, GRAD_OUTPUT: 3, GRAD: 4, UPDATE: 5}
LOSS, GRADIENT = 2, 3
# Half-widths of a row's band, at least, as factors: weights move little, gradients much.
FLOORS = {PARAM: 1.1, ACTIVATION: 2.0, GRAD_OUTPUT: 3.0, GRAD: 3.0, UPDATE: 3.0}
_LARGEST = 700.0  # whose exponential is finite
APART = 2  # records between what belongs together


@dataclass(frozen=True)
class Mover:
    """A row that has left its band.

    Args:
        column: of the run's rows.
        at: position of the record in which it did.
        times: its greatest multiple of its median there.
    """

    column: int
    at: int
    times: float


def rows_of(run: Run) -> Array:
    """Logarithms of the rows' rms, ``(S, L)``; infinite where not all elements are finite."""
    x = log(run["rms"])
    x[run["numel"] > run["finite"]] = math.inf
    # The peaks of units are those of activations.
    x[:, np.array(run.kinds) == UNIT] = math.nan
    return x


def find_movers(
    run: Run, x: Array, record: int, step: int, phase: int, deviations: float
) -> tuple[list[Mover], list[Mover]]:
    """Rows that were outside their bands when a spike began, in the order in which they left them.

    Args:
        run: all rows.
        x: their logarithms.
        record: position of the newest record at that step or before it.
        step: at which it began.
        phase: of the step in which it did.
        deviations: half-width of the bands.

    Returns:
        Those that left them before it, and those that did with it or after it.
    """
    if record < 0:
        return [], []
    first = max(0, record - WINDOW)
    at, columns = np.mgrid[first : record + 1, : x.shape[1]]
    floors = np.log([FLOORS.get(kind, 1.0) for kind in run.kinds])
    is_out, typical, _ = outside(
        x, at.ravel(), columns.ravel(), floors[columns.ravel()], deviations
    )
    is_out, over = is_out.reshape(at.shape), x[first : record + 1] - typical.reshape(at.shape)
    is_same = int(run.steps[record]) == step
    before: list[Mover] = []
    together: list[Mover] = []
    for column in np.flatnonzero(is_out[-APART:].any(0)).tolist():
        newest = int(np.flatnonzero(is_out[:, column])[-1])
        left, _ = around(is_out[:, column], newest)
        farthest = float(over[left : newest + 1, column].max())
        times = math.exp(farthest) if farthest < _LARGEST else math.inf
        mover = Mover(column, first + left, times)
        earlier = mover.at < record or not is_same or _PHASES[run.kinds[column]] < phase
        (before if earlier else together).append(mover)
    before.sort(key=lambda mover: _order(run, mover))
    if _is_batch(run, before, record):
        return [], before + together
    return before, together


def _order(run: Run, mover: Mover) -> tuple[float, ...]:
    kind = run.kinds[mover.column]
    # Modules one after the other; of others the one that is farthest out.
    within = mover.column if kind == ACTIVATION else -mover.times
    return mover.at, _PHASES[kind], within


def _is_batch(run: Run, moved: list[Mover], record: int) -> bool:
    """Whether outputs alone moved, in that very step, from the first module on."""
    if not moved or any(run.kinds[m.column] != ACTIVATION or m.at != record for m in moved):
        return False
    present = run["numel"][record] > 0
    outputs = np.flatnonzero((np.array(run.kinds) == ACTIVATION) & present)
    return bool(moved[0].column == outputs[0])


def tell(run: Run, moved: list[Mover], begin: int) -> str:
    """A sentence about rows that moved before a spike began at a step, the first one first."""
    first = moved[0]
    ahead = begin - int(run.steps[first.at])
    when = f"{ahead} step{'s' * (ahead > 1)} before" if ahead else "in the same step"
    size = (
        "not finite" if math.isinf(first.times) else f"{rounded(first.times)} times its usual size"
    )
    others = [named(run, mover.column) for mover in moved[1:3]]
    then = f"; then {', '.join(others)}" if others else ""
    if len(moved) > 3:
        then += f" and {len(moved) - 3} more"
    return f"First to leave its band was {named(run, first.column)}, {size}, {when}{then}."


def named(run: Run, column: int) -> str:
    """A row in words."""
    return f"{run.names[column]}'s {NOUNS[run.kinds[column]]}"
