"""Runs that become unstable by themselves, and the same networks in training that goes well.

Nothing is done to any of them but how they are trained.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from foreign import one_cycle, restarts, triangles
from tasks import GPT, LENGTH, VOCABULARY, Residual, small_image_batch, text_batch
from torch import nn

import gradstat
from gradstat import Finding, History
from gradstat.diagnosis.alerts import Alerts

STEPS = 240
WHAT = ("grad", "update", "activation")
Make = Callable[[nn.Module], torch.optim.Optimizer]
# The rules were chosen by what seeds below 21 show.
SEEDS = range(21, 26)


def gpt() -> nn.Module:
    model = GPT(2, 32, 2, VOCABULARY, LENGTH)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def free_attention() -> nn.Module:
    """Without the norm that keeps the attention's logits small."""
    model = gpt()
    for block in model.blocks:
        block.norm1 = nn.Identity()
    return model


def resnet() -> nn.Module:
    stem = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    blocks = [Residual(8) for _ in range(3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


def adamw(lr: float, eps: float = 1e-8) -> Make:
    return lambda model: torch.optim.AdamW(model.parameters(), lr, (0.9, 0.999), eps)


def sgd(lr: float) -> Make:
    return lambda model: torch.optim.SGD(model.parameters(), lr, 0.9)


def constant(step: int, steps: int) -> float:
    return 1.0


def rising(step: int, steps: int) -> float:
    return 1.02**step


def risen(step: int, steps: int) -> float:
    """As much a step, but ten-fold in all."""
    return min(1.02**step, 10.0)


def risen_and_falling(step: int, steps: int) -> float:
    """Ten-fold in 116 steps, then down as a cosine."""
    first = round(math.log(10) / math.log(1.02))
    down = math.cos(math.pi * max(0, step - first) / (steps - first))
    return 1.02**step if step < first else 5 + 5 * down


@dataclass(frozen=True)
class Organic:
    """How a network is trained.

    Args:
        schedule: multiple of the learning rate, given the step and how many there are.
        few: batches, over and over; 0 for new ones.
    """

    build: Callable[[], nn.Module]
    optimizer: Make
    schedule: Callable[[int, int], float] = constant
    batch: int = 16
    few: int = 0
    dtype: torch.dtype = torch.float32

    def train(self, seed: int, what: str | tuple[str, ...] = WHAT) -> History:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = self.build().to(self.dtype).train()
        optimizer = self.optimizer(model)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: self.schedule(at, STEPS))
        make = text_batch if isinstance(model, GPT) else small_image_batch
        kept = [make(self.batch, generator) for _ in range(self.few)]
        with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:
            for step in range(STEPS):
                x, y = kept[step % self.few] if kept else make(self.batch, generator)
                x = x.to(self.dtype) if x.is_floating_point() else x
                loss = nn.functional.cross_entropy(model(x).float(), y)
                w.log(loss=loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
        return w.history


HALF = torch.bfloat16
ORGANIC = {
    "rate rises, GPT, AdamW": Organic(gpt, adamw(2.5e-3), rising),
    "rate rises, GPT, SGD": Organic(gpt, sgd(0.03), rising),
    "rate rises, ResNet, SGD": Organic(resnet, sgd(0.05), rising, 64),
    "bfloat16, GPT, AdamW": Organic(gpt, adamw(2.5e-3), rising, dtype=HALF),
    "bfloat16, ResNet, SGD": Organic(resnet, sgd(0.08), rising, 64, dtype=HALF),
    "logits, GPT, AdamW": Organic(free_attention, adamw(1e-3), rising),
    "logits, GPT, SGD": Organic(free_attention, sgd(0.03), rising),
    # All batches are known by heart, and Adam's second moments small, when the rate is too high.
    "quiet, GPT, AdamW": Organic(gpt, adamw(1e-3, 1e-15), rising, few=2),
    "quiet, ResNet, AdamW": Organic(resnet, adamw(8e-3, 1e-15), rising, 32, few=2),
    "no warm-up, GPT, SGD": Organic(free_attention, sgd(0.35)),
}
CALM = {
    "GPT, AdamW, risen": Organic(gpt, adamw(1e-3), risen),
    "GPT, SGD, risen and falling": Organic(gpt, sgd(0.03), risen_and_falling),
    "GPT, AdamW, restarts": Organic(gpt, adamw(1e-2), restarts),
    "GPT, AdamW, one cycle, bfloat16": Organic(gpt, adamw(1e-2), one_cycle, dtype=HALF),
    "GPT, AdamW, triangles, few": Organic(gpt, adamw(1e-2, 1e-15), triangles, few=2),
    "free attention, AdamW, risen": Organic(free_attention, adamw(5e-4), risen),
    "ResNet, SGD, one cycle": Organic(resnet, sgd(0.2), one_cycle, 64),
    "ResNet, SGD, risen, bfloat16": Organic(resnet, sgd(0.01), risen, 64, dtype=HALF),
    "ResNet, AdamW, restarts, few": Organic(resnet, adamw(1e-2, 1e-15), restarts, 32, few=2),
    "ResNet, AdamW, triangles": Organic(resnet, adamw(1e-2), triangles, 32),
}


def breaks(history: History) -> int | None:
    """The step from which the loss is above 1.5 times its best so far, and stays there."""
    steps, loss = history.scalar("loss")
    loss = np.nan_to_num(loss, nan=np.inf, posinf=np.inf)
    smooth = np.array([np.median(loss[max(0, t - 4) : t + 1]) for t in range(len(loss))])
    best = np.minimum.accumulate(smooth)
    stays = np.flatnonzero(loss <= 1.5 * best + 0.05)
    at = int(stays[-1]) + 1 if len(stays) else 0
    return int(steps[at]) if len(loss) - at >= 10 else None


def told(history: History) -> list[tuple[int, Finding]]:
    """What `alert=` tells of a run while it goes on, and at which step."""
    found: list[tuple[int, Finding]] = []
    again = History(history.rows, history.bins)
    again.depth = history.depth
    alerts = Alerts(again, lambda each: found.append((again.last_step, each)), is_scaled=False)
    scalars = [(name, *history.scalar(name)) for name in history.scalars]
    for record in history.records:
        for name, steps, values in scalars:
            for value in values[steps == record.step].tolist():
                again.add_scalar(name, record.step, value)
                alerts.see_scalar(name, value)
        again.add(history.packed(record))
        layout, data = again.layout, again.packed(again.find(-1)).data
        alerts.see_record(*layout.views(data)[:2])
        alerts.tell()
    return found
