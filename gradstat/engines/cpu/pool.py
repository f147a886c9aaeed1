"""Helper threads: sleeping until a job comes, safe from several Python threads and after a fork."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import os
import queue
import threading
from _thread import start_new_thread
from collections.abc import Callable
from pathlib import Path

import torch

from gradstat.util import call_after_fork

_CGROUP = Path("/sys/fs/cgroup")  # in a container: its own

_get_cpu: Callable[[], int] | None = getattr(ctypes.CDLL(None), "sched_getcpu", None)


class _Share:
    """One helper's share of a job: done by it, or by nobody if the caller withdraws it first.

    The job is the caller's to free: a helper that freed tensors as the process ends would abort it.
    """

    def __init__(self, job: Callable[[], None]) -> None:
        self._job = job
        self._taken_by: dict[str, str] = {}  # `setdefault` lets one of the two be first
        self._is_done, self._undone = False, _locked()

    def do(self) -> None:
        if self._taken_by.setdefault("whom", "helper") == "helper":
            try:
                self._job()
            finally:
                self._job = _nothing
                self._is_done = True
                self._undone.release()

    def withdraw(self) -> None:
        """Keep it from being begun, or wait for its end; again, after an interrupt.

        `threading.Event` would do, were its own lock not lost where an interrupt comes as it is
        taken: no thread could wait for the event, or set it, any more.
        """
        if self._taken_by.setdefault("whom", "caller") == "caller":
            self._job = _nothing
        elif not self._is_done:
            self._undone.acquire()


def _nothing() -> None: ...


def _locked() -> threading.Lock:
    lock = threading.Lock()
    lock.acquire()
    return lock


class _Pool:
    """The helpers of a process: none at first, more when a job asks for them."""

    def __init__(self) -> None:
        self.forget_other_threads()
        call_after_fork(self)

    def forget_other_threads(self) -> None:
        """In a forked process there are no helpers."""
        self.ids: list[int] = []  # the operating system's, of the threads
        self._shares: queue.SimpleQueue[_Share] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._place: tuple[set[int], int] = (set(), 0)  # CPUs, of how many helpers

    def submit(self, shares: list[_Share]) -> None:
        # Whoever finds it taken, by another thread or for good by an interrupt that came before the
        # `try`, makes do with the helpers there are.
        if self._lock.acquire(blocking=False):
            try:
                while len(self.ids) < len(shares):
                    unstarted = _locked()
                    start_new_thread(self._help, (unstarted,))
                    unstarted.acquire()
                self._keep_off_callers_cpu()
            finally:
                self._lock.release()
        for share in shares:
            self._shares.put(share)

    def _help(self, unstarted: threading.Lock) -> None:
        self.ids.append(threading.get_native_id())
        unstarted.release()
        while True:
            self._shares.get().do()

    def _keep_off_callers_cpu(self) -> None:
        """Let no helper wake where the caller runs: it would wait there for the caller's end."""
        if _get_cpu is None or not hasattr(os, "sched_setaffinity"):
            return
        others = os.sched_getaffinity(0) - {_get_cpu()}
        if others and (others, len(self.ids)) != self._place:
            with contextlib.suppress(OSError):  # they may not be placed
                for helper in self.ids:
                    os.sched_setaffinity(helper, others)
                self._place = others, len(self.ids)


_pool = _Pool()


def run_together(job: Callable[[], None], threads: int) -> None:
    """Run a job in the calling thread and, at the same time, in helpers.

    The job takes its work off a shared counter, so it does not matter how many helpers come, or
    whether any does: those that have not started when the caller is done are not waited for. The
    others are, whatever is raised here meanwhile.

    Args:
        job: what each thread runs once; without the interpreter lock, or nothing is gained. It
            holds what it works on.
        threads: how many threads in all; one is the caller's own.
    """
    shares = [_Share(job) for _ in range(threads - 1)]
    try:
        if shares:
            # Where the interpreter is shutting down there is no new thread.
            with contextlib.suppress(RuntimeError):
                _pool.submit(shares)
        job()
    finally:
        _withdraw(shares)


def _withdraw(shares: list[_Share]) -> None:
    try:
        for share in shares:
            share.withdraw()
    except BaseException:
        _withdraw(shares)  # interrupted while waiting
        raise


def count_threads() -> int:
    """How many threads may work at a time: torch's, but no more than there are CPUs for them."""
    threads = torch.get_num_threads()
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
