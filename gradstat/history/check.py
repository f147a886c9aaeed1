"""What must hold in a run that anybody may have written.

Each check raises ValueError of the first thing that does not, and says where that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from gradstat.bins import Bins
from gradstat.formats import parse_format
from gradstat.record import KINDS, UNIT, Numbers, Row, Unpacked
from gradstat.results import FLOATS, INTEGERS, NO_SCALE_MAX, NO_SCALE_MIN, PACKED
from gradstat.util import Array, windows_of

_N_COUNTS = PACKED.index("scale_min")
_MOST_CHARACTERS = 80  # of a format's name
_MOST_ERROR = 1 + 1e-6  # of a norm: rounding takes nothing further away than zero
_MOST_ELEMENTS = 1 << 60  # no sum of a row's numbers overflows
# A device may count what is smaller as zero: float16's smallest normal number.
_FLUSHED = 2.0**-14
# Rows and filled bins that are checked together: what it takes is small beside a history.
_ROWS, _ENTRIES = 1 << 13, 1 << 17

_Wrong = tuple[Array, str]  # where, bool (N,), and what


def check_rows(rows: Sequence[Row], formats: Sequence[str]) -> None:
    """Refuse rows and formats that no run has."""
    if unknown := {row.kind for row in rows} - set(KINDS):
        raise ValueError(f"its rows are of {min(unknown)!r}, which is none of {', '.join(KINDS)}")
    if len(set(rows)) < len(rows):
        raise ValueError("its rows are not all different")
    for name in formats:
        if len(name) > _MOST_CHARACTERS or parse_format("History.load", name).name != name:
            raise ValueError(f"its formats hold {name!r:.80}, which is none")
    if len(set(formats)) < len(formats):
        raise ValueError("its formats are not all different")


def check_steps(steps: Sequence[int], last_step: int = -1) -> None:
    """Refuse steps that do not rise, after the last one before them."""
    if any(a >= b for a, b in pairwise([last_step, *steps])):
        raise ValueError("its steps do not rise from 0 or more")


def check_numbers(
    rows: Sequence[Row], formats: Sequence[str], steps: Sequence[int], numbers: Numbers
) -> None:
    """Refuse numbers of records, as `Unpacked` has them, that no measurement gives."""
    integers = numbers[0].reshape(-1, len(INTEGERS))
    floats = numbers[1].reshape(-1, len(FLOATS))
    quantized = numbers[2].reshape(len(integers), len(formats), len(PACKED))
    is_cast = np.tile(np.array([row.kind != UNIT for row in rows], bool), len(steps))
    for start in range(0, len(integers), _ROWS):
        part = slice(start, start + _ROWS)
        wrong = [
            *_wrong_integers(integers[part]),
            *_wrong_floats(integers[part], floats[part]),
            *_wrong_formats(integers[part], quantized[part], is_cast[part]),
        ]
        _refuse(wrong, start, rows, steps)


def check_histograms(
    rows: Sequence[Row], bins: Bins, steps: Sequence[int], records: Unpacked
) -> None:
    """Refuse histograms that no measurement gives, where `check_numbers` refuses nothing."""
    sizes = records.sizes
    if (sizes < 0).any() or records.ends[-1:].sum() != len(records.bins):
        raise ValueError(
            f"its histograms do not end one after the other, before {len(records.bins)}"
        )
    integers = records.integers.reshape(-1, len(INTEGERS))
    edges = np.append(0, records.ends)
    # A row takes memory, too.
    for part in windows_of((sizes + _ENTRIES // _ROWS).tolist(), _ENTRIES):
        entries = slice(edges[part.start], edges[part.stop])
        histograms = sizes[part], records.bins[entries], records.counts[entries]
        wrong = _wrong_histograms(integers[part], *histograms, bins.bins)
        _refuse(wrong, part.start, rows, steps)


def _refuse(wrong: Sequence[_Wrong], start: int, rows: Sequence[Row], steps: Sequence[int]) -> None:
    for mask, what in wrong:
        if mask.any():
            step, row = divmod(start + int(mask.argmax()), len(rows))
            raise ValueError(f"its {what}, in step {steps[step]} of {str(rows[row])!r:.80}")


def _wrong_integers(integers: Array) -> list[_Wrong]:
    numel, finite, zeros, nan, posinf, neginf, _, _ = integers.T
    return [
        ((integers < 0).any(1), "numbers of elements are negative"),
        ((integers > _MOST_ELEMENTS).any(1), "numbers of elements are too large"),
        (numel != finite + nan + posinf + neginf, "elements are not those finite and not"),
        (zeros > finite, "zeros are more than its finite elements"),
    ]


def _wrong_floats(integers: Array, floats: Array) -> list[_Wrong]:
    _, finite, zeros, *_ = integers.T
    least, most, _, std, l1, l2, low, high = floats.T
    undefined = np.isnan(floats)
    # Where the sum of magnitudes is beyond float64, the sum and the deviation may be anything.
    undefined[np.isinf(l1), 2:4] = False
    undefined[finite < 2, 3] = False
    return [
        (least > most, "min is above its max"),
        ((finite == 0) & ~(np.isnan(least) & np.isnan(most)), "min and max are of no element"),
        ((finite > 0) & undefined.any(1), "statistics are NaN beside finite elements"),
        ((zeros > 0) & ((least > _FLUSHED) | (most < -_FLUSHED)), "zeros are outside min and max"),
        ((std < 0) | (l1 < 0) | (l2 < 0), "std and norms are negative"),
        (low > high, "range ends below where it begins"),
    ]


def _wrong_formats(integers: Array, quantized: Array, is_cast: Array) -> list[_Wrong]:
    """What is wrong with what formats would do to N rows, ``(N, F, 10)``."""
    numel = integers[:, :1]
    counts, scales, norms = np.split(quantized, [_N_COUNTS, _N_COUNTS + 2], -1)
    nonzero, underflowed, saturated, nonfinite, blocks, empty_blocks = np.moveaxis(counts, -1, 0)
    is_there = ~np.isnan(quantized)
    expected = ((numel[:, 0] > 0) & is_cast)[:, None, None]
    # An empty tensor may have been measured.
    absent = (is_there != expected) & ((numel[:, 0] > 0) | ~is_cast)[:, None, None]
    least, most = np.moveaxis(scales, -1, 0)
    norm, error = np.moveaxis(norms, -1, 0)
    # NaN differs from itself.
    is_cut = (np.floor(quantized) != quantized)[..., : _N_COUNTS + 2]
    with np.errstate(invalid="ignore"):
        wrong = [
            ((counts < 0).any(-1) | (np.maximum(nonzero, nonfinite) > numel), "elements"),
            (underflowed + saturated > nonzero, "lost elements"),
            ((blocks > numel) | (empty_blocks > blocks), "blocks"),
            ((abs(scales) > NO_SCALE_MIN).any(-1), "scales"),
            ((least > most) & ((least < NO_SCALE_MIN) | (most > NO_SCALE_MAX)), "scales"),
            ((norms < 0).any(-1) | (error > norm * _MOST_ERROR), "norms"),
            ((nonzero == 0) & (norm > 0), "norms"),
            (is_cut.any(-1) & is_there.all(-1), "counts"),
        ]
    found = [(mask.any(1), f"formats have {what} that no tensor has") for mask, what in wrong]
    return [(absent.any((1, 2)), "formats are not of the rows that have values"), *found]


def _wrong_histograms(
    integers: Array, sizes: Array, indices: Array, values: Array, bins: int
) -> list[_Wrong]:
    """What is wrong with N histograms; a wrong entry makes its row wrong."""
    finite, below, above = integers[:, 1], integers[:, 6], integers[:, 7]
    ends = np.cumsum(sizes, dtype=np.int64)
    at = indices.astype(np.int64)
    rises = np.diff(at, prepend=-1)
    rises[(ends - sizes)[sizes > 0]] = 1
    entry = (rises <= 0) | (at < 0) | (at >= bins) | (values <= 0) | (values > _MOST_ELEMENTS)
    bad = np.zeros(len(sizes), bool)
    bad[np.searchsorted(ends, np.flatnonzero(entry), side="right")] = True
    total = np.append(0, np.cumsum(np.where(entry, 0, values), dtype=np.int64))
    sums = total[ends] - total[ends - sizes]
    # What overflows int64 does not overflow float64.
    huge = float(values.sum(dtype=np.float64)) > 2.0**62
    return [
        (bad, f"histogram has counts that are not positive or not in the order of {bins} bins"),
        (np.full(len(sizes), huge), "counts are too large"),
        (sums != finite - below - above, "counts do not sum to its finite elements in the range"),
    ]
