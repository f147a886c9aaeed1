"""Options of `watch` that are checked before anything is changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from gradstat.bins import Bins, LinearBins
from gradstat.record import ACTIVATION, GRAD, GRAD_OUTPUT, OF_OUTPUTS, PARAM, UNIT, UPDATE
from gradstat.recording.selection import ModuleSelector

EVERYTHING = "all"
# What may be asked for, and the kinds of rows it makes.
_WHAT = {
    GRAD: (GRAD,),
    PARAM: (PARAM,),
    UPDATE: (PARAM, UPDATE),
    ACTIVATION: (ACTIVATION, UNIT),
    GRAD_OUTPUT: (GRAD_OUTPUT,),
}


def check_integer(name: str, number: int, least: int) -> None:
    """Raise unless a number is an integer of at least that."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"watch() needs an integer; {name} is {number!r}")
    if number < least:
        raise ValueError(f"watch() needs a number of {least} or more; {name} is {number}")
    if number >= 1 << 62:
        raise ValueError(f"watch() needs a number below 2**62; {name} is {number}")


def check_directory(function: str, name: str, path: str | os.PathLike[str]) -> None:
    """Raise unless a path may be that of a directory to write into."""
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
    """Kinds of rows that are asked for."""
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
            f"{when!r}, optimizer is {type(optimizer).__name__}"
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
    """Raise unless the options fit the moment of measuring."""
    if when not in ("backward", "step", "call"):
        raise ValueError(f"watch() needs one of backward, step, call; when is {when!r}")
    if not isinstance(optimizer, Optimizer | None):
        raise TypeError(
            f"watch() needs a torch.optim.Optimizer; optimizer is {type(optimizer).__name__}"
        )
    if when == "step" and optimizer is None:
        raise TypeError(
            "watch() needs a torch.optim.Optimizer for when='step'; optimizer is NoneType"
        )
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
    """Raise ValueError unless an optimizer holds one of the parameters."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(id(parameter) in held for parameter in selected):
        raise ValueError(
            f"watch() needs an optimizer of the model's parameters; optimizer is "
            f"{type(optimizer).__name__} with {len(held)} others, {len(selected)} are selected"
        )
