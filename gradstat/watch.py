"""`watch`: hooks on a model that measure its gradients during backward, into a `History`."""

from __future__ import annotations

import re
from collections.abc import Callable
from types import TracebackType
from typing import Literal

from torch import nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradstat.bins import Bins, Log2Bins
from gradstat.history import History
from gradstat.hooks import BackwardHooks, StepHook
from gradstat.ops import check_bins, check_engine
from gradstat.records import Recorder
from gradstat.statistics import Statistics

Selector = str | Callable[[str, nn.Parameter], bool]


def watch(
    model: nn.Module,
    bins: Bins | None = None,
    every: int = 1,
    *,
    parameters: Selector | None = None,
    accumulation_steps: int = 1,
    when: Literal["backward", "step"] = "backward",
    optimizer: Optimizer | None = None,
    scaler: GradScaler | None = None,
    bucket_bytes: int = 25 << 20,
    engine: str | None = None,
) -> Watch:
    """Measure a model's gradients, during backward or when the optimizer steps.

    One record per backward pass that reaches a watched parameter, or per step. Reentrant
    checkpoints are part of the pass they run in, and passes that overlap in several threads make
    one record. Nothing waits for the device until a record is read, and nothing about the training
    changes.

    A record holds ``p.grad`` as the pass has accumulated it; where something changes it during
    backward, as DistributedDataParallel does, ``when="step"`` sees the outcome. A layer that has
    none, being frozen or unused, is a row of NaN and of zero counts; a shared parameter is one
    layer, under its first name. Of a sparse gradient its values are measured, not the zeros around
    them. Parameters that are replaced, as ``load_state_dict(assign=True)`` does, are not seen any
    more: watch again. Compiled autograd needs ``when="step"``.

    Args:
        model: the model; watch it after moving, sharding or wrapping it.
        bins: `Log2Bins` (default) or `LinearBins`.
        every: record every so many steps, from the first one.
        parameters: which parameters: a regular expression searched for in their names, or a
            function of name and parameter. By default all but biases.
        accumulation_steps: backward passes per optimizer step. The last of each is recorded, when
            the gradient is whole.
        when: ``"backward"`` measures each gradient as soon as it is there; ``"step"`` measures what
            the optimizer is about to apply: after reduction, unscaling and clipping. Two watches
            of one model compare them.
        optimizer: whose steps are records, for ``when="step"``; layers that it does not hold are
            absent, and so are the steps that a scaler skips (a fused optimizer skips them itself,
            with a record).
        scaler: what scales the loss, for ``when="backward"``: gradients are then measured unscaled.
            Exact while the scale is a power of two, as by default; with another one a value may be
            counted up to two bins of `Log2Bins` too near to zero. A step that the scaler will skip
            has a record like any other, its NaN and infinities counted.
        bucket_bytes: gradients measured in one launch; the default leaves them in a GPU's cache.
        engine: as in `statistics`.

    Returns:
        The running Watch: a context manager, or to be closed with ``close()``.

    Raises:
        TypeError: an argument of another kind.
        ValueError: a number below 1, an unknown engine, options that do not go together, no
            parameter that is selected and needs a gradient, one without a shape so far, an
            optimizer of other parameters.

    Example:
        >>> import torch, gradstat
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 1))
        >>> with gradstat.watch(model) as w:
        ...     for _ in range(3):
        ...         model(torch.randn(8, 4)).mean().backward()
        >>> w.history
        History(3 steps, 2 layers, Log2Bins())
    """
    bins = check_bins("watch", Log2Bins() if bins is None else bins)
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch() needs a torch.nn.Module; model is {type(model).__name__}")
    numbers = {
        "every": every,
        "accumulation_steps": accumulation_steps,
        "bucket_bytes": bucket_bytes,
    }
    for name, number in numbers.items():
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(f"watch() needs an integer; {name} is {number!r}")
        if number < 1:
            raise ValueError(f"watch() needs a number of 1 or more; {name} is {number}")
    check_engine("watch", engine)
    if not isinstance(scaler, GradScaler | None):
        raise TypeError(f"watch() needs a torch.amp.GradScaler; scaler is {type(scaler).__name__}")
    _check_when(when, optimizer, scaler, accumulation_steps)
    selected = _select(model, parameters)
    history = History(list(selected), bins)
    recorder = Recorder(history, every, accumulation_steps, bucket_bytes, engine)
    if optimizer is None:
        return Watch(recorder, BackwardHooks(selected.values(), recorder, scaler))
    _check_holds(optimizer, selected)
    return Watch(recorder, StepHook(selected.values(), recorder, optimizer))


class Watch:
    """Running hooks; made by `watch`.

    Args:
        recorder: what the hooks feed.
        hooks: on the model or the optimizer.
    """

    def __init__(self, recorder: Recorder, hooks: BackwardHooks | StepHook) -> None:
        self._recorder, self._hooks = recorder, hooks

    @property
    def history(self) -> History:
        """All records so far; waits for those still on their way from the device.

        Always the same object, to which later records are added.
        """
        with self._recorder.lock:
            self._recorder.collect(wait=True)
        return self._recorder.history

    @property
    def last(self) -> Statistics:
        """The newest record, shape ``(L,)``, on the CPU; waits for it.

        Raises:
            KeyError: there is none yet.
        """
        return self.history.record(-1)

    def close(self) -> None:
        """Take the hooks off the model; `history` stays readable."""
        with self._recorder.lock:
            self._hooks.remove()
            self._recorder.drop()

    def __enter__(self) -> Watch:
        """The watch itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close it."""
        self.close()


def _check_when(
    when: str, optimizer: Optimizer | None, scaler: GradScaler | None, accumulation_steps: int
) -> None:
    if when not in ("backward", "step"):
        raise ValueError(f"watch() needs one of backward, step; when is {when!r}")
    if when == "backward":
        if optimizer is not None:
            raise ValueError(
                f"watch() needs when='step' for an optimizer; optimizer is "
                f"{type(optimizer).__name__}, when is {when!r}"
            )
        return
    if not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"watch() needs a torch.optim.Optimizer for when='step'; optimizer is "
            f"{type(optimizer).__name__}"
        )
    if scaler is not None:
        raise ValueError(
            "watch() needs no scaler for when='step', which sees unscaled gradients; scaler is "
            f"{type(scaler).__name__}"
        )
    if accumulation_steps != 1:
        raise ValueError(
            "watch() needs accumulation_steps of 1 for when='step', which counts steps; "
            f"accumulation_steps is {accumulation_steps}"
        )


def _check_holds(optimizer: Optimizer, selected: dict[str, nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in selected.values()):
        raise ValueError(
            f"watch() needs an optimizer of the model's parameters; optimizer is "
            f"{type(optimizer).__name__} with {len(held)} others, {len(selected)} are selected"
        )


def _select(model: nn.Module, parameters: Selector | None) -> dict[str, nn.Parameter]:
    """Parameters to watch, by name."""
    if parameters is None:
        matches: Callable[[str, nn.Parameter], bool] = _is_weight
    elif isinstance(parameters, str):
        try:
            pattern = re.compile(parameters)
        except re.error as error:
            raise ValueError(
                f"watch() needs a regular expression; parameters is {parameters!r}: {error}"
            ) from error

        def matches(name: str, parameter: nn.Parameter) -> bool:
            return pattern.search(name) is not None
    elif callable(parameters):
        matches = parameters
    else:
        raise TypeError(
            f"watch() needs a regular expression or a function; parameters is {parameters!r}"
        )
    selected = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and matches(name, parameter)
    }
    for name, parameter in selected.items():
        if is_lazy(parameter):
            raise ValueError(
                f"watch() needs initialised parameters; {name} of {type(model).__name__} gets its "
                f"shape from the first batch: run one first"
            )
    if not any(parameter.requires_grad for parameter in selected.values()):
        total = sum(1 for _ in model.parameters())
        raise ValueError(
            f"watch() needs a model with parameters that require gradients; model is "
            f"{type(model).__name__} with {total} parameters, {len(selected)} selected by "
            f"parameters={parameters!r}, none of them requiring a gradient"
        )
    return selected


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    return "bias" not in name.rpartition(".")[2]
