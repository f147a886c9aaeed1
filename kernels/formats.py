"""The kernel of narrow formats: one program reads one work item and says what formats do to it.

Scales and rounding are those of gradstat/engines/reference.py. A format is a tuple of constants:
`gradstat.formats.Format.fields`. Magnitudes are float32; no instruction of a narrow type is needed.
"""

import triton
import triton.language as tl

from gradstat import formats
from gradstat.kernels.block_groups import (
    find_tiles,
    load_groups,
    load_ragged,
    load_tile_maxima,
    magnitudes,
)
from gradstat.kernels.careful import power_of_two
from gradstat.kernels.items import (
    ROWS,
    load_tile,
    nearly_reciprocal,
    pair_above,
    pair_add,
    pair_count,
    pair_unequal,
    pairs_of,
    values_of,
)

INF = tl.constexpr(float("inf"))
# Fields of a format, and ways to find its scale, as `gradstat.formats` says.
KIND, COLUMNS, LEAST, TO_ROUNDER, LARGEST, TOP = map(tl.constexpr, formats.FIELDS[:6])
SCALE, INVERSE, IS_BFLOAT16, IS_POWER, LARGEST_PAIR = map(tl.constexpr, formats.FIELDS[6:])
CONSTANT, AMAX, IN_ROW, TILES, E8M0, NVFP4 = map(tl.constexpr, formats.KINDS)

_E4M3_LEAST = tl.constexpr(formats.E4M3.least_normal_bits)
_E4M3_TO_ROUNDER = tl.constexpr(formats.E4M3.to_rounder)
_E4M3_LARGEST = tl.constexpr(formats.E4M3.largest)
_E2M1_LARGEST = tl.constexpr(formats.FORMATS["nvfp4"].largest)
_NVFP4_LARGEST = tl.constexpr(formats.NVFP4_LARGEST)
_LEAST_TENSOR_SCALE = tl.constexpr(formats.LEAST_TENSOR_SCALE)
_MOST_INVERSE = tl.constexpr(1 / formats.LEAST_SCALE)
_FLOAT32_MAX = tl.constexpr((2 - 2.0**-23) * 2.0**127)

# Fields of a row of partials, float64.
FORMAT_FIELDS = tl.constexpr(6)
RAGGED_VECTOR = tl.constexpr(4)  # values of a thread, fewer since squares are in float64
LEAST_MOST = tl.constexpr(2.0**-78)

# A sum of squares from here on has lost less to underflow than a float32 does to rounding.
SAFE_SQUARES = tl.constexpr(2.0**-100)
# Exponents of scales where there is none, as `gradstat.results` has them.
_NO_LEAST = tl.constexpr(1 << 15)


@triton.jit
def rounded(x, LEAST_BITS: tl.constexpr, TO_ROUNDER_BITS: tl.constexpr):
    """Magnitudes rounded to elements, ties to even, as if there were no largest one.

    The number that is added and taken away ends its digits where an element of the octave does. A
    product must not be fused with that sum: what comes here is a minimum.
    """
    octave = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, LEAST_BITS)
    rounder = (octave + TO_ROUNDER_BITS).to(tl.float32, bitcast=True)
    return (x + rounder) - rounder


@triton.jit
def rounded_bfloat16(x):
    """Magnitudes rounded to bfloat16; infinite beyond its largest."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0x7FFF0000
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def _divided(a, b, inverse):
    """Quotients rounded right, for a b of few digits, as an e4m3, and about its reciprocal.

    The remainder is exact, and no such quotient is close to halfway between two numbers.
    """
    q = a * inverse
    return tl.fma(tl.fma(-b, q, a), inverse, q)


@triton.jit
def _divided_twice(a, b, inverse):
    """Quotients rounded right, for any b and its reciprocal, rounded right (Markstein)."""
    q = _divided(a, b, inverse)
    return tl.fma(tl.fma(-b, q, a), inverse, q)


@triton.jit
def find_scales(largest, most, FORM: tl.constexpr, FAST: tl.constexpr):
    """Scales of groups of values.

    Args:
        largest: largest magnitude of each group, float32.
        most: that of the tensor, float32.
        FORM: format.
        FAST: no quotient is subnormal, and products are fused.

    Returns:
        reciprocal and scale, and the scale that is stored with a block, float32.
    """
    if FORM[KIND] == E8M0:
        exponent = (largest.to(tl.int32, bitcast=True) >> 23) - (127 + FORM[TOP])
        exponent = tl.maximum(exponent, -127)
        inverse = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
        # The least one is subnormal.
        scale = tl.maximum((127 + exponent) << 23, 1 << 22).to(tl.float32, bitcast=True)
        return inverse, scale, scale
    if FORM[KIND] == NVFP4:
        of_tensor = tl.maximum(tl.div_rn(most, _NVFP4_LARGEST), _LEAST_TENSOR_SCALE)
        inverse_of_tensor = tl.div_rn(1.0, of_tensor)
        if FAST:
            exact = _divided(largest, _E2M1_LARGEST, 1 / _E2M1_LARGEST)
            exact = _divided_twice(exact, of_tensor, inverse_of_tensor)
        else:
            exact = tl.div_rn(tl.div_rn(largest, _E2M1_LARGEST), of_tensor)
        stored = rounded(tl.minimum(exact, _E4M3_LARGEST), _E4M3_LEAST, _E4M3_TO_ROUNDER)
        # A minimum, so that no difference is fused with the product before it is rounded.
        scale = tl.minimum(stored * of_tensor, _FLOAT32_MAX)
        divisor = tl.where(stored > 0.0, stored, 1.0)
        if FAST:
            inverse = _divided(inverse_of_tensor, divisor, nearly_reciprocal(divisor))
        else:
            inverse = tl.div_rn(inverse_of_tensor, divisor)
        return tl.where(stored > 0.0, inverse, 0.0), scale, stored
    used = tl.where(largest > 0.0, largest, FORM[LARGEST])
    inverse = tl.minimum(tl.div_rn(FORM[LARGEST] * 1.0, used), _MOST_INVERSE)
    scale = tl.div_rn(1.0, inverse)
    return inverse, scale, scale


@triton.jit
def elements_of(x, inverse, FORM: tl.constexpr):
    """Elements of magnitudes, as if there were none beyond the largest; float32."""
    element = x * inverse
    if FORM[IS_BFLOAT16]:
        element = rounded_bfloat16(element)
    else:
        # A block's power of two takes none further, and a product with it is exact.
        if FORM[KIND] != E8M0:
            element = tl.minimum(element, 2.0 * FORM[LARGEST])
        element = rounded(element, FORM[LEAST], FORM[TO_ROUNDER])
    return element


@triton.jit
def maxima_kernel(
    items_ptr,
    maxima_ptr,
    DTYPE: tl.constexpr,
    IN_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Largest magnitudes of tensors and blocks of 128 x 128, from work item ``program_id``.

    Args:
        items_ptr: int64 (W, 9), see block_groups.py.
        maxima_ptr: int32 (M,), zeroed by the caller: bits of a float32 for each tensor and block.
        DTYPE: element type of the tensors; int16 for bfloat16.
        IN_TILES: whether blocks have a maximum; then a group is 128 columns.
        GROUP: columns of a group.
        THREADS: threads of the program.
    """
    address, tensor, n, n_whole, place = load_groups(items_ptr)
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    ROW: tl.constexpr = THREADS * VECTOR
    most = tl.zeros((THREADS,), tl.float32)
    for start in range(0, n_whole * GROUP, ROWS * ROW):
        rows = load_tile(address, start, DTYPE, ROWS, THREADS)
        for row in tl.static_range(ROWS):
            x, _ = magnitudes(values_of(rows[row], DTYPE))
            most = tl.maximum(most, tl.max(x, 1))
            if IN_TILES:
                _add_tiles(x, place, n, start + row * ROW, maxima_ptr, ROW)
    for start in range(n_whole * GROUP, n * GROUP, ROW):
        x = load_ragged(address, place, n, start, DTYPE, GROUP, THREADS, VECTOR)
        x, _ = magnitudes(x)
        most = tl.maximum(most, tl.max(x, 1))
        if IN_TILES:
            _add_tiles(x, place, n, start, maxima_ptr, ROW)
    tl.atomic_max(maxima_ptr + tensor, tl.max(most).to(tl.int32, bitcast=True), sem="relaxed")


@triton.jit
def _add_tiles(x, place, n, start, maxima_ptr, ROW: tl.constexpr):
    """Take the groups of a row to the maxima of their blocks."""
    largest = tl.max(tl.reshape(x, [ROW // 128, 128]), 1).to(tl.int32, bitcast=True)
    at, mask = find_tiles(place, n, start, ROW)
    tl.atomic_max(maxima_ptr + at, largest, mask=mask, sem="relaxed")


@triton.jit
def _no_sums(FORMS: tl.constexpr, PAIRS: tl.constexpr, ROW: tl.constexpr, THREADS: tl.constexpr):
    """Sums of what each format does to no values."""
    sums = ()
    for k in tl.static_range(len(FORMS)):
        none = tl.zeros((THREADS,), tl.int32 if PAIRS and not FORMS[k][IS_BFLOAT16] else tl.float32)
        blocks = tl.zeros((ROW // FORMS[k][COLUMNS] if FORMS[k][COLUMNS] > 0 else 1,), tl.float32)
        sums = sums + ((none, none, blocks, blocks + INF, blocks),)
    return sums


@triton.jit
def _no_squares(FORMS: tl.constexpr, THREADS: tl.constexpr, NUMBER: tl.constexpr):
    """Sums of squares of no values and no errors."""
    squares = (tl.zeros((THREADS, 2), NUMBER),)
    for _ in tl.static_range(len(FORMS)):
        squares = squares + (tl.zeros((THREADS, 2), NUMBER),)
    return squares


@triton.jit
def _add_squares(squares, x):
    """Sums of squares (THREADS, 2) with those of values (THREADS, N).

    One after the other: a square and its addition are one instruction.
    """
    if x.shape[1] == 2:
        squares += x * x
    else:
        a, b = tl.split(tl.permute(tl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))
        squares = _add_squares(_add_squares(squares, a), b)
    return squares


@triton.jit
def _count_above(counts, x, bound, PAIRS: tl.constexpr):
    """Counts of each thread with those values that are larger; in pairs if they are."""
    if PAIRS:
        counts = pair_add(counts, pair_count(pair_above(x, bound)))
    else:
        counts += tl.sum((x > bound).to(tl.float32), 1)
    return counts


@triton.jit
def _sum_counts(counts):
    """Sum over the threads; float32."""
    if counts.dtype == tl.int32:
        counts = values_of(counts[:, None], tl.float16)
    return tl.sum(counts)


@triton.jit
def _spread(x, COLUMNS_: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Give each value of a row what its block has."""
    wide = tl.broadcast_to(x[:, None], [x.shape[0], COLUMNS_])
    return tl.reshape(wide, [THREADS, VECTOR])


@triton.jit
def _add_format(
    x,
    sums,
    squares,
    unit,
    most,
    largest,
    FORM: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums and squares with what a format does to a row of magnitudes.

    Args:
        x: magnitudes, float32 (THREADS, VECTOR).
        sums: values that do not come to zero; that saturate; blocks that are not empty; least and
            greatest of the scales that are stored with those, but zero.
        squares: of errors times unit.
        unit: power of two.
        most: the tensor's largest magnitude.
        largest: that of the block of 128 x 128 for each group of 128.
        FORM: fields of the format.
        PAIRS: count in pairs of float16, which hold every element but bfloat16.
        FAST: see `find_scales`.
        THREADS: threads of the program.
        VECTOR: elements in 16 bytes.
    """
    IN_PAIRS: tl.constexpr = PAIRS and not FORM[IS_BFLOAT16]
    kept, saturated, blocks, least, greatest = sums
    COLUMNS_: tl.constexpr = FORM[COLUMNS]
    if FORM[KIND] == CONSTANT:
        inverse = FORM[INVERSE]
        scale = FORM[SCALE] * unit
    elif FORM[KIND] == AMAX:
        inverse, scale, _ = find_scales(most, most, FORM, FAST)
        scale = scale * unit
    else:
        if FORM[KIND] != TILES:
            largest = tl.max(tl.reshape(x, [THREADS * VECTOR // COLUMNS_, COLUMNS_]), 1)
        inverse, scale, stored = find_scales(largest, most, FORM, FAST)
        if FORM[KIND] != TILES:
            is_used = largest > 0.0
            blocks += is_used.to(tl.float32)
            is_used = is_used & (stored > 0.0)
            least = tl.minimum(least, tl.where(is_used, stored, INF))
            greatest = tl.maximum(greatest, tl.where(is_used, stored, 0.0))
        inverse = _spread(inverse, COLUMNS_, THREADS, VECTOR)
        scale = _spread(scale * unit, COLUMNS_, THREADS, VECTOR)
    element = elements_of(x, inverse, FORM)
    counted = pairs_of(element) if IN_PAIRS else element
    if (FORM[KIND] == CONSTANT) | (FORM[KIND] == E8M0) | (FORM[KIND] == NVFP4):
        bound = FORM[LARGEST_PAIR] if IN_PAIRS else FORM[LARGEST]
        saturated = _count_above(saturated, counted, bound, IN_PAIRS)
        element = tl.minimum(element, FORM[LARGEST])
    kept = _count_above(kept, counted, 0 if IN_PAIRS else 0.0, IN_PAIRS)
    if FORM[IS_POWER]:
        error = x * unit - element * scale
    else:
        # Elements times 12 digits of the scale are exact: the error is rounded as a difference.
        high = (scale.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        error = (x * unit - element * high) - element * (scale - high)
    return (kept, saturated, blocks, least, greatest), _add_squares(
        squares, error.to(squares.dtype)
    )


@triton.jit
def _add_row(
    x,
    sums,
    squares,
    unit,
    most,
    largest,
    FORMS: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The same of all formats, and squares of the magnitudes themselves."""
    new_sums = ()
    new_squares = (_add_squares(squares[0], (x * unit).to(squares[0].dtype)),)
    for k in tl.static_range(len(FORMS)):
        added, squared = _add_format(
            x, sums[k], squares[1 + k], unit, most, largest, FORMS[k], PAIRS, FAST, THREADS, VECTOR
        )
        new_sums = new_sums + (added,)
        new_squares = new_squares + (squared,)
    return new_sums, new_squares


@triton.jit
def _find_unit(address, place, n, DTYPE, GROUP: tl.constexpr, THREADS: tl.constexpr):
    """A power of two that brings the first values of an item to the order of 1."""
    x, _ = magnitudes(load_ragged(address, place, n, 0, DTYPE, GROUP, THREADS, 1))
    return power_of_two(tl.max(x))


@triton.jit
def formats_kernel(
    items_ptr,
    maxima_ptr,
    partials_ptr,
    DTYPE: tl.constexpr,
    FORMS: tl.constexpr,
    IN_TILES: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    THREADS: tl.constexpr,
):
    """What F formats do to work item ``program_id``, which is read once.

    Args:
        items_ptr: int64 (W, 9), see block_groups.py.
        maxima_ptr: float32 (M,), largest magnitude of each tensor and block of 128 x 128; read
            for scales that are made of them.
        partials_ptr: float64 (W, 1 + F, 6): for the values those not zero, those not finite, sum of
            squares; for a format what does not come to zero, what saturates, sum of squares of
            errors, and of the blocks of a row how many are not empty, least and greatest scale.
        DTYPE: element type of the tensors; int16 for bfloat16.
        FORMS: formats, fields of each.
        IN_TILES: whether a format has blocks of 128 x 128; then a group is 128 columns.
        GROUP: columns of a group.
        PAIRS: count in pairs, see items.py.
        THREADS: threads of the program.
    """
    address, tensor, n, n_whole, place = load_groups(items_ptr)
    VECTOR: tl.constexpr = 128 // DTYPE.primitive_bitwidth  # elements in 16 bytes
    ROW: tl.constexpr = THREADS * VECTOR
    most = tl.load(maxima_ptr + tensor)
    for k in tl.static_range(len(FORMS)):
        # Quotients below may be subnormal: the other loop divides them slowly.
        if PAIRS and FORMS[k][KIND] == NVFP4:
            n_whole = tl.where(most < LEAST_MOST, 0, n_whole)
    largest = tl.zeros((ROW // 128,), tl.float32)
    unit = _find_unit(address, place, n, DTYPE, GROUP, THREADS)
    sums = _no_sums(FORMS, PAIRS, ROW, THREADS)
    squares = _no_squares(FORMS, THREADS, tl.float32)
    IN_PAIRS: tl.constexpr = PAIRS and DTYPE.primitive_bitwidth == 16
    counts = tl.zeros((THREADS,), tl.int32 if IN_PAIRS else tl.float32)
    for start in range(0, n_whole * GROUP, ROWS * ROW):
        rows = load_tile(address, start, DTYPE, ROWS, THREADS)
        for row in tl.static_range(ROWS):
            x = tl.abs(values_of(rows[row], DTYPE))
            if IN_PAIRS:
                counts = pair_add(counts, pair_count(pair_unequal(rows[row], 0)))
            else:
                counts = _count_above(counts, x, 0.0, False)
            if IN_TILES:
                largest = load_tile_maxima(maxima_ptr, place, n, start + row * ROW, ROW)
            sums, squares = _add_row(
                x, sums, squares, unit, most, largest, FORMS, PAIRS, PAIRS, THREADS, VECTOR
            )

    # The item is read again where a float32 sum of squares may have lost some, where it overflowed,
    # or where a value is not finite, which makes the sum that too.
    nonzero = _sum_counts(counts)
    is_safe = (nonzero == 0.0) & (tl.sum(squares[0]) == 0.0)
    are_safe = n_whole >= 0
    for k in tl.static_range(1 + len(FORMS)):
        q = tl.sum(squares[k])
        are_safe = are_safe & (q < INF) & (q >= SAFE_SQUARES)
    is_safe = is_safe | are_safe
    begin = tl.where(is_safe, n_whole * GROUP, 0)
    RAGGED_ROW: tl.constexpr = THREADS * RAGGED_VECTOR
    one = tl.full((), 1.0, tl.float32)
    more = _no_sums(FORMS, PAIRS, RAGGED_ROW, THREADS)
    wide = _no_squares(FORMS, THREADS, tl.float64)
    largest = tl.zeros((RAGGED_ROW // 128,), tl.float32)
    others = tl.zeros((THREADS,), tl.float32)
    nonfinite = tl.zeros((THREADS,), tl.float32)
    for start in range(begin, n * GROUP, RAGGED_ROW):
        x = load_ragged(address, place, n, start, DTYPE, GROUP, THREADS, RAGGED_VECTOR)
        x, is_not = magnitudes(x)
        nonfinite += tl.sum(is_not.to(tl.float32), 1)
        others = _count_above(others, x, 0.0, False)
        if IN_TILES:
            largest = load_tile_maxima(maxima_ptr, place, n, start, RAGGED_ROW)
        more, wide = _add_row(
            x, more, wide, one, most, largest, FORMS, PAIRS, False, THREADS, RAGGED_VECTOR
        )

    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * (1 + len(FORMS)) * FORMAT_FIELDS
    inverse = tl.where(is_safe, 1.0 / unit.to(tl.float64), 0.0)
    for k in tl.static_range(1 + len(FORMS)):
        field_ptr = partial_ptr + k * FORMAT_FIELDS
        narrow = tl.where(is_safe, tl.sum(squares[k]), 0.0).to(tl.float64) * inverse * inverse
        tl.store(field_ptr + 2, narrow + tl.sum(wide[k]))
        if k == 0:
            tl.store(field_ptr, (tl.where(is_safe, nonzero, 0.0) + tl.sum(others)).to(tl.float64))
            tl.store(field_ptr + 1, tl.sum(nonfinite).to(tl.float64))
        else:
            kept, saturated, blocks, least, greatest = _totals(sums[k - 1], is_safe)
            kept_, saturated_, blocks_, least_, greatest_ = _totals(more[k - 1], n >= 0)
            tl.store(field_ptr, (kept + kept_).to(tl.float64))
            tl.store(field_ptr + 1, (saturated + saturated_).to(tl.float64))
            tl.store(field_ptr + 3, (blocks + blocks_).to(tl.float64))
            tl.store(field_ptr + 4, tl.minimum(least, least_).to(tl.float64))
            tl.store(field_ptr + 5, tl.maximum(greatest, greatest_).to(tl.float64))


@triton.jit
def _totals(sums, is_used):
    """Sums over the threads, or over none of them."""
    kept, saturated, blocks, least, greatest = sums
    return (
        tl.where(is_used, _sum_counts(kept), 0.0),
        tl.where(is_used, _sum_counts(saturated), 0.0),
        tl.where(is_used, tl.sum(blocks), 0.0),
        tl.where(is_used, tl.min(least), INF),
        tl.where(is_used, tl.max(greatest), 0.0),
    )


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
        FORMS: formats, fields of each.
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
    none = tl.zeros((BLOCK,), tl.float64)
    sums, least, greatest = (none, none, none, none), none + INF, none
    for start in range(first, end, BLOCK):
        item = start + block
        mask = item < end
        p = partials_ptr + (item * (1 + N_FORMS) + k) * FORMAT_FIELDS
        added = ()
        for field in tl.static_range(4):
            added = added + (sums[field] + tl.load(p + field, mask=mask, other=0.0),)
        sums = added
        least = tl.minimum(least, tl.load(p + 4, mask=mask, other=INF))
        greatest = tl.maximum(greatest, tl.load(p + 5, mask=mask, other=0.0))
    counted, second, squares, used = sums
    totals = (tl.sum(counted), tl.sum(second), tl.sum(squares), tl.sum(used))
    return totals + (tl.min(least), tl.max(greatest))
