"""Runs that become unstable by themselves: nothing is done to them but how they are trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from tasks import GPT, LENGTH, VOCABULARY, Residual, small_image_batch, text_batch
from torch import nn

import gradstat
from gradstat import History

STEPS = 400
Make = Callable[[nn.Module], torch.optim.Optimizer]


def gpt(std: float = 0.1, layers: int = 3) -> nn.Module:
    model = GPT(layers, 32, 2, VOCABULARY, LENGTH)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
    return model


def resnet() -> nn.Module:
    stem = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    blocks = [Residual(8) for _ in range(3)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))


@dataclass(frozen=True)
class Organic:
    build: Callable[[], nn.Module]
    optimizer: Make
    schedule: Callable[[int], float] = lambda step: 1.0
    dtype: torch.dtype = torch.float32
    few: int = 0  # batches, over and over; 0 for new ones
    steps: int = STEPS

    def train(self, seed: int, what=("grad", "update", "activation")) -> History:
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        model = self.build().to(self.dtype).train()
        optimizer = self.optimizer(model)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        make = text_batch if isinstance(model, GPT) else small_image_batch
        kept = [make(32, generator) for _ in range(self.few)]
        with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:
            for step in range(self.steps):
                x, y = kept[step % self.few] if kept else make(32, generator)
                x = x.to(self.dtype) if x.is_floating_point() else x
                loss = nn.functional.cross_entropy(model(x).float(), y)
                w.log(loss=loss)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                rates.step()
        return w.history


def adamw(lr: float, beta2: float = 0.999, eps: float = 1e-8) -> Make:
    return lambda model: torch.optim.AdamW(model.parameters(), lr, (0.9, beta2), eps)


def sgd(lr: float, momentum: float = 0.9) -> Make:
    return lambda model: torch.optim.SGD(model.parameters(), lr, momentum)


def rising(factor: float) -> Callable[[int], float]:
    return lambda step: factor**step


ORGANIC = {
    "rate rises, GPT": Organic(gpt, adamw(5e-4), rising(1.015)),
    "rate rises, ResNet": Organic(resnet, sgd(0.02), rising(1.015)),
    "rate rises, ResNet AdamW": Organic(resnet, adamw(5e-4), rising(1.015)),
    "no warm-up, GPT": Organic(gpt, adamw(2e-2)),
    "no warm-up, ResNet": Organic(resnet, sgd(1.0)),
    "beta2, GPT": Organic(gpt, adamw(6e-3, 0.999, 1e-12), few=2),
    "beta2, ResNet": Organic(resnet, adamw(1e-2, 0.999, 1e-12), few=2),
    "bf16, GPT": Organic(gpt, adamw(3e-3), dtype=torch.bfloat16),
    "bf16, ResNet": Organic(resnet, sgd(0.1), dtype=torch.bfloat16),
    "logits, GPT": Organic(lambda: gpt(0.3), adamw(1e-2)),
}


def breaks(history: History) -> int | None:
    """The step from which the loss is above twice what it was at its best, and stays there."""
    steps, loss = history.scalar("loss")
    loss = np.nan_to_num(loss, nan=np.inf, posinf=np.inf)
    smooth = np.array([np.median(loss[max(0, t - 4) : t + 1]) for t in range(len(loss))])
    best = np.minimum.accumulate(smooth)
    above = loss > 1.5 * best + 0.05
    stays = np.flatnonzero(~above)
    at = int(stays[-1]) + 1 if len(stays) else 0
    return int(steps[at]) if len(loss) - at >= 10 else None
