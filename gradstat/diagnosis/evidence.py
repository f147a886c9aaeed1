"""`Evidence`: what the rules of `diagnose` read of a history, in windows of records."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch

from gradstat.bins import FLOAT64_MAX, Log2Bins
from gradstat.history import History
from gradstat.history.records import is_loss, is_rate
from gradstat.record import GRAD, PARAM, UPDATE
from gradstat.util import Array, divide, evenly_spread, median, windows_of

_MAX_BLOCKS = 200
_MAX_SAMPLES = 64
# Numbers of a field that are in memory at a time: of some records, and of some rows.
_CELLS, _SERIES = 1 << 19, 1 << 22
_SOFT = 1e-3  # share of the loss at the start below which its logarithm says little
_FIRST = 32  # losses that say how large one is
_LARGEST = FLOAT64_MAX / 4  # of which two can be added
_LEVEL, _FALL = 8, 0.03  # losses whose median is their level; how far it falls, a logarithm
_PERSISTENT = 3  # sampled records in a row that must show something


class Evidence:
    """What the rules read: L rows of a history, in blocks of a window's records, 200 at most."""

    # Of a long run the rules read some records at a time, `by_record` and `by_block`, or some rows
    # at a time, `by_row`: arrays of all records and rows would grow with it. A part's history lacks
    # what was logged before it: it is given its `log_rate`.

    def __init__(
        self, history: History, window: int, kind: str | None = None, log_rate: Array | None = None
    ) -> None:
        self.history, self.window, self.steps = history, window, history.steps
        self._kind = kind
        kinds = dict.fromkeys(history.kinds) if kind is None else (kind,)
        by_kind = [np.flatnonzero(np.array(history.kinds) == each) for each in kinds]
        ordered = [history.by_depth(columns) for columns in by_kind]
        # Rows of a kind come together, the one nearest to the input first.
        self.columns = np.concatenate([np.zeros(0, np.int64), *ordered])
        rows = [history.rows[column] for column in self.columns]
        self.kinds = [row.kind for row in rows]
        self.names = [row.name for row in rows]
        self.printed = [row.name + history.type_of(row) for row in rows]  # modules with their type
        self.layers = [history.layers[column] for column in self.columns]
        self._fields: dict[str, Array] = {}
        self._of_kind: dict[str, Evidence] = {}
        n_blocks = max(1, min(len(history) // window, _MAX_BLOCKS))
        self.blocks = np.array_split(np.arange(len(history)), n_blocks)  # positions of records
        if log_rate is not None:
            self.log_rate = log_rate

    def __getitem__(self, field: str) -> Array:
        """A field of `Statistics`, ``(S, L)``, which is kept."""
        if field not in self._fields:
            self._fields[field] = self.history[field][:, self.columns]
        return self._fields[field]

    def of(self, kind: str) -> Evidence:
        if kind not in self._of_kind:
            self._of_kind[kind] = Evidence(self.history, self.window, kind, self.log_rate)
        return self._of_kind[kind]

    def part(self, places: Sequence[int] | Array) -> Evidence:
        """The same rows of the records at some places, which rise."""
        part = self.history.at(np.asarray(places).tolist())
        return Evidence(part, self.window, self._kind, self.log_rate[places])

    def parts(
        self, blocks: Sequence[Array] | None = None
    ) -> Iterator[tuple[Evidence, list[Array]]]:
        """The run in parts that fit in memory, each with the positions in it of its blocks."""
        blocks = self.blocks if blocks is None else blocks
        n_rows = len(self.history.rows)  # of all kinds are read
        for span in windows_of([len(block) * n_rows for block in blocks], _CELLS):
            some = blocks[span]
            part = self if len(some) == len(blocks) else self.part(np.concatenate(some))
            yield part, [block - some[0][0] for block in some]

    def by_record(self, values: Callable[[Evidence], Array]) -> Array:
        """What each record has, ``(S, ...)``, by the values of the records of a part."""
        return np.concatenate([values(part) for part, _ in self.parts()])

    def by_block(
        self,
        values: Callable[[Evidence], Array],
        reduced: Callable[[Array], Array],
        blocks: Sequence[Array] | None = None,
    ) -> Array:
        """What each block has, ``(B, ...)``: its records' values, of a part, reduced to one."""
        found: list[Array] = []
        for part, its_blocks in self.parts(blocks):
            numbers = values(part)
            found += [reduced(numbers[block]) for block in its_blocks]
        return np.stack(found)

    def by_row(
        self, values: Callable[[Evidence], Array], columns: Array | None = None
    ) -> Iterator[tuple[int, Array]]:
        """Columns of some rows, by default of all, and what each has in all records, ``(S,)``."""
        columns = np.arange(len(self.layers)) if columns is None else columns
        size = max(1, _SERIES // len(self.steps))
        for start in range(0, len(columns), size):
            some = columns[start : start + size]
            series = np.concatenate([values(part)[:, some] for part, _ in self.parts()])
            yield from zip(some.tolist(), series.T, strict=True)

    def is_kind(self, *kinds: str) -> Array:
        return np.isin(self.kinds, kinds)

    @property
    def places(self) -> Array:
        """Where each row is among the same rows in the order of the history, ``(L,)``."""
        return np.searchsorted(np.sort(self.columns), self.columns)

    @cached_property
    def nonzero(self) -> Array:
        """Elements that are finite and not zero: int64 ``(S, L)``."""
        return np.asarray(self["finite"] - self["zeros"])

    @cached_property
    def rms(self) -> Array:
        """Rms of the elements that are not zero, ``(S, L)``; NaN without any, finite elsewhere."""
        l2 = np.minimum(self["l2"], FLOAT64_MAX)
        return divide(l2, np.sqrt(self.nonzero))

    @cached_property
    def log_rms(self) -> Array:
        """Logarithm of `rms`, ``(S, L)``; infinite where not all elements are finite."""
        x = log(self.rms)
        x[self["numel"] > self["finite"]] = math.inf
        return x

    @cached_property
    def rate(self) -> Array:
        """Learning rate of the median group at each record: ``(S,)``; NaN if unknown."""
        groups = list(filter(is_rate, self.history.scalars))
        rates = np.full((max(len(groups), 1), len(self.steps)), math.nan)
        for at, name in enumerate(groups):
            steps, values = self.history.scalar(name)
            newest = np.searchsorted(steps, self.steps, "right") - 1
            rates[at] = np.where(newest >= 0, values[newest.clip(0)], math.nan)
        return median(np.where(rates > 0, rates, math.nan))

    @cached_property
    def log_rate(self) -> Array:
        """Logarithm of `rate`: ``(S,)``; 0 where none is known of any record."""
        return np.zeros(len(self.steps)) if np.isnan(self.rate).all() else np.log(self.rate)

    @cached_property
    def sizes(self) -> Array:
        """`log_rms`; of updates that a gradient made, per learning rate, which explains them."""
        sizes, updates = self.log_rms.copy(), self.is_kind(UPDATE)
        sizes[:, updates] -= self.log_rate[:, None]
        gradients = dict(zip(self.of(GRAD).names, self.of(GRAD).log_rms.T, strict=True))
        for column in np.flatnonzero(updates).tolist():
            gradient = gradients.get(self.names[column])
            if gradient is not None:  # weight decay alone, or momentum, where it is zero
                sizes[np.isnan(gradient), column] = math.nan
        return sizes

    @cached_property
    def pace(self) -> Array:
        """Norm of a step's change as a share of that of all weights: ``(S,)``; NaN if unknown."""
        if not {UPDATE, PARAM} <= set(self.history.kinds):
            return np.full(len(self.steps), math.nan)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            return np.asarray(self.norm(UPDATE) / self.norm(PARAM))

    def norm(self, kind: str) -> Array:
        return self.by_record(lambda part: part.history.norm(kind))

    @cached_property
    def losses(self) -> dict[str, tuple[Array, Array]]:
        """Steps of each loss of training, and its mean over the passes of each."""
        found = {}
        for name in filter(is_loss, self.history.scalars):
            steps, values = self.history.scalar(name)
            steps, first = np.unique(steps, return_index=True)
            n_passes = np.diff(np.append(first, len(values)))
            # A sum of large ones would overflow.
            found[name] = steps, np.add.reduceat(values / np.repeat(n_passes, n_passes), first)
        return found

    def falls(self, name: str, record: int = 0, within: int | None = None) -> bool:
        """Whether a loss falls beyond its noise from a record on, within so many or at all."""
        steps, losses = self.losses[name]
        x = log_losses(losses)
        at = int(np.searchsorted(steps, self.steps[record]))
        before = x[max(0, at - _LEVEL) : at + 1] if at else x[:_LEVEL]
        after = x[-_LEVEL:] if within is None else x[at + within - _LEVEL :][:_LEVEL]
        if not len(before) or not len(after):
            return True
        level = float(np.median(before))
        noise = float(median(abs(before - level)))
        return level - float(np.median(after)) > max(2 * noise, _FALL)

    @cached_property
    def levels(self) -> Array:
        """Median rms of the elements that are not zero, by block: ``(B, L)``; NaN without any."""
        return self.by_block(lambda part: part.rms, median)

    @cached_property
    def totals(self) -> Array:
        """Zeros and elements of all records of each block: float64 ``(B, 2, L)``."""
        return self.by_block(
            lambda part: np.stack([part["zeros"], part["numel"]], 1, dtype=np.float64),
            lambda x: x.sum(0),
        )

    @cached_property
    def format_levels(self) -> dict[str, dict[str, Array]]:
        """By format and field: what it would do to each block, ``(B, L)``; NaN for zeros alone."""
        return {name: self._levels_of(name) for name in self.history.formats}

    def _levels_of(self, name: str) -> dict[str, Array]:
        def values(part: Evidence) -> Array:
            fields = part.history.quantization(name)
            found = np.stack([fields[field] for field in _OF_FORMATS], 1)
            return np.where(fields["nonzero"][:, None] == 0, math.nan, found)[..., self.columns]

        def reduced(x: Array) -> Array:
            return np.stack([put(x[:, at]) for at, put in enumerate(_OF_FORMATS.values())])

        levels = self.by_block(values, reduced)
        return {field: levels[:, at] for at, field in enumerate(_OF_FORMATS)}

    @cached_property
    def sampled(self) -> Evidence:
        """At most 64 records, evenly spread, the newest among them."""
        return self.part(evenly_spread(len(self.history), _MAX_SAMPLES))

    @cached_property
    def samples(self) -> list[tuple[Array, Array, Array]]:
        """Layer, number and count of each filled bin, by sample; no samples over linear bins."""
        if not isinstance(self.history.bins, Log2Bins):
            return []
        found, records = [], self.sampled.history
        for at in range(len(records)):
            sizes, bins, counts = records.at([at]).unpack().histograms(self.columns)
            found.append((np.repeat(np.arange(len(sizes)), sizes), bins, counts))
        return found

    def shares(
        self, chosen: Callable[[int, Array, Array], Array], zeros: Array | float = 0.0
    ) -> Array:
        """Shares of the non-zero elements that are in some bins, ``(samples, L)``."""
        # Bins are chosen by sample, layers and numbers. Zeros that are in them are not counted.
        counted = [
            np.bincount(layers, counts * chosen(at, layers, bins), len(self.layers))
            for at, (layers, bins, counts) in enumerate(self.samples)
        ]
        return np.asarray((np.stack(counted) - zeros) / np.maximum(self.sampled.nonzero, 1))

    @property
    def all_steps(self) -> tuple[int, int]:
        return int(self.steps[0]), int(self.steps[-1])

    def span(self, mask: Array, at: int) -> tuple[int, int]:
        """First and last step of the blocks around one that a mask, ``(B,)``, holds together."""
        return self.steps_of(*around(mask, at))

    def steps_of(self, first: int, last: int) -> tuple[int, int]:
        return int(self.steps[self.blocks[first][0]]), int(self.steps[self.blocks[last][-1]])

    def lasting(self, shares: Array, limit: float) -> list[tuple[float, int, tuple[int, int]]]:
        """Layers whose share, ``(samples, L)``, stays at a limit or above it, the largest first."""
        # The largest share of each, its column, and the first and last step.
        least, steps = min(_PERSISTENT, len(shares)), self.sampled.steps.tolist()
        found = []
        for column, share in enumerate(shares.T):
            spans = [span for span in spans_of(share >= limit) if span[1] - span[0] >= least]
            if spans:
                first, end = max(spans, key=lambda span: share[slice(*span)].max())
                largest = float(share[first:end].max())
                found.append((largest, column, (steps[first], steps[end - 1])))
        return sorted(found, key=lambda each: -each[0])


def log(x: Array) -> Array:
    """Natural logarithm; NaN for zero, as for what is not known: it compares with nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(x == 0, math.nan, np.log(x))


def exp(power: float) -> float:
    """The number e to a power; of a finite one the nearest to it that float64 holds."""
    return math.exp(power if math.isinf(power) else min(max(power, -744.0), 709.0))


def log_losses(losses: Array) -> Array:
    """Logarithms of losses, made so that losses near zero or below it say little."""
    finite = losses[np.isfinite(losses)]
    if not len(finite):
        return np.full(len(losses), math.inf)
    within = losses.clip(-_LARGEST, _LARGEST)
    scale = float(np.median(abs(within[np.isfinite(losses)][:_FIRST]))) or 1.0
    with np.errstate(invalid="ignore"):
        positive = finite.min() > 0
        x = np.log(within + _SOFT * scale) if positive else np.arcsinh(within / scale)
    return np.where(np.isfinite(losses), x, math.inf)


@functools.cache
def log2_edges() -> Array:
    ends = torch.zeros((), device="cpu")
    return np.asarray(Log2Bins().edges(ends, ends))


# Of what a format would do, and how the records of a block are put together.
_OF_FORMATS: dict[str, Callable[[Array], Array]] = {
    "snr": median,
    "underflow": median,
    "saturated": median,
    "scale_min": np.fmin.reduce,
    "scale_max": np.fmax.reduce,
}


def around(mask: Array, at: int) -> tuple[int, int]:
    """First and last position of the run of true ones that a position is in."""
    gaps = np.flatnonzero(~mask)
    before, after = gaps[gaps < at], gaps[gaps > at]
    return int(before[-1] + 1 if len(before) else 0), int(after[0] if len(after) else len(mask)) - 1


def spans_of(mask: Array) -> list[tuple[int, int]]:
    """First position of each run of true ones, and the one after it."""
    ends: list[int] = np.flatnonzero(np.diff(mask, prepend=False, append=False)).tolist()
    return list(zip(ends[::2], ends[1::2], strict=True))
