"""Torch's own threads, which take a share of compiled work as they do of torch's operators.

They spin for a while after each operator: threads of ours would have to wait for a processor, and
these begin within two microseconds.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gradstat.bins import SUBNORMAL
from gradstat.engines.cpu.compiling import address_of, entry_point
from gradstat.util import call_after_fork

_CGROUP = Path("/sys/fs/cgroup")  # in a container: its own


class _Team:
    """The threads that OpenMP keeps for each thread that calls it."""

    def __init__(self) -> None:
        self.call = _openmp()
        call_after_fork(self)

    def forget_other_threads(self) -> None:
        """In a forked process: OpenMP would wait for threads that are not there."""
        self.call = None


def _openmp() -> Callable[[int, int, int, int], None] | None:
    """OpenMP's call of a function in several threads, if torch has an OpenMP that can be asked."""
    if sys.platform == "win32":
        return None
    # GCC's has it, and for what GCC has compiled LLVM's and Intel's, too. Torch loads its own for
    # all to see, so this is the one that torch calls.
    call: ctypes._FuncPointer | None = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if call is not None:
        call.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
        call.restype = None
    return call


_team = _Team()


def run_together(entry: Callable[[int], None], address: int, threads: int) -> None:
    """Call a compiled function once, or in each of torch's threads at the same time.

    It takes its work off a shared counter, so it does not matter how many come. An interrupt waits
    for the end of the call.

    Args:
        entry: what `compile_entry` returned for a function of an address.
        address: of what it works on.
        threads: of `count_threads`. Where it is less than torch's, but not 1, the function itself
            lets no more work: OpenMP would end the others, and start them again for torch.
    """
    if threads > 1 and _team.call is not None:
        _team.call(address_of(entry), address, torch.get_num_threads(), 0)
    else:
        entry_point(entry)(address)


def count_threads(most: int) -> int:
    """How many threads may work at a time: torch's, but no more than there are CPUs for them."""
    # Where the caller flushes subnormal numbers, others do too, and for good.
    if _team.call is None or SUBNORMAL * 1.0 == 0:
        return 1
    threads = min(most, torch.get_num_threads())
    if threads > 1 and hasattr(os, "sched_getaffinity"):
        threads = min(threads, len(os.sched_getaffinity(0)))
    return int(min(threads, _granted_cpus()))


@functools.cache
def _granted_cpus() -> float:
    """CPUs' time that the container may use, by version 2 or 1 of Linux's control groups."""
    for names in (["cpu.max"], ["cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):  # not there; "max"
            quota, period = " ".join((_CGROUP / name).read_text() for name in names).split()
            if int(quota) > 0:
                return math.ceil(int(quota) / int(period))
    return math.inf
