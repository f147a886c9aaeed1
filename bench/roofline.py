"""How fast the kernels can be, read off their machine code; no GPU is needed.

Compiles the measuring kernel, the one of the second sweep that automatic ranges take, and that of
narrow formats with each way to find a scale and with three formats, for each architecture and
dtype, finds the main loop, and tells for each card what share of its memory's speed to expect, and
which roof sets it: see cards.py. The loop alone is looked at, of a large tensor. Then what all
gradients of a model should take, with the programs that the engine makes of them.

Usage: python bench/roofline.py [--json FILE] [--markdown FILE]
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import sass
import torch
from cards import (
    CARDS,
    DISTRIBUTIONS,
    ISSUED,
    LATENCY_S,
    LAUNCH_S,
    REGISTERS,
    Card,
    launch_seconds,
    predict,
)
from shapes import GPT2_SMALL, MLP, RESNET50, Shape
from triton.backends.compiler import GPUTarget

from gradstat.bins import LinearBins, Log2Bins
from gradstat.engines import triton as triton_engine
from gradstat.engines import triton_formats
from gradstat.formats import FORMATS
from gradstat.kernels.finish import finish_kernel
from gradstat.kernels.formats import finish_formats_kernel, formats_kernel, maxima_kernel
from gradstat.kernels.measure import PARTIAL_FIELDS, measure_kernel, second_sweep_kernel

SCHEMES = {"Log2Bins()": Log2Bins(), "LinearBins(64, ...)": LinearBins(64, -0.5, 0.5)}
# One format for each way to find a scale.
ONE_OF_EACH = [
    "float16",
    "bfloat16",
    *(f"float8_e4m3fn{way}" for way in ("_amax", "_1x128", "_128x128")),
    "mxfp8_e4m3",
    "nvfp4",
]
# Formats that one launch measures together.
TOGETHER = "float8_e4m3fn + mxfp8_e4m3 + nvfp4"
KERNELS = [
    *(("measure", scheme) for scheme in SCHEMES),
    ("second sweep", "LinearBins(64, ...)"),
    *(("formats", name) for name in (*ONE_OF_EACH, TOGETHER)),
]
FORMATS_ON = (80, 90, 100)
LISTS = {"MLP": MLP, "ResNet-50": RESNET50, "GPT-2 small": GPT2_SMALL}
# Instructions of a program's threads, read off the machine code for sm_90: outside all loops, in a
# round of the loop over what is less than a tile, and in the finishing kernel.
OUTSIDE_LOOPS, MASKED_ROUND, FINISHING = 1000, 140, 400
PARTIAL_BYTES = 8 * PARTIAL_FIELDS.value
# For `cards.atomic_clocks`.
BINS = {"Log2Bins()": 0, "LinearBins(64, ...)": 64}


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
    constants = tuple(form.fields for form in forms)
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
    target, threads = GPUTarget("cuda", architecture, 32), triton_engine.THREADS
    code = sass.inspect(
        sass.compile_kernel(
            kernel, signature, constants, target, num_warps=threads // 32, **options
        )
    )
    each = elements_of_thread(dtype)
    loads = [sass.load_bytes(it.opcode) for it in code.loop if sass.load_bytes(it.opcode)]
    # Registers come in eights.
    programs = min(REGISTERS // (threads * -(-code.registers // 8) * 8), 2048 // threads)
    return {
        "architecture": architecture,
        "kernel": name,
        "dtype": str(dtype).removeprefix("torch."),
        "itemsize": dtype.itemsize,
        "bins": scheme,
        "instructions": len(code.loop) / each,
        "pipes": {pipe: count / each for pipe, count in sorted(code.pipes().items())},
        "registers": code.registers,
        "spills": code.spills,
        "barriers": code.count("BAR"),
        # Of a thread, by loads of 16 bytes.
        "wide_bytes": sum(n for n in loads if n == triton_engine.VECTOR_BYTES),
        "load_bytes": min(loads),
        "threads": threads,
        "programs": programs,
        "program_bytes": triton_engine.TILE_BYTES,
        "in_flight": programs * triton_engine.TILE_BYTES,
    }


def describe(row: dict[str, Any]) -> str:
    """A kernel's figures in a line."""
    pipes = ", ".join(f"{pipe} {count:.1f}" for pipe, count in row["pipes"].items())
    return (
        f"sm_{row['architecture']:<3} {row['kernel']:12} {row['bins']:39} {row['dtype']:8} "
        f"{row['instructions']:5.1f} instructions an element ({pipes}); {row['registers']} "
        f"registers, {row['spills']} B spilled, {row['load_bytes']}-byte loads, {row['barriers']} "
        f"barriers a tile, {row['in_flight'] / 1024:.0f} KB in flight"
    )


def predictions(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: for each card and kernel the share of the memory's speed, and the roof."""
    lines = [
        "Predicted shares of the memory's speed, and the roof where it is not bandwidth.",
        "",
        f"| card | kernel | dtype | {' | '.join(DISTRIBUTIONS)} |",
        f"|---|---|---|{'---|' * len(DISTRIBUTIONS)}",
    ]
    for card in CARDS:
        for row in rows:
            if row["architecture"] == card.architecture:
                found = [predict(card, row, BINS.get(row["bins"]), each) for each in DISTRIBUTIONS]
                cells = [
                    f"{s:.0%}" + ("" if roof == "bandwidth" else f" {roof}") for s, roof in found
                ]
                name = f"{row['kernel']} {row['bins']}"
                lines.append(f"| {card.name} | {name} | {row['dtype']} | {' | '.join(cells)} |")
    return lines


def list_seconds(card: Card, row: dict[str, Any], shapes: list[Shape]) -> dict[str, float]:
    """What measuring tensors of these shapes should take, in the programs that the engine makes.

    Args:
        card: of the row's architecture.
        row: figures of the measuring kernel over log2 bins, from `examine`.
        shapes: of the tensors.

    Returns:
        Seconds of both launches, and what memory needs to deliver the elements; programs.
    """
    dtype, itemsize = getattr(torch, row["dtype"]), row["itemsize"]
    tensors = [torch.empty(shape, dtype=dtype) for shape in shapes]
    items, spans = triton_engine.make_items(tensors, range(len(tensors)))

    def alone(waits: int, instructions: float) -> float:
        """Of one program whose waits for memory overlap with nothing."""
        issued = instructions * row["threads"] / ISSUED
        return waits * LATENCY_S + issued / card.hertz

    tile = row["program_bytes"] // itemsize
    programs = []
    for n, n_aligned in items[:, 2:4].tolist():
        tiles = n_aligned // tile
        rounds = -(-(n - n_aligned) // row["threads"])
        instructions = OUTSIDE_LOOPS + rounds * MASKED_ROUND
        instructions += tiles * row["instructions"] * tile / row["threads"]
        # Before the loops it waits for the words of its item, and for the first elements.
        programs.append((alone(2 + tiles + rounds, instructions), n * itemsize))
    at_once = card.multiprocessors * min(row["programs"], card.threads // row["threads"])
    share, _ = predict(card, row, 0, "Gaussian")
    finishing = []
    for _, first, end, _ in spans.tolist():
        blocks = -(-(end - first) // triton_engine.FINISH_BLOCK)
        # It reads the partial results twice.
        finishing.append((alone(2 + 2 * blocks, FINISHING), (end - first) * PARTIAL_BYTES))
    return {
        "programs": len(items),
        "at once": at_once,
        "measure": LAUNCH_S + launch_seconds(programs, at_once, share * card.bytes_per_second),
        "finish": LAUNCH_S + launch_seconds(finishing, at_once, card.bytes_per_second),
        "memory": sum(x.nbytes for x in tensors) / card.bytes_per_second,
    }


def list_predictions(rows: list[dict[str, Any]]) -> list[str]:
    """Lines of a table: for each card, list and dtype the times of both launches."""
    lines = [
        "Predicted times of all gradients of a model over log2 bins, in microseconds.",
        "",
        "| card | list | dtype | programs | at once | measure | finish | memory alone |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for card, (name, shapes) in product(CARDS, LISTS.items()):
        for row in rows:
            kind = row["architecture"], row["kernel"], row["bins"]
            if kind == (card.architecture, "measure", "Log2Bins()"):
                found = list_seconds(card, row, shapes)
                counts = [str(found[x]) for x in ("programs", "at once")]
                times = [f"{found[x] * 1e6:.1f}" for x in ("measure", "finish", "memory")]
                lines.append(f"| {' | '.join([card.name, name, row['dtype'], *counts, *times])} |")
    return lines


def shares(card: Card) -> dict[tuple[str, str, str], tuple[float, str]]:
    """Of the measuring kernel by scheme, dtype and distribution: see `cards.predict`."""
    found = {}
    for scheme, dtype in product(SCHEMES, triton_engine.ELEMENTS):
        row = examine(card.architecture, "measure", dtype, scheme)
        for distribution in DISTRIBUTIONS:
            key = scheme, row["dtype"], distribution
            found[key] = predict(card, row, BINS[scheme], distribution)
    return found


def list_times(card: Card) -> dict[tuple[str, str], float]:
    """Seconds of both launches by list and dtype."""
    found = {}
    for dtype in triton_engine.ELEMENTS:
        row = examine(card.architecture, "measure", dtype, "Log2Bins()")
        for name, shapes in LISTS.items():
            times = list_seconds(card, row, shapes)
            found[name, row["dtype"]] = times["measure"] + times["finish"]
    return found


def main() -> None:
    """Print the tables; write them to files too."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--markdown", type=Path, help="write the predictions to this file as well")
    options = parser.parse_args()
    rows = [
        examine(architecture, name, dtype, scheme)
        for architecture in sass.ARCHITECTURES
        for name, scheme in KERNELS
        if name != "formats" or architecture in FORMATS_ON
        for dtype in triton_engine.ELEMENTS
    ]
    table = [*predictions(rows), "", *list_predictions(rows)]
    print("\n".join([*map(describe, rows), "", *table]))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    if options.markdown:
        options.markdown.write_text("\n".join(table) + "\n")


if __name__ == "__main__":
    main()
