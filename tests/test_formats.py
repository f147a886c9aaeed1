"""The formats themselves: their numbers, their names, and the messages about others."""

import ml_dtypes
import numpy as np
import pytest
import torch
from quantizing import ELEMENTS

from gradstat.formats import FORMATS, Format, check_formats, parse_format


@pytest.mark.parametrize("form", FORMATS.values(), ids=str)
def test_formats_have_the_limits_that_ml_dtypes_knows(form: Format) -> None:
    element = ELEMENTS[form.exponent_bits, form.mantissa_bits]
    limits = np.finfo(element) if element is np.float16 else ml_dtypes.finfo(element)
    assert form.largest == float(limits.max)
    assert 2.0**form.min_exponent == float(limits.smallest_normal)
    smallest = 2.0 ** (form.min_exponent - form.mantissa_bits)
    assert smallest == float(limits.smallest_subnormal)
    assert 2.0**form.max_exponent <= form.largest < 2.0 ** (form.max_exponent + 1)


def test_formats_bits_have_a_share_of_the_scale() -> None:
    bits = {name: form.bits for name, form in FORMATS.items()}
    assert (bits["float16"], bits["float8_e5m2_amax"], bits["mxfp8_e4m3"]) == (16, 8, 8.25)
    assert (bits["mxfp6_e2m3"], bits["mxfp4_e2m1"], bits["nvfp4"]) == (6.25, 4.25, 4.5)
    assert (bits["float8_e4m3fn_1x128"], bits["float8_e4m3fn_128x128"]) == (8.25, 8 + 2.0**-9)


def test_parse_format_reads_every_name_back() -> None:
    given = [FORMATS["float8_e4m3fn"].with_scale(s) for s in (0.1 + 0.4, 2.0**-126, 1e30 * 0 + 3)]
    for form in [*FORMATS.values(), *given]:
        assert parse_format("quantization", form.name) == form
        assert parse_format("quantization", form) is form
    assert given[0].name == "float8_e4m3fn_scale_0.5"


def test_parse_format_names_the_close_ones() -> None:
    with pytest.raises(ValueError, match=r"watch\(\) needs formats, each one of 'float16'.*") as e:
        parse_format("watch", "mxfp4_e2m3")
    assert "'mxfp4_e2m1'" in str(e.value).partition("did you mean")[2]
    assert str(e.value).endswith("one is 'mxfp4_e2m3'")


@pytest.mark.parametrize("form", [torch.float8_e5m2, 8, None, ["float16"]], ids=str)
def test_parse_format_refuses_other_kinds(form: object) -> None:
    with pytest.raises(TypeError, match=r"quantization\(\) needs formats, each a name or a Format"):
        parse_format("quantization", form)  # type: ignore[arg-type]


def test_parse_format_refuses_a_format_of_the_callers_own() -> None:
    mine = Format("float8_e5m2", 5, 2, 100.0)
    with pytest.raises(ValueError, match="needs formats of gradstat"):
        parse_format("quantization", mine)
    with pytest.raises(ValueError, match="each one of"):
        parse_format("quantization", Format("mine", 5, 2, 57344.0))


@pytest.mark.parametrize(
    "name",
    ["nvfp4_scale_2.0", "float8_e5m2_scale_0", "float8_e5m2_scale_nan", "float8_e5m2_scale_x"],
)
def test_parse_format_refuses_such_a_given_scale(name: str) -> None:
    with pytest.raises(ValueError, match=rf"quantization\(\) needs formats; one is '{name}'"):
        parse_format("quantization", name)


@pytest.mark.parametrize("scale", [0.1, 0.0, -1.0, 1e300, 2.0**-127, float("nan"), float("inf")])
def test_with_scale_refuses_what_is_no_such_number(scale: float) -> None:
    with pytest.raises(ValueError, match=r"with_scale\(\) needs a scale that is a float32 number"):
        FORMATS["float16"].with_scale(scale)


def test_with_scale_refuses_other_kinds() -> None:
    for scale in ("1", True, None, torch.tensor(1.0)):
        with pytest.raises(TypeError, match=r"with_scale\(\) needs a number"):
            FORMATS["float16"].with_scale(scale)  # type: ignore[arg-type]


def test_check_formats_refuses_none_and_one_twice() -> None:
    with pytest.raises(ValueError, match=r"watch\(\) needs at least one format; formats is empty"):
        check_formats("watch", [])
    with pytest.raises(ValueError, match="formats has 'nvfp4' twice"):
        check_formats("watch", ["nvfp4", "float16", FORMATS["nvfp4"]])
    with pytest.raises(TypeError, match=r"needs a format or several; formats is 3"):
        check_formats("watch", 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["1_0", " 2", "", "nan", "0x1p3", "--1"])
def test_parse_format_takes_no_scale_that_is_not_written_as_a_number(scale: str) -> None:
    with pytest.raises(ValueError, match=r"quantization\(\) needs formats"):
        parse_format("quantization", f"float8_e5m2_scale_{scale}")
