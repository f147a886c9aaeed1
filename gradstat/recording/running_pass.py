"""`RunningPass`: the backward pass that hooks are called in, how it ends and how it fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

from gradstat.forks import call_after_fork
from gradstat.recording import torch_internals
from gradstat.recording.torch_internals import is_in_backward

_CALLER = "gradstat.caller"
Call = weakref.ref[Callable[..., None]]


class RunningPass:
    """A backward pass, from the hook on that begins to await its end.

    Autograd makes the call that awaits the end; where an exception ends the pass, it drops that
    call. If a device's own thread runs the hooks, it does so a moment after the exception has
    reached the caller.
    """

    def __init__(self) -> None:
        # The call that is awaited, while it is to come, and the thread that called the pass.
        self._awaited: tuple[Call, object] | None = None
        call_after_fork(self)

    @property
    def has_begun(self) -> bool:
        """Whether it has begun and not ended, unless by an exception."""
        return self._awaited is not None

    def await_end(self, function: Callable[[], None]) -> None:
        """Have a function called at the end of the pass that the caller of this is a hook of."""
        self.await_call(_queue(function))

    def await_call(self, call: Call) -> None:
        """Await a call that autograd alone keeps: no frame does, which an exception would keep."""
        self._awaited = call, torch_internals.inherited(_CALLER)

    def end(self) -> None:
        """Await nothing any more."""
        self._awaited = None

    def forget_other_threads(self) -> None:
        """In a forked process: await no pass of a thread that is not there."""
        self._awaited = None

    def is_running(self) -> bool:
        """Whether the pass has begun and neither ended nor been ended by an exception."""
        if self._awaited is None:
            return False
        call, caller = self._awaited
        return call() is not None and (
            torch_internals.running_pass() != -1 or caller != threading.get_ident()
        )


def _queue(function: Callable[[], None]) -> Call:
    call = partial(function)
    torch_internals.call_at_end_of_backward(call)
    return weakref.ref(call)


def remember_caller() -> None:
    """Let the passes that this thread will call know that it is their caller."""
    if not is_in_backward():
        torch_internals.bequeath(_CALLER, threading.get_ident())
