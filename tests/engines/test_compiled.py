"""What the compiler makes of the kernels, for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

from gradstat.formats import FORMATS

# Instructions of an element in the main loop, at most: of float32, float16 and bfloat16, on any
# architecture, and on those that differ. Turing has no instructions for pairs, Blackwell (of data
# centres) adds two float32 at once. They are what was found with Triton 3.8, and 2 % for another.
MOST_INSTRUCTIONS = {
    "measure Log2Bins()": {
        0: (13.5, 11, 11.6),
        75: (13.5, 12, 13.6),
        100: (11.7, 8.5, 9.4),
        120: (14.3, 10.6, 11.6),
    },
    "measure LinearBins(64, ...)": {
        0: (17.6, 16.4, 16.1),
        75: (17.6, 19, 18),
        100: (15, 13.7, 13.6),
        120: (18.8, 16.3, 16.3),
    },
    "second sweep LinearBins(64, ...)": {0: (7.3, 7.8, 7.8)},
}
# Kilobytes that a multiprocessor has on their way from memory, at least.
LEAST_IN_FLIGHT = {"Log2Bins()": (64, 32, 32), "LinearBins(64, ...)": (64, 48, 48)}
DTYPES = ("float32", "float16", "bfloat16")
MOST_REGISTERS = 112
# The same on gfx942 and gfx950.
MOST_FOR_AMD = {
    "measure": 256,
    "second sweep": 72,
    "finish": 64,
    "maxima": 64,
    "formats": 176,
    "finish formats": 48,
}

# The same of narrow formats, one for each way to find a scale, and for three formats together.
MOST_FOR_FORMATS = {
    "none": (17.2, 17.8),
    "amax": (16.7, 17.8),
    "block": (31.5, 25.5),
    "tiles": (39, 28.7),
    "e8m0": (22.6, 21),
    "nvfp4": (28.9, 25.2),
    "together": (57.5, 50),
}

# What bench/roofline.py examines.
MEASURING = [
    ("measure", "Log2Bins()"),
    ("measure", "LinearBins(64, ...)"),
    ("second sweep", "LinearBins(64, ...)"),
]
ONE_OF_EACH = [
    "float16",
    "bfloat16",
    *(f"float8_e4m3fn{way}" for way in ("_amax", "_1x128", "_128x128")),
    "mxfp8_e4m3",
    "nvfp4",
]
TOGETHER = "float8_e4m3fn + mxfp8_e4m3 + nvfp4"

EXAMINE = """
import json, sys
import roofline, torch
rows = [
    roofline.examine(architecture, name, getattr(torch, dtype), scheme)
    for architecture, name, dtype, scheme in json.loads(sys.argv[1])
]
print(json.dumps(rows))
"""

# All dtypes on one architecture of each maker, bfloat16 on the others.
EVERY_KERNEL = """
import re, roofline, sass, torch
from gradstat.engines import triton as triton_engine
from triton.backends.compiler import GPUTarget
FORMATS = (roofline.TOGETHER, "float8_e5m2_128x128 + bfloat16 + float8_e5m2_amax")
AMD = [GPUTarget("hip", arch, 64) for arch in ("gfx942", "gfx950")]
NVIDIA = [GPUTarget("cuda", arch, 32) for arch in (90, 75, 80, 86, 89, 100, 120)]
for target in AMD + NVIDIA:
    is_amd = target.backend == "hip"
    def report(name, dtype, scheme):
        arguments = roofline.kernel_arguments(name, dtype, scheme, 0 if is_amd else target.arch)
        warps = triton_engine.THREADS // target.warp_size
        compiled = sass.compile_kernel(*arguments, target, num_warps=warps)
        if is_amd:
            code = compiled.asm["amdgcn"]
            used = {x: int(n) for x, n in re.findall(r"[.](\\w+):\\s+(\\d+)", code)}
            registers = used["vgpr_count"]
            spills = used["vgpr_spill_count"] + used["private_segment_fixed_size"]
        else:
            usage = sass.usage(compiled)
            registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
        print(f"{target.arch}|{name}|{dtype}|{scheme}|{registers}|{spills}")
    dtypes = list(triton_engine.ELEMENTS)
    for dtype in dtypes if target in (AMD[0], NVIDIA[0]) else dtypes[-1:]:
        for name in ("maxima", "formats", "finish formats"):
            for formats in FORMATS:
                report(name, dtype, formats)
        for name in ("measure", "second sweep", "finish"):
            for scheme in roofline.SCHEMES:
                if (name, scheme) != ("second sweep", "Log2Bins()"):
                    report(name, dtype, scheme)
"""

# What a benchmark on a card sets beside its measurements.
PREDICTED = """
import json, cards, roofline
card = cards.named("NVIDIA H100 80GB HBM3")
shares = [[*key, *found] for key, found in roofline.shares(card).items()]
times = [[*key, found] for key, found in roofline.list_times(card).items()]
print(json.dumps([card.name, shares, times]))
"""

# Every sum of a product, and one that the compiler fuses, to see that it would be found.
EXCHANGED = """
import roofline, sass, torch, triton, triton.language as tl
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
    # As above: all dtypes on one architecture.
    for dtype in triton_engine.ELEMENTS if architecture == 90 else [torch.bfloat16]:
        for scheme in roofline.SCHEMES:
            for name in ("measure", "finish"):
                print(name, found(*roofline.kernel_arguments(name, dtype, scheme, architecture)))
        for formats in (roofline.TOGETHER, "float8_e5m2_128x128 + bfloat16 + float8_e5m2_amax"):
            for name in ("formats", "finish formats"):
                arguments = roofline.kernel_arguments(name, dtype, formats, architecture)
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


Choice = tuple[int, str, str, str]  # architecture, kernel, dtype, and bins or formats


def examine(chosen: list[Choice]) -> list[dict[str, Any]]:
    """Figures of main loops."""
    rows: list[dict[str, Any]] = json.loads(run("-c", EXAMINE, json.dumps(chosen)))
    assert len(rows) == len(chosen)
    return rows


def check_measuring(chosen: list[Choice]) -> None:
    for row in examine(chosen):
        kind = DTYPES.index(row["dtype"])
        name = f"{row['kernel']} {row['bins']}"
        most = MOST_INSTRUCTIONS[name].get(row["architecture"], MOST_INSTRUCTIONS[name][0])
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


def check_formats(chosen: list[Choice]) -> None:
    for row in examine(chosen):
        kind, scale = 0 if row["dtype"] == "float32" else 1, scale_of(row["bins"])
        assert row["instructions"] <= MOST_FOR_FORMATS[scale][kind], row
        assert row["registers"] <= (208 if scale == "together" else 128), row
        # Outside the loop.
        assert row["spills"] <= 16, row
        # All elements of a thread come in loads of 16 bytes.
        assert row["wide_bytes"] == 64, row
        assert row["barriers"] == 0, row


def test_main_loop_keeps_to_the_budget() -> None:
    # All dtypes on one architecture, bfloat16 where the budget is another one.
    check_measuring(
        [
            (architecture, kernel, dtype, bins)
            for kernel, bins in MEASURING
            for architecture, dtypes in ((90, DTYPES), (75, DTYPES[2:]), (100, DTYPES[2:]))
            for dtype in dtypes
        ]
    )


def test_main_loop_of_formats_keeps_to_the_budget() -> None:
    # One format for each way to find a scale; the most work for the widest loads.
    chosen = [(90, "formats", "bfloat16", name) for name in (*ONE_OF_EACH, TOGETHER)]
    chosen += [(90, "formats", "float32", name) for name in ("nvfp4", TOGETHER)]
    chosen += [(100, "formats", "float16", TOGETHER)]
    assert {scale_of(name) for *_, name in chosen} == set(MOST_FOR_FORMATS)
    check_formats(chosen)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_every_main_loop_keeps_to_the_budget(architecture: int) -> None:
    check_measuring([(architecture, kernel, d, bins) for kernel, bins in MEASURING for d in DTYPES])
    if architecture in (80, 90, 100):
        names = (*ONE_OF_EACH, TOGETHER)
        check_formats([(architecture, "formats", d, name) for name in names for d in DTYPES])


def test_every_kernel_compiles_for_amd_and_nvidia() -> None:
    # Machine code for AMD's GPUs is made and its registers are counted. None has run it.
    lines = [line.split("|") for line in run("-c", EVERY_KERNEL).splitlines()]
    assert len(lines) == 11 * (2 * 3 + 7)
    for arch, name, *_, registers, spills in lines:
        # Turing compares no pairs, and has more registers in use for it.
        most = 208 if name == "formats" and arch != "75" else 255
        if arch.startswith("gfx"):
            most = MOST_FOR_AMD[name]
        assert int(registers) <= most, (arch, name)
        assert int(spills) <= (16 if name == "formats" else 0), (arch, name)


def test_no_product_is_fused_into_a_sum_over_lanes(tmp_path: Path) -> None:
    # It proves that in PTX no lane adds its own unrounded product to the rounded one of another, so
    # lanes that store one sum store the same one. What `ptxas` makes of it is not looked at.
    script = tmp_path / "exchanged.py"
    script.write_text(EXCHANGED)
    lines = [line.split() for line in run(str(script)).splitlines()]
    assert [n for name, n in lines if name.isdigit()] == ["1"] * 7
    assert [n for name, n in lines if not name.isdigit()] == ["0"] * (3 + 6) * (2 * 2 + 2 * 2)


def test_predictions_are_of_a_card_by_its_name() -> None:
    name, shares, times = json.loads(run("-c", PREDICTED))
    assert name == "H100"
    assert len(shares) == 2 * 3 * 4
    assert all(0 < share <= 1 for *_, share, _ in shares)
    seconds = {(model, dtype): found for model, dtype, found in times}
    # 498 MB at 3.35 TB/s are 149 us; no list takes less than the waits of one program.
    assert 149e-6 < seconds["GPT-2 small", "float32"] < 175e-6
    assert seconds["MLP", "bfloat16"] > 5e-6


def test_a_launch_takes_what_its_longest_program_or_the_memory_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import cards

    one = [(1e-6, 1000)]
    assert cards.launch_seconds(one, 4, 1e12) == pytest.approx(1e-6)
    # Side by side, then one after another, then all bound by the memory.
    assert cards.launch_seconds(4 * one, 4, 1e12) == pytest.approx(1e-6)
    assert cards.launch_seconds(8 * one, 4, 1e12) == pytest.approx(2e-6)
    assert cards.launch_seconds(8 * one, 8, 1e9) == pytest.approx(8e-6)
    # The last program has the card to itself.
    assert cards.launch_seconds([*4 * one, (9e-6, 0)], 5, 1e12) == pytest.approx(9e-6)
