"""`Statistics`: what one pass over a tensor, or over each of a list of tensors, measures."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.bins import FLOAT32_MAX, LOG2_MAGNITUDES, Bins, LinearBins, Log2Bins
from gradstat.formats import Format
from gradstat.util import aligned, escaped

INTEGERS = ("numel", "finite", "zeros", "nan", "posinf", "neginf", "below", "above")
FLOATS = ("min", "max", "sum", "std", "l1", "l2", "low", "high")
DERIVED = ("mean", "var", "rms", "abs_max")
SHAPES = ("kurtosis",)  # read off the histogram
_SHOWN = ("numel", "zeros", "nan", "min", "max", "mean", "std", "l2")

# Largest magnitude that rounds to zero: half the smallest subnormal, ties going to even.
_FLUSHED_BELOW = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
    torch.float8_e4m3fn: 2.0**-10,
    torch.float8_e5m2: 2.0**-17,
}
# A histogram tells nothing of the shape of what lies in a few of its bins, far from zero.
_FARTHEST_MEAN = 2.0  # standard deviations

QUANTIZATION_INTEGERS = (
    *("nonzero", "underflowed", "saturated_count", "nonfinite"),
    *("blocks", "empty_blocks", "scale_min", "scale_max"),
)
QUANTIZATION_FLOATS = ("norm", "error_norm")
# Both together, as records hold them: float64, NaN where there is no tensor.
PACKED = QUANTIZATION_INTEGERS + QUANTIZATION_FLOATS
# What a History has of each format.
QUANTIZATION_COUNTS = ("nonzero", "nonfinite", "blocks", "empty_blocks")
QUANTIZATION_FIELDS = (
    *("underflow", "saturated", "snr", "error", "scale_min", "scale_max"),
    *QUANTIZATION_COUNTS,
)
# Exponents where there is no scale: merging takes the least and the greatest.
NO_SCALE_MIN, NO_SCALE_MAX = 1 << 15, -(1 << 15)
_ABSENT = np.array([0.0] * 6 + [NO_SCALE_MIN, NO_SCALE_MAX] + [0.0] * 2)

_PARTS: list[tuple[str, tuple[str, ...]]]
_PARTS = [("integers", INTEGERS), ("integers", QUANTIZATION_INTEGERS)]
_PARTS += [("floats", FLOATS), ("floats", QUANTIZATION_FLOATS)]


class _View(property):
    if TYPE_CHECKING:
        # Of a class it is the property itself.
        def __get__(self, of: object, owner: type | None = None) -> Tensor: ...  # type: ignore[override]


def _measured(name: str, doc: str) -> _View:
    """The column of a name in ``integers`` or ``floats``."""
    part, names = next(each for each in _PARTS if name in each[1])
    at = names.index(name)

    def column(self: _OfTensors) -> Tensor:
        found: Tensor = getattr(self, part)[..., at]
        return found

    view = _View(column)
    view.__doc__ = doc  # given as an argument, it would be hidden by that of the class
    return view


class _OfTensors:
    """What was measured of one tensor, or of each of a list of L tensors."""

    integers: Tensor

    def __len__(self) -> int:
        """Number of tensors measured."""
        self._check_list("len()")
        return len(self.integers)

    def __iter__(self) -> Iterator[Self]:
        """What was measured of each tensor of the list."""
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int | slice) -> Self:
        """What was measured of one tensor of the list, or of a part of the list."""
        self._check_list("indexing")
        return self._part(index)

    def _part(self, index: int | slice) -> Self:
        raise NotImplementedError

    def _check_list(self, what: str) -> None:
        if self.integers.dim() < 2:
            name = type(self).__name__
            raise TypeError(f"{what} needs {name} of a list; this is of one tensor")

    def _lines(self, title: object, names: Sequence[str]) -> str:
        """A line of fields for each tensor."""
        rows = [self] if self.integers.dim() == 1 else list(self)
        lines = [
            ", ".join(f"{name}={getattr(row, name).item():.4g}" for name in names) for row in rows
        ]
        return f"{type(self).__name__}({title}:" + "".join(f"\n  {line}" for line in lines) + ")"


@dataclass(frozen=True, eq=False, repr=False)
class Statistics(_OfTensors):
    """Statistics of one tensor, shape ``()``, or of a list of L tensors, shape ``(L,)``.

    Three tensors on the input's device hold everything; each field is a view or a formula of them.
    NaN and infinities are counted and left out of everything else. Floats are float64 (float32
    where the device has no float64) and NaN where they are undefined: min, max and mean of nothing,
    std of fewer than two values.

    Example:
        >>> import torch, gradstat
        >>> s = gradstat.statistics(torch.tensor([3.0, -4.0, float("nan")]))
        >>> int(s.finite), int(s.nan), float(s.l2), float(s.mean)
        (2, 1, 5.0, -0.5)
    """

    bins: Bins  #: scheme of the histogram
    integers: Tensor  #: int64, shape ``(..., 8)``, the fields of `INTEGERS` in order
    floats: Tensor  #: float64, shape ``(..., 8)``, the fields of `FLOATS` in order
    counts: Tensor  #: int64, shape ``(..., bins)``, finite values in each bin
    #: of the L tensors where `History.record` knows them: they then print as a table
    names: tuple[str, ...] = field(default=(), kw_only=True)

    numel = _measured("numel", "Elements, finite or not; int64.")
    finite = _measured("finite", "Elements that are neither NaN nor infinite; int64.")
    zeros = _measured("zeros", "Elements equal to zero, of either sign; int64.")
    nan = _measured("nan", "NaN elements; int64.")
    posinf = _measured("posinf", "Elements equal to plus infinity; int64.")
    neginf = _measured("neginf", "Elements equal to minus infinity; int64.")
    below = _measured("below", "Finite elements below the histogram's range; int64.")
    above = _measured("above", "Finite elements above the histogram's range; int64.")
    min = _measured("min", "Smallest finite value.")
    max = _measured("max", "Largest finite value.")
    sum = _measured("sum", "Sum of the finite values.")
    std = _measured("std", "Standard deviation, correction 1, as `torch.std`.")
    l1 = _measured("l1", "Sum of magnitudes.")
    l2 = _measured("l2", "Euclidean norm: the root of the sum of squares.")
    low = _measured("low", "Lower end of the histogram's range; minus infinity for `Log2Bins`.")
    high = _measured("high", "Upper end of the histogram's range; infinity for `Log2Bins`.")

    @property
    def mean(self) -> Tensor:
        """Mean of the finite values."""
        return self.sum / self.finite

    @property
    def var(self) -> Tensor:
        """Variance, correction 1, as `torch.var`."""
        return self.std**2

    @property
    def rms(self) -> Tensor:
        """Root mean square."""
        return self.l2 / self.finite.to(self.l2.dtype).sqrt()

    @property
    def abs_max(self) -> Tensor:
        """Largest magnitude."""
        return torch.maximum(self.min.abs(), self.max.abs())

    @property
    def kurtosis(self) -> Tensor:
        """Fourth central moment over the squared second one: 3 for a normal distribution.

        Read off the histogram, with the known count, mean, deviation and extremes;
        ``docs/statistics.md`` says how far it may be off. NaN for fewer than 4 elements, where all
        are equal, and where bins are too wide to tell.
        """
        return self.kurtosis_over(None)

    def kurtosis_over(self, bins: Tensor | None) -> Tensor:
        """The same where `counts` are of some of the bins: int64, of the same shape."""
        if bins is None:
            edges = self.edges.expand(*self.counts.shape[:-1], -1)
            low, high = edges[..., :-1], edges[..., 1:]
        else:
            low, high = (self.bins.edges(self.low, self.high, at) for at in (bins, bins + 1))
        counts = self.counts
        if isinstance(self.bins, LinearBins):
            # What is outside the range lies somewhere between its end and the extreme.
            ends = [end[..., None] for end in (self.min, self.low, self.high, self.max)]
            low = torch.cat([torch.minimum(*ends[:2]), low, ends[2]], -1)
            high = torch.cat([ends[1], high, torch.maximum(*ends[2:])], -1)
            counts = torch.cat([self.below[..., None], counts, self.above[..., None]], -1)
        result = self._kurtosis_between(counts, low, high)
        is_told = self.std >= 2.0**-126
        if isinstance(self.bins, Log2Bins):
            is_told &= self.abs_max <= FLOAT32_MAX
        return torch.where(is_told, result, math.nan)

    def _kurtosis_between(self, counts: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Kurtosis, ``(...)``, of counts ``(..., N)`` between the ends of their bins."""
        mean, std = self.mean, self.std
        # One element is the least exactly and one the greatest; the others are taken to lie evenly
        # in their bins, between the extremes, and then scaled so that the second moment is right.
        n = counts.sum(-1).to(std.dtype)
        # In units of the farthest element no power overflows or underflows.
        unit = torch.maximum(mean - self.min, self.max - mean)[..., None]
        ends = [((end - mean) / unit[..., 0])[..., None] for end in (self.min, self.max)]
        a, b = (((end - mean[..., None]) / unit).clamp(*ends) for end in (low, high))
        inner = counts.to(std.dtype)
        filled = (counts > 0).to(torch.int64)
        # The outer filled bins: the first, and the first from behind.
        last = filled.shape[-1] - 1 - filled.flip(-1).argmax(-1, keepdim=True)
        for at in (filled.argmax(-1, keepdim=True), last):
            inner = inner.scatter_add(-1, at, -torch.ones_like(inner[..., :1]))
        inner = inner.clamp(min=0)
        # Products: a power that is vectorised differs from one that is not in its last digit.
        centre2, half2 = ((a + b) / 2) ** 2, ((b - a) / 2) ** 2
        squares = (inner * (centre2 + half2 / 3)).sum(-1)
        fourths = (inner * (centre2 * centre2 + 2 * centre2 * half2 + half2 * half2 / 5)).sum(-1)
        outer2 = torch.cat(ends, -1) ** 2
        total = (n - 1) * (std / unit[..., 0]) ** 2
        scale = ((total - outer2.sum(-1)).clamp(min=0) / squares).nan_to_num(nan=0.0, posinf=0.0)
        moment = (outer2 * outer2).sum(-1) + fourths * scale**2
        result = n * moment / total**2
        return torch.where((n > 3) & (mean.abs() <= _FARTHEST_MEAN * std), result, torch.nan)

    @property
    def edges(self) -> Tensor:
        """Bin edges: float64, ``(bins + 1,)`` for `Log2Bins`, ``(..., bins + 1)`` for `LinearBins`.

        ``numpy.histogram(x, bins=edges)`` gives `counts`.
        """
        return self.bins.edges(self.low, self.high)

    def _part(self, index: int | slice) -> Statistics:
        names = self.names[index] if isinstance(index, slice) else ()
        integers, floats, counts = self.integers[index], self.floats[index], self.counts[index]
        return Statistics(self.bins, integers, floats, counts, names=names)

    def __repr__(self) -> str:
        """A line per tensor with the fields people look at first; waits for the device."""
        if not self.names:
            return self._lines(self.bins, _SHOWN)
        columns = [[f"{x:.4g}" for x in getattr(self, name).tolist()] for name in _SHOWN]
        rows = zip(map(escaped, self.names), *columns, strict=True)
        return "\n".join(aligned([("", *_SHOWN), *rows]))

    def to(self, device: torch.device | str) -> Statistics:
        """The same on another device."""
        return Statistics(
            self.bins, self.integers.to(device), self.floats.to(device), self.counts.to(device)
        )

    def merge(self, other: Statistics) -> Statistics:
        """Statistics of the union of two sets of values: of shards, steps or ranks.

        Counts, min and max are exact. The variance is NaN for values so large that neither their
        sum nor their norm fits float64, unless they are equal.

        Args:
            other: of the same shape, with the same bins over the same ranges.

        Returns:
            Statistics of the union, on this one's device.

        Raises:
            TypeError: no Statistics.
            ValueError: other bins, shapes or ranges. Comparing ranges waits for the device.
        """
        if not isinstance(other, Statistics):
            raise TypeError(f"merge() needs Statistics; other is {type(other).__name__}")
        if self.bins != other.bins or self.counts.shape != other.counts.shape:
            raise ValueError(
                f"merge() needs the same bins and shape; other is {other.bins} of "
                f"{tuple(other.counts.shape)}, this is {self.bins} of {tuple(self.counts.shape)}"
            )
        other = other.to(self.counts.device)
        # A layer that is absent from a record has no range, and nothing else.
        is_absent = self.low.isnan() | other.low.isnan()
        differ = (self.low != other.low) | (self.high != other.high)
        if isinstance(self.bins, LinearBins) and bool((differ & ~is_absent).any()):
            raise ValueError(
                "merge() needs histograms over the same range; low and high differ. "
                "Log2Bins and LinearBins with a fixed range always merge"
            )
        integers = torch.stack([self.integers, other.integers])
        floats = union_floats(integers, torch.stack([self.floats, other.floats]))
        return Statistics(self.bins, integers.sum(0), floats, self.counts + other.counts)

    def unscale(self, scale: float | Tensor) -> Statistics:
        """Statistics of the values divided by a power of two, such as a loss scale.

        Exact, as if quotients had no smallest and no largest magnitude: the values of one bin move
        to one other. A divisor below 1 is exact for magnitudes from 2**-126 on: smaller ones have
        wider bins, which go where their end nearer to zero goes.

        Args:
            scale: a positive power of two; a 0-dim tensor on the statistics' device costs no wait.

        Returns:
            Statistics of ``x / scale``.

        Raises:
            TypeError: neither a number nor a 0-dim tensor.
            ValueError: a number that is not a positive power of two.
        """
        if not _is_scalar(scale):
            raise TypeError(f"unscale() needs a number or a 0-dim tensor; scale is {scale!r}")
        if not isinstance(scale, Tensor):
            if not (math.isfinite(scale) and scale > 0 and math.frexp(scale)[0] == 0.5):
                raise ValueError(f"unscale() needs a positive power of two; scale is {scale}")
            scale = self.floats.new_tensor(scale)
        floats, counts = self.floats / scale, self.counts
        if isinstance(self.bins, Log2Bins):
            # A bin goes where its end nearer to zero goes.
            inner = self.edges[LOG2_MAGNITUDES:-1].nan_to_num(posinf=0.0) / scale
            positive = self.bins.index(inner, inner, inner)
            target = torch.cat([self.bins.bins - 1 - positive.flip(0), positive])
            counts = torch.zeros_like(counts).scatter_add_(-1, target.expand_as(counts), counts)
        return Statistics(self.bins, self.integers, floats, counts)

    def quantile(self, q: float) -> Tensor:
        """Quantile of the finite values, read off the histogram.

        Interpolated within the bin that holds it, so it is off by less than that bin's width, and
        never beyond the extremes. Values outside a linear range count as its ends.

        Args:
            q: fraction of the values below, 0 to 1.

        Returns:
            float64, shape ``()`` or ``(L,)``; NaN where there is no finite value.

        Raises:
            TypeError: ``q`` is no number, such as a list of them.
            ValueError: ``q`` outside 0..1.
        """
        if not _is_scalar(q):
            raise TypeError(f"quantile() needs a number between 0 and 1; q is {q!r}")
        if not 0 <= q <= 1:
            raise ValueError(f"quantile() needs q between 0 and 1; q is {q}")
        edges = self.edges.expand(*self.counts.shape[:-1], -1)
        low, high = self.low[..., None], self.high[..., None]
        inner = [end[..., None].clamp(low, high) for end in (self.min, self.max)]
        # What is outside the range is in two more bins, of no width, at its ends.
        edges = torch.cat([low, edges.clamp(*inner), high], -1)
        counts = torch.cat([self.below[..., None], self.counts, self.above[..., None]], -1)
        rank = q * self.finite[..., None].to(edges.dtype)
        total = counts.cumsum(-1).to(edges.dtype)
        at = torch.searchsorted(total, rank.clamp(min=0.5)).clamp(max=self.bins.bins + 1)
        inside, after = counts.gather(-1, at), total.gather(-1, at)
        share = 1 - (after - rank) / inside.clamp(min=1)
        low, high = edges.gather(-1, at), edges.gather(-1, at + 1)
        # Halves, since the width of a bin may be more than float64 holds.
        value = 2 * torch.lerp(low / 2, high / 2, share.clamp(0, 1)).squeeze(-1)
        return torch.where(self.finite > 0, value, math.nan)

    def underflow(self, dtype: torch.dtype) -> Tensor:
        """Fraction of the non-zero finite values that would become zero in a narrower type.

        Read off the histogram: exact but for values at the very threshold, half the smallest
        subnormal, which are taken to survive, and for bfloat16, which keeps some of the values
        below 2**-128 that are all taken to be lost.

        Args:
            dtype: float16, bfloat16, float8_e4m3fn or float8_e5m2.

        Returns:
            float64, shape ``()`` or ``(L,)``; 0 where there is no non-zero value.

        Raises:
            TypeError: no dtype.
            ValueError: another dtype, or a histogram that is not over `Log2Bins`.
        """
        if not isinstance(dtype, torch.dtype):
            raise TypeError(f"underflow() needs a torch.dtype; dtype is {dtype!r}")
        if dtype not in _FLUSHED_BELOW:
            names = ", ".join(str(known) for known in _FLUSHED_BELOW)
            raise ValueError(f"underflow() needs one of {names}; dtype is {dtype}")
        if not isinstance(self.bins, Log2Bins):
            raise ValueError(f"underflow() needs statistics over Log2Bins; bins is {self.bins}")
        edges = self.edges
        lost = (self.counts * is_flushed(edges, dtype)).sum(-1) - self.zeros
        return lost.to(edges.dtype) / (self.finite - self.zeros).clamp(min=1)


def is_flushed(edges: Tensor, dtype: torch.dtype) -> Tensor:
    """Which bins of `Log2Bins`, by their edges, a narrower type makes zero."""
    threshold = max(_FLUSHED_BELOW[dtype], 2.0**-128)
    return (edges[1:] <= threshold) & (edges[:-1] > -threshold)


def _is_scalar(x: object) -> bool:
    return isinstance(x, Real) or (isinstance(x, Tensor) and x.dim() == 0)


def union_floats(integers: Tensor, floats: Tensor) -> Tensor:
    """Floats, ``(..., 8)``, of the union of P parts over the same ranges; NaN where all are absent.

    Source: Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
    sample variances" (1979).
    """
    # Squares within the parts, and of their means around the mean of all, in units in which no
    # square overflows or underflows. The variance is NaN where a part's mean is not known.
    least, most, total, std, l1, l2, low, high = floats.unbind(-1)
    is_absent = l2.isnan()
    n = integers[..., INTEGERS.index("finite")].to(floats.dtype)
    n_all = n.sum(0)
    means = _mean_between_extremes(n, floats)
    farthest = torch.where(n > 0, means, 0.0).abs().nan_to_num().amax(0)
    # A quarter of two large means differs by a number that float64 holds.
    shrink = torch.where(farthest > 1, 0.25, 1.0).to(floats.dtype)
    means, std = means * shrink, torch.where(n > 1, std, 0.0) * shrink
    first, last = (_extreme(torch.where(n > 0, means, math.nan), sign) for sign in (1, -1))
    first = first.nan_to_num(nan=0.0)
    unit = torch.fmax(std.amax(0), last - first).nan_to_num(nan=0.0)
    unit = torch.where(unit > 0, unit, 1.0)
    shift = torch.where(n > 0, (means - first) / unit, 0.0)
    shift = shift - (n * shift).sum(0) / n_all.clamp(min=1)
    squares = (n - 1).clamp(min=0) * (std / unit) ** 2 + n * shift**2
    variance = squares.sum(0) / (n_all - 1).clamp(min=1)
    rows = {
        "min": _extreme(least, 1),
        "max": _extreme(most, -1),
        "sum": torch.where(is_absent, 0.0, total).sum(0),
        "std": torch.where(n_all > 1, unit * variance.sqrt() / shrink, math.nan),
        "l1": torch.where(is_absent, 0.0, l1).sum(0),
        "l2": union_norms(torch.where(is_absent, 0.0, l2)),
        "low": _extreme(low, 1),
        "high": _extreme(high, -1),
    }
    whole = torch.stack([rows[name] for name in FLOATS], -1)
    return torch.where(is_absent.all(0)[..., None], math.nan, whole)


def union_norms(norms: Tensor) -> Tensor:
    """Norms of the union of P parts, ``(P, ...)``: no square overflows or underflows."""
    largest = norms.amax(0)
    unit = torch.where(largest.isfinite() & (largest > 0), largest, 1.0)
    return unit * ((norms / unit) ** 2).sum(0).sqrt()


def _extreme(x: Tensor, sign: int) -> Tensor:
    """The least, or with -1 the greatest, of P numbers that is not NaN; NaN where all are."""
    found = (sign * x).nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf).amin(0)
    return torch.where(x.isnan().all(0), math.nan, sign * found)


def _mean_between_extremes(n: Tensor, floats: Tensor) -> Tensor:
    """Mean, 0 of nothing; NaN where values are so large that neither sum nor norm is finite."""
    least, most, total, std, _, l2, _, _ = floats.unbind(-1)
    # Where the sum overflows, the mean square is the mean's own and that of the deviations.
    rms = l2 / n.sqrt()
    size = rms * (1 - (std / rms) ** 2 * (n - 1) / n).clamp(min=0).sqrt()
    size = torch.where(l2.isinf(), math.nan, size)
    mean = torch.where(total.isinf(), size.copysign(total), total / n)
    # Rounding may take a quotient past the extremes: equal values have a mean equal to them.
    mean = torch.where(least == most, least, mean.clamp(least, most))
    return torch.where(n > 0, mean, 0.0)


def as_statistics(bins: Bins, rows: Iterable[NDArray[Any]]) -> Statistics:
    """Integers, floats and counts on the host as Statistics, without a copy."""
    return Statistics(bins, *(torch.from_numpy(each) for each in rows))


def as_arrays(statistics: Statistics) -> tuple[NDArray[Any], ...]:
    """Statistics on the host as integers, floats and counts, without a copy."""
    fields = statistics.integers, statistics.floats, statistics.counts
    return tuple(each.numpy() for each in fields)


@dataclass(frozen=True, eq=False, repr=False)
class Quantization(_OfTensors):
    """What a format would do to one tensor, shape ``()``, or to each of a list, shape ``(L,)``.

    NaN and infinities are counted and left out of everything else.

    Example:
        >>> import torch, gradstat
        >>> x = torch.tensor([1.0, 1e-5, 500.0, 3.0, 0.0])
        >>> q = gradstat.quantization(x, "float8_e4m3fn")
        >>> float(q.underflow), float(q.saturated), round(float(q.error), 3)  # 448 for 500
        (0.25, 0.25, 0.104)
    """

    format: Format
    integers: Tensor  #: int64, shape ``(..., 8)``, the fields of `QUANTIZATION_INTEGERS` in order
    floats: Tensor  #: float64, shape ``(..., 2)``: L2 norm of the finite values, and of the error

    nonzero = _measured("nonzero", "Finite values that are not zero; int64.")
    underflowed = _measured("underflowed", "How many of these become zero; int64.")
    saturated_count = _measured(
        "saturated_count",
        "How many of these round beyond the largest element and become it; int64.",
    )
    nonfinite = _measured("nonfinite", "NaN and infinities; int64.")
    blocks = _measured(
        "blocks", "Groups of values that share a scale, 0 for a format without scales; int64."
    )
    empty_blocks = _measured(
        "empty_blocks", "How many of these have no finite value that is not zero; int64."
    )
    norm = _measured("norm", "L2 norm of the finite values.")
    error_norm = _measured(
        "error_norm", "L2 norm of the error: what the format makes of the values, less the values."
    )

    @property
    def scale_min(self) -> Tensor:
        """Exponent of the smallest scale, ``floor(log2(scale))``; float64, NaN where there is none.

        Scales of empty blocks are left out. For nvfp4 it is the e4m3 scale.
        """
        return self._exponent("scale_min", NO_SCALE_MIN)

    @property
    def scale_max(self) -> Tensor:
        """Exponent of the largest scale."""
        return self._exponent("scale_max", NO_SCALE_MAX)

    def _exponent(self, name: str, none: int) -> Tensor:
        stored = self.integers[..., QUANTIZATION_INTEGERS.index(name)]
        return torch.where(stored == none, math.nan, stored.double())

    @property
    def underflow(self) -> Tensor:
        """Share of the non-zero finite values that become zero; 0 where there are none."""
        return self.underflowed.double() / self.nonzero.clamp(min=1)

    @property
    def saturated(self) -> Tensor:
        """Share of the non-zero finite values that saturate; 0 where there are none."""
        return self.saturated_count.double() / self.nonzero.clamp(min=1)

    @property
    def error(self) -> Tensor:
        """L2 norm of the error relative to that of the values; 0 where all are zero."""
        return self.error_norm / torch.where(self.norm > 0, self.norm, 1.0)

    @property
    def snr(self) -> Tensor:
        """Signal-to-noise ratio in dB, ``-20 log10(error)``; infinite where there is no error."""
        return -20 * self.error.log10()

    def merge(self, other: Quantization) -> Quantization:
        """Quantization of both sets of values: of shards or ranks, each with scales of its own.

        Args:
            other: of the same format and shape.

        Returns:
            Counts added, norms of the union, the least and the greatest scale; on this one's
            device.

        Raises:
            TypeError: no Quantization.
            ValueError: another format or shape.
        """
        if not isinstance(other, Quantization):
            raise TypeError(f"merge() needs a Quantization; other is {type(other).__name__}")
        if self.format != other.format or self.integers.shape != other.integers.shape:
            raise ValueError(
                f"merge() needs the same format and shape; other is {other.format.name} of "
                f"{tuple(other.nonzero.shape)}, this is {self.format.name} of "
                f"{tuple(self.nonzero.shape)}"
            )
        device = self.integers.device
        integers = torch.stack([self.integers, other.integers.to(device)])
        floats = torch.stack([self.floats, other.floats.to(device)])
        return Quantization(self.format, _union_integers(integers), union_norms(floats))

    def _part(self, index: int | slice) -> Quantization:
        return Quantization(self.format, self.integers[index], self.floats[index])

    def __repr__(self) -> str:
        """A line per tensor with what people look at first; waits for the device."""
        return self._lines(self.format.name, ("underflow", "saturated", "snr", "error"))


def packed(integers: Tensor, floats: Tensor) -> Tensor:
    """Integers ``(F, L, 8)`` and floats ``(F, L, 2)`` as records hold them: ``(L, F, 10)``."""
    return torch.cat([integers.double(), floats], -1).transpose(0, 1).contiguous()


def unpacked(form: Format, fields: NDArray[np.float64]) -> Quantization:
    """Fields of `PACKED`, ``(..., 10)``, as a Quantization, all zero where there is no tensor."""
    n = len(QUANTIZATION_INTEGERS)
    present = np.where(np.isnan(fields[..., -1:]), _ABSENT, fields)
    integers, floats = present[..., :n].astype(np.int64), present[..., n:]
    return Quantization(form, torch.from_numpy(integers), torch.from_numpy(floats))


def union_packed(fields: Tensor) -> Tensor:
    """Fields of `PACKED` of the union of P parts, ``(P, ..., 10)``; NaN for no tensor."""
    n = len(QUANTIZATION_INTEGERS)
    is_absent = fields[..., -1:].isnan()
    present = torch.where(is_absent, torch.from_numpy(_ABSENT), fields)
    integers = _union_integers(present[..., :n])
    whole = torch.cat([integers, union_norms(present[..., n:])], -1)
    return torch.where(is_absent.all(0), math.nan, whole)


def _union_integers(parts: Tensor) -> Tensor:
    """Counts added, the least and the greatest scale: ``(P, ..., 8)`` to ``(..., 8)``."""
    whole = parts.sum(0)
    least, most = (QUANTIZATION_INTEGERS.index(name) for name in ("scale_min", "scale_max"))
    whole[..., least], whole[..., most] = parts[..., least].amin(0), parts[..., most].amax(0)
    return whole
