"""Helper threads: sleeping until a job comes, safe from several Python threads and after a fork."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

_pool: ThreadPoolExecutor | None = None


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
        _pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="gradstat")
    try:
        return [_pool.submit(job) for _ in range(helpers)]
    except RuntimeError:  # the interpreter is shutting down: the caller works alone
        return []


def _forget() -> None:
    """In a forked child there are no helpers."""
    global _pool
    _pool = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
