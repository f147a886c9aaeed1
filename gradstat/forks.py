"""What a forked process forgets: only the thread that forks goes on in it."""

from __future__ import annotations

import os
import weakref
from typing import Protocol


class _Forgetful(Protocol):
    def forget_other_threads(self) -> None:
        """Give up locks that nobody will release, and what another thread has begun."""


_FORGETFUL: weakref.WeakSet[_Forgetful] = weakref.WeakSet()


def call_after_fork(x: _Forgetful) -> None:
    """Have an object's ``forget_other_threads`` called in each process that is forked from here."""
    _FORGETFUL.add(x)


def _forget_other_threads() -> None:
    for x in list(_FORGETFUL):
        x.forget_other_threads()


if hasattr(os, "register_at_fork"):  # not on Windows, which cannot fork
    os.register_at_fork(after_in_child=_forget_other_threads)
