"""Bin schemes: which bin a value falls into, and where the bins end.

Every engine follows the arithmetic written here, so counts agree to the last one. Values are
binned as float32. float16 and bfloat16 widen exactly; float64 is rounded to float32 in the one
direction that takes no value across an edge, so a bin is the same interval
``[edges[i], edges[i + 1])`` for every dtype.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import ParamSpec, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from gradstat.util import Array

FLOAT32_MAX = 3.4028234663852886e38
FLOAT64_MAX = 1.7976931348623157e308

# `Log2Bins` tell magnitudes apart by their top bits, as kernels/binning.py does.
LOG2_SHIFT = 21  # bits of a float32 below those
LOG2_MAGNITUDES = 1024  # that they tell apart: bins on each side of zero
LOG2_FINITE = 1020  # of these, before infinity and NaN

# Each float32 exponent is an octave; the first holds subnormals, the last nothing finite.
OCTAVES = np.arange(-127.0, 130.0)

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# The least float64, from its bits, as the module is imported. Python computes a constant when it
# compiles: `2.0**-1074` is 0.0 for good in a module that it compiles while subnormals are flushed.
# Times 1 it is 0 in a thread that flushes subnormals.
(SUBNORMAL,) = struct.unpack("<d", (1).to_bytes(8, "little"))


def keeps_subnormals(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function as if `torch.set_flush_denormal` were off."""
    # Bins end at subnormals, and no count should depend on the mode of the thread that asks for it.
    # Threads that torch started in that mode keep it for good, so the caller's computes alone.

    @functools.wraps(function)
    def keeping(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if SUBNORMAL * 1.0 != 0.0 or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        threads = torch.get_num_threads()
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(True)

    return keeping


@dataclass(frozen=True)
class Log2Bins:
    """Quarter-octave bins over all of float32: one pass, no range, mergeable with any other record.

    The bin of a value is the top 11 bits of its float32 pattern (sign, 8 exponent bits, 2 mantissa
    bits), put in order from the most negative to the most positive. A bin is at most a quarter of
    its lower magnitude wide, but for magnitudes below 2**-126 and float64 beyond float32.

    Example:
        >>> import torch, gradstat
        >>> counts, edges = gradstat.histogram(torch.tensor([1.0, 1.1, -2.0]), gradstat.Log2Bins())
        >>> counts.shape, int(counts.max()), float(edges[counts.argmax()])
        (torch.Size([2048]), 2, 1.0)
    """

    @property
    def bins(self) -> int:
        """Number of bins, 2048."""
        return 2 * LOG2_MAGNITUDES

    @property
    def spec(self) -> str:
        """Text from which `parse_bins` makes an equal scheme."""
        return "log2"

    @keeps_subnormals
    def index(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Bin of each value, finite, of any floating-point dtype and shape: int64, in 0..2047.

        Low and high are ignored; they are there for a common signature with `LinearBins`.
        """
        # Rounding a magnitude down keeps it in its bin.
        magnitude = float32_below(x.abs()).view(torch.int32) >> LOG2_SHIFT
        negative = LOG2_MAGNITUDES - 1 - magnitude
        return torch.where(x < 0, negative, LOG2_MAGNITUDES + magnitude).long()

    @keeps_subnormals
    def edges(self, low: Tensor, high: Tensor, at: Tensor | None = None) -> Tensor:
        """The smallest float64 of each bin, then the end of the last: all 2049, or those ``at``.

        They do not decrease, and are infinite at the outer bins. Of the range only the device is
        used.
        """
        magnitude = torch.arange(LOG2_FINITE + 1, device=low.device, dtype=torch.int32)
        magnitude <<= LOG2_SHIFT
        positive = widen(magnitude.view(torch.float32))
        ends = -positive[1:].flip(0)
        negative = torch.nextafter(ends, torch.zeros_like(ends))
        negative[0] = -math.inf
        outer = positive.new_full((LOG2_MAGNITUDES - LOG2_FINITE,), math.inf)
        edges = torch.cat([-outer, negative, positive, outer])
        return edges if at is None else edges[at]


@dataclass(frozen=True)
class LinearBins:
    """Equal-width bins.

    The bin of a value is ``floor((x - low) * (bins / (high - low)))``, each operation rounded to
    float32, the last bin closed; `edges` gives the intervals as they are. The ends of every range
    are rounded outwards to float32. An automatic range of float64 values beyond float32 is divided
    by a power of two first.

    Args:
        bins: number of bins, 1 or more.
        low: lower end of the range; ``None`` takes each tensor's finite minimum.
        high: upper end of the range; ``None`` takes each tensor's finite maximum.
        nice: round the automatic edges to few digits, as MATLAB's ``histcounts(x, bins)`` does.

    Raises:
        TypeError: an argument of another kind.
        ValueError: ``bins`` < 1, a range that is not finite in float32, ``low`` >= ``high``, one
            end without the other, ``nice`` together with a range.

    Example:
        >>> import torch, gradstat
        >>> gradstat.histogram(torch.tensor([0.0, 0.2, 1.0]), gradstat.LinearBins(2, 0.0, 1.0))
        (tensor([2, 1]), tensor([0.0000, 0.5000, 1.0000], dtype=torch.float64))
    """

    bins: int
    low: float | None = None
    high: float | None = None
    nice: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bins, Integral) or isinstance(self.bins, bool):
            raise TypeError(f"LinearBins() needs an integer number of bins; bins is {self.bins!r}")
        object.__setattr__(self, "bins", int(self.bins))
        object.__setattr__(self, "nice", bool(self.nice))
        if not 1 <= self.bins <= 1 << 20:
            raise ValueError(f"LinearBins() needs 1 to 1048576 bins; bins is {self.bins}")
        if (self.low is None) != (self.high is None):
            raise ValueError(
                f"LinearBins() needs both ends of the range or none; low is {self.low}, "
                f"high is {self.high}"
            )
        if self.nice and self.low is not None:
            raise ValueError(
                f"LinearBins() needs a range or nice, not both; low is {self.low}, "
                f"nice is {self.nice}"
            )
        if self.low is None or self.high is None:
            return
        for name, value in (("low", self.low), ("high", self.high)):
            if not isinstance(value, Real) or isinstance(value, bool):
                raise TypeError(f"LinearBins() needs a range of two numbers; {name} is {value!r}")
            if not abs(value) <= FLOAT32_MAX:
                raise ValueError(f"LinearBins() needs a range finite in float32; {name} is {value}")
            object.__setattr__(self, name, float(value))
        if not _round_float32(self.low) < _round_float32(self.high):
            raise ValueError(
                f"LinearBins() needs low < high in float32; low is {self.low}, high is {self.high}"
            )

    def __repr__(self) -> str:
        """The arguments that were given."""
        ends = "" if self.low is None else f", {self.low}, {self.high}"
        return f"LinearBins({self.bins}{ends}{', nice=True' if self.nice else ''})"

    @property
    def spec(self) -> str:
        """Text from which `parse_bins` makes an equal scheme."""
        return f"linear {self.bins} {self.low} {self.high} {self.nice}"

    @property
    def known_range(self) -> tuple[float, float] | None:
        """Ends of the range rounded outwards to float32; ``None`` for an automatic range."""
        if self.low is None or self.high is None:
            return None
        return _round_down(self.low), -_round_down(-self.high)

    @keeps_subnormals
    def index(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Bin of each value, finite, of any floating-point dtype and shape: int64, in -1..bins.

        It is -1 below the range and ``bins`` above it. The ends of the range, float32 or float64,
        are broadcast to the values.
        """
        x, low, high = widen(x), widen(low), widen(high)
        unit = _unit(low, high)
        inside = self._index_inside(float32_below(x, unit), *_float32_hull(low, high, unit))
        inside = torch.where(x == high, self.bins - 1, inside)
        return torch.where(x < low, -1, torch.where(x > high, self.bins, inside))

    @keeps_subnormals
    def edges(self, low: Tensor, high: Tensor, at: Tensor | None = None) -> Tensor:
        """The smallest value of each bin, then ``high``, as `index` rounds: all, or those ``at``.

        For ranges of any shape ``(...)``, float32 or float64, and numbers of edges ``(..., K)``:
        float64 ``(..., bins + 1)`` or ``(..., K)``, not decreasing.
        """
        if at is None and torch.compiler.is_compiling():
            edges: Tensor = _linear_edges_op(low, high, self.bins)
            return edges
        at = torch.arange(self.bins + 1, device=low.device) if at is None else at
        low, high = widen(low)[..., None], widen(high)[..., None]
        unit = _unit(low, high)
        # Bisection over the ordered float32 bit patterns.
        low32, high32 = _float32_hull(low, high, unit)
        first, last = _ordered(low32), _ordered(high32)
        for _ in range(33):
            middle = (first + last) >> 1
            reached = self._index_inside(_from_ordered(middle), low32, high32) >= at
            first = torch.where(reached, first, middle + 1)
            last = torch.where(reached, middle, last)
        inner = torch.minimum((widen(_from_ordered(last)) + 0.0) * unit, high)
        return torch.where(at == 0, low, torch.where(at == self.bins, high, inner))

    @keeps_subnormals
    def automatic_range(self, minimum: Tensor, maximum: Tensor) -> tuple[Tensor, Tensor]:
        """Low and high of the range from a finite minimum to a maximum, NaN where there is none.

        It is rounded outwards to float32, to few digits with ``nice``, and at least a few float32
        wide; 0 to 1 where there is no value. float64 where the values are, else float32.
        """
        unit = _unit(widen(minimum), widen(maximum))
        lo, hi = _float32_hull(minimum, maximum, unit)
        empty = torch.isnan(lo)
        lo, hi = torch.where(empty, 0.0, lo), torch.where(empty, 1.0, hi)
        if self.nice:
            low, high = nice_range(widen(lo) * unit, widen(hi) * unit, self.bins)
        else:
            # 2**-21 of a float32 is 4 to 8 of its units in the last place.
            half = (lo.abs() * 2.0**-21).clamp(min=0.5)
            constant = lo == hi
            low, high = torch.where(constant, lo - half, lo), torch.where(constant, hi + half, hi)
            low, high = widen(low) * unit, widen(high) * unit
        if minimum.dtype == torch.float64:
            return _round_end(low, unit), _round_end(high, unit)
        return _clamp_float32(low), _clamp_float32(high)

    def _index_inside(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Bin of each value of a range; all float32."""
        scale, inv_width = self._factors(low, high)
        t = ((x * scale) - (low * scale)) * inv_width
        return t.clamp(0, self.bins - 1).floor().long()

    def _factors(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Power of two by which values are scaled, and bins per scaled unit, both float32."""
        # The scale keeps `high - low` and its reciprocal inside float32's normal range. It is 1 for
        # widths from 2**-100 to 2**126; elsewhere `x * scale` is still exact where it matters, so
        # fusing it with the subtraction changes nothing.
        width = high - low
        scale = torch.ones_like(width)
        scale = torch.where(width < 2.0**-100, 2.0**100, scale)
        scale = torch.where(width > 2.0**126, 2.0**-8, scale)
        # A number divided by a tensor would be rounded twice.
        return scale, torch.full_like(width, self.bins) / (high * scale - low * scale)


Bins: TypeAlias = Log2Bins | LinearBins


@torch.library.custom_op("gradstat::linear_edges", mutates_args=())
def _linear_edges_op(low: Tensor, high: Tensor, bins: int) -> Tensor:
    """`LinearBins.edges` as one node of a graph: its loop, unrolled, takes a minute to compile."""
    return LinearBins(bins).edges(low, high)


@_linear_edges_op.register_fake
def _(low: Tensor, high: Tensor, bins: int) -> Tensor:
    return widen(low.new_empty((*low.shape, bins + 1)))


def parse_bins(spec: str) -> Bins:
    """The scheme whose `spec` is given; ValueError for any other text."""
    kind, *fields = spec.split(" ")
    if kind == "log2" and not fields:
        return Log2Bins()
    if kind == "linear" and len(fields) == 4:
        bins, low, high, nice = fields
        ends = [None if end == "None" else float(end) for end in (low, high)]
        scheme = LinearBins(int(bins), ends[0], ends[1], nice == "True")
        if spec == scheme.spec:
            return scheme
    raise ValueError(f"parse_bins() needs the spec of a bin scheme; spec is {spec!r}")


def widen(x: Tensor) -> Tensor:
    """float64 of the values, or float32 on a device that has no float64 (Apple's MPS)."""
    return x.float() if x.device.type == "mps" else x.double()


def float32_below(x: Tensor, unit: Tensor | float = 1.0) -> Tensor:
    """Largest finite float32 not above each value; float64 is divided by a power of two."""
    if x.dtype != torch.float64:
        return x.float()
    y = (x / unit).float()
    # Multiplied, since a quotient may have been rounded to zero.
    y = torch.where(y.double() * unit > x, torch.nextafter(y, y.new_full((), -math.inf)), y)
    return y.clamp(min=-FLOAT32_MAX)


def _float32_hull(low: Tensor, high: Tensor, unit: Tensor) -> tuple[Tensor, Tensor]:
    """Narrowest float32 range that holds both ends, each divided by a power of two."""
    return float32_below(low, unit), -float32_below(-high, unit)


def _unit(low: Tensor, high: Tensor) -> Tensor:
    """Power of two that brings the ends of a range beyond float32 into it; else 1."""
    size = torch.maximum(low.abs(), high.abs())
    if size.dtype != torch.float64:
        return torch.ones_like(size)
    # The exponent field of the largest power of two in it, less 126: at most 2**127 is left.
    unit = (((size.view(torch.int64) >> 52) - 126) << 52).view(torch.float64)
    return torch.where((size > FLOAT32_MAX) & size.isfinite(), unit, 1.0)


def _round_end(x: Tensor, unit: Tensor) -> Tensor:
    """End of a float64 range: a float32 where the unit is 1, finite elsewhere."""
    return torch.where(unit > 1, x.clamp(-FLOAT64_MAX, FLOAT64_MAX), _clamp_float32(x).double())


def _clamp_float32(x: Tensor) -> Tensor:
    return x.clamp(-FLOAT32_MAX, FLOAT32_MAX).float()


def _round_down(x: float) -> float:
    """Largest float32 that is not above a number within float32's range."""
    spacing = _float32_spacing(x)
    return math.floor(x / spacing) * spacing


def _round_float32(x: float) -> float:
    spacing = _float32_spacing(x)
    return round(x / spacing) * spacing


def _float32_spacing(x: float) -> float:
    """Distance of the float32 around a number, of those up to the next power of two."""
    return math.ldexp(1.0, max(math.frexp(x)[1] - 24, -149))


def _ordered(x: Tensor) -> Tensor:
    """float32 to int64 keys in the same order; -0.0 comes just before 0.0."""
    bits = x.view(torch.int32).long()
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_ordered(key: Tensor) -> Tensor:
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).int().view(torch.float32)


def nice_range(lo: Tensor, hi: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Bin range as MATLAB's ``histcounts(x, n)`` picks it; float64 in and out."""
    # Powers of ten come from a table, not from `log10`, whose last digit differs by device.
    table = powers_of_ten(lo.device)

    def power_of_ten(x: Tensor) -> Tensor:
        at = torch.searchsorted(table, x.contiguous(), right=True) - 1
        return table.take(at.clamp(min=0))

    size = torch.maximum(lo.abs(), hi.abs())
    constant = hi - lo <= 2.0**-26 * size
    raw = (hi - lo) / n
    power = power_of_ten(raw)
    width = power * torch.floor(raw / power).clamp(min=1.0)
    left = torch.minimum(width * torch.floor(lo / width), lo)
    narrow = (hi - left) / n
    spread = (hi - left) / (n - 1) - narrow if n > 1 else narrow
    power = power_of_ten(spread)
    width = power * torch.ceil(narrow / power)
    right = torch.maximum(left + n * width, hi)
    # A constant is a range of 1 around it, or of as many float32 as there are bins if that is more.
    spacing = size * 2.0**-23
    room = torch.ceil(max(n, 16) * spacing).clamp(min=1.0) / 4
    left = torch.where(constant, torch.floor(2 * (lo - room)) / 2, left)
    right = torch.where(constant, torch.ceil(2 * (hi + room)) / 2, right)
    # A range so wide that float64 cannot hold its width stays as it is.
    is_held = (hi - lo).isfinite() & left.isfinite() & right.isfinite()
    return torch.where(is_held, left, lo), torch.where(is_held, right, hi)


@functools.cache
def powers_of_ten(device: torch.device) -> Tensor:
    """Powers of ten from 1e-80 to 1e308 in order, float64 ``(389,)``."""
    return torch.tensor([float(f"1e{k}") for k in range(-80, 309)], dtype=torch.float64).to(device)


def octave_of(bins: Array) -> Array:
    """Octave of each of some bins of `Log2Bins`, whatever its sign: 0 to 255."""
    bins = bins.astype(np.int64)
    return np.where(bins < LOG2_MAGNITUDES, LOG2_MAGNITUDES - 1 - bins, bins - LOG2_MAGNITUDES) >> 2


def octaves(counts: Array, zeros: Array) -> Array:
    """Histograms over `OCTAVES`, ``(N, 256)``, of those over `Log2Bins`, without their zeros."""
    magnitudes = counts[:, LOG2_MAGNITUDES:] + counts[:, LOG2_MAGNITUDES - 1 :: -1]
    summed: Array = magnitudes.reshape(len(counts), 256, 4).sum(2)
    summed[:, 0] -= zeros
    return summed
