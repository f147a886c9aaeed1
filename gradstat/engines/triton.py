"""The Triton engine: all tensors of a list in one launch, and one small launch to finish it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from gradstat.bins import Bins, LinearBins, Log2Bins, keeps_subnormals
from gradstat.engines import reference
from gradstat.engines.protocol import NUMBERS, together
from gradstat.engines.triton_cadence import PassCounter as PassCounter
from gradstat.engines.triton_cadence import on_device
from gradstat.engines.triton_items import make_items
from gradstat.engines.triton_plans import Group, find_plan
from gradstat.kernels.finish import finish_kernel
from gradstat.kernels.histogram import histogram_kernel
from gradstat.kernels.items import ROWS
from gradstat.kernels.measure import PARTIAL_FIELDS, measure_kernel
from gradstat.results import Statistics

Kernel: TypeAlias = Any  # of Triton, which ships no types, compiled or not

MAX_BINS = 4093  # a program keeps its histogram, with three more slots, in registers
FINISH_BLOCK = 128
THREADS = 256
VECTOR_BYTES = 16
TILE_BYTES = ROWS.value * VECTOR_BYTES * THREADS
BLACKWELL = 100  # the first of its compute capabilities
# Element types in device code; bfloat16 as its bits.
ELEMENTS = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.int16}
_tables = functools.partial(make_items, tile_bytes=TILE_BYTES)


def measure(tensors: Sequence[Tensor], bins: Bins, due: Tensor | None = None) -> Statistics:
    """Statistics of each tensor of a list, as `reference.measure`, without waiting for the device.

    float64 tensors, and all tensors when there are more than 4,093 linear bins, go to the reference
    engine.

    Args:
        tensors: L tensors on one CUDA device, or on the CPU when Triton interprets.
        bins: scheme of the histogram.
        due: for captures: a flag on the device, int64 ``(1,)``. In a replay where it is 0 no kernel
            reads a tensor, and the results are not to be used; the reference engine measures
            nevertheless.

    Returns:
        Statistics of shape ``(L,)``.

    Raises:
        ValueError: tensors that are not on a CUDA device.
    """
    check_device("measure", "tensors[0]", tensors[0].device)
    if bins.bins > MAX_BINS:
        return reference.measure(tensors, bins)
    if any(map(Tensor.is_neg, tensors)):
        tensors = [x.resolve_neg() for x in tensors]  # a copy where torch keeps a sign apart
    n, device = len(tensors), tensors[0].device
    rows = torch.zeros(n * (NUMBERS + bins.bins), dtype=torch.int64, device=device)
    return _measure(tensors, bins, rows, _known_ranges(bins, n, device), due)


class Plan:
    """How to measure tensors of which there are others like them at each step of a training.

    Args:
        tensors: L on one CUDA device.
        bins: scheme.
    """

    def __init__(self, tensors: Sequence[Tensor], bins: Bins) -> None:
        self._bins, self._device = bins, tensors[0].device
        self._types, self._dtypes = list(map(type, tensors)), [x.dtype for x in tensors]
        self._ranges: Tensor | None = None

    def run(
        self, tensors: Sequence[Tensor], formats: Tensor | None = None, due: Tensor | None = None
    ) -> Tensor | None:
        """All numbers of the rows in one tensor; as `gradstat.engines.protocol.Plan`."""
        bins, n = self._bins, len(tensors)
        if (
            list(map(type, tensors)) != self._types
            or [x.dtype for x in tensors] != self._dtypes
            or any(x.layout != torch.strided or x.is_neg() for x in tensors)
        ):
            return None
        if bins.bins > MAX_BINS:
            return together(reference.measure(tensors, bins), formats)
        n_formats = 0 if formats is None else formats.numel()
        size = n * (NUMBERS + bins.bins) + n_formats
        rows = torch.zeros(size, dtype=torch.int64, device=self._device)
        ranges = self._ranges
        if ranges is None:
            ranges = _known_ranges(bins, n, self._device)
            # What a capture makes is written by its replays alone.
            if self._device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                self._ranges = ranges
        _measure(tensors, bins, rows, ranges, due)
        if formats is not None:
            rows[-n_formats:] = formats.view(torch.int64).flatten()
        return rows


def _measure(
    tensors: Sequence[Tensor],
    bins: Bins,
    rows: Tensor,
    ranges: Tensor | None,
    due: Tensor | None,
) -> Statistics:
    """Write the rows of tensors: integers, floats and counts of all, into zeros."""
    n, device = len(tensors), rows.device
    floats_at, counts_at, end = n * NUMBERS // 2, n * NUMBERS, n * (NUMBERS + bins.bins)
    result = Statistics(
        bins,
        rows[:floats_at].view(n, -1),
        rows[floats_at:counts_at].view(torch.float64).view(n, -1),
        rows[counts_at:end].view(n, -1),
    )
    with on_device(device):
        plan = find_plan(tensors, device, _tables)
        for group in plan.groups:
            _summarise(group, result, ranges, due)
        if isinstance(bins, LinearBins) and ranges is None:
            found = torch.stack(bins.automatic_range(result.min.float(), result.max.float()), 1)
            result.floats[:, -2:] = found
            for group in plan.groups:
                _count(group, result, found, due)
    for i in plan.float64_rows:
        _copy_row(reference.measure([tensors[i]], bins), result, i)
    return result


_compiled: dict[
    tuple[object, ...], Kernel
] = {}  # what was launched before, by kernel and constants


def _launch(
    kernel: Kernel, grid: int, tensors: Sequence[Tensor], *others: object, **options: object
) -> None:
    """Launch a kernel over a grid of one dimension, the second time without the JIT's front.

    The front binds and classifies all arguments, which takes several times as long as the launch.
    It finds the same each time: all pointers are aligned as memory of PyTorch's is, and what else
    a kernel takes is part of the key.
    """
    key = (kernel.__name__, tensors[0].get_device(), *others)
    compiled = _compiled.get(key)
    if compiled is not None:
        compiled[grid, 1, 1](*tensors, *others)
        return
    compiled = kernel[(grid,)](*tensors, *others, **options)
    if hasattr(compiled, "packed_metadata"):  # nothing is, where Triton interprets
        _compiled[key] = compiled


@keeps_subnormals
def _known_ranges(bins: Bins, n: int, device: torch.device) -> Tensor | None:
    """Low and high of each of ``n`` tensors, float32 ``(n, 2)``, if the scheme has a range."""
    ends = bins.known_range if isinstance(bins, LinearBins) else None
    if ends is None:
        return None
    return torch.stack([torch.full((n,), x, dtype=torch.float32, device=device) for x in ends], 1)


def check_device(function: str, argument: str, device: torch.device) -> None:
    """Raise ValueError unless Triton runs there."""
    if device.type != "cuda" and not knobs.runtime.interpret:
        raise ValueError(
            f"{function}() needs CUDA tensors for the engine 'triton', or TRITON_INTERPRET=1 set "
            f"before triton is imported; {argument} is on {device}"
        )


def _summarise(group: Group, result: Statistics, ranges: Tensor | None, due: Tensor | None) -> None:
    """Launch all but the histogram of automatic ranges, which are not known yet."""
    bins, n_items, due = result.bins, len(group.items), group.always if due is None else due
    device, is_log2, slots = result.floats.device, isinstance(bins, Log2Bins), slots_of(bins)
    capability, itemsize = capability_of(device), group.dtype.itemsize
    partials = result.floats.new_empty((n_items, PARTIAL_FIELDS.value))
    known = result.floats if ranges is None else ranges  # else not read
    if n_items:
        _launch(
            measure_kernel,
            n_items,
            (due, group.items, known, partials, result.counts),
            ELEMENTS[group.dtype],
            bins.bins if is_log2 or ranges is not None else 0,
            slots,
            is_log2,
            compares_pairs(itemsize, capability),
            THREADS,
            num_warps=warps_on(device),
            **limit_registers(itemsize, slots, capability),
        )
    _launch(
        finish_kernel,
        len(group.spans),
        (due, group.spans, partials, known, result.integers, result.floats),
        ranges is not None,
        FINISH_BLOCK,
        num_warps=warps_on(device),
        enable_fp_fusion=False,
    )


def _count(group: Group, result: Statistics, ranges: Tensor, due: Tensor | None) -> None:
    """Launch the histogram over ranges that the measurement has found."""
    n_items = len(group.items)
    if n_items:
        _launch(
            histogram_kernel,
            n_items,
            (group.always if due is None else due, group.items, ranges, result.counts),
            ELEMENTS[group.dtype],
            result.bins.bins,
            slots_of(result.bins),
            THREADS,
            num_warps=warps_on(ranges.device),
        )


def slots_of(bins: Bins) -> int:
    """Slots of a program's histogram: a power of two, with room for three beside linear bins."""
    return bins.bins if isinstance(bins, Log2Bins) else 1 << (bins.bins + 2).bit_length()


@functools.cache
def warps_on(device: torch.device) -> int:
    """Warps of a program: of 32 threads, on AMD's data-centre GPUs of 64."""
    warp = torch.cuda.get_device_properties(device).warp_size if device.type == "cuda" else 32
    return int(THREADS // warp)


@functools.cache
def capability_of(device: torch.device) -> int:
    """Compute capability of an NVIDIA GPU, as 90; 0 of another device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def compares_pairs(itemsize: int, capability: int) -> bool:
    """Whether a GPU has minima of 16-bit elements in pairs: from Ampere on."""
    return itemsize == 2 and capability >= 80


def limit_registers(itemsize: int, slots: int, capability: int) -> dict[str, int]:
    """The option that holds `measure_kernel` to so many registers as let enough programs run.

    Left alone, the compiler takes as many as let two programs of 256 threads run on a
    multiprocessor. Where three to five run, more bytes are on their way from memory at once, and
    the loop grows by 1 % at most. A program's histogram is in its registers too. For 16-bit
    elements Blackwell needs no limit, and spills with one.
    """
    if not capability or (itemsize == 2 and capability >= BLACKWELL):
        return {}
    least = 72 if itemsize == 2 else 48 if capability < BLACKWELL else 56
    return {"maxnreg": least + -(-(slots // THREADS) // 8) * 8}  # they come in eights


def _copy_row(source: Statistics, target: Statistics, row: int) -> None:
    target.integers[row].copy_(source.integers[0])
    target.floats[row].copy_(source.floats[0])
    target.counts[row].copy_(source.counts[0])
