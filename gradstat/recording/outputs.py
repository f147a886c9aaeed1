"""Hooks on modules through which a `Recorder` sees what they compute, compiled or not."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradstat.record import ACTIVATION, GRAD_OUTPUT, UNIT
from gradstat.recording.gradients import RunningPass, remember_caller, take_off
from gradstat.recording.passes import Recorder
from gradstat.recording.torch_internals import (
    BATCH_NORM,
    base_of,
    is_transformed,
    keep_in_graphs,
    leave_uncompiled,
    name_of_wrapped,
    running_node,
    saved_tensor_hook,
    scale_of,
    step_states_of,
)

_SPATIAL = ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
_LINEAR = (nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag, nn.MultiheadAttention)
# Modules, and which dimension of their outputs has a unit in each of its places: from the end where
# there need not be a batch.
_UNIT_DIMS: tuple[tuple[tuple[type[nn.Module], ...], int], ...] = (
    ((*_LINEAR, nn.LayerNorm, nn.RMSNorm, nn.RNNBase, nn.RNNCellBase), -1),
    ((BATCH_NORM, nn.GroupNorm, nn.Upsample), 1),
    *((tuple(getattr(nn, f"{name}{n}d") for name in _SPATIAL), -n - 1) for n in (1, 2, 3)),
)

_KEYS = itertools.count()
_RUNNING: weakref.WeakValueDictionary[int, OutputHooks] = weakref.WeakValueDictionary()


class OutputHooks:
    """Each output of a module, and the gradient with respect to it, goes to the recorder."""

    # Outputs count while the model is in training mode and gradients are enabled. Outputs that a
    # checkpoint computes once more do not. The modules are in the order of the recorder's rows.

    def __init__(
        self,
        model: nn.Module,
        modules: Sequence[nn.Module],
        recorder: Recorder,
        scaler: GradScaler | None,
        optimizer: Optimizer | None,  # whose steps make the records
        is_running: Callable[[], bool],  # whether a pass that the recorder has begun goes on
    ) -> None:
        # The hooks are on the model and keep this alive, not the other way round.
        self._model = weakref.ref(_unwrapped(model))
        self._recorder, self._rows = recorder, recorder.first_rows
        self._scaler, self._is_running, self._is_closed = scaler, is_running, False
        self._optimizer = None if optimizer is None else weakref.ref(optimizer)
        # A scaler's of the iteration under way; ``update()`` puts a new dict in its place.
        self._step_states: dict[int, object] | None = None
        self._n_steps = 0
        self._known_dims = [
            next((dim for types, dim in _UNIT_DIMS if isinstance(module, types)), None)
            for module in modules
        ]
        self._newest_dim: tuple[torch.Size, int] | None = None
        self._is_seeing = False  # still true afterwards where an exception has ended `see`
        self._pass = RunningPass(is_asked=True)
        self.sees_gradients = GRAD_OUTPUT in self._rows
        self.key = next(_KEYS)
        _RUNNING[self.key] = self
        self._handles = [
            module.register_forward_hook(_OnOutput(self, index))
            for index, module in enumerate(modules)
        ]

    def remove(self) -> None:
        """Take the hooks off; those that are compiled into a model do nothing any more."""
        take_off(self._handles)
        self._is_closed = True

    @leave_uncompiled
    def see(self, index: int, x: Tensor, is_gradient: bool) -> None:
        """Measure an output of the module of that index, or the gradient with respect to one."""
        model = self._model()
        if self._is_closed or model is None or not model.training or not _is_ordinary(x):
            return
        x, recorder = x.detach(), self._recorder
        with recorder.lock:
            if not recorder.is_due():
                return
            if not is_gradient:
                remember_caller()
            if self._has_failed():
                # What was seen so far belongs to a pass or a step that came to nothing.
                recorder.drop()
            is_new = not is_gradient and not _is_recomputing()
            if is_gradient or is_new:
                recorder.order.note(GRAD_OUTPUT if is_gradient else ACTIVATION, index)
            self._is_seeing = True
            if is_gradient:
                if self._pass.call is None:
                    self._pass.await_end(self._on_end)
                if self.sees_gradients:
                    recorder.take_scale(GRAD_OUTPUT, scale_of(self._scaler))
                    recorder.add_output(self._rows[GRAD_OUTPUT] + index, x)
            elif ACTIVATION in self._rows and is_new:
                unit = self._unit_dim(index, x)
                if recorder.add_output(self._rows[ACTIVATION] + index, x):
                    recorder.add_peaks(self._rows[UNIT] + index, x, unit)
            self._is_seeing = False

    def _on_end(self) -> None:
        with self._recorder.lock:
            self._pass.call = None

    def _has_failed(self) -> bool:
        failed = self._is_seeing
        if self._pass.call is not None and not self._pass.is_running():
            self._pass.call = None
            failed = True
        failed |= self._recorder.is_recording and not self._is_running()
        return failed | self._has_skipped_step()

    def _has_skipped_step(self) -> bool:
        """Whether the iteration before has skipped its step, for which no hook is called."""
        states, before = step_states_of(self._scaler), self._step_states
        if self._optimizer is None or states is before:
            return False
        n_steps = self._recorder.schedule.n_passes
        has_stepped = n_steps != self._n_steps
        self._step_states, self._n_steps = states, n_steps
        return before is not None and id(self._optimizer()) in before and not has_stepped

    def _unit_dim(self, index: int, x: Tensor) -> int | None:
        """The dimension of a module's output that has its units; ``None`` where there are none."""
        # Where the module does not say, as an activation, it has its units where the newest of
        # those that do had them, if its output has the same shape; if not, after the batch in four
        # dimensions or more, and last otherwise.
        known = self._known_dims[index]
        if x.dim() == 0 or x.numel() == 0:
            return None
        if known is not None:
            unit = min(known, x.dim() - 1) if known >= 0 else max(x.dim() + known, 0)
            self._newest_dim = x.shape, unit
            return unit
        if self._newest_dim is not None and self._newest_dim[0] == x.shape:
            return self._newest_dim[1]
        if x.dim() == 1:
            return None
        return 1 if x.dim() >= 4 else x.dim() - 1


class _OnOutput:
    """A module's forward hook; in a copy of the module it does nothing."""

    def __init__(self, hooks: OutputHooks, index: int) -> None:
        self.hooks, self.index = hooks, index
        self.sees_gradients = hooks.sees_gradients
        # Numbers would become constants of a compiled block, which others like it could not share.
        self.place = torch.tensor([hooks.key, index], device="cpu")

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_exporting():
            return
        if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            return
        x = _first_tensor(output)
        if x is None:
            return
        has_gradient = x.requires_grad and not x.is_leaf
        if torch.compiler.is_compiling():
            place = self.place
            _see(place, x.detach(), False)
            if has_gradient and self.sees_gradients:
                x.register_hook(lambda gradient: _see(place, gradient.detach(), True))  # type: ignore[no-untyped-call]
        else:
            see = partial(self.hooks.see, self.index)
            see(x, False)
            # Also for activations alone: it tells of a backward pass that fails.
            if has_gradient:
                _hook_gradient(x, inputs, see)

    def __reduce__(self) -> tuple[Any, ...]:
        # Any callable would do that takes three arguments, returns None and needs no gradstat.
        return getattr, (nullcontext(), "__exit__")


def _hook_gradient(
    x: Tensor, inputs: tuple[Any, ...], see: Callable[[Tensor, bool], object]
) -> None:
    """Have the gradient with respect to an output seen, also where that is changed in place."""
    base = base_of(x)
    node = None if base is None else base.grad_fn
    if base is None or node is None or base.numel() != x.numel() or _shares(base, inputs):
        # A leaf has been left out: a hook would stay on it.
        x.register_hook(lambda gradient: see(gradient, True))  # type: ignore[no-untyped-call]
        return
    # A view, which a linear layer returns for 3-D input, loses its hooks when it is changed in
    # place. Its base has as many elements, and nobody else knows it.
    number = base.output_nr

    def see_gradient(gradients: tuple[Tensor | None, ...]) -> None:
        gradient = gradients[number]
        if gradient is not None:
            see(gradient, True)

    node.register_prehook(see_gradient)


def _shares(base: Tensor, inputs: tuple[Any, ...]) -> bool:
    """Whether an input is that tensor, or a view of it."""
    tensors = [x for x in inputs if isinstance(x, Tensor)]
    return len(tensors) != len(inputs) or any(x is base or base_of(x) is base for x in tensors)


@torch.library.custom_op("gradstat::see", mutates_args=())
def _see(place: Tensor, x: Tensor, is_gradient: bool) -> None:
    """What a compiled model calls in place of `OutputHooks.see`."""
    key, index = place.tolist()
    hooks = _RUNNING.get(key)
    if hooks is not None:
        hooks.see(index, x, is_gradient)


_see.register_fake(lambda *_: None)
# It returns nothing, and yet a compiler must not leave it out.
keep_in_graphs(torch.ops.gradstat.see.default)


def _first_tensor(output: object) -> Tensor | None:
    """An output, or the first of floating point in a tuple, list or mapping of them."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        for each in output:
            found = _first_tensor(each)
            if found is not None:
                return found
    return None


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, whose mode may be set without that of what is around it."""
    name = name_of_wrapped(model)
    return model if name is None else _unwrapped(model.get_submodule(name))


def _is_ordinary(x: object) -> bool:
    """Whether it is a tensor with values; those of a transform or an export have none."""
    if not isinstance(x, Tensor):  # a gradient may be None
        return False
    if is_transformed(x) or x.is_meta or x.is_nested:
        return False
    return type(x) in (Tensor, nn.Parameter) or hasattr(x, "device_mesh")


def _is_recomputing() -> bool:
    """Whether a checkpoint computes again, for the tensors that backward needs."""
    if running_node() is None:
        return False
    # A reentrant one has no such hook: only now does it compute with gradients.
    return "_recomputation_hook" in getattr(saved_tensor_hook(), "__qualname__", "")
