"""The finishing kernel of narrow formats: one program merges the partial results of one tensor."""

import triton
import triton.language as tl

from gradstat.kernels.formats import FORMAT_FIELDS
from gradstat.kernels.rounding import AMAX, CONSTANT, KIND, SCALE, TILES, find_scales

INF = tl.constexpr(float("inf"))
# Exponents of scales where there is none, as `gradstat.results` has them.
_NO_LEAST = tl.constexpr(1 << 15)


@triton.jit
def _exponent(scale):
    """floor(log2(scale)) of a positive float64."""
    return (scale.to(tl.int64, bitcast=True) >> 52) - 1023


@triton.jit
def _tile_scales(maxima_ptr, first, end, FORM: tl.constexpr, BLOCK: tl.constexpr):
    """Blocks of 128 x 128 that are not empty, and their least and greatest scale, float64."""
    block = tl.arange(0, BLOCK)
    used = tl.zeros((BLOCK,), tl.float64)
    least = tl.full((BLOCK,), INF, tl.float64)
    greatest = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, end, BLOCK):
        at = start + block
        largest = tl.load(maxima_ptr + at, mask=at < end, other=0.0)
        _, scale, _ = find_scales(largest, largest, FORM, False)
        is_used = largest > 0.0
        used += is_used.to(tl.float64)
        least = tl.minimum(least, tl.where(is_used, scale, INF).to(tl.float64))
        greatest = tl.maximum(greatest, tl.where(is_used, scale, 0.0).to(tl.float64))
    return tl.sum(used), tl.min(least), tl.max(greatest)


@triton.jit
def finish_formats_kernel(
    spans_ptr,
    maxima_ptr,
    partials_ptr,
    integers_ptr,
    floats_ptr,
    n_rows,
    FORMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What F formats do to the tensor that row ``program_id`` of the spans names.

    Args:
        spans_ptr: int64 (N, 4 + F): row of the results and of the maximum, first work item, end of
            its items, row of the maximum of the first block of 128 x 128, blocks of each format.
        maxima_ptr: float32 (M,), see formats.py.
        partials_ptr: float64 (W, 1 + F, 6), see formats.py.
        integers_ptr: int64 (F, L, 8), fields of `gradstat.results.QUANTIZATION_INTEGERS`.
        floats_ptr: float64 (F, L, 2), fields of `gradstat.results.QUANTIZATION_FLOATS`.
        n_rows: L.
        FORMS: formats, see rounding.py.
        BLOCK: items merged at once.
    """
    N_FORMS: tl.constexpr = len(FORMS)
    span_ptr = spans_ptr + tl.program_id(0).to(tl.int64) * (4 + N_FORMS)
    row = tl.load(span_ptr)
    first = tl.load(span_ptr + 1)
    end = tl.load(span_ptr + 2)
    most = tl.load(maxima_ptr + row)
    tiles = tl.load(span_ptr + 3)
    nonzero, nonfinite, squares, _, _, _ = _merge(partials_ptr, first, end, 0, N_FORMS, BLOCK)
    for k in tl.static_range(N_FORMS):
        kept, saturated, errors, used, least, greatest = _merge(
            partials_ptr, first, end, 1 + k, N_FORMS, BLOCK
        )
        n_blocks = tl.load(span_ptr + 4 + k)
        if FORMS[k][KIND] == TILES:
            used, least, greatest = _tile_scales(
                maxima_ptr, tiles, tiles + n_blocks, FORMS[k], BLOCK
            )
        elif FORMS[k][KIND] == AMAX:
            _, scale, _ = find_scales(most, most, FORMS[k], False)
            used = (nonzero > 0.0).to(tl.float64)
            least = scale.to(tl.float64)
            greatest = least
        elif FORMS[k][KIND] == CONSTANT:
            used = (nonzero > 0.0).to(tl.float64)
            least = used * 0.0 + FORMS[k][SCALE]
            greatest = least
        has_scale = (n_blocks > 0) & (used > 0.0) & (least < INF)
        at = row + k * n_rows
        i = integers_ptr + 8 * at
        tl.store(i, nonzero.to(tl.int64))
        tl.store(i + 1, (nonzero - kept).to(tl.int64))
        tl.store(i + 2, saturated.to(tl.int64))
        tl.store(i + 3, nonfinite.to(tl.int64))
        tl.store(i + 4, n_blocks)
        tl.store(i + 5, tl.where(n_blocks > 0, n_blocks - used.to(tl.int64), 0))
        tl.store(i + 6, tl.where(has_scale, _exponent(least), _NO_LEAST))
        tl.store(i + 7, tl.where(has_scale, _exponent(greatest), -_NO_LEAST))
        tl.store(floats_ptr + 2 * at, tl.sqrt(squares))
        tl.store(floats_ptr + 2 * at + 1, tl.sqrt(errors))


@triton.jit
def _merge(partials_ptr, first, end, k, N_FORMS: tl.constexpr, BLOCK: tl.constexpr):
    """Partials of a tensor and a format from its items, in a fixed order; float64."""
    block = tl.arange(0, BLOCK)
    counted = tl.zeros((BLOCK,), tl.float64)
    second = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    used = tl.zeros((BLOCK,), tl.float64)
    least = tl.full((BLOCK,), INF, tl.float64)
    greatest = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, end, BLOCK):
        item = start + block
        mask = item < end
        p = partials_ptr + (item * (1 + N_FORMS) + k) * FORMAT_FIELDS
        counted += tl.load(p, mask=mask, other=0.0)
        second += tl.load(p + 1, mask=mask, other=0.0)
        squares += tl.load(p + 2, mask=mask, other=0.0)
        used += tl.load(p + 3, mask=mask, other=0.0)
        least = tl.minimum(least, tl.load(p + 4, mask=mask, other=INF))
        greatest = tl.maximum(greatest, tl.load(p + 5, mask=mask, other=0.0))
    return (
        tl.sum(counted),
        tl.sum(second),
        tl.sum(squares),
        tl.sum(used),
        tl.min(least),
        tl.max(greatest),
    )
