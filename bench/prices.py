"""What each statistic costs: instructions that the main loop loses when its line is left out.

Usage: python bench/prices.py [ARCHITECTURE]
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import roofline
import sass
import torch
from triton.backends.compiler import GPUTarget

from gradstat.engines import triton as triton_engine
from gradstat.kernels import measure

# How the lines of each statistic begin in kernels/measure.py.
LINES = {
    "sum": ("total +=",),
    "l2 and std": ("squares +=",),
    "l1": ("magnitudes +=",),
    "min": ("smallest = tl.minimum", "smallest = pair_min"),
    "max": ("largest = tl.maximum", "largest = pair_max"),
    "zeros": ("zeros +=", "zeros = pair_add"),
    "histogram": ("histogram += tl.histogram",),
}


def without(beginnings: tuple[str, ...]) -> Any:
    """The measuring kernel without the lines that begin so."""
    lines = Path(measure.__file__).read_text().splitlines()
    kept = [
        re.sub(r"\S.*", "pass", line) if line.strip().startswith(beginnings) else line
        for line in lines
    ]
    assert kept != lines
    path = Path(tempfile.mkdtemp()) / "variant.py"
    path.write_text("\n".join(kept))
    spec = importlib.util.spec_from_file_location("variant", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.measure_kernel


def instructions(kernel: Any, dtype: torch.dtype, scheme: str, architecture: int) -> float:
    """Instructions of an element in the main loop."""
    _, signature, constants = roofline.kernel_arguments("measure", dtype, scheme)
    target = GPUTarget("cuda", architecture, 32)
    compiled = sass.compile_kernel(
        kernel, signature, constants, target, num_warps=triton_engine.THREADS // target.warp_size
    )
    return len(sass.inspect(compiled).loop) / roofline.elements_of_thread(dtype)


def main(architecture: int) -> None:
    for scheme in roofline.SCHEMES:
        for dtype in triton_engine.ELEMENTS:
            whole = instructions(measure.measure_kernel, dtype, scheme, architecture)
            prices = [
                f"{name} {whole - instructions(without(lines), dtype, scheme, architecture):.1f}"
                for name, lines in LINES.items()
            ]
            print(f"sm_{architecture} {scheme:19} {dtype} {whole:.1f}: {', '.join(prices)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 90)
