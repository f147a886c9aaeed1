"""What the compiler makes of the kernels, for GPUs that need not be there."""

import json
from typing import Any

import pytest
from conftest import ROOT
from programs import run_python

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

# Main loops, and what a benchmark on a card sets beside its measurements.
EXAMINE = """
import functools, json, sys
import cards, roofline, torch
roofline.examine = functools.cache(roofline.examine)
rows = [
    roofline.examine(architecture, name, getattr(torch, dtype), scheme)
    for architecture, name, dtype, scheme in json.loads(sys.argv[1])
]
card = cards.named("NVIDIA H100 80GB HBM3")
shares = [[*key, *found] for key, found in roofline.shares(card).items()]
times = [[*key, found] for key, found in roofline.list_times(card).items()]
print(json.dumps([rows, card.name, shares, times]))
"""

# The oldest and the newest of NVIDIA's, the one that is measured, and one of AMD's; and the others.
TARGETS = ["gfx942", 90, 75, 100]
OTHERS = ["gfx950", 80, 86, 89, 120]

# All dtypes on one architecture of each maker, bfloat16 on the others; and a sum of a product that
# the compiler fuses, to see that it would be found.
EVERY_KERNEL = """
import json, re, sys
import roofline, sass, triton, triton.language as tl
from gradstat.engines import triton as triton_engine
from triton.backends.compiler import GPUTarget
FORMATS = (roofline.TOGETHER, "float8_e5m2_128x128 + bfloat16 + float8_e5m2_amax")

@triton.jit
def fused(x_ptr, y_ptr, THREADS: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, THREADS))
    tl.store(y_ptr, tl.sum(x * 3.0))

def report(arch, name, dtype, scheme, arguments):
    is_amd = isinstance(arch, str)
    target = GPUTarget("hip", arch, 64) if is_amd else GPUTarget("cuda", arch, 32)
    warps = triton_engine.THREADS // target.warp_size
    compiled = sass.compile_kernel(*arguments, target, num_warps=warps)
    if is_amd:
        code = compiled.asm["amdgcn"]
        used = {x: int(n) for x, n in re.findall(r"[.](\\w+):\\s+(\\d+)", code)}
        registers, exchanged = used["vgpr_count"], 0
        spills = used["vgpr_spill_count"] + used["private_segment_fixed_size"]
    else:
        usage = sass.usage(compiled)
        registers, spills = usage["REG"], usage["STACK"] + usage["LOCAL"]
        exchanged = len(sass.fused_with_exchanged(compiled.asm["ptx"]))
    print(f"{arch}|{name}|{dtype}|{scheme}|{registers}|{spills}|{exchanged}")

for arch in json.loads(sys.argv[1]):
    dtypes = list(triton_engine.ELEMENTS)
    if arch not in ("gfx942", 90):
        dtypes = dtypes[-1:]
    kernels = [(n, each) for n in ("maxima", "formats", "finish formats") for each in FORMATS]
    kernels += [(n, each) for n in ("measure", "finish") for each in roofline.SCHEMES]
    kernels += [("second sweep", "LinearBins(64, ...)")]
    for dtype in dtypes:
        for name, scheme in kernels:
            capability = 0 if isinstance(arch, str) else arch
            arguments = roofline.kernel_arguments(name, dtype, scheme, capability)
            report(arch, name, dtype, scheme, arguments)
    if not isinstance(arch, str):
        control = fused, {"x_ptr": "*fp32", "y_ptr": "*fp32"}, {"THREADS": 256}
        report(arch, "control", "", "", control)
"""


def run(*arguments: str) -> str:
    # The compiler, not the interpreter.
    environment = {"PYTHONPATH": str(ROOT / "bench"), "TRITON_INTERPRET": None}
    return run_python(*arguments, check=True, **environment).stdout


Choice = tuple[int, str, str, str]  # architecture, kernel, dtype, and bins or formats


def examine(chosen: list[Choice]) -> tuple[list[dict[str, Any]], Any]:
    """Figures of main loops; name, shares and times of a card."""
    rows, *predicted = json.loads(run("-c", EXAMINE, json.dumps(chosen)))
    assert len(rows) == len(chosen)
    return rows, predicted


def check_measuring(rows: list[dict[str, Any]]) -> None:
    for row in rows:
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


def check_formats(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        kind, scale = 0 if row["dtype"] == "float32" else 1, scale_of(row["bins"])
        assert row["instructions"] <= MOST_FOR_FORMATS[scale][kind], row
        assert row["registers"] <= (208 if scale == "together" else 128), row
        # Outside the loop.
        assert row["spills"] <= 16, row
        # All elements of a thread come in loads of 16 bytes.
        assert row["wide_bytes"] == 64, row
        assert row["barriers"] == 0, row


# All dtypes on one architecture, bfloat16 where the budget is another one.
MEASURED = [
    (architecture, kernel, dtype, bins)
    for kernel, bins in MEASURING
    for architecture, dtypes in ((90, DTYPES), (75, DTYPES[2:]), (100, DTYPES[2:]))
    for dtype in dtypes
]
# One format for each way to find a scale; the most work for the widest loads.
CAST = [
    *((90, "formats", "bfloat16", name) for name in (*ONE_OF_EACH, TOGETHER)),
    *((90, "formats", "float32", name) for name in ("nvfp4", TOGETHER)),
    (100, "formats", "float16", TOGETHER),
]


@pytest.fixture(scope="module")
def examined() -> tuple[list[dict[str, Any]], Any]:
    """All that these tests look at, from one process: it compiles each kernel once."""
    return examine(MEASURED + CAST)


def test_main_loop_keeps_to_the_budget(examined: tuple[list[dict[str, Any]], Any]) -> None:
    check_measuring(examined[0][: len(MEASURED)])


def test_main_loop_of_formats_keeps_to_the_budget(
    examined: tuple[list[dict[str, Any]], Any],
) -> None:
    assert {scale_of(name) for *_, name in CAST} == set(MOST_FOR_FORMATS)
    check_formats(examined[0][len(MEASURED) :])


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [75, 80, 86, 89, 90, 100, 120])
def test_every_main_loop_keeps_to_the_budget(architecture: int) -> None:
    chosen = [(architecture, kernel, d, bins) for kernel, bins in MEASURING for d in DTYPES]
    check_measuring(examine(chosen)[0])
    if architecture in (80, 90, 100):
        names = (*ONE_OF_EACH, TOGETHER)
        check_formats(examine([(architecture, "formats", d, n) for n in names for d in DTYPES])[0])


@pytest.fixture(
    scope="module",
    params=[TARGETS, pytest.param(OTHERS, marks=pytest.mark.slow)],
    ids=["", "other architectures"],
)
def lines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What every kernel of some architectures has become; Triton reads its own from a file."""
    script = tmp_path_factory.mktemp("every_kernel") / "every_kernel.py"
    script.write_text(EVERY_KERNEL)
    printed = run(str(script), json.dumps(request.param)).splitlines()
    controls = sum(isinstance(target, int) for target in request.param)
    others = 2 * 2 if request.param is TARGETS else 0
    assert len(printed) == 11 * (len(request.param) + others) + controls
    return [line.split("|") for line in printed]


def test_every_kernel_compiles_for_amd_and_nvidia(lines: list[Any]) -> None:
    # Machine code for AMD's GPUs is made and its registers are counted. None has run it.
    for arch, name, *_, registers, spills, _ in lines:
        # Turing compares no pairs, and has more registers in use for it.
        most = 208 if name == "formats" and arch != "75" else 255
        if arch.startswith("gfx"):
            most = MOST_FOR_AMD[name]
        assert int(registers) <= most, (arch, name)
        assert int(spills) <= (16 if name == "formats" else 0), (arch, name)


def test_no_product_is_fused_into_a_sum_over_lanes(lines: list[Any]) -> None:
    # It proves that in PTX no lane adds its own unrounded product to the rounded one of another, so
    # lanes that store one sum store the same one. What `ptxas` makes of it is not looked at.
    for arch, name, *_, exchanged in lines:
        assert int(exchanged) == (name == "control"), (arch, name)


def test_predictions_are_of_a_card_by_its_name(
    examined: tuple[list[dict[str, Any]], Any],
) -> None:
    name, shares, times = examined[1]
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
