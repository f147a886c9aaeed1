"""The processor's mode of subnormal numbers."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# The least float64, from its bits, as the module is imported. Python computes a constant when it
# compiles: `2.0**-1074` is 0.0 for good in a module that it compiles while subnormals are flushed.
(_SUBNORMAL,) = struct.unpack("<d", (1).to_bytes(8, "little"))


def keeps_subnormals(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function as if `torch.set_flush_denormal` were off.

    Bins end at subnormals, and no count should depend on the mode of the thread that asks for it.
    Threads that torch started in that mode keep it for good, so the caller's computes alone.
    """

    @functools.wraps(function)
    def keeping(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _SUBNORMAL * 1.0 != 0.0 or torch.compiler.is_compiling():
            return function(*args, **kwargs)
        threads = torch.get_num_threads()
        torch.set_flush_denormal(False)
        torch.set_num_threads(1)
        try:
            return function(*args, **kwargs)
        finally:
            torch.set_num_threads(threads)
            torch.set_flush_denormal(True)

    return keeping
