"""Hooks on modules through which a `Recorder` sees what they compute, compiled or not."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op
from torch.amp import GradScaler

from gradstat.kinds import ACTIVATION, GRAD_OUTPUT, UNIT
from gradstat.recorder import Recorder

_KEYS = itertools.count()
_RUNNING: weakref.WeakValueDictionary[int, OutputHooks] = weakref.WeakValueDictionary()


class OutputHooks:
    """Each output of a module, and the gradient with respect to it, goes to the recorder.

    Outputs count while the model is in training mode and gradients are enabled; what a checkpoint
    computes once more does not.

    Args:
        model: whose mode counts.
        modules: to hook, in the order of the recorder's rows.
        recorder: what sees their outputs.
        first_rows: the row of the first module, by kind; which kinds there are.
        scaler: what scales the loss, or ``None``.
        is_running: whether a pass that the recorder has begun still goes on.
    """

    def __init__(
        self,
        model: nn.Module,
        modules: Iterable[nn.Module],
        recorder: Recorder,
        first_rows: Mapping[str, int],
        scaler: GradScaler | None,
        is_running: Callable[[], bool],
    ) -> None:
        # The hooks are on the model and keep this alive, not the other way round.
        self._model = weakref.ref(model)
        self._recorder, self._rows = recorder, first_rows
        self._scaler, self._is_running = scaler, is_running
        self.sees_gradients = GRAD_OUTPUT in first_rows
        self.key = next(_KEYS)
        _RUNNING[self.key] = self
        self._handles = [
            module.register_forward_hook(_OnOutput(self, index))
            for index, module in enumerate(modules)
        ]

    def remove(self) -> None:
        """Take the hooks off; what was compiled with them sees nothing any more."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _RUNNING.pop(self.key, None)

    def see(self, index: int, x: Tensor, is_gradient: bool) -> None:
        """Measure an output of the module of that index, or the gradient with respect to one."""
        model = self._model()
        if not _is_ordinary(x) or model is None or not model.training:
            return
        recorder = self._recorder
        with recorder.lock, torch.no_grad():
            if recorder.is_recording and not self._is_running():
                # An exception has ended that pass, and this belongs to the next one.
                recorder.drop()
            if is_gradient:
                recorder.take_scale(GRAD_OUTPUT, getattr(self._scaler, "_scale", None))
                recorder.add_output(self._rows[GRAD_OUTPUT] + index, x, changes=False)
            elif ACTIVATION in self._rows:
                again = torch._C._current_autograd_node() is not None
                if recorder.add_output(self._rows[ACTIVATION] + index, x, again=again):
                    recorder.add_peaks(self._rows[UNIT] + index, x)


class _OnOutput:
    """A module's forward hook; a copy of the module has one that does nothing."""

    def __init__(self, hooks: OutputHooks, index: int) -> None:
        self.hooks, self.index = hooks, index
        self.sees_gradients = hooks.sees_gradients
        # Numbers would become constants of a compiled block, which others like it could not share.
        self.place = torch.tensor([hooks.key, index])

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_exporting() or _is_tracing():
            return
        x = _first_tensor(output)
        if x is None:
            return
        see: Callable[[Tensor, bool], object]
        if torch.compiler.is_compiling():
            see = partial(_see, self.place)
        else:
            see = partial(self.hooks.see, self.index)
        see(x.detach(), False)
        # A hook on a leaf would stay there.
        if self.sees_gradients and x.requires_grad and not x.is_leaf:
            x.register_hook(lambda gradient: see(gradient.detach(), True))  # type: ignore[no-untyped-call]

    def __reduce__(self) -> tuple[Any, ...]:
        # Any callable would do that takes three arguments, returns None and needs no gradstat.
        return getattr, (nullcontext(), "__exit__")


@torch.library.custom_op("gradstat::see", mutates_args=())
def _see(place: Tensor, x: Tensor, is_gradient: bool) -> None:
    """What a compiled model calls in place of `OutputHooks.see`."""
    key, index = place.tolist()
    hooks = _RUNNING.get(key)
    if hooks is not None:
        hooks.see(index, x, is_gradient)


_see.register_fake(lambda *_: None)
# It returns nothing, and yet a compiler must not leave it out.
_register_effectful_op(torch.ops.gradstat.see.default, _EffectType.ORDERED)


def _first_tensor(output: object) -> Tensor | None:
    """An output, or the first tensor in a tuple, list or mapping of them."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, tuple | list):
        for each in output:
            found = _first_tensor(each)
            if found is not None:
                return found
    return None


def _is_tracing() -> bool:
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


def _is_ordinary(x: Tensor) -> bool:
    """Whether a tensor has values here and now, as those of a transform or an export have not."""
    if torch._C._functorch.is_functorch_wrapped_tensor(x) or x.is_meta:
        return False
    return type(x) in (Tensor, nn.Parameter) or hasattr(x, "device_mesh")
