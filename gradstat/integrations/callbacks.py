"""What the callbacks of trainers have in common."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Real
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.amp import GradScaler

from gradstat.formats import asked_formats
from gradstat.history import History
from gradstat.record import GRAD, GRAD_OUTPUT
from gradstat.recording.options import EVERYTHING
from gradstat.recording.watch import Watch, watch
from gradstat.util import one_of

_KNOWN = ("model", "when", "optimizer", "scaler", "accumulation_steps", "first_step")
_OPTIONS = tuple(name for name in inspect.signature(watch).parameters if name not in _KNOWN)


class Watching:
    """A watch that lasts as long as a training, with options of `gradstat.watch`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        for name, value in options.items():
            if name in _KNOWN:
                raise TypeError(
                    f"WatchCallback() needs no {name}, which the trainer knows; {name} is {value!r}"
                )
            if name not in _OPTIONS:
                raise TypeError(
                    f"WatchCallback() needs options of watch(), {one_of(name, _OPTIONS)}; got "
                    f"{name}={value!r}"
                )
        asked_formats("WatchCallback", options.get("formats", ()))
        if options.get("sink") is not None and not callable(options["sink"]):
            raise TypeError(f"WatchCallback() needs a function; sink is {options['sink']!r}")
        self._options = options
        self._watch: Watch | None = None

    @property
    def watch(self) -> Watch:
        """The watch of the newest training; RuntimeError if there has been none."""
        if self._watch is None:
            raise RuntimeError("WatchCallback needs a training; the trainer has not started one")
        return self._watch

    @property
    def history(self) -> History:
        """Its records so far, as `Watch.history`."""
        return self.watch.history

    def _start(
        self, model: nn.Module, scaler: GradScaler | None, n_steps: int, **options: Any
    ) -> None:
        self._stop()
        # A training from its beginning does not go on with the records of another one.
        first_step = n_steps or None
        if not {GRAD_OUTPUT, EVERYTHING}.isdisjoint(self._asked):
            # Other gradients are measured when they are unscaled.
            options["scaler"] = scaler
        self._watch = watch(model, first_step=first_step, **self._options, **options)

    @property
    def _asked(self) -> tuple[str, ...]:
        what = self._options.get("what", GRAD)
        return (what,) if isinstance(what, str) else tuple(what)

    def _log(self, values: Mapping[str, object]) -> None:
        """Keep what a trainer reports: the numbers among it."""
        if self._watch is None:
            return
        numbers = {name: x for name, x in values.items() if _is_number(x)}
        self._watch.log(**numbers)

    def _stop(self) -> None:
        if self._watch is not None:
            self._watch.close()


def _is_number(x: object) -> TypeGuard[float | Tensor]:
    if isinstance(x, Tensor):
        return x.dim() == 0 and not x.is_complex()
    return isinstance(x, Real) and not isinstance(x, bool)
