"""`histogram`, `statistics` and `quantization`: check the arguments, choose the engine, run it."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from types import ModuleType
from typing import Any, TypeAlias, cast, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import Parameter

from gradstat.bins import Bins, LinearBins, Log2Bins, parse_bins, widen
from gradstat.engines import Engine
from gradstat.formats import Format, check_formats, parse_format
from gradstat.results import (
    FLOATS,
    INTEGERS,
    QUANTIZATION_FLOATS,
    QUANTIZATION_INTEGERS,
    Quantization,
    Statistics,
)
from gradstat.util import ENGINE_VARIABLE

Tensors: TypeAlias = Tensor | Iterable[Tensor] | Mapping[str, Tensor]

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
ENGINES = ("cpu", "reference", "triton")
# Their modules that measure formats.
_FORMAT_ENGINES = {"cpu": "cpu.formats", "reference": "reference", "triton": "triton_formats"}


def statistics(
    x: Tensors, bins: int | Bins | None = None, *, engine: str | None = None
) -> Statistics:
    """Measure a tensor, or each of a list of tensors, in one pass.

    No host synchronisation; every integer is the same on every engine, every float within 1e-5 of
    float64 (a sum or mean whose terms cancel: within 1e-6 of the sum or mean of magnitudes).

    Args:
        x: float16, bfloat16, float32 or float64 tensor of any shape and strides, or several on
            one device: a sequence, a generator, or a mapping, whose values are taken in order.
        bins: `Log2Bins` (default), `LinearBins`, or the number of bins of equal width from the
            smallest value to the largest.
        engine: ``"triton"`` (CUDA and ROCm), ``"cpu"`` or ``"reference"``; by default, or by the
            environment variable ``GRADSTAT_ENGINE``, the fastest one for the device.

    Returns:
        Statistics of shape ``()`` for a tensor, ``(L,)`` for several.

    Raises:
        TypeError: an argument of another kind.
        ValueError: no tensors, tensors on two devices, an unknown engine or one that cannot
            run here.

    Example:
        >>> import torch, gradstat
        >>> s = gradstat.statistics([torch.ones(4), torch.tensor([0.0, float("inf")])])
        >>> s.l2.tolist(), s.zeros.tolist(), s.posinf.tolist()
        ([2.0, 0.0], [0, 1], [0, 1])
    """
    tensors = listed("statistics", x)
    scheme = check_bins("statistics", Log2Bins() if bins is None else bins)
    check_tensors("statistics", tensors)
    engine = check_engine("statistics", engine, tensors[0].device)
    result = measure(tensors, scheme, engine)
    return result[0] if isinstance(x, Tensor) else result


def histogram(
    x: Tensor,
    bins: int | Bins | Sequence[float] = 30,
    range: tuple[float, float] | None = None,  # numpy.histogram's name for it
    density: bool = False,
) -> tuple[Tensor, Tensor]:
    """Histogram of a tensor, as `numpy.histogram` and `torch.histogram`, for tensors on any device.

    Values that are not finite are left out. The edges are the smallest value of each bin, so
    ``numpy.histogram(x, bins=edges)`` gives exactly the same counts.

    Args:
        x: float16, bfloat16, float32 or float64, any shape and strides.
        bins: number of equal-width bins, a bin scheme, or the edges, which do not decrease.
        range: lower and upper end; by default the finite minimum and maximum.
        density: divide the counts by their sum and the bins' widths.

    Returns:
        counts, int64 ``(bins,)``, or densities, float64, and edges, float64 ``(bins + 1,)``, on
        the device of ``x``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: ``bins`` < 1, edges that decrease, a range that is not finite or not
            increasing, a range beside a scheme or edges.

    Example:
        >>> import torch, gradstat
        >>> gradstat.histogram(torch.tensor([1.0, 2.0, 1.0]), bins=2)
        (tensor([2, 1]), tensor([1.0000, 1.5000, 2.0000], dtype=torch.float64))
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"histogram() needs a tensor; x is {type(x).__name__}")
    if isinstance(bins, (Log2Bins, LinearBins)):
        _check_no_range(range, "a scheme")
        counts, edges = _count(x, bins)
    elif isinstance(bins, (list, tuple, Tensor, np.ndarray)):
        _check_no_range(range, "edges")
        check_tensors("histogram", [x])
        counts, edges = _count_between(x, _check_edges(bins, x.device))
    else:
        ends = (None, None) if range is None else range
        if not isinstance(ends, (tuple, list)) or len(ends) != 2:
            raise TypeError(f"histogram() needs a range of two numbers; range is {range!r}")
        counts, edges = _count(x, LinearBins(cast("int", bins), *ends))
    if density:
        return counts / (counts.sum() * edges.diff()), edges
    return counts, edges


def _count(x: Tensor, bins: Bins) -> tuple[Tensor, Tensor]:
    """Counts in the bins of a scheme, and the edges."""
    check_tensors("histogram", [x])
    engine = check_engine("histogram", None, x.device)
    # A compiler takes `measure`, and then the edges, into its graph.
    if not torch.compiler.is_compiling() and (engine or _fastest(x)) == "cpu":
        counted: tuple[Tensor, Tensor] = import_engine("cpu").histogram(x, bins)
        return counted
    result = measure([x], bins, engine)[0]
    return result.counts, result.edges


def _count_between(x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Counts between any edges, exactly: values are compared as float64."""
    values = widen(x.detach().reshape(-1))
    # -0.0 and 0.0 are one value; what is not finite is outside.
    at = torch.bucketize(values, edges, right=True)
    at = torch.where(values == edges[-1], len(edges) - 1, at)
    at = torch.where(values.isfinite(), at, 0)
    counts = torch.zeros(len(edges) + 1, dtype=torch.int64, device=x.device)
    counts.scatter_add_(0, at, torch.ones_like(at))
    return counts[1:-1], edges


def _check_edges(bins: Sequence[float] | Tensor | NDArray[Any], device: torch.device) -> Tensor:
    try:
        # NumPy makes float64 of numbers, torch float32.
        edges = bins.detach() if isinstance(bins, Tensor) else torch.as_tensor(np.asarray(bins))
    except (TypeError, ValueError):  # no numbers; rows of different lengths
        edges = torch.empty(0)
    if edges.dim() != 1 or len(edges) < 2 or edges.is_complex() or not has_values(edges):
        raise TypeError(f"histogram() needs edges, two numbers or more in a row; bins is {bins!r}")
    edges = widen(edges.to(device))
    if not bool((edges[1:] >= edges[:-1]).all()):
        raise ValueError(f"histogram() needs edges that do not decrease; bins is {bins!r}")
    return edges


@overload
def quantization(  # type: ignore[overload-overlap]  # a string, an iterable too, is one format
    x: Tensors, formats: str | Format, *, dim: int = -1, engine: str | None = None
) -> Quantization: ...


@overload
def quantization(
    x: Tensors, formats: Iterable[str | Format], *, dim: int = -1, engine: str | None = None
) -> dict[str, Quantization]: ...


def quantization(
    x: Tensors,
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
        x: as for `statistics`; float64 values are rounded to float32 first.
        formats: float16, bfloat16, float8_e4m3fn, float8_e5m2, either float8 with ``_amax``,
            ``_1x128``, ``_128x128`` or ``_scale_`` and a number behind, mxfp8_e4m3, mxfp8_e5m2,
            mxfp6_e2m3, mxfp6_e3m2, mxfp4_e2m1, nvfp4; one of them or several.
        dim: dimension that blocks of values with one scale run along; the others, in their order,
            are rows.
        engine: as for `statistics`.

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
    engine = check_engine("quantization", engine, tensors[0].device)
    _check_dim(tensors, dim)
    integers, floats = measure_formats(tensors, parsed, dim, engine)
    if isinstance(x, Tensor):
        integers, floats = integers[:, 0], floats[:, 0]
    results = {
        form.name: Quantization(form, *row)
        for form, *row in zip(parsed, integers, floats, strict=True)
    }
    return results[parsed[0].name] if isinstance(formats, (str, Format)) else results


def measure(tensors: Sequence[Tensor], bins: Bins, engine: str | None = None) -> Statistics:
    """`statistics` of checked arguments, in a compiled graph as one node."""
    if torch.compiler.is_compiling():
        # One opaque node in the graph; called eagerly it would only cost its dispatch.
        values = [x.detach() for x in tensors]
        packed = _measure_op(values, bins.spec, engine or "")
        return Statistics(bins, *packed)
    return choose_engine(engine, tensors[0]).measure(tensors, bins)


@torch.library.custom_op("gradstat::measure", mutates_args=())
def _measure_op(tensors: list[Tensor], bins: str, engine: str) -> tuple[Tensor, Tensor, Tensor]:
    result = measure(tensors, parse_bins(bins), engine or None)
    # Of the Triton engine all three are views of one tensor, and what an operator returns may not
    # share memory.
    return result.integers.clone(), result.floats.clone(), result.counts


@_measure_op.register_fake
def _(tensors: list[Tensor], bins: str, engine: str) -> tuple[Tensor, Tensor, Tensor]:
    n, x = len(tensors), tensors[0]
    wide = torch.float32 if x.device.type == "mps" else torch.float64
    return (
        x.new_empty((n, len(INTEGERS)), dtype=torch.int64),
        x.new_empty((n, len(FLOATS)), dtype=wide),
        x.new_empty((n, parse_bins(bins).bins), dtype=torch.int64),
    )


def measure_formats(
    tensors: Sequence[Tensor], formats: Sequence[Format], dim: int = -1, engine: str | None = None
) -> tuple[Tensor, Tensor]:
    """`quantization` of checked arguments: int64 ``(F, L, 8)`` and float64 ``(F, L, 2)``."""
    if torch.compiler.is_compiling():
        # One opaque node in the graph.
        values = [x.detach() for x in tensors]
        names = [form.name for form in formats]
        integers, floats = _measure_formats_op(values, ",".join(names), dim, engine or "")
        return integers, floats
    module = import_engine(_FORMAT_ENGINES[engine or _fastest(tensors[0])])
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


def is_measurable(x: Tensor) -> bool:
    """Whether `statistics` takes the tensor: dense, and of one of four floating-point dtypes."""
    return x.layout == torch.strided and x.dtype in DTYPES and not x.is_nested


def choose_engine(engine: str | None, x: Tensor) -> Engine:
    """The engine of that name, by default the fastest one for the tensor's device."""
    return cast(Engine, import_engine(engine or _fastest(x)))


def _fastest(x: Tensor) -> str:
    return {"cuda": "triton", "cpu": "cpu"}.get(x.device.type, "reference")


@functools.cache
def import_engine(module: str) -> ModuleType:
    """A module of the engines, by its name there."""
    return importlib.import_module(f"gradstat.engines.{module}")


def check_engine(
    function: str, engine: str | None, device: torch.device | None = None
) -> str | None:
    """Return the engine that the argument or the environment names, ``None`` if neither does.

    One that does not exist or, with a device, does not measure there is refused.
    """
    preferred = os.environ.get(ENGINE_VARIABLE)
    for source, name in (("engine", engine), (ENGINE_VARIABLE, preferred)):
        if name and name not in ENGINES:
            raise ValueError(
                f"{function}() needs one of the engines {', '.join(ENGINES)}; {source} is {name!r}"
            )
    name = engine or preferred
    if name == "triton" and device is not None and device.type != "cuda":
        import_engine(name).check_device(function, "x", device)
    return name


def check_bins(function: str, bins: int | Bins) -> Bins:
    """Return the scheme that ``bins`` is, or is the number of; raise TypeError for others."""
    if isinstance(bins, (Log2Bins, LinearBins)):
        return bins
    if isinstance(bins, Integral) and not isinstance(bins, bool):
        return LinearBins(int(bins))
    raise TypeError(f"{function}() needs Log2Bins, LinearBins or a number; bins is {bins!r}")


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


def _check_no_range(range: tuple[float, float] | None, other: str) -> None:
    if range is not None:
        raise ValueError(f"histogram() needs a range or {other}, not both; range is {range}")


def listed(function: str, x: Tensors) -> Sequence[Tensor]:
    """One tensor or several as a sequence; what each of them is, is checked later."""
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, (list, tuple)):
        return x
    if isinstance(x, Mapping):
        return list(x.values())
    if isinstance(x, Iterable) and not isinstance(x, (str, bytes, np.ndarray)):
        return list(x)
    raise TypeError(f"{function}() needs a tensor or several; x is {type(x).__name__}")


def check_tensors(function: str, tensors: Sequence[Tensor]) -> None:
    """Raise unless there are tensors, all measurable and on one device."""
    if not tensors:
        raise ValueError(f"{function}() needs at least one tensor; x is empty")
    for i, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"{function}() needs tensors; x[{i}] is {type(x).__name__}")
        if not is_measurable(x):
            raise TypeError(
                f"{function}() needs dense floating-point tensors; x[{i}] is {_instead(x)}"
            )
        if x.device != tensors[0].device:
            raise ValueError(
                f"{function}() needs tensors on one device; x[{i}] is on {x.device}, x[0] on "
                f"{tensors[0].device}"
            )
        if not _is_plain(x) and hasattr(x, "to_local"):
            raise TypeError(
                f"{function}() needs tensors, not parts of them; x[{i}] is a {type(x).__name__}: "
                f"pass x.to_local() or x.full_tensor()"
            )
        if not has_values(x):
            without = (
                f"a {type(x).__name__} without storage, as under torch.func.vmap or in fake mode"
            )
            raise ValueError(
                f"{function}() needs tensors with values; x[{i}] is "
                f"{'on meta' if x.is_meta else without}"
            )


def has_values(x: Tensor) -> bool:
    """Whether engines find values in memory; a compiler's tensors have them when it is done."""
    if not (x.is_cpu or x.is_cuda) or torch.compiler.is_compiling():
        return not x.is_meta
    try:
        # A fake tensor warns when it is asked for an address.
        if not _is_plain(x) and x.untyped_storage().device.type == "meta":
            return False
        return x.data_ptr() != 0 or x.numel() == 0
    except RuntimeError:  # of a transform of torch.func
        return False


def _is_plain(x: Tensor) -> bool:
    return type(x) is Tensor or type(x) is Parameter


def _instead(x: Tensor) -> str:
    """What an unsupported tensor is and what to pass instead."""
    if x.is_nested:
        return "a nested tensor: pass x.unbind()"
    if x.layout != torch.strided:
        values = "x.coalesce().values()" if x.layout == torch.sparse_coo else "x.values()"
        return f"{x.layout} ({x.dtype}): pass {values} or x.to_dense()"
    if x.is_complex():
        return f"{x.dtype}: pass torch.view_as_real(x) or x.abs()"
    if x.is_quantized:
        return f"{x.dtype}: pass x.dequantize()"
    return f"{x.dtype}: pass x.float()"
