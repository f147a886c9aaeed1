"""`quantization`: check the arguments, choose the engine, run it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from gradstat.formats import Format, check_formats, parse_format
from gradstat.ops import check_engine, check_tensors, engine_name, import_engine, listed
from gradstat.quantized import QUANTIZATION_FLOATS, QUANTIZATION_INTEGERS, Quantization

_ENGINES = {
    "cpu": "cpu.formats",
    "reference": "reference_formats",
    "triton": "triton_formats",
}


@overload
def quantization(  # type: ignore[overload-overlap]  # a string, an iterable too, is one format
    x: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    formats: str | Format,
    *,
    dim: int = -1,
    engine: str | None = None,
) -> Quantization: ...


@overload
def quantization(
    x: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    formats: Iterable[str | Format],
    *,
    dim: int = -1,
    engine: str | None = None,
) -> dict[str, Quantization]: ...


def quantization(
    x: Tensor | Iterable[Tensor] | Mapping[str, Tensor],
    formats: str | Format | Iterable[str | Format],
    *,
    dim: int = -1,
    engine: str | None = None,
) -> Quantization | dict[str, Quantization]:
    """What a narrow number format would do to a tensor, or to each of a list of tensors.

    Nothing is cast: shares of values that would become zero or saturate, the error, the scales.
    No host synchronisation; every integer is the same on every engine, every float within 1e-5 of
    float64. `gradstat.formats` defines the formats; ``docs/formats.md`` describes them.

    Args:
        x: float16, bfloat16, float32 or float64 tensor of any shape and strides, or several on
            one device: a sequence, a generator, or a mapping, whose values are taken in order.
            float64 values are rounded to float32 first.
        formats: float16, bfloat16, float8_e4m3fn, float8_e5m2, either float8 with ``_amax``,
            ``_1x128``, ``_128x128`` or ``_scale_`` and a number behind, mxfp8_e4m3, mxfp8_e5m2,
            mxfp6_e2m3, mxfp6_e3m2, mxfp4_e2m1, nvfp4; one of them or several.
        dim: dimension that blocks of values with one scale run along; the others, in their order,
            are rows.
        engine: ``"triton"`` (CUDA and ROCm), ``"cpu"`` or ``"reference"``; by default, or by the
            environment variable ``GRADSTAT_ENGINE``, the fastest one for the device.

    Returns:
        A Quantization of shape ``()`` for a tensor, ``(L,)`` for several; for several formats a
        dict of them by name.

    Raises:
        TypeError: an argument of another kind.
        ValueError: an unknown format, no tensors, tensors on two devices, a dimension that a tensor
            does not have, an unknown engine or one that cannot run here.

    Example:
        >>> import torch, gradstat
        >>> x = torch.cat([torch.full((31,), 1e-4), torch.tensor([1.0])])
        >>> q = gradstat.quantization(x, ("mxfp4_e2m1", "float8_e5m2"))
        >>> float(q["mxfp4_e2m1"].underflow), float(q["float8_e5m2"].underflow)
        (0.96875, 0.0)
    """
    tensors = listed("quantization", x)
    parsed = check_formats("quantization", formats)
    check_tensors("quantization", tensors)
    check_engine("quantization", engine, tensors[0].device)
    _check_dim(tensors, dim)
    integers, floats = measure_formats(tensors, parsed, dim, engine)
    if isinstance(x, Tensor):
        integers, floats = integers[:, 0], floats[:, 0]
    results = {
        form.name: Quantization(form, *row)
        for form, *row in zip(parsed, integers, floats, strict=True)
    }
    return results[parsed[0].name] if isinstance(formats, (str, Format)) else results


def measure_formats(
    tensors: Sequence[Tensor], formats: Sequence[Format], dim: int = -1, engine: str | None = None
) -> tuple[Tensor, Tensor]:
    """`quantization` of checked arguments: what watch calls during backward.

    Args:
        tensors: L tensors on one device.
        formats: F formats.
        dim: dimension that blocks run along.
        engine: name, or ``None``.

    Returns:
        integers, int64 ``(F, L, 8)``, the fields of `QUANTIZATION_INTEGERS`, and floats, float64
        ``(F, L, 2)``, those of `QUANTIZATION_FLOATS`; on the tensors' device, without waiting.
    """
    if torch.compiler.is_compiling():
        # One opaque node in the graph.
        values = [x.detach() for x in tensors]
        names = [form.name for form in formats]
        integers, floats = _measure_formats_op(values, ",".join(names), dim, engine or "")
        return integers, floats
    module = import_engine(_ENGINES[engine_name(engine, tensors[0])])
    measured: tuple[Tensor, Tensor] = module.measure_formats(tensors, formats, dim)
    return measured


@torch.library.custom_op("gradstat::measure_formats", mutates_args=())
def _measure_formats_op(
    tensors: list[Tensor], formats: str, dim: int, engine: str
) -> tuple[Tensor, Tensor]:
    parsed = [parse_format("measure_formats", name) for name in formats.split(",")]
    return measure_formats(tensors, parsed, dim, engine or None)


@_measure_formats_op.register_fake
def _(tensors: list[Tensor], formats: str, dim: int, engine: str) -> tuple[Tensor, Tensor]:
    shape = formats.count(",") + 1, len(tensors)
    return (
        tensors[0].new_empty((*shape, len(QUANTIZATION_INTEGERS)), dtype=torch.int64),
        tensors[0].new_empty((*shape, len(QUANTIZATION_FLOATS)), dtype=torch.float64),
    )


def _check_dim(tensors: Sequence[Tensor], dim: int) -> None:
    if not isinstance(dim, int) or isinstance(dim, bool):
        raise TypeError(f"quantization() needs a whole number as dim; dim is {dim!r}")
    for i, x in enumerate(tensors):
        n = max(x.dim(), 1)
        if not -n <= dim < n:
            raise ValueError(
                f"quantization() needs a dim that every tensor has; dim is {dim}, x[{i}] has "
                f"{x.dim()} dimensions"
            )
