"""Hooks on parameters and optimizers: each backward pass, step or call is a pass of the recorder.

Taking them off leaves nothing behind.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.autograd.graph import Node
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradstat.record import GRAD, PARAM, UPDATE
from gradstat.recording.passes import Recorder
from gradstat.recording.shards import local_part
from gradstat.recording.torch_internals import (
    bequeath,
    call_at_end_of_backward,
    hooks_on_gradient,
    inherited,
    is_compiled_autograd,
    leave_uncompiled,
    raw_stream,
    run_first,
    running_node,
    running_pass,
    scale_of,
)
from gradstat.util import call_after_fork

_CALLER = "gradstat.caller"
Call = weakref.ref[Callable[..., None]]


class RunningPass:
    """A backward pass, from its first hook to its end."""

    # Autograd makes the call that awaits the end; where an exception ends the pass, it drops that
    # call. If a device's own thread runs the hooks, it does so a moment after the exception has
    # reached the caller.

    def __init__(self, *, is_asked: bool) -> None:
        self._is_asked = is_asked  # from outside of a hook, if it is running
        # What is awaited, while it is to come; dead where an exception has ended the pass.
        self.call: Call | None = None
        self._caller: object = None  # the thread that called the pass
        call_after_fork(self)

    def await_end(self, function: Callable[[], None]) -> None:
        """Have a method called at the end of the pass whose hook calls this."""
        call_at_end_of_backward(function)
        # Autograd alone keeps it: no frame does, which an exception would keep.
        self.call = weakref.ref(function)
        if self._is_asked:
            self._caller = inherited(_CALLER)

    def forget_other_threads(self) -> None:
        self.call = None

    def is_running(self) -> bool:
        """Whether the pass has begun and neither ended nor been ended by an exception."""
        call = self.call
        return (call is not None and call() is not None) and (
            running_pass() != -1 or self._caller != threading.get_ident()
        )


def remember_caller() -> None:
    """Let the passes that this thread will call know that it is their caller."""
    if running_pass() == -1:
        bequeath(_CALLER, threading.get_ident())


class BackwardHooks:
    """Each backward pass is a pass of the recorder."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],  # in the order of the recorder's rows
        recorder: Recorder,
        scaler: GradScaler | None,
        at_once: bool,  # measure each gradient before its hook returns
    ) -> None:
        self._recorder, self._scaler = recorder, scaler
        first_rows = recorder.first_rows
        self._first_gradient = first_rows.get(GRAD)
        # The hooks are on the parameters and keep this alive, not the other way round.
        self._weights = [
            (first_rows[PARAM] + index, weakref.ref(parameter))
            for index, parameter in enumerate(parameters if PARAM in first_rows else ())
        ]
        self._pass = RunningPass(is_asked=recorder.sees_outputs)
        # Indices of gradients that others may change, or free, as soon as the hook returns, such as
        # an optimizer that makes its step in a hook of its own.
        self._at_once = {
            index
            for index, parameter in enumerate(parameters)
            if at_once or not all(map(_is_ours, hooks_on_gradient(parameter)))
        }
        self._fit_in_bucket = sum(p.nbytes for p in parameters) < recorder.bucket_bytes
        self._handles = []
        for index, parameter in enumerate(parameters):
            handle = _hook(parameter, self._hook_of(index))
            self._handles.append(handle)
            run_first(parameter, handle)

    def remove(self) -> None:
        take_off(self._handles)

    def is_running(self) -> bool:
        return self._pass.is_running()

    def _hook_of(self, index: int) -> Callable[[Tensor], None]:
        """What notes a parameter's gradient: the part of a step that comes most often."""
        # A training step fills the caches with its own, so each call of Python's costs several
        # times what it costs alone: this is one function, and takes no lock.
        recorder, running = self._recorder, self._pass
        note, note_on, streams = recorder.note, recorder.note_on, recorder.streams
        row = (self._first_gradient or 0) + index
        waits = self._fit_in_bucket and index not in self._at_once
        waits &= self._first_gradient is not None

        @leave_uncompiled
        def on_gradient(parameter: Tensor) -> None:
            call = running.call
            # No pass yet, or an exception has ended it: then autograd has let go of the method.
            if call is None or call() is None:
                self._begin()
            if recorder.is_recording:
                gradient = parameter.grad
                # It waits for the end of the pass, unless all are more than a bucket holds, or it
                # may change before, as a view does, see `Recorder.add`.
                if waits and gradient is not None and not gradient._is_view():
                    if gradient.is_cpu:
                        note((row, gradient))
                        return
                    if gradient.is_cuda:
                        device = gradient.get_device()
                        place = device, raw_stream(device)
                        if place in streams:
                            note_on((row, gradient, place))
                            return
                self._on_gradient(index, parameter)

        return on_gradient

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        recorder = self._recorder
        with recorder.lock:
            if not recorder.is_recording:
                return
            gradient = parameter.grad
            if gradient is not None and self._first_gradient is not None:
                recorder.add(self._first_gradient + index, gradient)
                if index in self._at_once:
                    recorder.measure_waiting()
            # After those that hooks have noted before.
            recorder.order.note(GRAD, index)

    def _begin(self) -> None:
        if is_compiled_autograd():
            # The end of the pass would not be told.
            raise RuntimeError("watch() needs when='step' under compiled autograd")
        with self._recorder.lock:
            call = self._pass.call
            if call is not None and call() is not None:  # another thread's hook was first
                return
            # There is no scale before the first loss, nor in a scaler that is not enabled.
            self._recorder.begin(None if self._scaler is None else scale_of(self._scaler))
            self._pass.await_end(self._on_end)

    @leave_uncompiled
    def _on_end(self) -> None:
        recorder = self._recorder
        with recorder.lock:
            node = running_node()
            if node is not None:
                # A node of an outer pass has run this one, as reentrant checkpoints do. By the end
                # of the outer pass others may have changed the gradients of this one.
                recorder.measure_waiting()
                call = _hook_nodes_after(node, self._on_outer_node)
                if call is not None:
                    self._pass.call = call
                    return
            for row, reference in self._weights:
                weight = reference()
                if weight is not None:
                    recorder.add(row, weight)
            self._pass.call = None
            recorder.end()

    @leave_uncompiled
    def _on_outer_node(self, handles: list[RemovableHandle], *_: object) -> None:
        with self._recorder.lock:
            take_off(handles)
            self._pass.await_end(self._on_end)


class StepHook:
    """Each step of an optimizer, or each call, is a pass of the recorder."""

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],  # in the order of the recorder's rows
        recorder: Recorder,
        optimizer: Optimizer | None,
        *,
        calls_only: bool,  # only `measure` makes records; those of updates wait for the step
    ) -> None:
        self._recorder, self._rows = recorder, recorder.first_rows
        self.calls_only = calls_only
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        # Neither they nor the optimizer are to live for the sake of a history.
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._indices = {id(parameter): index for index, parameter in enumerate(parameters)}
        self._before: dict[int, tuple[nn.Parameter, Tensor]] = {}
        self._has_closure = False
        # Until the first record, which tells the order of the layers.
        self._order_handles = [
            _hook(parameter, partial(_note, recorder.order.seen, (GRAD, index)))
            for index, parameter in enumerate(parameters)
        ]
        # Some gradients of the last record, and which version of each.
        self._seen: list[tuple[weakref.ref[Tensor], int]] = []
        self._handles: list[RemovableHandle] = []
        if optimizer is not None:
            if not calls_only:
                self._handles.append(optimizer.register_step_pre_hook(self._on_step))
            if UPDATE in self._rows:
                self._handles.append(optimizer.register_step_post_hook(self._after_step))

    def remove(self) -> None:
        self._end_without_step()
        take_off(self._handles)
        take_off(self._order_handles)
        self._before.clear()

    def add_unfinished(self) -> None:
        """Measure the gradients of a backward pass after which no step came."""
        if self.calls_only or self._recorder.is_recording:
            return
        gradients = self._some_gradients()
        # Not by their addresses, which new gradients may be given again.
        is_new = [all(x is not y() or x._version != v for y, v in self._seen) for x in gradients]
        # Those that were set to zero are of no pass.
        if any(is_new) and any(bool(local_part(x).any()) for x in gradients):
            self._measure(self._alive(), None)

    def is_running(self) -> bool:
        """Whether a step that the recorder has begun may go on while a module computes."""
        return self._has_closure

    def measure(self) -> None:
        """Measure all gradients as they are; a record of updates ends with the step."""
        with self._recorder.lock:
            self._end_without_step()
            self._measure(self._alive(), None)
            optimizer = None if self._optimizer is None else self._optimizer()
            if UPDATE in self._rows and optimizer is not None and self._recorder.is_recording:
                self._copy(self._held_by(optimizer))
            if not self._before:
                self._recorder.end()

    def _end_without_step(self) -> None:
        """End a record that `measure` has begun and that no step followed, as a scaler skips it."""
        if self.calls_only and self._before:
            self._before = {}
            self._recorder.end()

    def _copy(self, parameters: dict[int, nn.Parameter]) -> None:
        self._recorder.measure_waiting()
        self._before = {index: (p, _wide_copy(p)) for index, p in parameters.items()}

    @leave_uncompiled
    def _on_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # After the optimizer itself comes what step() is given.
        self._has_closure = any(map(callable, (*args[1:], *kwargs.values())))
        with self._recorder.lock:
            # A fused optimizer is given the scale by GradScaler.step(), to divide by it itself.
            known = self._held_by(optimizer)
            self._measure(known, getattr(optimizer, "grad_scale", None))
            if UPDATE not in self._rows:
                self._recorder.end()
            elif self._recorder.is_recording:
                self._copy(known)

    @leave_uncompiled
    def _after_step(self, *_: Any) -> None:  # noqa: ANN401 (the optimizer, what step() is given)
        with self._recorder.lock:
            if self.calls_only and not self._before:
                return
            placements = self._recorder.history.placements
            before_step, self._before = self._before, {}
            for index, (parameter, before) in before_step.items():
                change = torch.sub(local_part(parameter.detach()), before, out=before)
                row = self._rows[UPDATE] + index
                placements[row] = placements[self._rows[PARAM] + index]
                self._recorder.add(row, change)
            self._recorder.end()

    def _some_gradients(self) -> list[Tensor]:
        n = len(self._parameters)
        some = [self._parameters[at]() for at in sorted({0, n // 2, n - 1})]
        gradients = [p.grad for p in some if p is not None]
        return [x for x in gradients if x is not None]

    def _alive(self) -> dict[int, nn.Parameter]:
        parameters = ((index, p()) for index, p in enumerate(self._parameters))
        return {index: p for index, p in parameters if p is not None}

    def _held_by(self, optimizer: Optimizer) -> dict[int, nn.Parameter]:
        held: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
        known = ((self._indices.get(id(p), -1), p) for p in held)
        return {at: p for at, p in known if at >= 0 and p is self._parameters[at]()}

    def _measure(self, parameters: dict[int, nn.Parameter], scale: Tensor | None) -> None:
        self._recorder.begin(scale)
        self._seen = [(weakref.ref(x), x._version) for x in self._some_gradients()]
        if self._order_handles and self._recorder.is_recording:
            take_off(self._order_handles)
        for index, parameter in parameters.items():
            gradient = parameter.grad
            if gradient is not None and GRAD in self._rows:
                self._recorder.add(self._rows[GRAD] + index, gradient)
            if PARAM in self._rows:
                self._recorder.add(self._rows[PARAM] + index, parameter)


def _note(seen: dict[tuple[str, int], None], gradient: tuple[str, int], _: Tensor) -> None:
    """A hook that compiled autograd can trace, and that keeps nothing else alive."""
    seen[gradient] = None


def _is_ours(hook: Callable[..., None]) -> bool:
    function: object = getattr(hook, "func", hook)
    return getattr(function, "__module__", None) == __name__


def take_off(handles: list[RemovableHandle]) -> None:
    """Take hooks off, and leave the list empty."""
    for handle in handles:
        handle.remove()
    handles.clear()


def _hook_nodes_after(node: Node, function: Callable[..., None]) -> Call | None:
    """Have a function called, with its hooks' handles, before a node that comes after this one."""
    handles: list[RemovableHandle] = []
    call = partial(function, handles)
    handles += [after.register_prehook(call) for after, _ in node.next_functions if after]
    return weakref.ref(call) if handles else None


def _wide_copy(parameter: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter, in float32 at least."""
    part = local_part(parameter.detach())
    return part.float() if part.itemsize < 4 else part.clone()


def _hook(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> RemovableHandle:
    """Hook a parameter, also one that is frozen for now."""
    frozen = not parameter.requires_grad
    # A hook cannot be put on a frozen parameter, but stays on one.
    parameter.requires_grad_(True)
    try:
        handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
    finally:
        parameter.requires_grad_(not frozen)
    return handle
