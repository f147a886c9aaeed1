"""Narrow number formats, each defined once from its source, and their names.

Sources:
    IEEE: float16 is binary16 of IEEE 754-2019; bfloat16 has the exponents of binary32.
    FP8: Micikevicius et al., "FP8 Formats for Deep Learning" (2022), arXiv 2209.05433: both float8.
    MX: "OCP Microscaling Formats (MX) Specification" 1.0 (2023), sections 5.2, 5.3 and 6.3.
    NVFP4: NVIDIA, "Pretraining Large Language Models with NVFP4" (2025), arXiv 2509.25149,
        appendix on quantization.
    DeepSeek: "DeepSeek-V3 Technical Report" (2024), arXiv 2412.19437, section 3.3.2: 1 x 128 and
        128 x 128 blocks of float8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from gradstat.util import one_of

Scaling = Literal["none", "given", "amax", "block", "e8m0", "nvfp4"]

_GIVEN = "_scale_"
# A scale is no smaller: its reciprocal stays finite, and so does that of the product of an e4m3 and
# the scale of a tensor, at least 2**-9 * 2**-117.
LEAST_SCALE, LEAST_TENSOR_SCALE = 2.0**-126, 2.0**-117
LEAST_EXPONENT = -127  # of an E8M0 scale
_SCALE_BITS = {"block": 32, "e8m0": 8, "nvfp4": 8}

# Fields of a format as compiled code takes it, see `Format.fields`: which scale; columns of a
# block, 0 for none; bits of the smallest normal element; what takes the bits of a power of two to
# those of the number that rounds its octave; largest element and exponent; scale and reciprocal, of
# a constant one; whether the elements are bfloat16, whose largest octave has no such number;
# whether all scales are powers of two; the largest element as a pair of float16.
FIELDS = range(11)
KIND, COLUMNS, LEAST, TO_ROUNDER, LARGEST, TOP, SCALE, INVERSE, IS_BFLOAT16, *_ = FIELDS
# Scales: one that is known; from the tensor's largest magnitude; of blocks of a row; of blocks of
# 128 rows; powers of two; e4m3.
KINDS = range(6)
CONSTANT, AMAX, IN_ROW, TILES, E8M0, NVFP4 = KINDS
_KIND_OF = {"none": CONSTANT, "given": CONSTANT, "amax": AMAX, "e8m0": E8M0, "nvfp4": NVFP4}


@dataclass(frozen=True)
class Format:
    """A format: its elements, which values share a scale, and how the scale is found.

    A value is a scale times an element. Elements are rounded to nearest, ties to even; magnitudes
    that round beyond the largest become the largest.
    """

    name: str  # as `gradstat.quantization` takes it
    exponent_bits: int  # of an element, with a bias of ``2**(exponent_bits - 1) - 1``
    mantissa_bits: int  # of an element
    largest: float  # finite magnitude of an element
    # "given": the float32 `scale`; "amax": one float32 that takes the tensor's largest magnitude to
    # `largest`; "block": such a one for each block; "e8m0": a power of two for each block; "nvfp4":
    # an e4m3 for each block under a float32 for the tensor.
    scaling: Scaling = "none"
    block: tuple[int, int] | None = None  # rows and columns
    scale: float = 1.0  # that is given

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal element."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def max_exponent(self) -> int:
        """Exponent of the largest element."""
        return math.frexp(self.largest)[1] - 1

    @property
    def least_normal_bits(self) -> int:
        """The smallest normal element as the bits of a float32."""
        return (self.min_exponent + 127) << 23

    @property
    def to_rounder(self) -> int:
        """From the bits of a power of two to those of the number that rounds its octave."""
        # That number, 1.5 times a power of two, ends its digits where elements of the octave do:
        # added and taken away, it leaves a float32 rounded to an element.
        return ((23 - self.mantissa_bits) << 23) | 1 << 22

    @cached_property
    def fields(self) -> tuple[float, ...]:
        """The format as compiled code takes it: a number for each of `FIELDS`."""
        down, columns = self.block or (1, 0)
        kind = _KIND_OF.get(self.scaling, TILES if down > 1 else IN_ROW)
        is_bfloat16 = self.exponent_bits == 8
        return (
            kind,
            columns,
            self.least_normal_bits,
            self.to_rounder,
            self.largest,
            self.max_exponent,
            self.scale,
            float(np.float32(1) / np.float32(self.scale)),
            is_bfloat16,
            kind == E8M0 or (kind == CONSTANT and math.frexp(self.scale)[0] == 0.5),
            0 if is_bfloat16 else 0x10001 * int(np.float16(self.largest).view(np.uint16)),
        )

    @property
    def bits(self) -> float:
        """Bits of a value, with its share of the block's scale."""
        element = 1 + self.exponent_bits + self.mantissa_bits
        return element + (_SCALE_BITS[self.scaling] / math.prod(self.block) if self.block else 0)

    def count_blocks(self, rows: int, columns: int) -> int:
        """Scales of a matrix; 0 for a format without them, and of an empty one."""
        if self.scaling == "none" or not rows * columns:
            return 0
        down, across = self.block or (rows, columns)
        return -(-rows // down) * -(-columns // across)

    def with_scale(self, scale: float) -> Format:
        """The same elements under one scale, which they are multiplied by to give values back."""
        if isinstance(scale, bool) or not isinstance(scale, (int, float)):
            raise TypeError(f"with_scale() needs a number; scale is {scale!r}")
        if self.scaling != "none":
            raise ValueError(f"with_scale() needs a format without a scale; this is {self.name}")
        # Compared first: a number beyond float32 would warn.
        if not LEAST_SCALE <= scale <= 1 / LEAST_SCALE or float(np.float32(scale)) != scale:
            raise ValueError(
                "with_scale() needs a scale that is a float32 number between 2**-126 and 2**126; "
                f"scale is {scale!r}"
            )
        scale = float(scale)
        return replace(self, name=f"{self.name}{_GIVEN}{scale!r}", scaling="given", scale=scale)


def _float8(name: str, exponent_bits: int, mantissa_bits: int, largest: float) -> list[Format]:
    plain = Format(name, exponent_bits, mantissa_bits, largest)
    return [
        plain,
        replace(plain, name=f"{name}_amax", scaling="amax"),
        replace(plain, name=f"{name}_1x128", scaling="block", block=(1, 128)),
        replace(plain, name=f"{name}_128x128", scaling="block", block=(128, 128)),
    ]


_ALL = [
    Format("float16", 5, 10, 65504.0),
    Format("bfloat16", 8, 7, (2 - 2.0**-7) * 2.0**127),
    *_float8("float8_e4m3fn", 4, 3, 448.0),
    *_float8("float8_e5m2", 5, 2, 57344.0),
    Format("mxfp8_e4m3", 4, 3, 448.0, "e8m0", (1, 32)),
    Format("mxfp8_e5m2", 5, 2, 57344.0, "e8m0", (1, 32)),
    Format("mxfp6_e2m3", 2, 3, 7.5, "e8m0", (1, 32)),
    Format("mxfp6_e3m2", 3, 2, 28.0, "e8m0", (1, 32)),
    Format("mxfp4_e2m1", 2, 1, 6.0, "e8m0", (1, 32)),
    Format("nvfp4", 2, 1, 6.0, "nvfp4", (1, 16)),
]
FORMATS = {each.name: each for each in _ALL}
E4M3 = FORMATS["float8_e4m3fn"]  # of the scales of nvfp4's blocks
# The largest magnitude under nvfp4's tensor scale: the largest element times the largest e4m3.
NVFP4_LARGEST = FORMATS["nvfp4"].largest * E4M3.largest


def parse_format(function: str, form: str | Format) -> Format:
    """The format of a name, such as ``"mxfp4_e2m1"`` or ``"float8_e4m3fn_scale_0.25"``."""
    if isinstance(form, Format):
        if parse_format(function, form.name) != form:
            raise ValueError(f"{function}() needs formats of gradstat.formats; one is {form!r}")
        return form
    if not isinstance(form, str):
        raise TypeError(
            f"{function}() needs formats, each a name or a Format; formats has {form!r}"
        )
    if form in FORMATS:
        return FORMATS[form]
    base, is_given, scale = form.partition(_GIVEN)
    if is_given and base in FORMATS:
        try:
            # Python reads more as a number than is written as one.
            if not scale or set(scale) - set("0123456789.e+-"):
                raise ValueError(f"{scale!r} is no number")
            return FORMATS[base].with_scale(float(scale))
        except ValueError as error:
            raise ValueError(f"{function}() needs formats; one is {form!r}: {error}") from None
    known = one_of(form, list(FORMATS))
    raise ValueError(f"{function}() needs formats, each {known}; one is {form!r}")


def asked_formats(function: str, formats: str | Format | Iterable[str | Format]) -> list[Format]:
    """As `check_formats`, but an empty tuple or list asks for none."""
    has_none = isinstance(formats, (tuple, list)) and not formats
    return [] if has_none else check_formats(function, formats)


def check_formats(function: str, formats: str | Format | Iterable[str | Format]) -> list[Format]:
    """One format or several, none of them unknown or there twice."""
    if isinstance(formats, (str, Format)):
        return [parse_format(function, formats)]
    if not isinstance(formats, Iterable):
        raise TypeError(f"{function}() needs a format or several; formats is {formats!r}")
    parsed = [parse_format(function, each) for each in formats]
    names = [each.name for each in parsed]
    if not names:
        raise ValueError(f"{function}() needs at least one format; formats is empty")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{function}() needs each format once; formats has {twice!r} twice")
    return parsed
