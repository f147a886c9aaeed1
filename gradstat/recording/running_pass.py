"""`RunningPass`: the backward pass that hooks are called in, how it ends and how it fails."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from functools import partial

import torch

# What a thread keeps under it is there in all hooks of the backward passes that it calls, also in
# those that run in a device's own thread. Without it a pass that fails there may be noticed late.
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
        self._caller: int | None = None

    def await_end(self, function: Callable[[], None]) -> None:
        """Have a function called at the end of the pass that the caller of this is a hook of."""
        call = partial(function)
        self.await_call(call)
        torch.autograd.Variable._execution_engine.queue_callback(call)

    def await_call(self, call: Callable[..., None]) -> None:
        """Await a call that autograd alone keeps."""
        self.has_begun, self._next_call = True, weakref.ref(call)
        is_known = torch._C._is_key_in_tls(_CALLER)
        self._caller = torch._C._get_obj_in_tls(_CALLER) if is_known else None

    def end(self) -> None:
        """Await nothing any more."""
        self.has_begun, self._next_call = False, lambda: None

    def is_running(self) -> bool:
        """Whether the pass has begun and neither ended nor been ended by an exception."""
        if self._next_call() is None:
            return False
        return is_in_backward() or self._caller != threading.get_ident()


def is_in_backward() -> bool:
    """Whether this thread runs hooks of a backward pass."""
    return torch._C._current_graph_task_id() != -1


def remember_caller() -> None:
    """Let the passes that this thread will call know that it is their caller."""
    if not is_in_backward():
        torch._C._stash_obj_in_tls(_CALLER, threading.get_ident())
