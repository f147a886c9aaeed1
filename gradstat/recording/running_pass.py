"""`RunningPass`: the backward pass that hooks are called in, how it ends and how it fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

from gradstat.recording import torch_internals
from gradstat.recording.torch_internals import is_in_backward

_CALLER = "gradstat.caller"


class RunningPass:
    """A backward pass, from the hook on that begins to await its end.

    Autograd calls what awaits the end; where an exception ends the pass, it drops that call. If a
    device's own thread runs the hooks, it does so a moment after the exception has reached the
    caller.
    """

    def __init__(self) -> None:
        self.has_begun = False
        self._next_call: Callable[[], object] = lambda: None
        self._caller: object = None

    def await_end(self, function: Callable[[], None]) -> None:
        """Have a function called at the end of the pass that the caller of this is a hook of."""
        call = partial(function)
        self.await_call(call)
        torch_internals.call_at_end_of_backward(call)

    def await_call(self, call: Callable[..., None]) -> None:
        """Await a call that autograd alone keeps."""
        self.has_begun, self._next_call = True, weakref.ref(call)
        self._caller = torch_internals.inherited(_CALLER)

    def end(self) -> None:
        """Await nothing any more."""
        self.has_begun, self._next_call = False, lambda: None

    def is_running(self) -> bool:
        """Whether the pass has begun and neither ended nor been ended by an exception."""
        if self._next_call() is None:
            return False
        return is_in_backward() or self._caller != threading.get_ident()


def remember_caller() -> None:
    """Let the passes that this thread will call know that it is their caller."""
    if not is_in_backward():
        torch_internals.bequeath(_CALLER, threading.get_ident())
