"""Whether a compiled function computes what `reference` does: tried once, on some hundred values.

With versions that nobody has tested together a compiler may be wrong and say nothing. What passes
is noted beside Numba's cache, for all processes with the same processor, sources and versions.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from gradstat.util import warn

TOLERANCE = 1e-5  # of floats, relative
_SPECIAL = (0.0, -0.0, float("nan"), float("inf"), -float("inf"))


def trial_tensors(dtype: torch.dtype) -> list[Tensor]:
    """A few hundred values, over float16's magnitudes; alone, with special ones, and repeated.

    The repeated are counted in other ways. All sums are as large as those of magnitudes, or nearly.
    """
    n = torch.arange(600, dtype=torch.float64, device="cpu")
    values = torch.exp(11 * torch.sin(n)) * torch.where(n % 8 == 0, -1.0, 1.0)
    special = torch.tensor(_SPECIAL, dtype=torch.float64, device="cpu")
    tensors = values.reshape(4, 150), torch.cat([special, values]), values.repeat(10, 6)
    return [x.to(dtype) for x in tensors]


def passes_trial(
    entry: Callable[..., Any],
    what: str,
    measure: Callable[[], Sequence[Tensor]],
    define: Callable[[], Sequence[Tensor]],
) -> bool:
    """Whether a compiled function may be used; a warning says where it may not.

    Args:
        entry: what `compile_entry` returned.
        what: it computes, for the warning.
        measure: gives results of it.
        define: gives those of `reference`.
    """
    note = _note(entry)
    if note is not None and note.exists():
        return True
    with np.errstate(all="ignore"):  # whatever is wrong is said below
        agrees = all(map(_agree, measure(), define()))
    if not agrees:
        warn(
            f"the CPU engine computes {what} wrongly with NumPy {np.__version__}, Numba "
            f"{numba.__version__} and PyTorch {torch.__version__}: the engine 'reference', which "
            f"is slow, takes its place"
        )
        return False
    if note is not None:
        with contextlib.suppress(OSError):  # only read from here
            note.touch()
    return True


def _note(entry: Callable[..., Any]) -> Path | None:
    """The file that says that a function has passed; ``None`` where Numba keeps no cache."""
    # Numba's own wrapper hides the function as well.
    compiled: Any = inspect.unwrap(entry, stop=lambda each: hasattr(each, "stats"))
    directory = compiled.stats.cache_path
    name = f"{compiled.py_func.__qualname__}-torch{torch.__version__}.agrees"
    return None if directory is None else Path(directory) / name


def _agree(got: Tensor, expected: Tensor) -> bool:
    if not expected.is_floating_point():
        return torch.equal(got, expected)
    return torch.allclose(got, expected, rtol=TOLERANCE, atol=0, equal_nan=True)
