"""Layers and units that do not learn: dead, without a gradient, standing still, saturated."""

from __future__ import annotations

import math
from operator import itemgetter

import numpy as np

from gradstat.diagnosis.evidence import Evidence, log2_edges
from gradstat.diagnosis.findings import Finding, Severity, for_all
from gradstat.history.records import is_rate
from gradstat.record import ACTIVATION, GRAD, OF_PARAMETERS, PARAM, UPDATE
from gradstat.thresholds import Thresholds
from gradstat.util import Array, median, plural

_PERSISTENT = 3  # windows in a row, at least, in which a layer stands still
_STEADY = 2.0  # a line from zero or to zero changes threefold between its halves
_END = 0.875  # of a tanh's output, from which on its slope is below a quarter
_ROUNDED = 0.9  # share of elements that do not change at all


def find_dead(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Layers whose whole gradient is zero in a window of records."""
    n_records = len(run.steps)
    by_block = run.by_block(
        lambda part: (part["numel"] > 0) & (part["zeros"] == part["numel"]), np.logical_and.reduce
    )
    columns = np.flatnonzero(by_block.any(0))
    numels, all_zeros = (run.by_row(itemgetter(name), columns) for name in ("numel", "zeros"))
    findings = []
    for (column, numel), (_, zeros) in zip(numels, all_zeros, strict=True):
        layer, mask = run.layers[column], by_block[:, column]
        at = int(np.flatnonzero(mask)[-1])
        records = np.count_nonzero((numel > 0) & (zeros == numel))
        lasting = at == len(mask) - 1 and n_records >= thresholds.window
        sentence = (
            f"All {numel.max()} elements of {layer}'s gradient are zero in {records} of "
            f"{n_records} records: it does not learn."
        )
        numbers = {"records": float(records), "zeros": float(zeros.max())}
        severity: Severity = "severe" if lasting else "warning"
        findings.append(Finding("dead", severity, layer, run.span(mask, at), numbers, sentence))
    return for_all(findings)


def find_absent(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Layers without a gradient in any record of a window or more: one finding for all of them."""
    never = np.flatnonzero(run.totals[:, 1].sum(0) == 0).tolist()
    if not never or len(never) == len(run.layers) or len(run.steps) < thresholds.window:
        return []
    updates = run.of(UPDATE)
    moved = set(np.array(updates.names)[updates.totals[:, 1].sum(0) > 0])
    left_out = [each for each in never if moved and run.names[each] not in moved]
    # Most of a network is left out where the rest is trained alone.
    is_left_out = bool(left_out) and 2 * len(left_out) < len(run.layers)
    first, *rest = left_out if is_left_out else never
    n = len(rest)
    others = f", nor {'do' if n > 1 else 'does'} {plural(n, 'other')}" if n else ""
    why = "frozen, or the loss does not depend on it"
    if is_left_out:
        why = "it is not in the optimizer, and no step moves it"
    sentence = (
        f"{run.layers[first]} has no gradient in any of {len(run.steps)} records{others}: {why}."
    )
    severity: Severity = "warning" if is_left_out else "note"
    numbers, names = {"layers": n + 1.0}, tuple(run.layers[each] for each in rest)
    layer = run.layers[first]
    return [Finding("no gradient", severity, layer, run.all_steps, numbers, sentence, others=names)]


def find_stuck(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Layers that do not move: most of them from the start, or some while the others do."""
    if len(run.history) < run.window or PARAM not in run.history.kinds:
        return []
    # The largest step of each block: what moves now and then is not stuck.
    steps = run.by_block(_ratio, np.fmax.reduce)
    pace = median(np.where(np.isinf(steps), math.nan, steps).T)
    by_record = run.by_record(lambda part: median(_ratio(part).T))
    half = len(by_record) // 2
    early, late = (median(part) for part in (by_record[:half], by_record[half:]))
    if late / _STEADY > early:
        return []  # a learning rate that warms up
    if (pace < thresholds.stuck_ratio).all():
        is_ending = early / _STEADY > late
        # Those that are dead have a finding of their own.
        stuck = np.flatnonzero(np.fmax.reduce(steps) < thresholds.stuck_ratio).tolist()
        stuck = [column for column in stuck if not _is_zero(run, column, slice(None))]
        return [] if is_ending or not stuck else [_all_stuck(run, stuck, pace)]
    if most := _most_rounded(run) or _slow(run, thresholds):
        return [most]
    # Where a schedule has slowed down all layers, none is stuck.
    usual = max(median(pace) / 2, np.fmax.reduce(pace) / 10)
    going = np.flatnonzero(pace >= usual)
    limit = np.minimum(thresholds.stuck_ratio, thresholds.stuck_pace * pace)
    return _stuck_alone(run, steps, pace, going, steps < limit[:, None])


def find_dead_units(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Modules with many units that were zero for a whole batch, in each record of a window."""
    if len(run.steps) < run.window:
        return []
    floors = run.by_block(_dead, lambda share: share.min(0))
    findings = []
    for column in range(_first_with_parameters(run), len(run.layers)):
        mask = floors[:, column] >= thresholds.dead_units_share
        if not mask.any():
            continue
        at = int(np.flatnonzero(mask)[-1])
        block = run.part(run.blocks[at])
        zeros, units = block["zeros"][:, column], block["numel"][:, column]
        least = float((zeros / units).min())
        severe = at == len(mask) - 1 and least >= thresholds.dead_units_severe
        n, layer = int(units[-1]), run.layers[column]
        which = f"All {n} units" if least == 1 else f"{math.ceil(least * n)} of {n} units or more"
        sentence = (
            f"{which} of {run.printed[column]} are zero for every input of a batch, in each of "
            f"{len(units)} records: they add nothing and do not learn."
        )
        numbers, steps = {"share": least, "units": float(n)}, run.span(mask, at)
        severity: Severity = "severe" if severe else "warning"
        findings.append(Finding("dead units", severity, layer, steps, numbers, sentence))
    return for_all(sorted(findings, key=lambda finding: -finding.numbers["share"]))


def find_saturation(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Layers in which most elements that are not zero lie many octaves below the layer's rms."""
    if not run.samples:
        return []
    edges = log2_edges()
    outer = np.maximum(abs(edges[1:]), abs(edges[:-1]))
    limits = np.nan_to_num(run.sampled["rms"]) * 2.0**-thresholds.saturation_octaves
    # Zeros share a bin with the smallest numbers. They are taken away where that bin is counted.
    zeros = run.sampled["zeros"] * (limits >= outer[len(outer) // 2])
    shares = run.shares(lambda at, layers, bins: outer[bins] <= limits[at, layers], zeros)
    times = 2.0 ** min(thresholds.saturation_octaves, 1023)  # no float64 is larger
    said = (
        f"of the non-zero elements of {{layer}}'s gradient are more than {times:.0f} times smaller "
        "than its rms: the units they belong to hardly learn."
    )
    return _saturated(run, shares, thresholds, said)


def find_saturated_outputs(run: Evidence, thresholds: Thresholds) -> list[Finding]:
    """Modules most of whose outputs are at both ends of a range from -1 to 1, as a tanh's are."""
    if not run.samples:
        return []
    sampled = run.sampled
    bounded = (sampled["abs_max"] <= 1) & (sampled["min"] < -_END) & (sampled["max"] > _END)
    at_end = np.minimum(*map(abs, (log2_edges()[1:], log2_edges()[:-1]))) >= _END
    shares = np.where(bounded, run.shares(lambda at, layers, bins: at_end[bins]), 0.0)
    shares[:, : _first_with_parameters(run)] = 0.0
    said = (
        f"of {{layer}}'s outputs are within {1 - _END:g} of 1 or -1, the ends of a tanh, where its "
        "slope is almost zero: what is below it hardly learns. Smaller weights or a norm before it "
        "help."
    )
    return _saturated(run, shares, thresholds, said)


def _saturated(run: Evidence, shares: Array, thresholds: Thresholds, said: str) -> list[Finding]:
    found = []
    for share, column, steps in run.lasting(shares, thresholds.saturation_share):
        layer, numbers = run.layers[column], {"share": share}
        sentence = f"{share:.0%} {said.format(layer=run.printed[column])}"
        found.append(Finding("saturation", "warning", layer, steps, numbers, sentence))
    return for_all(found)


def _ratio(run: Evidence) -> Array:
    """`History.update_ratio`, 0 for weights of zero that stay so: ``(S, L)``."""
    ratio = run.history.update_ratio()[:, run.places]
    return np.where((run["numel"] > 0) & (run["zeros"] == run["numel"]), 0.0, ratio)


def _all_stuck(run: Evidence, stuck: list[int], pace: Array) -> Finding:
    """Most layers, where the median layer has not moved from the start."""
    zeros = _unchanged(run, np.arange(len(run.blocks)), stuck)
    ratio, layer = float(pace.max()), run.names[stuck[0]]
    numbers = {"ratio": ratio, "zeros": zeros, "layers": float(len(stuck))}
    more = f" and {len(stuck) - 1} more of {len(run.layers)} layers" if len(stuck) > 1 else ""
    have = "has" if len(stuck) == 1 else "have"
    rounded = zeros >= _ROUNDED
    why = _why(run, zeros) if rounded else "the learning rate is far too small"
    sentence = (
        f"{layer}{more} {have} not moved from the first record on: "
        f"{_size(ratio, 'the median layer')}; {why}."
    )
    severe = rounded and len(run.blocks) >= _PERSISTENT
    severity: Severity = "severe" if severe else "warning"
    return Finding("stuck", severity, run.layers[stuck[0]], run.all_steps, numbers, sentence)


def _slow(run: Evidence, thresholds: Thresholds) -> Finding | None:
    """All layers, where a step changes the weights by next to nothing and no loss falls."""
    known = run.pace[np.isfinite(run.pace)]
    fastest = float(known.max()) if len(known) else math.inf
    if fastest >= thresholds.stuck_slow or not run.losses or any(map(run.falls, run.losses)):
        return None
    numbers = {"ratio": fastest, "layers": float(len(run.layers))}
    rate = run.rate[np.isfinite(run.rate)]
    of = f", {rate.max():.3g}," if len(rate) else ""
    sentence = (
        f"A step changes the weights by {fastest:.1e} of their size at most, where 0.001 is usual, "
        f"and the loss stays as it is: the learning rate{of} is too small."
    )
    newest = run.part([len(run.steps) - 1])
    column = int(np.nanargmin(np.where(newest["numel"] > 0, newest["rms"], math.nan)))
    return Finding("stuck", "warning", run.layers[column], run.all_steps, numbers, sentence)


def _most_rounded(run: Evidence) -> Finding | None:
    """Most layers, where nearly all elements that have a gradient stay as they are all the time."""
    if len(run.blocks) < _PERSISTENT or run.of(GRAD).layers != run.names:
        return None
    least = run.by_block(_kept, median).min(0)
    rounded = np.flatnonzero(least >= _ROUNDED)
    if 2 * len(rounded) <= len(run.layers):
        return None
    layer = int(rounded[least[rounded].argmax()])
    numbers = {"zeros": float(least[layer]), "layers": float(len(rounded))}
    sentence = (
        f"Most layers hardly learn, {run.names[layer]} and {len(rounded) - 1} more of "
        f"{len(run.layers)}: at least {_percent(least[rounded].min())} of their "
        f"elements that have a gradient stay as they are; the changes round to nothing in the type "
        f"of the weights."
    )
    return Finding("stuck", "warning", run.layers[layer], run.all_steps, numbers, sentence)


def _kept(run: Evidence) -> Array:
    """Share of the elements that have a gradient which a step leaves as they are: ``(S, L)``."""
    gradients = run.of(GRAD)
    free = gradients["numel"] - gradients["zeros"]
    kept = (run["zeros"] - (run["numel"] - free)).clip(0)
    return np.where(free > 0, kept / np.maximum(free, 1), math.nan)


def _stuck_alone(
    run: Evidence, steps: Array, pace: Array, going: Array, still: Array
) -> list[Finding]:
    """Layers that stand still in the last of the blocks in which others go on."""
    if not len(going):
        return []
    least = max(min(_PERSISTENT, len(going)), math.ceil(len(going) / 4))
    findings = []
    for column in np.flatnonzero(still[going[-least:]].all(0)).tolist():
        moved = np.flatnonzero(~still[going, column])
        blocks = going[moved[-1] + 1 if len(moved) else 0 :]
        if _is_zero(run, column, blocks):
            continue
        numbers = {
            "ratio": float(steps[blocks, column].max()),
            "pace": float(np.median(pace[blocks])),
            "zeros": _unchanged(run, blocks, column),
        }
        sentence = (
            f"{run.names[column]} stands still while others move: "
            f"{_size(numbers['ratio'], 'it')}, and the median layer by {numbers['pace']:.1e}"
        )
        if numbers["zeros"] >= _ROUNDED:
            sentence += f"; {_why(run, numbers['zeros'])}"
        layer, span = run.layers[column], run.steps_of(int(blocks[0]), int(blocks[-1]))
        findings.append(Finding("stuck", "warning", layer, span, numbers, sentence + "."))
    return for_all(sorted(findings, key=lambda finding: finding.numbers["ratio"]))


def _is_zero(run: Evidence, column: int, blocks: Array | slice) -> bool:
    """Whether a layer's gradient is known to be all zeros, which `find_dead` says."""
    gradients, name = run.of(GRAD), run.names[column]
    if name not in gradients.layers:
        return False
    zeros, numel = gradients.totals[blocks, :, gradients.layers.index(name)].T
    return np.array_equal(zeros, numel)  # no record has more zeros than elements


def _unchanged(run: Evidence, blocks: Array, columns: list[int] | int) -> float:
    """Share of some layers' elements that a step leaves as they are."""
    zeros, numel = run.totals[blocks][..., columns].reshape(len(blocks), 2, -1).sum((0, 2))
    return float(zeros / max(numel, 1))


def _size(ratio: float, layer: str) -> str:
    if not ratio:
        return f"no step changes {layer}"
    return f"a step changes {layer} by {ratio:.1e} of its size at most"


def _why(run: Evidence, zeros: float) -> str:
    names = filter(is_rate, run.history.scalars)
    rates = np.concatenate([np.zeros(0), *(run.history.scalar(name)[1] for name in names)])
    if len(rates) and not rates.any():
        return "the learning rate is 0"
    which = "no element changes" if zeros == 1 else f"{_percent(zeros)} of the elements do not"
    rounded = f"{which}: the changes round to nothing in the type of the weights"
    return rounded if len(rates) and rates.all() else f"{rounded}, or the learning rate is 0"


def _percent(share: float) -> str:
    # Rounded down: almost all is not 100%.
    return f"{math.floor(share * 1000) / 10:g}%"


def _dead(run: Evidence) -> Array:
    """Share of dead units among those that a batch should reach: ``(S, L)``; 0 where absent."""
    # Were all units on equally often, a share of 1 - z of the time, one of them would be zero in
    # all of a batch's N places with probability z to the N: almost never in a large batch, but
    # where a batch is a single input all of its zeros are that.
    outputs = run.of(ACTIVATION)
    if not outputs.layers:
        return np.nan_to_num(run.history.dead_units()[:, run.places])
    with np.errstate(divide="ignore", invalid="ignore"):
        places = outputs["numel"] / run["numel"]
        on = 1 - outputs["zeros"] / outputs["numel"]
        reached = -np.expm1(places * np.log1p(-on))
        dead = 1 - (1 - run.history.dead_units()[:, run.places]) / reached
    dead = np.where((reached == 0) & (run["numel"] > 0), 1.0, dead)
    return np.nan_to_num(dead)


def _first_with_parameters(run: Evidence) -> int:
    """The first column of a module that has parameters, after the input; 0 where none is known."""
    owners = {name.rpartition(".")[0] for kind in OF_PARAMETERS for name in run.of(kind).names}
    return next((at for at, module in enumerate(run.names) if module in owners), 0)
