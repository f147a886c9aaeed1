"""What the compiler makes of the kernels, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import triton
from conftest import ROOT

from gradstat.formats import FORMATS

# Instructions of an element in the main loop, at most: of float32, float16 and bfloat16.
MOST_INSTRUCTIONS = {
    ("measure", "Log2Bins()", 80): (13.5, 11.5, 12),
    ("measure", "Log2Bins()", 90): (13.5, 11.5, 12),
    ("measure", "Log2Bins()", 100): (12.5, 11, 11.3),
    ("measure", "LinearBins(64, ...)", 80): (19, 17.3, 17.3),
    ("measure", "LinearBins(64, ...)", 90): (19, 17.3, 17.3),
    ("measure", "LinearBins(64, ...)", 100): (18, 16.5, 16.2),
    # The second sweep of an automatic range.
    ("second sweep", "LinearBins(64, ...)", 80): (9.5, 9.5, 9.5),
    ("second sweep", "LinearBins(64, ...)", 90): (9.5, 9.5, 9.5),
    ("second sweep", "LinearBins(64, ...)", 100): (9.5, 9.5, 9.5),
}
# Bytes that a multiprocessor has on their way from memory, at least.
LEAST_IN_FLIGHT = {"Log2Bins()": (64, 32, 32), "LinearBins(64, ...)": (64, 48, 48)}
DTYPES = ("float32", "float16", "bfloat16")
MOST_REGISTERS = 96

# The same of narrow formats, one for each way to find a scale, and for three formats together.
MOST_FOR_FORMATS = {
    "none": (20, 22),
    "amax": (19, 21),
    "block": (35, 31),
    "tiles": (40, 31),
    "e8m0": (24, 22),
    "nvfp4": (30, 26),
    "together": (60, 50),
}

EVERY_KERNEL = """
import roofline, sass, torch
from gradstat.engines import triton as triton_engine
from triton.backends.compiler import GPUTarget
FORMATS = (roofline.TOGETHER, "float8_e5m2_128x128 + bfloat16 + float8_e5m2_amax")
for target in (GPUTarget("hip", "gfx942", 64), GPUTarget("cuda", 90, 32)):
    capability = target.arch if target.backend == "cuda" else 0
    for dtype in triton_engine.ELEMENTS:
        for name in ("maxima", "formats", "finish formats"):
            for formats in FORMATS:
                arguments = roofline.kernel_arguments(name, dtype, formats, capability)
                warps = triton_engine.THREADS // target.warp_size
                compiled = sass.compile_kernel(*arguments, target, num_warps=warps)
                print(target.arch, name, dtype, formats, list(compiled.asm)[-1])
        for name in ("measure", "second sweep", "finish"):
            for scheme in roofline.SCHEMES:
                if (name, scheme) != ("second sweep", "Log2Bins()"):
                    arguments = roofline.kernel_arguments(name, dtype, scheme, capability)
                    warps = triton_engine.THREADS // target.warp_size
                    compiled = sass.compile_kernel(*arguments, target, num_warps=warps)
                    print(target.arch, name, dtype, scheme, list(compiled.asm)[-1])
"""

# Every sum of a product, and one that the compiler fuses, to see that it would be found.
EXCHANGED = """
import roofline, sass, triton, triton.language as tl
from gradstat.engines import triton as triton_engine
from triton.backends.compiler import GPUTarget
@triton.jit
def fused(x_ptr, y_ptr, THREADS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, THREADS))
    tl.store(y_ptr, tl.sum(x * 3.0))
for architecture in sass.ARCHITECTURES:
    def found(*arguments):
        compiled = sass.compile_kernel(*arguments, GPUTarget("cuda", architecture, 32), num_warps=8)
        return len(sass.fused_with_exchanged(compiled.asm["ptx"]))
    print(architecture, found(fused, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"THREADS": 256}))
    for dtype in triton_engine.ELEMENTS:
        for scheme in roofline.SCHEMES:
            for name in ("measure", "finish"):
                print(name, found(*roofline.kernel_arguments(name, dtype, scheme)))
        for formats in (roofline.TOGETHER, "float8_e5m2_128x128 + bfloat16 + float8_e5m2_amax"):
            for name in ("formats", "finish formats"):
                arguments = roofline.kernel_arguments(name, dtype, formats)
                print(name.replace(" ", "-"), found(*arguments))
"""


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "bench")}
    # The compiler, not the interpreter.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path: Path = tmp_path_factory.mktemp("roofline") / "rows.json"
    run(str(ROOT / "bench" / "roofline.py"), "--json", str(path))
    rows: list[dict[str, Any]] = json.loads(path.read_text())
    return rows


# Up to Triton 3.7 a histogram is counted by ballots: the same result, more instructions.
counts_by_atomics = tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 8)


@pytest.mark.skipif(not counts_by_atomics, reason="the budget is for Triton 3.8 and later")
def test_main_loop_keeps_to_the_budget(rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["kernel"] != "formats"]
    assert len(rows) == 3 * 3 * 3
    for row in rows:
        kind = DTYPES.index(row["dtype"])
        most = MOST_INSTRUCTIONS[row["kernel"], row["bins"], row["architecture"]]
        assert row["instructions"] <= most[kind], row
        assert row["in_flight"] >= LEAST_IN_FLIGHT[row["bins"]][kind] << 10, row
        assert row["registers"] <= MOST_REGISTERS, row
        assert row["spills"] == 0, row
        assert row["load_bytes"] == 16, row
        assert row["barriers"] <= 3, row


def scale_of(formats: str) -> str:
    if formats not in FORMATS:
        return "together"
    scaling = FORMATS[formats].scaling
    return "tiles" if formats.endswith("_128x128") else scaling


def test_main_loop_of_formats_keeps_to_the_budget(rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["kernel"] == "formats"]
    assert len(rows) == 3 * 3 * (len(FORMATS) + 1)
    assert {scale_of(row["bins"]) for row in rows} == set(MOST_FOR_FORMATS)
    for row in rows:
        kind, scale = 0 if row["dtype"] == "float32" else 1, scale_of(row["bins"])
        assert row["instructions"] <= MOST_FOR_FORMATS[scale][kind], row
        assert row["registers"] <= (208 if scale == "together" else 128), row
        # Outside the loop.
        assert row["spills"] <= 16, row
        # All elements of a thread come in loads of 16 bytes.
        assert row["wide_bytes"] == 64, row
        assert row["barriers"] == 0, row


def test_every_kernel_compiles_for_amd_and_nvidia() -> None:
    lines = run("-c", EVERY_KERNEL).splitlines()
    assert len(lines) == 2 * 3 * 11
    assert sum(line.startswith("gfx942") and line.endswith("hsaco") for line in lines) == 33
    assert sum(line.startswith("90") and line.endswith("cubin") for line in lines) == 33


def test_no_product_is_fused_into_a_sum_over_lanes(tmp_path: Path) -> None:
    # It proves that in PTX no lane adds its own unrounded product to the rounded one of another, so
    # lanes that store one sum store the same one. What `ptxas` makes of it is not looked at.
    script = tmp_path / "exchanged.py"
    script.write_text(EXCHANGED)
    lines = [line.split() for line in run(str(script)).splitlines()]
    assert [n for name, n in lines if name.isdigit()] == ["1"] * 3
    assert [n for name, n in lines if not name.isdigit()] == ["0"] * 3 * 3 * (2 * 2 + 2 * 2)
