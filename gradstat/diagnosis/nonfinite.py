"""NaN and infinities in rows of any kind: where a step first met them, and what made them."""

from __future__ import annotations

import numpy as np

from gradstat.diagnosis.evidence import Evidence, spans_of
from gradstat.diagnosis.findings import Finding, Severity
from gradstat.history.records import is_loss
from gradstat.record import ACTIVATION, FROM_THE_END, GRAD, GRAD_OUTPUT, PARAM, UNIT, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array, plural

# In the order in which a step computes them; the peaks of units are those of activations.
_FORWARD, _BACKWARD = (PARAM, ACTIVATION), (GRAD_OUTPUT, GRAD, UPDATE)
_FIRST_MET = {
    PARAM: "{} is the first parameter with NaN or infinity",
    ACTIVATION: "The output of {} is the first, as modules run, with NaN or infinity",
    GRAD_OUTPUT: "The gradient of the output of {} is the first, from the last module back, with "
    "NaN or infinity",
    GRAD: "{} is where backward first met NaN or infinity",
    UPDATE: "{} is the first parameter whose change has NaN or infinity in it",
}
_EARLY, _LASTING = 20, 3  # records in which a mask is there, and that say that all of them are
_HALVINGS = 24  # from the scale that a GradScaler begins with to one that fits
_OTHERS = {PARAM: "parameter", ACTIVATION: "module", GRAD_OUTPUT: "module", UPDATE: "parameter"}


def find_nonfinite(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """NaN or infinities: where they come from, those that last and those that passed."""
    bad = _broken(run)
    # What follows NaN is no finding of its own: records in a row are one episode, and the first of
    # them shows where it began.
    episodes = spans_of(np.asarray(bad.any(1)))
    groups = [[each for each in episodes if each[1] == len(bad)]]
    for kinds in (_FORWARD, _BACKWARD):
        passed = [each for each in episodes if each[1] < len(bad)]
        groups.append([each for each in passed if _kind(run, bad[each[0]]) in kinds])
    return [_finding(run, bad, group, thresholds) for group in groups if group]


def _broken(run: Evidence) -> Array:
    """Whether a row has NaN, or infinities that mean something: ``(S, L)``."""
    bad: Array = run.by_record(lambda part: part["numel"] > part["finite"])
    bad &= ~run.is_kind(UNIT)
    # Masks of attention hold infinities while all is well.
    harmless = bad & run.is_kind(*_FORWARD)
    if harmless.any():
        harmless &= run.by_record(lambda part: part["nan"] == 0)
    # A mask is there from early on, or now and then; an overflow begins, and goes on.
    first = np.where(bad.any(0), bad.argmax(0), len(bad))
    goes_on = np.count_nonzero(bad, 0) == len(bad) - first
    begins = (first >= _EARLY) & goes_on & (len(bad) - first >= _LASTING)
    harmless &= ~begins
    well = ~(bad & ~harmless).any(1)
    bad &= ~(harmless & harmless[well].any(0))
    return bad


def _kind(run: Evidence, bad: Array) -> str:
    """The kind of rows that a step reached first, of some rows."""
    return next(kind for kind in (*_FORWARD, *_BACKWARD) if (bad & run.is_kind(kind)).any())


def _finding(
    run: Evidence, bad: Array, episodes: list[tuple[int, int]], thresholds: Thresholds
) -> Finding:
    """Episodes of some records in a row, all of which passed or the one that did not."""
    (at, _), end = episodes[0], episodes[-1][1]
    kind = _kind(run, bad[at])
    columns = np.flatnonzero(bad[at] & run.is_kind(kind)).tolist()
    column = _first(run, kind, columns)
    n_records = sum(last - first for first, last in episodes)
    is_gradient, has_passed = kind in (GRAD, GRAD_OUTPUT), end < len(bad)
    # A NaN that is applied stays in the weights: a gradient whose NaN passed was not.
    is_skipped = (is_gradient and has_passed) or _is_search(run, bad, at)
    few = n_records <= thresholds.nonfinite_share * len(bad)
    record = run.part([at])
    numbers = {
        name: float(record[name][0, column]) for name in ("nan", "posinf", "neginf", "numel")
    }
    numbers |= {"records": float(n_records), "layers": float(len(columns))}
    others = len(columns) - 1
    rest = f", before {plural(others, 'other ' + _OTHERS.get(kind, 'layer'))}"
    sentence = (
        f"{_FIRST_MET[kind].format(run.printed[column])}, at step {run.steps[at]}"
        f"{rest * (others > 0)}: of {numbers['numel']:,.0f} elements {_count(numbers)}. This holds "
        f"for {n_records} of {len(bad)} records"
        + ", the newest not among them" * has_passed
        + "; a GradScaler skips such steps while it looks for its scale" * is_skipped
        + "."
    )
    if is_gradient and not is_skipped:
        sentence += _what_made_it(run, at, column)
    steps = (int(run.steps[at]), int(run.steps[end - 1]))
    severity: Severity = "warning" if is_skipped or (has_passed and few) else "severe"
    return Finding("non-finite", severity, run.layers[column], steps, numbers, sentence)


def _count(numbers: dict[str, float]) -> str:
    """How many elements are NaN and how many infinite, in words."""
    infinite = numbers["posinf"] + numbers["neginf"]
    parts = [(numbers["nan"], "NaN"), (infinite, "infinite")]
    (n, what), *more = [part for part in parts if part[0]]
    others = [f" and {m:,.0f} {other}" for m, other in more]
    return f"{n:,.0f} {'is' if n == 1 else 'are'} {what}{''.join(others)}"


def _is_search(run: Evidence, bad: Array, at: int) -> bool:
    """Whether all records from the start have infinite gradients and nothing else is broken."""
    # A scale halves with each step that it makes overflow.
    if at > 0 or len(bad) > _HALVINGS:
        return False
    infinite = (run["posinf"] + run["neginf"] > 0) & run.is_kind(GRAD)
    whole = infinite.any(1).all() and not (bad & run.is_kind(*_FORWARD, UPDATE)).any()
    return bool(whole) and not any(_lost(run, record) for record in range(len(bad)))


def _first(run: Evidence, kind: str, columns: list[int]) -> int:
    """The row that is computed first, of some rows of a kind in the order of their depth."""
    if kind in FROM_THE_END:
        return columns[-1]
    found, *rest = columns
    if run.history.depth is None:
        # A module is seen after its parts, but registered before them.
        for column in rest:
            if run.names[column].startswith(f"{run.names[found]}."):
                found = column
    return found


def _what_made_it(run: Evidence, at: int, column: int) -> str:
    """What made NaN that backward met, if it was no layer; else ""."""
    present = run.part([at])["numel"][0] > 0
    is_last = column == np.flatnonzero(run.is_kind(run.kinds[column]) & present)[-1]
    lost, has_outputs = _lost(run, at), (present & run.is_kind(ACTIVATION)).any()
    if has_outputs and (is_last or lost):
        return f" All outputs are finite in that step{lost}: the loss made it, not a layer."
    if not is_last:
        return ""
    return (
        f" Backward computes that gradient first{lost}: the forward pass or the loss made it, not "
        f"this layer; what=('grad', 'activation') shows where."
    )


def _lost(run: Evidence, at: int) -> str:
    """The loss in a record's step, in words, if it was not finite; else ""."""
    for name in filter(is_loss, run.history.scalars):
        steps, values = run.history.scalar(name)
        here = values[steps == run.steps[at]]
        if len(here) and not np.isfinite(here).all():
            return f" and {name} is {here[~np.isfinite(here)][0]}"
    return ""
