"""What narrow formats are measured to do, against what torchao's casts do."""

import logging
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from conftest import ROOT
from quantizing import samples

import gradstat
from gradstat.formats import FORMATS

sys.path.insert(0, str(ROOT / "examples"))
import formats

# What torchao says when it is imported is not ours to change.
pytestmark = [pytest.mark.integrations, pytest.mark.filterwarnings("ignore")]

MX_FORMATS = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4_e2m1": torch.float4_e2m1fn_x2,
}


@pytest.fixture(scope="module")
def mx() -> ModuleType:
    logging.getLogger("torch").setLevel(logging.ERROR)
    pytest.importorskip("torchao")
    import torchao.prototype.mx_formats.mx_tensor as module

    found: ModuleType = module
    return found


def tensors() -> dict[str, torch.Tensor]:
    """Finite ones that torchao takes: of whole blocks, and no scale of less than 2**-126."""
    generator = torch.Generator("cpu").manual_seed(4)
    x = torch.randn(128, 256, generator=generator, device="cpu")
    adversarial = samples(torch.float32)
    names = ("normal", "over many octaves", "ties", "one giant", "equal", "zero blocks", "zeros")
    found = {"normal, larger": x, "gradients": x * 1e-6}
    found |= {name: adversarial[name] for name in names}
    found["largest"] = torch.full((2, 64), 3e38, device="cpu")
    found["small"] = x * 1e-30
    model = formats.make_model()
    formats.backward(model, formats.make_text())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None and parameter.dim() == 2:
            found |= {f"{name}, weight": parameter.detach(), f"{name}, gradient": parameter.grad}
    return {name: x[:, : x.shape[1] // 32 * 32].contiguous() for name, x in found.items()}


def compare(form: str, cast: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> None:
    """The values that a cast gives back, and what was measured."""
    back, q = cast(x).double(), gradstat.quantization(x, form)
    assert int(q.underflowed) == int(((back == 0) & (x != 0)).sum())
    error = float((back - x.double()).norm())
    assert float(q.error_norm) == pytest.approx(error, rel=1e-5, abs=0), form
    # Also value by value: no element is more than what is largest.
    assert float(q.norm) == pytest.approx(float(x.double().norm()), rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", MX_FORMATS)
def test_quantization_is_the_mx_cast_of_torchao(
    mx: ModuleType, form: str, dtype: torch.dtype
) -> None:
    element, exponents = MX_FORMATS[form], []

    def cast(x: torch.Tensor) -> torch.Tensor:
        scale, data = mx.to_mx(x, element, 32)
        used = x.unflatten(-1, (-1, 32)).abs().amax(-1) > 0
        exponents.append(scale.view(torch.uint8).long()[used] - 127)
        return mx.to_dtype(data, scale, element, 32, torch.float32)

    for name, x in tensors().items():
        x = x.to(dtype)
        compare(form, cast, x)
        q = gradstat.quantization(x, form)
        if x.any():
            found = (int(exponents[-1].min()), int(exponents[-1].max()))
            assert (int(q.scale_min), int(q.scale_max)) == found, name


def test_quantization_is_the_nvfp4_cast_of_torchao(mx: ModuleType) -> None:
    import torchao.prototype.mx_formats.nvfp4_tensor as nvfp4

    def cast(x: torch.Tensor) -> torch.Tensor:
        scale = nvfp4.per_tensor_amax_to_scale(x.abs().amax())
        return nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)

    for name, x in tensors().items():
        # It makes no e4m3 scale below 2**-6, where the format has smaller ones, and none of zeros.
        # Of equal values the only error is that of its rounding what it gives back to float32.
        if name not in ("over many octaves", "one giant", "zeros", "equal"):
            compare("nvfp4", cast, x)


@pytest.mark.parametrize("suffix", ["amax", "1x128", "128x128"])
@pytest.mark.parametrize("element", ["float8_e4m3fn", "float8_e5m2"])
def test_quantization_is_the_float8_cast_of_torchao(
    mx: ModuleType, element: str, suffix: str
) -> None:
    import torchao.quantization.quant_primitives as primitives

    dtype, block = getattr(torch, element), FORMATS[f"{element}_{suffix}"].block

    def cast(x: torch.Tensor) -> torch.Tensor:
        scale = primitives._choose_scale_float8(x, list(block or x.shape), dtype)
        data = primitives._quantize_affine_float8(x, scale, dtype)
        return primitives._dequantize_affine_float8(data, scale)

    # It divides by the scale, and by zero in a block of zeros: other ties, not other errors.
    for scale in (1.0, 1e-6):
        compare(f"{element}_{suffix}", cast, tensors()["normal, larger"] * scale)
