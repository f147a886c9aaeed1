"""How fast the kernels can be, read off their machine code; no GPU is needed.

Compiles the measuring kernel, the one of the second sweep that automatic ranges take, and that of
narrow formats with each of them and with three, for each architecture and dtype, finds the main
loop, and compares the instructions of an element with what a GPU executes in the time in which its
memory delivers one.

Assumptions: memory delivers its nominal bandwidth and the loop alone takes time; a multiprocessor
issues 4 warp instructions a clock; a clock executes the lanes of `LANES` in each pipe; latency is
hidden, for which `in flight` bytes are there: the loads of as many programs as fit by registers
(Little's law asks for 15 to 40 KB on these GPUs). What is limited by neither instructions nor
latency is limited by the memory: a share of 1.

Usage: python bench/roofline.py [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sass
import torch
from triton.backends.compiler import GPUTarget

from gradstat.bins import LinearBins, Log2Bins
from gradstat.engines import triton as triton_engine
from gradstat.engines import triton_formats
from gradstat.formats import FORMATS
from gradstat.kernels.finish import finish_kernel
from gradstat.kernels.formats import finish_formats_kernel, formats_kernel, maxima_kernel
from gradstat.kernels.measure import measure_kernel, second_sweep_kernel

SCHEMES = {"Log2Bins()": Log2Bins(), "LinearBins(64, ...)": LinearBins(64, -0.5, 0.5)}
# Formats that one launch measures together.
TOGETHER = "float8_e4m3fn + mxfp8_e4m3 + nvfp4"
KERNELS = [
    *(("measure", scheme) for scheme in SCHEMES),
    ("second sweep", "LinearBins(64, ...)"),
    *(("formats", name) for name in (*FORMATS, TOGETHER)),
]
ISSUED = 128  # instructions of a thread that a multiprocessor issues in a clock
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class GPU:
    """Nominal figures of a card, and lanes of each pipe of a multiprocessor in a clock."""

    name: str
    architecture: int
    bytes_per_second: float
    multiprocessors: int
    hertz: float
    lanes: dict[str, int]


_LANES = {"alu": 64, "fma": 128, "memory": 32, "conversion": 16}
GPUS = (
    GPU("A100", 80, 2.04e12, 108, 1.41e9, {**_LANES, "fma": 64}),
    GPU("H100", 90, 3.35e12, 132, 1.755e9, _LANES),
    GPU("H200", 90, 4.8e12, 132, 1.755e9, _LANES),
    GPU("B200", 100, 8.0e12, 148, 1.85e9, _LANES),
)


def kernel_arguments(
    name: str, dtype: torch.dtype, scheme: str, capability: int = 90
) -> tuple[Any, ...]:
    """A kernel, the types of its arguments and its constants, as the Triton engine has them.

    Args:
        name: ``"measure"``, ``"second sweep"`` or ``"finish"``; of narrow formats ``"formats"``,
            ``"maxima"`` or ``"finish formats"``.
        dtype: of the tensors.
        scheme: a key of `SCHEMES`, or formats with plus signs between them.
        capability: compute capability; 0 for AMD.
    """
    if scheme not in SCHEMES:
        return format_arguments(name, dtype, scheme, capability)
    bins = SCHEMES[scheme]
    is_log2 = isinstance(bins, Log2Bins)
    slots = triton_engine.slots_of(bins)
    tables = {"due_ptr": "*i64", "items_ptr": "*i64", "ranges_ptr": "*fp32", "counts_ptr": "*i64"}
    elements = {
        "DTYPE": triton_engine.ELEMENTS[dtype],
        "BINS": bins.bins,
        "SLOTS": slots,
        "THREADS": triton_engine.THREADS,
    }
    if name == "measure":
        pairs = triton_engine.compares_pairs(dtype.itemsize, capability)
        constants = {**elements, "LOG2": is_log2, "PAIRS": pairs}
        return measure_kernel, {**tables, "partials_ptr": "*fp64"}, constants
    if name == "second sweep":
        return second_sweep_kernel, tables, elements
    results = {"due_ptr": "*i64", "spans_ptr": "*i64", "partials_ptr": "*fp64"}
    results |= {
        "ranges_ptr": "*fp32",
        "integers_ptr": "*i64",
        "floats_ptr": "*fp64",
    }
    constants = {"KNOWN_RANGE": not is_log2, "BLOCK": triton_engine.FINISH_BLOCK}
    return finish_kernel, results, constants


def format_arguments(
    name: str, dtype: torch.dtype, formats: str, capability: int
) -> tuple[Any, ...]:
    """The same for a kernel of narrow formats."""
    forms = [FORMATS[each] for each in formats.split(" + ")]
    constants = tuple(triton_formats.form_constants(form) for form in forms)
    if name == "finish formats":
        results = {"spans_ptr": "*i64", "maxima_ptr": "*fp32", "partials_ptr": "*fp64"}
        results |= {"integers_ptr": "*i64", "floats_ptr": "*fp64", "n_rows": "i32"}
        blocks = {"FORMS": constants, "BLOCK": triton_engine.FINISH_BLOCK}
        return finish_formats_kernel, results, blocks
    elements = {
        "DTYPE": triton_engine.ELEMENTS[dtype],
        "IN_TILES": triton_formats.in_tiles(forms),
        "GROUP": triton_formats.group_columns(forms),
        "THREADS": triton_engine.THREADS,
    }
    tables = {"items_ptr": "*i64", "maxima_ptr": "*i32"}
    if name == "maxima":
        return maxima_kernel, tables, elements
    tables |= {"maxima_ptr": "*fp32", "partials_ptr": "*fp64"}
    pairs = triton_engine.compares_pairs(2, capability)
    return formats_kernel, tables, {**elements, "FORMS": constants, "PAIRS": pairs}


def elements_of_thread(dtype: torch.dtype) -> int:
    """Elements of a tile for each thread."""
    return triton_engine.TILE_BYTES // triton_engine.THREADS // dtype.itemsize


def examine(architecture: int, name: str, dtype: torch.dtype, scheme: str) -> dict[str, Any]:
    """Figures of a kernel's main loop."""
    kernel, signature, constants = kernel_arguments(name, dtype, scheme, architecture)
    options = {}
    if name == "measure":
        slots = constants["SLOTS"]
        options = triton_engine.limit_registers(dtype.itemsize, slots, architecture)
    target = GPUTarget("cuda", architecture, 32)
    warps = triton_engine.THREADS // target.warp_size
    code = sass.inspect(
        sass.compile_kernel(kernel, signature, constants, target, num_warps=warps, **options)
    )
    each = elements_of_thread(dtype)
    # They come in eights.
    registers = -(-code.registers // 8) * 8
    programs = min(REGISTERS // (triton_engine.THREADS * registers), 2048 // triton_engine.THREADS)
    return {
        "architecture": architecture,
        "kernel": name,
        "dtype": str(dtype).removeprefix("torch."),
        "bins": scheme,
        "instructions": len(code.loop) / each,
        "pipes": {pipe: count / each for pipe, count in sorted(code.pipes().items())},
        "registers": code.registers,
        "spills": code.spills,
        "barriers": code.count("BAR"),
        # Of a thread, by loads of 16 bytes.
        "wide_bytes": sum(
            sass.load_bytes(each.opcode)
            for each in code.loop
            if sass.load_bytes(each.opcode) == triton_engine.VECTOR_BYTES
        ),
        "load_bytes": min(
            sass.load_bytes(each.opcode) for each in code.loop if sass.load_bytes(each.opcode)
        ),
        "in_flight": programs * triton_engine.THREADS * each * dtype.itemsize,
    }


def predict(gpu_: GPU, figures: dict[str, Any]) -> tuple[float, float, str]:
    """Instructions that fit an element's time, the share of bandwidth, and what limits it."""
    itemsize = 4 if figures["dtype"] == "float32" else 2
    per_clock = gpu_.bytes_per_second / gpu_.hertz / gpu_.multiprocessors / itemsize
    budget = ISSUED / per_clock
    shares = {"memory bandwidth": 1.0, "issue": budget / figures["instructions"]}
    for pipe, lanes in gpu_.lanes.items():
        used = figures["pipes"].get(pipe, 0)
        if used:
            shares[pipe] = lanes / per_clock / used
    limit = min(shares, key=lambda name: shares[name])
    return budget, min(shares[limit], 1.0), limit


def main() -> None:
    """Print the table; write it as JSON too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    options = parser.parse_args()
    rows = [
        examine(architecture, name, dtype, scheme)
        for architecture in sass.ARCHITECTURES
        for name, scheme in KERNELS
        for dtype in triton_engine.ELEMENTS
    ]
    width = max(len(name) for _, name in KERNELS)
    for row in rows:
        pipes = ", ".join(f"{pipe} {count:.1f}" for pipe, count in row["pipes"].items())
        print(
            f"sm_{row['architecture']:<3} {row['kernel']:9} {row['bins']:{width}} {row['dtype']:8} "
            f"{row['instructions']:5.1f} instructions an element ({pipes}); "
            f"{row['registers']} registers, {row['spills']} B spilled, {row['load_bytes']}-byte "
            f"loads, {row['barriers']} barriers a tile, {row['in_flight'] / 1024:.0f} KB in flight"
        )
    print()
    for card in GPUS:
        for row in rows:
            if row["architecture"] == card.architecture:
                budget, share, limit = predict(card, row)
                print(
                    f"{card.name} {row['kernel']:9} {row['bins']:{width}} {row['dtype']:8} "
                    f"{row['instructions']:5.1f} of {budget:4.1f} instructions: {share:4.0%} of "
                    f"bandwidth, limited by {limit}"
                )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
