"""`WatchCallback`: a callback of Hugging Face's Trainer that watches the model it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from gradstat.integrations.callbacks import Watching

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("WatchCallback needs transformers: pip install transformers") from error


class WatchCallback(Watching, TrainerCallback):  # type: ignore[misc]
    """Record the gradients of each optimizer step of a Trainer.

    They are measured as they are applied: whole, averaged over the ranks, unscaled and clipped. The
    learning rate is kept at each step, and so is what the Trainer logs, at its own steps: the loss
    every ``logging_steps``, evaluations, and what your own ``log()`` reports.

    Args:
        **options: as `gradstat.watch`, but ``model``, ``when``, ``optimizer``, ``scaler``,
            ``accumulation_steps`` and ``first_step``, which the Trainer knows.

    Example:
        >>> from gradstat.integrations.transformers import WatchCallback  # doctest: +SKIP
        >>> gradients = WatchCallback(every=10)  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[gradients], ...).train()  # doctest: +SKIP
        >>> gradients.history  # doctest: +SKIP
    """

    def on_train_begin(
        self,
        args: Any,  # noqa: ANN401
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Watch the model."""
        # Accelerate wraps the optimizer that will step.
        inner = getattr(optimizer, "optimizer", optimizer)
        scaler = getattr(optimizer, "scaler", None)
        self._start(model, scaler, state.global_step, when="step", optimizer=inner)

    def on_log(
        self,
        args: Any,  # noqa: ANN401
        state: Any,  # noqa: ANN401
        control: Any,  # noqa: ANN401
        logs: Mapping[str, object] | None = None,
        **_: Any,  # noqa: ANN401
    ) -> None:
        """Keep what is logged."""
        self._log(logs or {})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ANN401
        """Close the watch."""
        self._stop()
