"""What a GradScaler tells of its steps without being asked on the device."""

from __future__ import annotations

import weakref

from torch.amp import GradScaler
from torch.optim import Optimizer

from gradstat.recording.torch_internals import step_states_of


class SkippedSteps:
    """Finds out that a scaler has skipped an optimizer's step, for which no hook is called."""

    def __init__(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._scaler, self._optimizer = scaler, weakref.ref(optimizer)
        # Of the iteration under way; ``update()`` puts a new dict in its place.
        self._states: dict[int, object] | None = None
        self._n_steps = 0

    def found(self, n_steps: int) -> bool:
        """Whether the iteration before has skipped its step, given how many were made so far."""
        states = step_states_of(self._scaler)
        if states is self._states:
            return False
        before, stepped = self._states, n_steps != self._n_steps
        self._states, self._n_steps = states, n_steps
        return before is not None and id(self._optimizer()) in before and not stepped
