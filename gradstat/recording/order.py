"""The order in which gradients arrive and modules run, as the first recorded pass shows it."""

from __future__ import annotations

import numpy as np

from gradstat.history import History
from gradstat.record import OF_OUTPUTS
from gradstat.recording.torch_internals import has_compiled


class Order:
    """Notes what comes in the first recorded pass, and tells a history at its end.

    A model that torch.compile has compiled runs as a whole, and its gradients arrive in no order:
    then the history keeps the order of registration.
    """

    def __init__(self, history: History) -> None:
        self._history = history
        self.is_known = False
        # Numbers of parameters and modules; dicts, as they keep their order.
        self._gradients: dict[int, None] = {}
        self._outputs: dict[int, None] = {}
        self._output_gradients: dict[int, None] = {}

    def note_gradient(self, parameter: int) -> None:
        """A parameter's gradient has arrived."""
        self._gradients.setdefault(parameter)

    def note_output(self, module: int, is_gradient: bool) -> None:
        """A module has run, or the gradient with respect to its output has arrived."""
        (self._output_gradients if is_gradient else self._outputs).setdefault(module)

    def forget(self) -> None:
        """The pass has come to nothing."""
        self._gradients.clear()
        self._outputs.clear()
        self._output_gradients.clear()

    def settle(self) -> None:
        """The pass is over."""
        self.is_known = True
        if has_compiled():
            return
        parameters = [*reversed(self._gradients)]
        modules = [*self._outputs] or [*reversed(self._output_gradients)]
        history = self._history
        if parameters or modules:
            history.depth = np.zeros(len(history.rows), np.int64)
            for kind in dict.fromkeys(history.kinds):
                rows = np.flatnonzero(np.array(history.kinds) == kind)
                seen = modules if kind in OF_OUTPUTS else parameters
                history.depth[rows] = _depths(len(rows), seen)


def _depths(n: int, seen: list[int]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Place of each of n things; one that was not seen comes after the one before it."""
    place = dict(zip(seen, range(len(seen)), strict=True))
    key = -1
    keys = []
    for each in range(n):
        key = place.get(each, key)
        keys.append(key)
    depths = np.empty(n, np.int64)
    depths[np.argsort(keys, kind="stable")] = np.arange(n)
    return depths
