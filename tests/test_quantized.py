"""`quantization()` and `Quantization`: arguments, shapes, derived values, merging."""

import math

import numpy as np
import pytest
import torch
from quantizing import samples

import gradstat
from gradstat.formats import FORMATS
from gradstat.results import PACKED, packed, unpacked

E5M2 = "float8_e5m2"
PAIR = ("integers", "floats")


def test_quantization_of_a_tensor_has_no_dimension_and_of_a_list_one() -> None:
    x = torch.ones(3, 4)
    one = gradstat.quantization(x, E5M2)
    assert one.snr.shape == one.nonzero.shape == ()
    several = gradstat.quantization({"a": x, "b": x * 0}, E5M2)
    assert several.nonzero.tolist() == [12, 0]
    assert len(several) == 2
    assert [int(each.nonzero) for each in several] == [12, 0]
    assert several[1:].nonzero.tolist() == [0]
    for refuse in (lambda: len(one), lambda: one[0]):
        with pytest.raises(TypeError, match="this is of one tensor"):
            refuse()


def test_quantization_of_several_formats_is_a_dict_in_their_order() -> None:
    found = gradstat.quantization(torch.ones(3), ["nvfp4", E5M2])
    assert list(found) == ["nvfp4", E5M2]
    assert found["nvfp4"].format is FORMATS["nvfp4"]
    assert list(gradstat.quantization(torch.ones(3), [E5M2])) == [E5M2]


def test_quantization_shares_are_of_values_that_are_finite_and_not_zero() -> None:
    x = torch.tensor([1.0, 2.0**-17, 2.0**-16, 7e4, 0.0, -0.0, math.nan, math.inf])
    q = gradstat.quantization(x, E5M2)
    assert (int(q.nonzero), int(q.nonfinite)) == (4, 2)
    assert (float(q.underflow), float(q.saturated)) == (0.25, 0.25)
    error = (7e4 - 57344) / 7e4
    assert float(q.error) == pytest.approx(error, rel=1e-5)
    assert float(q.snr) == pytest.approx(-20 * math.log10(error), rel=1e-5)
    assert int(q.blocks) == int(q.empty_blocks) == 0
    assert math.isnan(q.scale_min)
    assert math.isnan(q.scale_max)


def test_quantization_of_nothing_loses_nothing() -> None:
    for x in (torch.zeros(40), torch.zeros(0), torch.full((3,), math.nan)):
        q = gradstat.quantization(x, "mxfp4_e2m1")
        assert (float(q.underflow), float(q.saturated), float(q.error)) == (0, 0, 0)
        assert float(q.snr) == math.inf
        assert math.isnan(q.scale_min)
    assert int(gradstat.quantization(torch.zeros(40), "mxfp4_e2m1").empty_blocks) == 2


def test_quantization_of_what_starves_has_an_error_of_one() -> None:
    q = gradstat.quantization(torch.full((10,), 1e-9), E5M2)
    assert (float(q.underflow), float(q.error), float(q.snr)) == (1, 1, 0)


def test_quantization_scales_are_those_of_the_blocks() -> None:
    x = torch.tensor([[1.0] * 32 + [0.25] * 32, [0.0] * 32 + [3.0] * 32])
    q = gradstat.quantization(x, "mxfp4_e2m1")
    # floor(log2(amax)) less the exponent of 6, the largest element.
    assert (int(q.blocks), int(q.empty_blocks)) == (4, 1)
    assert (float(q.scale_min), float(q.scale_max)) == (-4, -1)
    assert int(gradstat.quantization(x, "mxfp4_e2m1", dim=0).blocks) == 64


def test_quantization_says_what_it_needs() -> None:
    x = torch.ones(3)
    for arguments, error, message in (
        ((3, E5M2), TypeError, "needs a tensor or several; x is int"),
        (([], E5M2), ValueError, "needs at least one tensor; x is empty"),
        (([x, 3], E5M2), TypeError, r"needs tensors; x\[1\] is int"),
        ((x.long(), E5M2), TypeError, r"needs dense floating-point tensors; x\[0\] is torch.int64"),
        ((x, "float8"), ValueError, "needs formats, each one of .*; one is 'float8'"),
        ((x, []), ValueError, "needs at least one format"),
    ):
        with pytest.raises(error, match=rf"quantization\(\) {message}"):
            gradstat.quantization(*arguments)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match=r"needs a dim that every tensor has; dim is 1, x\[1\]"):
        gradstat.quantization([x[None], x], E5M2, dim=1)
    with pytest.raises(TypeError, match=r"needs a whole number as dim; dim is 1\.5"):
        gradstat.quantization(x, E5M2, dim=1.5)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="needs one of the engines"):
        gradstat.quantization(x, E5M2, engine="gpu")


def test_quantization_merge_is_that_of_both() -> None:
    parts = [torch.randn(40, 64) * 1e-3, torch.randn(24, 64) * 1e5]
    for form in ("mxfp4_e2m1", "float8_e4m3fn", "float8_e4m3fn_1x128"):
        both = gradstat.quantization(torch.cat(parts), form)
        a, b = (gradstat.quantization(x, form) for x in parts)
        merged = a.merge(b)
        assert merged.integers.tolist() == both.integers.tolist()
        torch.testing.assert_close(merged.floats, both.floats, rtol=1e-6, atol=0)


@pytest.mark.parametrize("form", ["mxfp6_e3m2", "nvfp4", "float8_e5m2_1x128", "float16"])
def test_quantization_does_not_see_signs_nor_the_order_of_rows(form: str) -> None:
    x = torch.randn(64, 256) * torch.exp(3 * torch.randn(64, 256))
    q = gradstat.quantization(x, form)
    for other in (-x, x.abs(), x.flip(0), x[torch.randperm(64)]):
        again = gradstat.quantization(other, form)
        assert again.integers.tolist() == q.integers.tolist()
        torch.testing.assert_close(again.floats, q.floats, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "form", ["mxfp4_e2m1", "nvfp4", "float8_e4m3fn_amax", "float8_e5m2_128x128"]
)
def test_quantization_with_scales_does_not_see_a_power_of_two(form: str) -> None:
    x = torch.randn(130, 96)
    q, small = gradstat.quantization(x, form), gradstat.quantization(x * 2.0**-40, form)
    assert small.integers[:6].tolist() == q.integers[:6].tolist()
    assert float(small.error) == pytest.approx(float(q.error), rel=1e-6)
    moved = 0 if form == "nvfp4" else 40  # of nvfp4 the scale of the tensor moves
    assert float(q.scale_min - small.scale_min) == moved
    assert float(q.scale_max - small.scale_max) == moved


def test_quantization_merge_with_nothing_changes_nothing() -> None:
    for form in ("nvfp4", E5M2):
        some = gradstat.quantization(torch.randn(40), form)
        nothing = gradstat.quantization(torch.zeros(0), form)
        for merged in (some.merge(nothing), nothing.merge(some)):
            assert merged.integers.tolist() == some.integers.tolist()
            assert merged.floats.tolist() == some.floats.tolist()


def test_quantization_merge_refuses_another_format_or_shape() -> None:
    q = gradstat.quantization(torch.ones(3), E5M2)
    for other in ("nvfp4", "float8_e4m3fn"):
        with pytest.raises(ValueError, match=rf"needs the same format and shape; other is {other}"):
            q.merge(gradstat.quantization(torch.ones(3), other))
    with pytest.raises(ValueError, match="needs the same format and shape"):
        q.merge(gradstat.quantization([torch.ones(3)], E5M2))


def test_unpacked_is_what_was_packed() -> None:
    tensors = list(samples(torch.float32).values())
    forms = ("nvfp4", E5M2, "bfloat16")
    q = gradstat.quantization(tensors, forms)
    pair = (torch.stack([getattr(each, field) for each in q.values()]) for field in PAIR)
    fields = packed(*pair).cpu().numpy()
    assert fields.shape == (len(tensors), len(forms), len(PACKED))
    for k, form in enumerate(forms):
        again = unpacked(FORMATS[form], fields[:, k])
        assert again.integers.tolist() == q[form].integers.tolist()
        assert again.floats.tolist() == q[form].floats.tolist()


def test_unpacked_of_an_absent_tensor_has_nothing() -> None:
    q = unpacked(FORMATS["nvfp4"], np.full((2, len(PACKED)), math.nan))
    assert q.nonzero.tolist() == q.blocks.tolist() == [0, 0]
    assert q.scale_min.isnan().all()
    some = gradstat.quantization([torch.randn(40, device="cpu")] * 2, "nvfp4", engine="cpu")
    assert some.merge(q).integers.tolist() == some.integers.tolist()


def test_quantization_is_shown_in_a_line_for_each_tensor() -> None:
    shown = repr(gradstat.quantization([torch.ones(3), torch.full((2,), 1e-9)], E5M2))
    assert shown == (
        "Quantization(float8_e5m2:\n  underflow=0, saturated=0, snr=inf, error=0\n"
        "  underflow=1, saturated=0, snr=-0, error=1)"
    )


def test_quantization_is_compiled_as_one_node() -> None:
    compiled = torch.compile(
        lambda x: gradstat.quantization(x, ("nvfp4", E5M2))["nvfp4"].error * 2,
        backend="eager",
        fullgraph=True,
    )
    x = torch.randn(40)
    assert float(compiled(x)) == 2 * float(gradstat.quantization(x, "nvfp4").error)
