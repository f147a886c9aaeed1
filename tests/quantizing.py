"""Tensors that narrow formats treat each in its own way, and what casts make of them."""

import math
from collections.abc import Callable

import ml_dtypes
import numpy as np
import torch
from numpy.typing import NDArray

from gradstat.formats import FORMATS, Format

Array = NDArray[np.float64]

ELEMENTS = {
    (5, 10): np.float16,
    (8, 7): ml_dtypes.bfloat16,
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (2, 1): ml_dtypes.float4_e2m1fn,
}
NO_SCALE = (1 << 15, -(1 << 15))
# One of each kind of a given scale: a power of two, none, one that takes values far beyond.
ALL_FORMATS = [
    *FORMATS.values(),
    FORMATS["float8_e5m2"].with_scale(0.25),
    FORMATS["float8_e4m3fn"].with_scale(0.3125 * 2.0**-9),
    FORMATS["bfloat16"].with_scale(2.0**-20),
]

# One for each way to find a scale.
_OF_KINDS = (
    *("float8_e5m2", "bfloat16", "float8_e4m3fn_amax", "float8_e4m3fn_1x128"),
    *("float8_e5m2_128x128", "mxfp8_e4m3", "nvfp4"),
)
KINDS = [FORMATS[name] for name in _OF_KINDS]


def samples(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Matrices, vectors and a number, some with a ragged end, of any dtype."""
    generator = torch.Generator("cpu").manual_seed(17)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device="cpu")

    def integers(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device="cpu")

    def with_one(x: torch.Tensor, value: float) -> torch.Tensor:
        x[len(x) // 2, x.shape[1] // 3] = value
        return x

    found = {
        "normal": normal(64, 96) * 1e-3,
        "rows and columns beyond a block of 128": normal(130, 129),
        "wide rows": normal(2, 8200),
        "ragged": normal(7, 45) * 20,
        "narrow rows": normal(50, 3),
        "three dimensions": normal(3, 5, 40),
        "over many octaves": normal(60, 64) * torch.exp(8 * normal(60, 64)),
        # Ties of every format: they are multiples of halves of its steps.
        "ties": integers(-2048, 2048, 33, 64) / 64,
        "powers of two": torch.exp2(integers(-149, 128, 40, 32).float()),
        "subnormal": normal(70) * 1e-40,
        "small": normal(9, 33) * 1e-30,
        "large": normal(9, 33) * 1e30,
        "smallest scales": normal(16, 32) * 1e-37,
        "one giant": with_one(normal(20, 64) * 1e-3, 1e30),
        "one nan and one infinity": with_one(with_one(normal(20, 50), math.nan).roll(7), math.inf),
        "nothing finite": torch.full((3, 40), math.nan, device="cpu"),
        "largest": torch.full((3, 50), (2 - 2.0**-23) * 2.0**127, device="cpu"),
        "equal": torch.full((40, 64), 0.1, device="cpu"),
        "zero blocks": torch.cat([torch.zeros(4, 64, device="cpu"), normal(4, 64)], 1),
        "zeros": torch.zeros(33, 40, device="cpu"),
        "empty": torch.zeros(3, 0, device="cpu"),
        "number": torch.tensor(-3.3, device="cpu"),
        # Of float64: what comes to zero in float32, alone and beside others, and what comes to its
        # largest value, the first of these two, or beyond, the others.
        "zero in float32": torch.full((3, 40), 1e-50, dtype=torch.float64, device="cpu"),
        "ends of float32": torch.tensor(
            [[1e-50, 1.0], [3.40282347e38, 3.4028235677973362e38], [3.4028235677973366e38, 1e300]],
            dtype=torch.float64,
            device="cpu",
        ),
        "halves of the largest": torch.tensor(
            [[448, 464, 464.001, 480, 57344, 61440, 61439, 6, 7, 7.001, 7.5, 7.75, 28, 30, 65520]],
            device="cpu",
        ),
    }
    return {name: x.to(dtype) for name, x in found.items()}


def every_pattern(dtype: torch.dtype) -> torch.Tensor:
    """All values of a 16-bit type, one of each."""
    patterns = torch.arange(1 << 16, dtype=torch.int32, device="cpu").to(torch.int16)
    return patterns.view(dtype).reshape(256, 256)


def expected(x: torch.Tensor, form: Format, dim: int = -1) -> tuple[list[int], list[float]]:
    """The fields of a Quantization, from casts of ml_dtypes: value by value and block by block."""
    values = x.detach().double().numpy()
    values = np.moveaxis(values, dim, -1) if values.ndim else values.reshape(1)
    matrix = values.reshape(math.prod(values.shape[:-1]), values.shape[-1])
    is_finite = np.isfinite(matrix)
    with np.errstate(over="ignore", invalid="ignore"):
        magnitudes = np.abs(np.where(is_finite, matrix, 0))
        most = min(magnitudes.max(initial=0), np.finfo(np.float32).max)
        scale_of = _scale_rule(form, np.float32(most))
    counts, scales, norms = np.zeros(3, int), [], [_norm(magnitudes), 0.0]
    blocks = _blocks(magnitudes, form)
    for block in blocks:
        underflowed, saturated, error, scale = _cast(block, form, scale_of)
        counts += (underflowed, saturated, not block.any())
        norms[1] = math.hypot(norms[1], error)
        if scale > 0 and block.any():
            scales.append(math.frexp(scale)[1] - 1)
    if form.scaling == "none":
        blocks, counts[2], scales = [], 0, []
    integers = [
        *(np.count_nonzero(magnitudes), counts[0], counts[1], np.count_nonzero(~is_finite)),
        *(len(blocks), counts[2]),
        min(scales, default=NO_SCALE[0]),
        max(scales, default=NO_SCALE[1]),
    ]
    return [int(each) for each in integers], norms


def _blocks(matrix: Array, form: Format) -> list[Array]:
    if form.block is None:
        return [matrix.reshape(-1)] if matrix.size else []
    down, across = form.block
    return [
        matrix[top : top + down, left : left + across].reshape(-1)
        for top in range(0, matrix.shape[0], down)
        for left in range(0, matrix.shape[1], across)
    ]


def _scale_rule(
    form: Format, most: np.float32
) -> Callable[[np.float32], tuple[np.float32, np.float32, float]]:
    """From a block's largest magnitude: its scale, the reciprocal, the scale that is stored."""
    one = np.float32(1)

    def constant(_: np.float32) -> tuple[np.float32, np.float32, float]:
        scale = np.float32(form.scale)
        return scale, one / scale, float(scale)

    def to_largest(largest: np.float32) -> tuple[np.float32, np.float32, float]:
        inverse = min(np.float32(form.largest) / largest, np.float32(2.0**126))
        return one / inverse, inverse, float(one / inverse)

    def power_of_two(largest: np.float32) -> tuple[np.float32, np.float32, float]:
        element_exponent = math.frexp(form.largest)[1] - 1
        exponent = math.frexp(largest)[1] - 1 - element_exponent if largest else -127
        scale = np.float32(2.0 ** max(exponent, -127))
        return scale, one / scale, float(scale)

    def e4m3(largest: np.float32) -> tuple[np.float32, np.float32, float]:
        of_tensor = max(most / np.float32(6 * 448), np.float32(2.0**-117))
        ratio = min(largest / np.float32(6) / of_tensor, np.float32(448))
        stored = np.float32(ml_dtypes.float8_e4m3fn(ratio))
        inverse = one / of_tensor / stored if stored else np.float32(0)
        return of_tensor * stored, inverse, float(stored)

    rules = {"none": constant, "given": constant, "amax": to_largest, "block": to_largest}
    return {**rules, "e8m0": power_of_two, "nvfp4": e4m3}[form.scaling]


def _cast(
    block: Array,
    form: Format,
    scale_of: Callable[[np.float32], tuple[np.float32, np.float32, float]],
) -> tuple[int, int, float, float]:
    """How many values of a block come to zero and saturate; norm of the error; stored scale."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        rounded = block.astype(np.float32)
        narrow = np.minimum(rounded, np.finfo(np.float32).max)
        scale, inverse, stored = scale_of(narrow.max(initial=np.float32(0)))
        quotient = narrow * inverse
        element = quotient.astype(ELEMENTS[form.exponent_bits, form.mantissa_bits])
        element = element.astype(np.float64)
    # Halfway from the largest element to where the next one would be; a tie goes to the even one.
    step = 2.0 ** (math.frexp(form.largest)[1] - 1 - form.mantissa_bits)
    half, is_odd = form.largest + step / 2, form.largest / step % 2 == 1
    saturated = (quotient >= half) if is_odd else (quotient > half)
    element = np.where(saturated, form.largest, element)
    saturated = saturated | np.isinf(rounded)
    assert np.isfinite(element).all()
    assert element.max(initial=0) <= form.largest
    underflowed = np.count_nonzero((block > 0) & (element == 0))
    error = _norm(block - element * np.float64(scale))
    return underflowed, np.count_nonzero(saturated), error, stored


def _norm(x: Array) -> float:
    return math.hypot(*x.reshape(-1).tolist())
