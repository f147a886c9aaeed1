"""The processor's mode of subnormal numbers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

# In a list, so that no compiler takes a product of it for a constant.
_SUBNORMAL = [2.0**-1074]


def keeps_subnormals(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function as if `torch.set_flush_denormal` were off.

    Bins end at subnormals, and no count should depend on the mode of the thread that asks for it.
    Threads that torch started in that mode keep it for good, so the caller's computes alone.
    """

    @functools.wraps(function)
    def keeping(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _SUBNORMAL[0] * 1.0 != 0.0 or torch.compiler.is_compiling():
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
