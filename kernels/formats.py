"""The kernel of narrow formats: one program reads one work item and says what formats do to it."""

import triton
import triton.language as tl

from gradstat.kernels.careful import power_of_two
from gradstat.kernels.granules import (
    load_granules,
    load_ragged,
    load_tile_maxima,
    load_whole,
    magnitudes,
)
from gradstat.kernels.rounding import (
    AMAX,
    COLUMNS,
    CONSTANT,
    E8M0,
    INVERSE,
    IS_POWER,
    KIND,
    LARGEST,
    NVFP4,
    SCALE,
    TILES,
    elements_of,
    find_scales,
)

# Fields of a row of partials, float64.
FORMAT_FIELDS = tl.constexpr(6)

# A sum of squares from here on has lost less to underflow than a float32 does to rounding.
SAFE_SQUARES = tl.constexpr(2.0**-100)
INF = tl.constexpr(float("inf"))


@triton.jit
def _no_sums(FORMS: tl.constexpr, THREADS: tl.constexpr, TILE: tl.constexpr):
    """Sums of no values: of these, and for each format of what it does to them."""
    none = tl.zeros((THREADS,), tl.float32)
    sums = ((none,),)
    for k in tl.static_range(len(FORMS)):
        blocks = tl.zeros((TILE // FORMS[k][COLUMNS] if FORMS[k][COLUMNS] > 0 else 1,), tl.float32)
        sums = sums + ((none, none, blocks, blocks + INF, blocks),)
    return sums


@triton.jit
def _no_squares(FORMS: tl.constexpr, THREADS: tl.constexpr, NUMBER: tl.constexpr):
    """Sums of squares of no values and no errors."""
    squares = (tl.zeros((THREADS,), NUMBER),)
    for _ in tl.static_range(len(FORMS)):
        squares = squares + (tl.zeros((THREADS,), NUMBER),)
    return squares


@triton.jit
def _kept(is_safe, sums, none, FORMS: tl.constexpr):
    """Sums, or those of no values."""
    chosen = ()
    for k in tl.static_range(1 + len(FORMS)):
        of_format = ()
        for field in tl.static_range(len(sums[k])):
            of_format = of_format + (tl.where(is_safe, sums[k][field], none[k][field]),)
        chosen = chosen + (of_format,)
    return chosen


@triton.jit
def count(is_so):
    """How many of a thread's values of a tile are so, float32 (THREADS,)."""
    return tl.sum(tl.sum(tl.where(is_so, 1.0, 0.0), 2), 0)


@triton.jit
def _spread(
    x, COLUMNS_: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr
):
    """Give each value of a tile what its block has."""
    wide = tl.broadcast_to(x[:, None], [x.shape[0], COLUMNS_])
    return tl.reshape(wide, [ROWS, THREADS, VECTOR])


@triton.jit
def _add_format(
    x,
    sums,
    squares,
    unit,
    most,
    largest,
    FORM: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Sums and squares with what a format does to a tile of magnitudes.

    Args:
        x: magnitudes, float32 (ROWS, THREADS, VECTOR).
        sums: values that do not come to zero; that saturate; blocks that are not empty; least and
            greatest of the scales that are stored with those, but zero.
        squares: of errors times unit.
        unit: power of two.
        most: the tensor's largest magnitude.
        largest: that of the block of 128 x 128 for each granule of 128.
        FORM: see rounding.py.
        ROWS: vectors of a tile for each thread.
        THREADS: threads of the program.
        VECTOR: elements in 16 bytes.
    """
    kept, saturated, blocks, least, greatest = sums
    COLUMNS_: tl.constexpr = FORM[COLUMNS]
    if FORM[KIND] == CONSTANT:
        inverse = FORM[INVERSE]
        scale = FORM[SCALE] * unit
    elif FORM[KIND] == AMAX:
        inverse, scale, _ = find_scales(most, most, FORM)
        scale = scale * unit
    else:
        if FORM[KIND] != TILES:
            largest = tl.max(tl.reshape(x, [ROWS * THREADS * VECTOR // COLUMNS_, COLUMNS_]), 1)
        inverse, scale, stored = find_scales(largest, most, FORM)
        if FORM[KIND] != TILES:
            is_used = largest > 0.0
            blocks += is_used.to(tl.float32)
            is_used = is_used & (stored > 0.0)
            least = tl.minimum(least, tl.where(is_used, stored, INF))
            greatest = tl.maximum(greatest, tl.where(is_used, stored, 0.0))
        inverse = _spread(inverse, COLUMNS_, ROWS, THREADS, VECTOR)
        scale = _spread(scale * unit, COLUMNS_, ROWS, THREADS, VECTOR)
    element = elements_of(x, inverse, FORM)
    if (FORM[KIND] == CONSTANT) | (FORM[KIND] == E8M0) | (FORM[KIND] == NVFP4):
        saturated += count(element > FORM[LARGEST])
        element = tl.minimum(element, FORM[LARGEST])
    kept += count(element > 0.0)
    if FORM[IS_POWER]:
        error = x * unit - element * scale
    else:
        # Elements times 12 digits of the scale are exact: the error is rounded as a difference.
        high = (scale.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
        error = (x * unit - element * high) - element * (scale - high)
    error = error.to(squares.dtype)
    squares += tl.sum(tl.sum(error * error, 2), 0)
    return (kept, saturated, blocks, least, greatest), squares


@triton.jit
def _add_tile(
    x,
    sums,
    squares,
    unit,
    most,
    largest,
    FORMS: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The same of all formats, and of the magnitudes themselves."""
    scaled = (x * unit).to(squares[0].dtype)
    new_sums = ((sums[0][0] + count(x > 0.0),),)
    new_squares = (squares[0] + tl.sum(tl.sum(scaled * scaled, 2), 0),)
    for k in tl.static_range(len(FORMS)):
        added, squared = _add_format(
            x, sums[1 + k], squares[1 + k], unit, most, largest, FORMS[k], ROWS, THREADS, VECTOR
        )
        new_sums = new_sums + (added,)
        new_squares = new_squares + (squared,)
    return new_sums, new_squares


@triton.jit
def _find_unit(address, place, n, DTYPE, GRANULE: tl.constexpr, THREADS: tl.constexpr):
    """A power of two that brings the first values of an item to the order of 1."""
    x = load_ragged(address, place, n, 0, DTYPE, GRANULE, 1, THREADS, 1)
    x, _ = magnitudes(x)
    return power_of_two(tl.max(tl.reshape(x, [THREADS])))


@triton.jit
def formats_kernel(
    items_ptr,
    maxima_ptr,
    partials_ptr,
    DTYPE: tl.constexpr,
    FORMS: tl.constexpr,
    IN_TILES: tl.constexpr,
    GRANULE: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """What F formats do to work item ``program_id``, which is read once.

    Args:
        items_ptr: int64 (W, 9), see granules.py.
        maxima_ptr: float32 (M,), largest magnitude of each tensor and block of 128 x 128; read
            for scales that are made of them.
        partials_ptr: float64 (W, 1 + F, 6): for the values those not zero, those not finite, sum of
            squares; for a format what does not come to zero, what saturates, sum of squares of
            errors, and of the blocks of a row how many are not empty, least and greatest scale.
        DTYPE: element type of the tensors; int16 for bfloat16.
        FORMS: formats, see rounding.py.
        IN_TILES: whether a format has blocks of 128 x 128; then a granule is 128 columns.
        GRANULE: columns of a granule.
        ROWS: vectors of a tile for each thread.
        THREADS: threads of the program.
        VECTOR: elements in 16 bytes.
    """
    address, tensor, n, n_whole, place = load_granules(items_ptr)
    TILE: tl.constexpr = ROWS * THREADS * VECTOR
    most = tl.load(maxima_ptr + tensor)
    largest = tl.zeros((TILE // 128,), tl.float32)
    unit = _find_unit(address, place, n, DTYPE, GRANULE, THREADS)
    sums = _no_sums(FORMS, THREADS, TILE)
    squares = _no_squares(FORMS, THREADS, tl.float32)
    for start in range(0, n_whole * GRANULE, TILE):
        x = tl.abs(load_whole(address, start, DTYPE, ROWS, THREADS, VECTOR))
        if IN_TILES:
            largest = load_tile_maxima(maxima_ptr, place, n, start, TILE)
        sums, squares = _add_tile(
            x, sums, squares, unit, most, largest, FORMS, ROWS, THREADS, VECTOR
        )

    # The item is read again where a float32 sum of squares may have lost some, where it overflowed,
    # or where a value is not finite, which makes the sum that too.
    is_safe = n_whole >= 0
    for k in tl.static_range(1 + len(FORMS)):
        q = tl.sum(squares[k])
        is_safe = is_safe & (q < INF) & (q >= SAFE_SQUARES)
    is_safe = is_safe | ((tl.sum(sums[0][0]) == 0.0) & (tl.sum(squares[0]) == 0.0))
    begin = tl.where(is_safe, n_whole * GRANULE, 0)
    sums = _kept(is_safe, sums, _no_sums(FORMS, THREADS, TILE), FORMS)
    one = tl.full((), 1.0, tl.float32)
    wide = _no_squares(FORMS, THREADS, tl.float64)
    nonfinite = tl.zeros((THREADS,), tl.float32)
    for start in range(begin, n * GRANULE, TILE):
        x = load_ragged(address, place, n, start, DTYPE, GRANULE, ROWS, THREADS, VECTOR)
        x, is_not = magnitudes(x)
        nonfinite += count(is_not)
        if IN_TILES:
            largest = load_tile_maxima(maxima_ptr, place, n, start, TILE)
        sums, wide = _add_tile(x, sums, wide, one, most, largest, FORMS, ROWS, THREADS, VECTOR)

    partial_ptr = partials_ptr + tl.program_id(0).to(tl.int64) * (1 + len(FORMS)) * FORMAT_FIELDS
    inverse = tl.where(is_safe, 1.0 / unit.to(tl.float64), 0.0)
    for k in tl.static_range(1 + len(FORMS)):
        field_ptr = partial_ptr + k * FORMAT_FIELDS
        tl.store(field_ptr, tl.sum(sums[k][0]).to(tl.float64))
        narrow = tl.where(is_safe, tl.sum(squares[k]), 0.0).to(tl.float64) * inverse * inverse
        tl.store(field_ptr + 2, narrow + tl.sum(wide[k]))
        if k == 0:
            tl.store(field_ptr + 1, tl.sum(nonfinite).to(tl.float64))
        else:
            tl.store(field_ptr + 1, tl.sum(sums[k][1]).to(tl.float64))
            tl.store(field_ptr + 3, tl.sum(sums[k][2]).to(tl.float64))
            tl.store(field_ptr + 4, tl.min(sums[k][3]).to(tl.float64))
            tl.store(field_ptr + 5, tl.max(sums[k][4]).to(tl.float64))
