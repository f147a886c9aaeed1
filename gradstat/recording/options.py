"""Options of `watch`, checked before anything is changed, and what of a model they select.

What is of another kind raises TypeError, what has no such value ValueError.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch
from torch import nn
from torch.amp import GradScaler
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradstat.bins import Bins, LinearBins
from gradstat.record import ACTIVATION, GRAD, GRAD_OUTPUT, OF_OUTPUTS, PARAM, UNIT, UPDATE
from gradstat.recording.torch_internals import name_of_wrapped
from gradstat.util import warn

Item = TypeVar("Item")
Selector: TypeAlias = str | Callable[[str, Item], bool]
ParameterSelector: TypeAlias = Selector[nn.Parameter]
ModuleSelector: TypeAlias = Selector[nn.Module]

_MOST_NAMES = 5  # in a warning
LOOKS = 256  # passes, or calls, from one look at whether parameters were replaced to the next
EVERYTHING = "all"
# What may be asked for, and the kinds of rows it makes.
_WHAT = {
    GRAD: (GRAD,),
    PARAM: (PARAM,),
    UPDATE: (PARAM, UPDATE),
    ACTIVATION: (ACTIVATION, UNIT),
    GRAD_OUTPUT: (GRAD_OUTPUT,),
}


def check_directory(function: str, name: str, path: str | os.PathLike[str]) -> None:
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"{function}() needs a directory's path; {name} is {path!r}")
    if not os.fspath(path):
        raise ValueError(f"{function}() needs a directory's path; {name} is {path!r}")
    if Path(path).exists() and not Path(path).is_dir():
        raise ValueError(
            f"{function}() needs a directory; {name} is {os.fspath(path)!r}, another file"
        )


def check_what(
    what: str | Sequence[str],
    when: str,
    optimizer: Optimizer | None,
    bins: Bins,
    modules: ModuleSelector | None,
) -> set[str]:
    asked = [what] if isinstance(what, str) else what
    if not isinstance(asked, Iterable):
        raise TypeError(f"watch() needs a name or several; what is {what!r}")
    asked = list(asked)
    sees_steps = when == "step" or (when == "call" and optimizer is not None)
    if asked == [EVERYTHING]:
        asked = [each for each in _WHAT if each != UPDATE or sees_steps]
    if not asked or any(each not in tuple(_WHAT) for each in asked):
        raise ValueError(
            f"watch() needs {EVERYTHING!r}, or one or several of {', '.join(_WHAT)}; what is "
            f"{what!r}"
        )
    kinds = {kind for each in asked for kind in _WHAT[each]}
    if UPDATE in kinds and not sees_steps:
        raise ValueError(
            f"watch() needs when='step' and an optimizer to see updates; what is {what!r}, when is "
            f"{when!r}, and {'no' if optimizer is None else 'an'} optimizer is given"
        )
    has_outputs = not kinds.isdisjoint(OF_OUTPUTS)
    if modules is not None and not has_outputs:
        raise ValueError(
            f"watch() needs what='activation' or 'grad_output' for modules; what is {what!r}"
        )
    if has_outputs and isinstance(bins, LinearBins) and bins.low is None:
        raise ValueError(
            f"watch() needs Log2Bins, or LinearBins with a range, to put the outputs of a module "
            f"together; bins is {bins}"
        )
    return kinds


def check_when(
    when: str, optimizer: Optimizer | None, scaler: GradScaler | None, accumulation_steps: int
) -> None:
    if when not in ("backward", "step", "call"):
        raise ValueError(f"watch() needs one of backward, step, call; when is {when!r}")
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(
            f"watch() needs a torch.optim.Optimizer; optimizer is {type(optimizer).__name__}"
        )
    if when == "step" and optimizer is None:
        raise TypeError("watch() needs a torch.optim.Optimizer for when='step': give it optimizer=")
    if when != "backward" and scaler is not None:
        raise ValueError(
            f"watch() needs no scaler for when={when!r}, which sees unscaled gradients; scaler is "
            f"{type(scaler).__name__}"
        )
    if when != "backward" and accumulation_steps != 1:
        raise ValueError(
            f"watch() needs accumulation_steps of 1 for when={when!r}, which counts steps; "
            f"accumulation_steps is {accumulation_steps}"
        )


def check_holds(optimizer: Optimizer, selected: Sequence[nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in selected):
        raise ValueError(
            f"watch() needs an optimizer of the model's parameters; optimizer is "
            f"{type(optimizer).__name__} with {len(held)} others, {len(selected)} are selected"
        )


def select_parameters(
    model: nn.Module, parameters: ParameterSelector | None
) -> dict[str, nn.Parameter]:
    """Floating-point parameters to watch, by plain name; by default all but biases."""
    matches = _is_weight if parameters is None else _matcher("parameters", parameters)
    selected = {}
    for full_name, parameter in model.named_parameters():
        name = plain_name(model, full_name)
        if not parameter.is_floating_point() or not matches(name, parameter):
            continue
        if is_lazy(parameter):
            raise ValueError(
                f"watch() needs initialised parameters; {name} of {type(model).__name__} gets its "
                f"shape from the first batch: run one first"
            )
        selected[name] = parameter
    if not any(parameter.requires_grad for parameter in selected.values()):
        total = sum(1 for _ in model.parameters())
        left_out = any(parameter.requires_grad for parameter in model.parameters())
        hint = "; parameters='' takes biases too" * (parameters is None and left_out)
        raise ValueError(
            f"watch() needs a model with parameters that require gradients; model is "
            f"{type(model).__name__} with {total} parameters, {len(selected)} selected by "
            f"parameters={parameters!r}, none of them requiring a gradient{hint}"
        )
    return selected


def select_modules(model: nn.Module, modules: ModuleSelector | None) -> dict[str, nn.Module]:
    """Modules whose outputs to watch, by plain name; by default those without modules in them."""
    # What wraps another module is none of them: it returns the same. The model's own name is that
    # of its class in parentheses.
    matches = _usual_modules(model) if modules is None else _matcher("modules", modules)
    selected = {}
    for full_name, module in model.named_modules():
        if name_of_wrapped(module) is not None:
            continue
        name = plain_name(model, full_name) or f"({type(module).__name__})"
        # Those of TorchScript take no hooks.
        if matches(name, module) and not isinstance(module, torch.jit.ScriptModule):
            selected[name] = module
    if not selected:
        total = sum(1 for _ in model.modules())
        raise ValueError(
            f"watch() needs modules to see the outputs of; model is {type(model).__name__} with "
            f"{total} modules, none of them selected by modules={modules!r}"
        )
    return selected


class Replaced:
    """Tells of watched parameters that the model no longer has: no hook sees what replaced them."""

    def __init__(self, model: nn.Module, selected: Mapping[str, nn.Parameter]) -> None:
        self._model = weakref.ref(model)
        self._known = {name: weakref.ref(parameter) for name, parameter in selected.items()}
        # FSDP puts others in their places while a pass computes.
        is_flat = any("_fsdp_wrapped_module" in name for name, _ in model.named_modules())
        self._may_leave = {
            name for name, each in selected.items() if is_flat or hasattr(each, "device_mesh")
        }
        self._has_told = False

    def look(self) -> None:
        model = self._model()
        if model is None or self._has_told:
            return
        there = set(map(id, model.parameters()))
        gone = [
            name
            for name, parameter in ((name, known()) for name, known in self._known.items())
            if parameter is None or not (id(parameter) in there or name in self._may_leave)
        ]
        if gone:
            self._has_told = True
            some = ", ".join(gone[:_MOST_NAMES]) + ", ..." * (len(gone) > _MOST_NAMES)
            warn(
                f"watch() sees {len(self._known) - len(gone)} of its {len(self._known)} parameters "
                f"in the model, others have been replaced or taken out: {some}; watch() again to "
                f"see what is there now"
            )


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or module without those that wrappers, as of DDP, put into it."""
    module: nn.Module | None = model
    kept = []
    for part in name.split("."):
        if module is None or part != name_of_wrapped(module):
            kept.append(part)
        module = None if module is None else dict(module.named_children()).get(part)
    return ".".join(kept)


def _matcher(argument: str, selector: Selector[Item]) -> Callable[[str, Item], bool]:
    if isinstance(selector, str):
        try:
            pattern = re.compile(selector)
        except re.error as error:
            raise ValueError(
                f"watch() needs a regular expression; {argument} is {selector!r}: {error}"
            ) from error
        return lambda name, _: pattern.search(name) is not None
    if callable(selector):
        return selector
    raise TypeError(f"watch() needs a regular expression or a function; {argument} is {selector!r}")


def _is_weight(name: str, parameter: nn.Parameter) -> bool:
    return "bias" not in name.rpartition(".")[2]


def _usual_modules(model: nn.Module) -> Callable[[str, nn.Module], bool]:
    """Those without modules in them, and attention, which never calls the projection in it."""
    attention = nn.MultiheadAttention
    # A subclass may call its projections, as PyTorch's quantizable one does.
    whole = [
        m
        for m in model.modules()
        if isinstance(m, attention) and type(m).forward is attention.forward
    ]
    inside = {id(part) for module in whole for part in module.children()}
    outside = set(map(id, whole))
    return lambda _, module: (
        id(module) in outside
        or (id(module) not in inside and next(module.children(), None) is None)
    )
