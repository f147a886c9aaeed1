"""Which parameters and which modules of a model `watch` looks at."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from gradstat.recording.torch_internals import name_of_wrapped

Item = TypeVar("Item")
Selector: TypeAlias = str | Callable[[str, Item], bool]
ParameterSelector: TypeAlias = Selector[nn.Parameter]
ModuleSelector: TypeAlias = Selector[nn.Module]


def select_parameters(
    model: nn.Module, parameters: ParameterSelector | None
) -> dict[str, nn.Parameter]:
    """Floating-point parameters to watch, by plain name; by default all but biases.

    Args:
        model: whose they are.
        parameters: regular expression or function of name and parameter.

    Raises:
        TypeError: a selector of another kind.
        ValueError: none that needs a gradient, one without a shape so far, a bad expression.
    """
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
        raise ValueError(
            f"watch() needs a model with parameters that require gradients; model is "
            f"{type(model).__name__} with {total} parameters, {len(selected)} selected by "
            f"parameters={parameters!r}, none of them requiring a gradient"
        )
    return selected


def select_modules(model: nn.Module, modules: ModuleSelector | None) -> dict[str, nn.Module]:
    """Modules whose outputs to watch, by plain name; by default those without modules in them.

    What wraps another module is none of them: it returns the same.

    Args:
        model: whose they are; its own name is that of its class in parentheses.
        modules: regular expression or function of name and module.

    Raises:
        TypeError: a selector of another kind.
        ValueError: none selected, a bad expression.
    """
    matches = _is_leaf if modules is None else _matcher("modules", modules)
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


def plain_name(model: nn.Module, name: str) -> str:
    """The name of a parameter or module without those that wrappers put into it.

    Args:
        model: whose it is.
        name: in the model, wrappers such as ``torch.compile`` or DistributedDataParallel included.
    """
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


def _is_leaf(name: str, module: nn.Module) -> bool:
    return next(module.children(), None) is None
