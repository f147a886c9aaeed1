"""Which watches of a model are open: each goes on measuring when nothing refers to it any more."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Hashable
from dataclasses import dataclass

from torch import nn

from gradstat.recording.logged import LearningRates
from gradstat.recording.module_hooks import OutputHooks
from gradstat.recording.parameter_hooks import BackwardHooks, StepHook
from gradstat.recording.recorder import Recorder
from gradstat.recording.torch_internals import SparingCaptures
from gradstat.warning import warn

Hooks = BackwardHooks | StepHook
Others = OutputHooks | LearningRates


@dataclass(frozen=True)
class _Open:
    """A watch, without what would keep its model alive.

    Args:
        name: given by the user, or ``None``.
        measures: equal for watches that measure the same.
        recorder: what the hooks feed.
        hooks: on the parameters or the optimizer.
        others: on the modules and for the learning rate.
    """

    name: str | None
    measures: Hashable
    recorder: Recorder
    hooks: weakref.ref[Hooks]
    others: list[weakref.ref[Others]]

    @property
    def is_open(self) -> bool:
        return not self.recorder.is_closed and self.hooks() is not None


_OPEN: weakref.WeakKeyDictionary[nn.Module, list[_Open]] = weakref.WeakKeyDictionary()


def make_room(model: nn.Module, name: str | None, measures: Hashable) -> None:
    """Close the open watch that has a new one's name; without a name, warn of one like it.

    Arguments as of `add`, for the new watch.
    """
    still_open = [each for each in _OPEN.get(model, ()) if each.is_open]
    if name is None:
        n_same = sum(each.name is None and each.measures == measures for each in still_open)
        if n_same:
            which = "a watch" if n_same == 1 else f"{n_same} watches"
            warn(
                f"watch() has {which} of this {type(model).__name__} open that measure"
                f"{'s' * (n_same == 1)} the same at each step: close() what is no longer needed, "
                f"or give it a name, as in watch(model, name='main'): a new watch then takes the "
                f"place of the open one of its name"
            )
    for each in still_open:
        hooks = each.hooks()
        if name is not None and each.name == name and hooks is not None:
            others = [other for other in (ref() for ref in each.others) if other is not None]
            close(each.recorder, hooks, others)


def add(
    model: nn.Module,
    name: str | None,
    measures: Hashable,
    recorder: Recorder,
    hooks: Hooks,
    others: list[Others],
) -> None:
    """Remember a watch that hangs on a model now; other arguments as of `_Open`."""
    opened = _Open(name, measures, recorder, weakref.ref(hooks), list(map(weakref.ref, others)))
    _OPEN[model] = [*(each for each in _OPEN.get(model, ()) if each.is_open), opened]


def close(recorder: Recorder, hooks: Hooks, others: list[Others]) -> None:
    """Take a watch off its model, as `Watch.close` says."""
    with recorder.lock, SparingCaptures():
        recorder.is_closed = True
        hooks.remove()
        for each in others:
            each.remove()
        # In a clean-up, or at the end of a with block, there is the exception that led there.
        if sys.exc_info()[0] is not None or recorder.has_failed():
            if isinstance(hooks, StepHook):
                hooks.add_unfinished()
            recorder.end_early()
        # Where an interrupt ends this, the end of the process does it again.
        recorder.finish()
