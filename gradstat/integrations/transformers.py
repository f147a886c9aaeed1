"""`WatchCallback`: a callback of Hugging Face's Trainer that watches the model it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from gradstat.integrations.callbacks import Watching

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("WatchCallback needs transformers: pip install transformers") from error


class WatchCallback(Watching, TrainerCallback):  # type: ignore[misc]
    """Record the gradients of each optimizer step of a Trainer.

    They are measured as they are applied: whole, averaged over the ranks, unscaled and clipped. The
    loss and the learning rate are kept at each step, and what the Trainer logs, at its own steps:
    evaluations, and what your own ``log()`` reports.

    ``loss`` is what the model's forward pass returns on this rank; the batches of a step are put
    together as the Trainer does. The Trainer logs a loss of its own every ``logging_steps``: if it
    differs from the mean of these, as with a ``compute_loss`` of yours or several ranks, it is kept
    as ``trainer_loss``. If a model returns no loss, or the Trainer compiles it, ``loss`` is the
    Trainer's own.

    Args:
        **options: as `gradstat.watch`, but ``model``, ``when``, ``optimizer``, ``scaler``,
            ``accumulation_steps`` and ``first_step``, which the Trainer knows.
    """

    _handle: RemovableHandle | None = None  # removes the hook that sees the losses

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        **_: Any,
    ) -> None:
        scaler = getattr(optimizer, "scaler", None)
        self._start(model, scaler, state.global_step, when="step", optimizer=optimizer)
        self._forget_losses()
        self._n_logged, self._has_losses = state.global_step, False
        if not getattr(args, "torch_compile", False):
            self._handle = model.register_forward_hook(self._on_forward, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._losses:
            loss = torch.stack(self._losses).sum()
            self._log({"loss": loss if self._are_parts else loss / len(self._losses)})
            self._forget_losses()
            self._has_losses = True

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        logged = dict(logs or {})
        if "loss" in logged:
            if self._has_losses:
                loss = float(logged.pop("loss"))
                steps, values = self.history.scalar("loss")
                mean = values[steps >= self._n_logged].mean()
                # The Trainer may round it.
                if not np.isclose(loss, mean, rtol=1e-2, atol=1e-4, equal_nan=True):
                    logged["trainer_loss"] = loss
            self._n_logged = state.global_step
        self._log(logged)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        super()._stop()
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _forget_losses(self) -> None:
        self._losses: list[Tensor] = []  # of the batches of a step
        self._are_parts = False  # of the step's loss, or means of their own

    def _on_forward(
        self, model: nn.Module, arguments: tuple[Any, ...], options: Mapping[str, Any], outputs: Any
    ) -> None:
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
            return
        if model.training and torch.is_grad_enabled():
            # Not a copy: the Trainer scales it in place for the number of ranks.
            self._losses.append(loss.detach())
            self._are_parts = options.get("num_items_in_batch") is not None
