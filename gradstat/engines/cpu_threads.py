"""Helper threads: sleeping until a job comes, safe from several Python threads and after a fork."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None
_helper_ids: list[int] = []  # the operating system's
_placed = (-1, 0)  # the CPU that helpers were last kept off, and how many they were

# Where threads can be placed, as on Linux.
_get_cpu: Callable[[], int] | None = (
    getattr(ctypes.CDLL(None), "sched_getcpu", None) if hasattr(os, "sched_setaffinity") else None
)


def run_together(job: Callable[[], None], threads: int) -> None:
    """Run a job in the calling thread and, at the same time, in helpers.

    The job takes its work off a shared counter, so it does not matter how many helpers come, or
    whether any does: those that have not started when the caller is done are not waited for.

    Args:
        job: what each thread runs once; without the interpreter lock, or nothing is gained.
        threads: how many threads in all.
    """
    shares = _submit(job, threads - 1)
    try:
        job()
    finally:
        for share in shares:
            if not share.cancel():
                share.result()


def _submit(job: Callable[[], None], helpers: int) -> list[Future[None]]:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(
            os.cpu_count(),
            thread_name_prefix="gradstat",
            initializer=lambda: _helper_ids.append(threading.get_native_id()),
        )
    _keep_off_callers_cpu()
    try:
        return [_pool.submit(job) for _ in range(helpers)]
    except RuntimeError:  # the interpreter is shutting down: the caller works alone
        return []


def _keep_off_callers_cpu() -> None:
    """Let no helper wake where the caller runs: it would wait there until the caller is done."""
    global _placed
    if _get_cpu is None:
        return
    cpu = _get_cpu()
    if (cpu, len(_helper_ids)) == _placed:
        return
    others = os.sched_getaffinity(0) - {cpu}
    try:
        for helper in _helper_ids if others else []:
            os.sched_setaffinity(helper, others)
    except OSError:  # one has gone, or may not be placed
        return
    _placed = cpu, len(_helper_ids)


def _forget() -> None:
    """In a forked child there are no helpers."""
    global _pool, _placed
    _pool, _placed = None, (-1, 0)
    _helper_ids.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
