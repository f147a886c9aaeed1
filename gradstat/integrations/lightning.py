"""`WatchCallback`: a Lightning callback that watches the module which is trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from gradstat.integrations.callbacks import Watching
from gradstat.record import UPDATE

try:
    from lightning.pytorch import Callback
except ImportError:
    try:
        from pytorch_lightning import Callback
    except ImportError as error:
        raise ImportError("WatchCallback needs Lightning: pip install lightning") from error


class WatchCallback(Watching, Callback):  # type: ignore[misc]
    """Record the gradients of each optimizer step of a Lightning training.

    They are measured when the gradient is whole, averaged over the ranks and unscaled, and before
    Lightning clips it. A module with several optimizers has a record for each step of each of them.
    The learning rate is kept at each step, and so are the loss that ``training_step`` returns and
    what your own ``self.log`` reports in it.

    Args:
        **options: as `gradstat.watch`, but ``model``, ``when``, ``optimizer``, ``scaler``,
            ``accumulation_steps`` and ``first_step``, which Lightning knows. ``what="update"``
            needs a module with one optimizer.
    """

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        optimizers = trainer.optimizers
        if UPDATE in self._asked and len(optimizers) != 1:
            raise ValueError(
                f"WatchCallback() needs a module with one optimizer to see updates; "
                f"{type(pl_module).__name__} has {len(optimizers)}"
            )
        self._start(
            pl_module,
            getattr(trainer.precision_plugin, "scaler", None),
            trainer.global_step,
            when="call",
            optimizer=optimizers[0] if len(optimizers) == 1 else None,
        )

    def on_before_optimizer_step(
        self, trainer: Any, pl_module: nn.Module, optimizer: Optimizer
    ) -> None:
        self.watch.measure()

    def on_before_backward(self, trainer: Any, pl_module: nn.Module, loss: Tensor) -> None:
        # Lightning has divided it by the batches of a step.
        self._log({"loss": loss.detach() * trainer.accumulate_grad_batches})

    def on_train_batch_end(
        self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        metrics = trainer.callback_metrics.items()
        self._log({name: value for name, value in metrics if name != "loss"})

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        self._stop()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        self._stop()
