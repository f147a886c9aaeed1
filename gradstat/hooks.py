"""Hooks through which a `Recorder` sees gradients; taking them off leaves nothing behind."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradstat.records import Recorder


class BackwardHooks:
    """Each backward pass is a pass of the recorder.

    Args:
        parameters: to hook, in the order of the recorder's layers.
        recorder: what sees their gradients.
        scaler: what scales the loss, or ``None``.
        at_once: measure each gradient before its hook returns.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        recorder: Recorder,
        scaler: GradScaler | None,
        at_once: bool,
    ) -> None:
        self._recorder, self._scaler, self._at_once = recorder, scaler, at_once
        # What will be called next in the running pass. Autograd alone keeps it alive, and drops it
        # with a pass that an exception ends.
        self._next_call: Callable[[], Callable[..., None] | None] = lambda: None
        self._handles = [
            _hook(parameter, partial(self._on_gradient, index))
            for index, parameter in enumerate(parameters)
        ]

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _on_gradient(self, index: int, parameter: Tensor) -> None:
        with self._recorder.lock:
            if self._next_call() is None:
                # There is no scale before the first loss, nor in a scaler that is not enabled.
                self._recorder.begin(getattr(self._scaler, "_scale", None))
                self._await_end()
            gradient = parameter.grad
            if gradient is not None:
                self._recorder.add(index, gradient)
                if self._at_once:
                    self._recorder.measure_waiting()

    def _await_end(self) -> None:
        on_end = partial(self._on_end)
        self._next_call = weakref.ref(on_end)
        torch.autograd.Variable._execution_engine.queue_callback(on_end)

    def _on_end(self) -> None:
        with self._recorder.lock:
            node = torch._C._current_autograd_node()
            if node is None:
                self._recorder.end()
                return
            # By the end of the outer pass others may have changed the gradients of this one.
            self._recorder.measure_waiting()
            if not self._await_end_outside(node):
                self._recorder.end()

    def _await_end_outside(self, node: torch.autograd.graph.Node) -> bool:
        """Go on after a backward pass inside another one, as reentrant checkpointing runs them.

        Args:
            node: of the outer graph, which ran the inner pass.

        Returns:
            Whether there is a node after it, from which the end of the outer pass can be awaited.
        """
        handles: list[RemovableHandle] = []

        def on_outer_node(*_: Any) -> None:  # noqa: ANN401 (gradients, which it does not read)
            with self._recorder.lock:
                for handle in handles:
                    handle.remove()
                self._await_end()

        self._next_call = weakref.ref(on_outer_node)
        handles += [
            after.register_prehook(on_outer_node) for after, _ in node.next_functions if after
        ]
        return bool(handles)


class StepHook:
    """Each step of an optimizer, or each call, is a pass of the recorder.

    Args:
        parameters: in the order of the recorder's layers.
        recorder: what sees their gradients.
        optimizer: measured before it steps; without one only `measure` measures.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], recorder: Recorder, optimizer: Optimizer | None
    ) -> None:
        self._recorder, self._parameters, self.optimizer = recorder, list(parameters), optimizer
        self._indices = {id(p): index for index, p in enumerate(self._parameters)}
        self._handle = None
        if optimizer is not None:
            self._handle = optimizer.register_step_pre_hook(self._on_step)

    def remove(self) -> None:
        """Take the hook off."""
        if self._handle is not None:
            self._handle.remove()

    def measure(self) -> None:
        """Measure all gradients as they are."""
        self._measure(self._parameters, None)

    def _on_step(self, optimizer: Optimizer, *_: Any) -> None:  # noqa: ANN401 (what step() is given)
        held = [p for group in optimizer.param_groups for p in group["params"]]
        # A fused optimizer is given the scale by GradScaler.step(), to divide by it itself.
        self._measure(held, getattr(optimizer, "grad_scale", None))

    def _measure(self, parameters: list[nn.Parameter], scale: Tensor | None) -> None:
        with self._recorder.lock:
            self._recorder.begin(scale)
            for parameter in parameters:
                index = self._indices.get(id(parameter))
                if index is not None:
                    gradient = parameter.grad
                    if gradient is not None:
                        self._recorder.add(index, gradient)
            self._recorder.end()


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
