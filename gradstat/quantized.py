"""`Quantization`: what a narrow format would do to a tensor, or to each of a list of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gradstat.formats import Format

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


@dataclass(frozen=True, eq=False, repr=False)
class Quantization:
    """What a format would do to one tensor, shape ``()``, or to each of a list, shape ``(L,)``.

    NaN and infinities are counted and left out of everything else.

    Args:
        format: the format.
        integers: int64, shape ``(..., 8)``, the fields of `QUANTIZATION_INTEGERS` in order.
        floats: float64, shape ``(..., 2)``: L2 norm of the finite values, and of the error.

    Example:
        >>> import torch, gradstat
        >>> x = torch.tensor([1.0, 1e-5, 500.0, 3.0, 0.0])
        >>> q = gradstat.quantization(x, "float8_e4m3fn")
        >>> float(q.underflow), float(q.saturated), round(float(q.error), 3)  # 448 for 500
        (0.25, 0.25, 0.104)
    """

    format: Format
    integers: Tensor
    floats: Tensor

    @property
    def nonzero(self) -> Tensor:
        """Finite values that are not zero; int64."""
        return self.integers[..., 0]

    @property
    def underflowed(self) -> Tensor:
        """How many of these become zero; int64."""
        return self.integers[..., 1]

    @property
    def saturated_count(self) -> Tensor:
        """How many of these round beyond the largest element and become it; int64."""
        return self.integers[..., 2]

    @property
    def nonfinite(self) -> Tensor:
        """NaN and infinities; int64."""
        return self.integers[..., 3]

    @property
    def blocks(self) -> Tensor:
        """Groups of values that share a scale, 0 for a format without scales; int64."""
        return self.integers[..., 4]

    @property
    def empty_blocks(self) -> Tensor:
        """How many of these have no finite value that is not zero; int64."""
        return self.integers[..., 5]

    @property
    def scale_min(self) -> Tensor:
        """Exponent of the smallest scale, ``floor(log2(scale))``; float64, NaN where there is none.

        Scales of empty blocks are left out. For nvfp4 it is the e4m3 scale.
        """
        return _exponents(self.integers[..., 6], NO_SCALE_MIN)

    @property
    def scale_max(self) -> Tensor:
        """Exponent of the largest scale."""
        return _exponents(self.integers[..., 7], NO_SCALE_MAX)

    @property
    def norm(self) -> Tensor:
        """L2 norm of the finite values."""
        return self.floats[..., 0]

    @property
    def error_norm(self) -> Tensor:
        """L2 norm of the error: what the format makes of the values, less the values."""
        return self.floats[..., 1]

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
        here, there = self.integers, other.integers.to(self.integers.device)
        integers = here + there
        integers[..., 6] = torch.minimum(here[..., 6], there[..., 6])
        integers[..., 7] = torch.maximum(here[..., 7], there[..., 7])
        floats = torch.hypot(self.floats, other.floats.to(self.floats.device))
        return Quantization(self.format, integers, floats)

    def __len__(self) -> int:
        """Number of tensors measured."""
        if self.integers.dim() < 2:
            raise TypeError("len() needs a Quantization of a list; this is of one tensor")
        return self.integers.shape[0]

    def __getitem__(self, index: int | slice) -> Quantization:
        """Quantization of one tensor of the list, or of a part of the list."""
        if self.integers.dim() < 2:
            raise TypeError("indexing needs a Quantization of a list; this is of one tensor")
        return Quantization(self.format, self.integers[index], self.floats[index])

    def __iter__(self) -> Iterator[Quantization]:
        """Quantization of each tensor of the list."""
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        """A line per tensor with what people look at first; waits for the device."""
        rows = [self] if self.integers.dim() == 1 else list(self)
        names = ("underflow", "saturated", "snr", "error")
        lines = [
            ", ".join(f"{name}={getattr(row, name).item():.4g}" for name in names) for row in rows
        ]
        return f"Quantization({self.format.name}:" + "".join(f"\n  {line}" for line in lines) + ")"


def _exponents(stored: Tensor, none: int) -> Tensor:
    return torch.where(stored == none, math.nan, stored.double())


def packed(integers: Tensor, floats: Tensor) -> Tensor:
    """The fields of F formats and L tensors as records hold them.

    Args:
        integers: int64 ``(F, L, 8)``.
        floats: float64 ``(F, L, 2)``.

    Returns:
        float64 ``(L, F, 10)``, the fields of `PACKED`.
    """
    return torch.cat([integers.double(), floats], -1).transpose(0, 1).contiguous()


def unpacked(form: Format, fields: NDArray[np.float64]) -> Quantization:
    """Fields of `PACKED` as a Quantization, all zero where there is no tensor.

    Args:
        form: the format.
        fields: float64 ``(..., 10)``.
    """
    n = len(QUANTIZATION_INTEGERS)
    present = np.where(np.isnan(fields[..., -1:]), _ABSENT, fields)
    integers, floats = present[..., :n].astype(np.int64), present[..., n:]
    return Quantization(form, torch.from_numpy(integers), torch.from_numpy(floats))
