"""`Alerts`: calls a function with a finding as soon as a record or a loss shows it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import numpy as np

from gradstat.diagnosis.divergence import REACH, Reached, find_instability, is_untried
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.findings import Finding
from gradstat.diagnosis.nonfinite import find_nonfinite
from gradstat.diagnosis.spikes import find_gradient_spikes, find_loss_spikes
from gradstat.diagnosis.usual import WINDOW
from gradstat.diagnosis.vanishing_exploding import find_growth
from gradstat.history import History
from gradstat.history.records import is_loss, is_rate
from gradstat.record import GRAD, PARAM, UNIT, UPDATE
from gradstat.results import FLOATS, INTEGERS
from gradstat.thresholds import Thresholds
from gradstat.util import Array, median

Alert = Callable[[Finding], object]

_REFRESHED = 8  # records between two looks at what is usual, and values that tell of it
_NEAR = 0.5  # share of a threshold, in the logarithm, from which the rules are asked
_TRIED = 4  # scales one after the other, each of which may overflow
_L2 = FLOATS.index("l2")
_NUMEL, _FINITE = INTEGERS.index("numel"), INTEGERS.index("finite")


class Alerts:
    """Watches records and losses as they come, and asks the rules when one stands out."""

    # A record costs a few operations on arrays of its rows. What `diagnose` would call non-finite,
    # a spike or exploding is told once, and again only when it has cleared in between. Every eighth
    # record tells whether instability is ahead, where the weights grow or steps are large.

    def __init__(self, history: History, function: Alert, *, is_scaled: bool) -> None:
        self._history, self._function, self._is_scaled = history, function, is_scaled
        self._thresholds = Thresholds()
        kinds = np.array(history.kinds)
        self._counted = kinds != UNIT
        self._gradients, self._weights, self._updates = (
            np.flatnonzero(kinds == each) for each in (GRAD, PARAM, UPDATE)
        )
        # Logarithms of the newest records' norms, of each row and of the whole gradient.
        self._ring = np.full((WINDOW, len(kinds) + 1), math.nan)
        self._usual = np.full(len(kinds) + 1, math.inf)
        self._near = np.full(len(kinds) + 1, _NEAR * math.log(self._thresholds.exploding_growth))
        self._near[-1] = _NEAR * math.log(self._thresholds.spike_gradient)
        self._losses: dict[str, deque[float]] = {}  # the newest
        self._n_records = self._n_looked_at = 0
        self._steps: deque[int] = deque(maxlen=WINDOW // _REFRESHED + 1)  # of every eighth record
        self._rates: dict[str, float] = {}
        self._reached = Reached()
        self._is_due = self._is_unstable = self._is_ahead = False
        self._told: set[tuple[str, int]] = set()  # kinds, and of spikes the step of the first value
        self._is_telling = False

    def see_record(self, integers: Array, floats: Array) -> None:
        """A record has come: its integers and floats, ``(L, 8)``."""
        self._n_records += 1
        at = self._n_records % WINDOW
        row = self._ring[at]
        with np.errstate(divide="ignore", invalid="ignore"):
            row[:-1] = np.log(floats[:, _L2])
            row[-1] = np.logaddexp.reduce(2 * row[self._gradients]) / 2
        is_broken = (integers[:, _NUMEL] != integers[:, _FINITE])[self._counted].any()
        if is_broken or (row > self._usual + self._near).any():
            self._is_due = True
        if self._n_records % _REFRESHED == 0:
            before = np.where(np.isfinite(self._ring), self._ring, math.nan)
            self._usual = np.nan_to_num(median(before), nan=math.inf)
            self._is_unstable = self._has_moved(before) and not self._is_learning()

    def _has_moved(self, sizes: Array) -> bool:
        """Whether the weights have grown over a window of records, or a step changes them much."""
        self._steps.append(self._history.last_step)
        if not len(self._weights):
            return False
        at = self._n_records % WINDOW
        ends = sizes[[(at + 1) % WINDOW, at]]
        ends[np.isnan(ends)] = -math.inf
        before, now = np.logaddexp.reduce(2 * ends[:, self._weights], axis=1) / 2
        step = np.logaddexp.reduce(2 * ends[1, self._updates], initial=-math.inf) / 2
        rate = math.log(median(np.array(list(self._rates.values()) or [1.0])))
        with np.errstate(invalid="ignore"):  # of weights that are all zero, or NaN
            growth, pace = now - before, step - now
            self._reached = Reached(*np.fmax(self._reached, (step - rate, pace)).tolist())
            possible = self._reached.step + rate - now
        if len(self._steps) * _REFRESHED <= WINDOW:
            return False
        growth *= WINDOW / (self._steps[-1] - self._steps[0])
        has_moved = bool(
            growth > math.log(self._thresholds.weights_growth) * _NEAR
            or pace > math.log(self._thresholds.weights_pace * _NEAR)
            or is_untried(possible, self._reached.pace)
        )
        self._is_ahead &= has_moved
        return has_moved

    def _is_learning(self) -> bool:
        """Whether a loss falls by a tenth or more in a window of its values, noise apart."""
        for recent in map(list, self._losses.values()):
            before, now = sorted(recent[:_REFRESHED]), sorted(recent[-_REFRESHED:])
            # The upper quartile of the newest, and the lower one of the oldest.
            upper, lower = now[3 * len(now) // 4], before[len(before) // 4]
            if upper < lower - 0.1 * abs(lower):
                return True
        return False

    def see_scalar(self, name: str, value: float) -> None:
        if is_rate(name) and value > 0:
            self._rates[name] = value
        if not is_loss(name):
            return
        recent = self._losses.setdefault(name, deque(maxlen=WINDOW))
        if not math.isfinite(value):
            self._is_due = True
            return
        # Losses below zero have no logarithm: the rules are asked of each that is a new maximum.
        usual = sorted(recent)[len(recent) // 2] if recent else math.inf
        if value > usual + (self._thresholds.spike_loss - 1) * _NEAR * abs(usual):
            self._is_due = True
        recent.append(value)

    def tell(self) -> None:
        """Ask the rules if anything stood out, and tell what is new."""
        if self._is_telling:
            return
        has_records, self._n_looked_at = self._n_records > self._n_looked_at, self._n_records
        self._is_telling = True  # what the function does may log
        try:
            if self._is_unstable:
                self._is_unstable = False
                self._tell_what_is_ahead()
            if not self._is_due:
                # A spike ends by its own rule; what else was there has cleared.
                if self._told and has_records:
                    self._told = {each for each in self._told if each[0].endswith("spike")}
                return
            self._is_due = False
            for finding in self._find():
                begins = finding.steps[0] if finding.kind.endswith("spike") else -1
                if (finding.kind, begins) not in self._told:
                    self._told.add((finding.kind, begins))
                    self._function(finding)
        finally:
            self._is_telling = False

    def _tell_what_is_ahead(self) -> None:
        newest = self._history.newest(REACH)
        newest.logged = self._history.logged
        run = Evidence(newest, self._thresholds.window)
        found = find_instability(run, self._thresholds, self._reached)
        found = [each for each in found if each.steps[1] > self._steps[-2]]
        # The loss wavers; what has been told is over when the weights hardly move.
        if found and not self._is_ahead:
            self._is_ahead = True
            self._function(found[0])

    def _find(self) -> list[Finding]:
        """What the newest record or loss shows."""
        if not len(self._history):
            return []
        run = Evidence(self._history, self._thresholds.window)
        found = find_nonfinite(run, self._thresholds)
        if self._is_scaled:
            # A loss scale that is tried overflows now and then.
            n_records = [np.ptp(np.searchsorted(run.steps, each.steps)) for each in found]
            pairs = zip(found, n_records, strict=True)
            found = [each for each, n in pairs if each.severity == "severe" and n >= _TRIED]
        found += find_loss_spikes(run, self._thresholds)
        found += find_gradient_spikes(run, self._thresholds)
        if len(self._gradients):
            found += find_growth(run.of(GRAD), self._thresholds)
        # A loss may come before its record: its step is then above the newest one.
        newest = int(run.steps[-1])
        return [each for each in found if each.steps[1] >= newest]
