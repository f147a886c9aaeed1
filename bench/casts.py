"""Narrow formats against casting: python bench/casts.py [--markdown FILE].

Three things on the same tensor, in turn: the cast alone; the cast, the way back, and the numbers
that `gradstat.quantization` gives, by torch; and `gradstat.quantization`. Its answer is compared
with the second one's before anything is timed. Casts are torch's for formats without a scale, and
torchao's for the others.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from machine import describe
from report import table, where
from torch import Tensor

import gradstat
from gradstat.formats import FORMATS

SHAPE = (4096, 4096)
ROUNDS = 7
MX_ELEMENTS = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp4_e2m1": torch.float4_e2m1fn_x2,
}
Cast = Callable[[Tensor], tuple[Tensor, ...]]
Back = Callable[..., Tensor]


def casts() -> dict[str, tuple[Cast, Back]]:
    """To each format, and back to float32."""
    logging.getLogger("torch").setLevel(logging.ERROR)  # torchao's import
    from torchao.prototype.mx_formats import mx_tensor, nvfp4_tensor
    from torchao.quantization import quant_primitives as primitives

    def plain(dtype: torch.dtype) -> tuple[Cast, Back]:
        return lambda x: (x.to(dtype),), lambda data: data.float()

    def scaled(name: str) -> tuple[Cast, Back]:
        block = list(FORMATS[name].block or SHAPE)

        def cast(x: Tensor) -> tuple[Tensor, ...]:
            scale = primitives._choose_scale_float8(x, block, torch.float8_e4m3fn)
            return primitives._quantize_affine_float8(x, scale, torch.float8_e4m3fn), scale

        return cast, primitives._dequantize_affine_float8

    def mx(element: torch.dtype | str) -> tuple[Cast, Back]:
        def back(scale: Tensor, data: Tensor) -> Tensor:
            return mx_tensor.to_dtype(data, scale, element, 32, torch.float32)

        return lambda x: mx_tensor.to_mx(x, element, 32), back

    def nvfp4(x: Tensor) -> tuple[Tensor, ...]:
        scale = nvfp4_tensor.per_tensor_amax_to_scale(x.abs().amax())
        return (nvfp4_tensor.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale),)

    return {
        **{str(dtype)[6:]: plain(dtype) for dtype in (torch.float16, torch.bfloat16)},
        **{str(dtype)[6:]: plain(dtype) for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)},
        **{f"float8_e4m3fn_{kind}": scaled(f"float8_e4m3fn_{kind}") for kind in ("amax", "1x128")},
        **{name: mx(element) for name, element in MX_ELEMENTS.items()},
        "nvfp4": (nvfp4, lambda data: data.dequantize(torch.float32)),
    }


def measure_by_torch(x: Tensor, back: Tensor) -> tuple[Tensor, ...]:
    """Norms of the values and of the error, values that come to zero, and that are not finite."""
    is_lost = (back == 0) & (x != 0)
    return x.norm(), (back - x).norm(), is_lost.sum(), (~x.isfinite()).sum()


def check(name: str, x: Tensor, back: Tensor) -> None:
    """Stop unless gradstat gives the same answer; torch's own float32 norms are 1e-3 off."""
    q = gradstat.quantization(x, name)
    assert int(q.underflowed) == int(((back == 0) & (x != 0)).sum()), name
    error = (back.double() - x.double()).norm()
    torch.testing.assert_close(q.error_norm, error, rtol=1e-5, atol=0)


def seconds(function: Callable[[], object]) -> float:
    # torch's threads spin on after their work, and would hold a core that is needed next.
    time.sleep(0.01)
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(name: str, x: Tensor, cast: Cast, back: Back) -> list[str]:
    """A row of the table: GB/s of the three, and ratios of their times, medians of the rounds."""

    def by_torch() -> tuple[Tensor, ...]:
        return measure_by_torch(x, back(*cast(x)))

    check(name, x, back(*cast(x)))
    functions = (lambda: cast(x), by_torch, lambda: gradstat.quantization(x, name))
    rounds = [[seconds(each) for each in functions] for _ in range(ROUNDS)]
    speeds = [x.nbytes / 1e9 / statistics.median(column) for column in zip(*rounds, strict=True)]
    ratios = [statistics.median(each[k] / each[2] for each in rounds) for k in (0, 1)]
    return [name, *(f"{speed:.2f}" for speed in speeds), *(f"{ratio:.1f}" for ratio in ratios)]


def measure_together(x: Tensor) -> str:
    """Three formats in one call, against one after the other."""
    names = ("float8_e4m3fn", "mxfp8_e4m3", "nvfp4")
    together = [seconds(lambda: gradstat.quantization(x, names)) for _ in range(ROUNDS)]
    alone = [
        sum(seconds(lambda name=name: gradstat.quantization(x, name)) for name in names)
        for _ in range(ROUNDS)
    ]
    ratio = statistics.median(a / t for a, t in zip(alone, together, strict=True))
    speed = x.nbytes / 1e9 / statistics.median(together)
    return f"{', '.join(names)} in one call: {speed:.2f} GB/s, {ratio:.2f} times as fast as alone."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--markdown", type=Path, help="file for the table")
    path = parser.parse_args().markdown
    generator = torch.Generator().manual_seed(20)
    x = torch.randn(SHAPE, generator=generator) * 1e-2
    rows = [measure(name, x, *each) for name, each in casts().items()]
    head = ["format", "cast, GB/s", "cast and measured", "gradstat", "to cast", "to measured"]
    lines = ["# Narrow formats", "", f"Of {SHAPE[0]} x {SHAPE[1]} float32. Ratios are of times:"]
    lines += [
        "that of the cast, and that of the cast and what torch measures, over gradstat's.",
        "",
    ]
    lines += [table(head, rows), "", measure_together(x), ""]
    text = "\n".join([*lines, where(describe(["torch", "torchao", "numba", "numpy"]))])
    print(text)
    if path:
        path.write_text(text + "\n")


if __name__ == "__main__":
    main()
