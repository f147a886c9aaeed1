"""Narrow formats by every engine, against casts of ml_dtypes and of torch."""

import math

import pytest
import torch
from conftest import IN_SOFTWARE, Engine, no_waiting
from quantizing import ALL_FORMATS, KINDS, every_pattern, expected, samples
from test_bit_patterns import rows_with_pairs

from gradstat import ops
from gradstat.formats import FORMATS, Format

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative, of norms of values and of errors.
TOLERANCES = {"reference": 1e-12, "cpu": 1e-5, "triton": 1e-5}


def check(
    engine: Engine,
    tensors: dict[str, torch.Tensor],
    formats: list[Format],
    dim: int = -1,
    flush_subnormals: bool = False,
) -> None:
    wanted = {
        (form.name, name): expected(x, form, dim) for form in formats for name, x in tensors.items()
    }
    on_device = [x.to(engine.device) for x in tensors.values()]
    torch.set_flush_denormal(flush_subnormals)
    try:
        integers, floats = engine.measure_formats(on_device, formats, dim)
    finally:
        torch.set_flush_denormal(False)
    assert integers.shape == (len(formats), len(tensors), 8)
    assert floats.shape == (len(formats), len(tensors), 2)
    rows = zip(integers.flatten(0, 1).tolist(), floats.flatten(0, 1).tolist(), strict=True)
    for which, (found_integers, found_floats) in zip(wanted, rows, strict=True):
        wanted_integers, wanted_floats = wanted[which]
        assert found_integers == wanted_integers, which
        tolerance = TOLERANCES[engine.name]
        assert found_floats == pytest.approx(wanted_floats, rel=tolerance, abs=0), which


def formats_for(engine: Engine, dtype: torch.dtype) -> list[Format]:
    """All of them; where kernels run in software one for each kind of scale, a quarter of all.

    Formats of a kind differ in constants alone. In software a CUDA device takes all for bfloat16,
    of which models are made; Triton's interpreter, which widens types of 16 bits first, takes of
    those the formats in tiles and in rows. A card takes all.
    """
    if engine.is_interpreted:
        return KINDS if dtype.itemsize > 2 else KINDS[-3:]
    is_in_software = engine.device == "cuda" and IN_SOFTWARE
    return KINDS if is_in_software and dtype != torch.bfloat16 else ALL_FORMATS


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_measure_formats_is_what_casts_do(engine: Engine, dtype: torch.dtype) -> None:
    check(engine, samples(dtype), formats_for(engine, dtype))


def test_measure_formats_along_another_dimension(engine: Engine) -> None:
    names = ("ragged", "three dimensions", "rows and columns beyond a block of 128", "number")
    tensors = {name: samples(torch.float32)[name] for name in names}
    check(engine, tensors, KINDS, dim=0)
    check(engine, {"middle": tensors["three dimensions"]}, KINDS, dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_measure_formats_of_every_pattern(engine: Engine, dtype: torch.dtype) -> None:
    # As they are, and in an order in which blocks have small and large values side by side.
    patterns = every_pattern(dtype)
    if engine.is_interpreted or (engine.device == "cuda" and IN_SOFTWARE):
        check(engine, {"across": patterns.T}, KINDS)
    else:
        check(engine, {"in order": patterns, "across": patterns.T}, ALL_FORMATS)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_measure_formats_tells_the_elements_of_a_pair_apart(
    engine: Engine, dtype: torch.dtype
) -> None:
    pairs = rows_with_pairs(dtype, 256)
    check(engine, {"with": pairs, "finite": pairs.nan_to_num(0, 2, -2)}, KINDS)


def test_measure_formats_of_strided_tensors(engine: Engine) -> None:
    x = samples(torch.float32)["rows and columns beyond a block of 128"]
    views = {"transposed": x.T, "every other column": x[:, ::2], "from an odd one": x[1:, 3:]}
    check(engine, views, [FORMATS["mxfp8_e4m3"], FORMATS["nvfp4"]])
    negated = torch.complex(x, x).conj().imag
    assert negated.is_neg()
    check(engine, {"negated": negated}, [FORMATS["mxfp8_e4m3"]])


def test_measure_formats_of_a_format_alone_is_that_among_others(engine: Engine) -> None:
    # Several rows, a ragged end, scales far apart, blocks of zeros, nothing.
    names = ("ragged", "over many octaves", "one giant", "zero blocks", "empty")
    tensors = [samples(torch.float32)[name].to(engine.device) for name in names]
    integers, floats = engine.measure_formats(tensors, KINDS)
    for k, form in enumerate(KINDS):
        alone_integers, alone_floats = engine.measure_formats(tensors, [form])
        assert torch.equal(alone_integers[0], integers[k])
        torch.testing.assert_close(alone_floats[0], floats[k], rtol=1e-6, atol=0)


def test_measure_formats_of_a_tensor_needs_no_other(engine: Engine) -> None:
    tensors = [x.to(engine.device) for x in samples(torch.bfloat16).values()]
    formats = [FORMATS["nvfp4"], FORMATS["float8_e4m3fn_128x128"]]
    integers, floats = engine.measure_formats(tensors, formats)
    for i in range(len(tensors)):
        alone = engine.measure_formats(tensors[i : i + 1], formats)
        assert torch.equal(alone[0][:, 0], integers[:, i])
        torch.testing.assert_close(alone[1][:, 0], floats[:, i], rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["float8_e4m3fn", "float8_e5m2"])
def test_measure_formats_is_the_cast_of_torch(engine: Engine, form: str) -> None:
    x = every_pattern(torch.bfloat16)
    x = x[x.isfinite()]
    # That of e4m3fn makes NaN of what saturates here.
    x = x.clamp(-FORMATS[form].largest, FORMATS[form].largest)
    cast = x.to(getattr(torch, form)).double()
    integers, floats = engine.measure_formats([x.to(engine.device)], [FORMATS[form]])
    assert int(integers[0, 0, 1]) == int(((cast == 0) & (x != 0)).sum())
    assert float(floats[0, 0, 1]) == pytest.approx(float((cast - x.double()).norm()), rel=1e-6)


def test_measure_formats_with_subnormals_flushed(engine: Engine) -> None:
    has_mode = torch.set_flush_denormal(True)
    torch.set_flush_denormal(False)
    if not has_mode:
        pytest.skip("this processor has no such mode")
    if engine.is_interpreted or (engine.device == "cuda" and IN_SOFTWARE):
        pytest.skip("software computes in the mode of the thread, a GPU in its own")
    tensors = {name: samples(torch.float32)[name] for name in ("subnormal", "smallest scales")}
    check(engine, tensors, ALL_FORMATS, flush_subnormals=True)


def test_measure_formats_does_not_depend_on_threads() -> None:
    x = torch.randn(700, 1000, generator=torch.Generator("cpu").manual_seed(3), device="cpu")
    engine, before = Engine("cpu", "cpu"), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(engine.measure_formats([x, x[:9]], ALL_FORMATS))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(each[k], found[0][k]) for each in found for k in (0, 1))
    assert math.isfinite(float(found[0][1].sum()))


@pytest.mark.gpu
def test_measure_formats_does_not_wait_for_the_device() -> None:
    tensors = [x.cuda() for dtype in DTYPES for x in samples(dtype).values()]
    tensors.append(torch.randn(64, 40, device="cuda").T)
    before = ops.measure_formats(tensors, KINDS)
    with no_waiting():
        after = ops.measure_formats(tensors, KINDS)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_measure_formats_of_large_items_is_the_reference(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Whole tiles, and sums in float32 that are right, lost, and infinite.
    generator = torch.Generator("cpu").manual_seed(9)
    x = torch.randn(40, 512, generator=generator, device="cpu")
    late, last = x.clone(), torch.zeros_like(x)
    late[0] *= 1e-30
    last[-1, -1] = 0.7
    tensors = {
        "normal": x,
        "all but the first values large": late,
        "the last value alone": last,
        "small": x * 1e-30,
        "large": x * 1e30,
        "exact": x.bfloat16().float(),
        "one nan": torch.where(x == x.max(), math.nan, x),
        "from the second element": torch.cat([x.flatten(), x[0]])[1:-511].reshape(40, 512),
    }
    monkeypatch.setattr("gradstat.engines.triton.MIN_ITEM", 1 << 16)
    check(engine, tensors, KINDS)
