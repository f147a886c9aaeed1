"""Small networks and what they learn, for the evidence about findings."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from conftest import ROOT
from torch import Tensor, nn

sys.path.insert(0, str(ROOT / "examples"))
sys.path.insert(0, str(ROOT / "bench"))
import digits
from networks import GPT

VOCABULARY, LENGTH = 32, 16
Batch = tuple[Tensor, Tensor]


@functools.cache
def images() -> Batch:
    """2,000 digits of 28 x 28."""
    x, y = digits.synthetic(2000)
    return torch.from_numpy(x), torch.from_numpy(y)


@functools.cache
def text() -> Tensor:
    """20,000 tokens, each of which narrows down the next one."""
    generator = torch.Generator().manual_seed(1)
    likely = torch.randint(VOCABULARY, (VOCABULARY, 4), generator=generator)
    chosen = torch.randint(4, (20_000,), generator=generator).clamp(min=1) - 1
    tokens = [0]
    for choice in chosen.tolist():
        tokens.append(int(likely[tokens[-1], choice]))
    return torch.tensor(tokens)


def image_batch(size: int, generator: torch.Generator) -> Batch:
    x, y = images()
    chosen = torch.randint(len(x), (size,), generator=generator)
    return x[chosen], y[chosen]


def small_image_batch(size: int, generator: torch.Generator) -> Batch:
    x, y = image_batch(size, generator)
    return nn.functional.avg_pool2d(x.view(-1, 1, 28, 28), 2)[:, :, 1:13, 1:13], y


def text_batch(size: int, generator: torch.Generator) -> Batch:
    starts = torch.randint(len(text()) - LENGTH - 1, (size, 1), generator=generator)
    tokens = text()[starts + torch.arange(LENGTH + 1)]
    return tokens[:, :-1], tokens[:, 1:].flatten()


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))


class LSTM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, 16)
        self.lstm = nn.LSTM(16, 32, batch_first=True)
        self.head = nn.Linear(32, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.tokens(x))[0])
        return logits.flatten(0, 1)


def mlp() -> nn.Module:
    """The study's network, 784-10-10-10-10."""
    layers: list[nn.Module] = [nn.Linear(784, 10)]
    for _ in range(3):
        layers += [nn.ReLU(), nn.Linear(10, 10)]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def resnet() -> nn.Module:
    stem = nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU()
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    return nn.Sequential(*stem, Residual(8), Residual(8), *head)


def gpt() -> nn.Module:
    model = GPT(2, 32, 2, VOCABULARY, LENGTH)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.1)
    return model


def classify(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Task:
    build: Callable[[], nn.Module]
    batch: Callable[[int, torch.Generator], Batch]
    loss: Callable[[nn.Module, Batch], Tensor] = classify


TASKS = {
    "MLP": Task(mlp, image_batch),
    "GPT": Task(gpt, text_batch),
    "ResNet": Task(resnet, small_image_batch),
    "LSTM": Task(LSTM, text_batch),
}
Parameters = list[dict[str, object]]
OPTIMIZERS: dict[str, Callable[[Parameters, float], torch.optim.Optimizer]] = {
    "SGD": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.9),
    **{
        name: getattr(torch.optim, name)
        for name in ("Adam", "AdamW", "NAdam", "RAdam", "RMSprop", "Adagrad")
    },
}


def constant(step: int, steps: int) -> float:
    return 1.0


def warmup_cosine(step: int, steps: int) -> float:
    """Up over a tenth of the steps, then down to a tenth."""
    first = steps // 10
    if step < first:
        return (step + 1) / first
    return 0.55 + 0.45 * math.cos(math.pi * (step - first) / (steps - first))


@dataclass(frozen=True)
class Setting:
    """How a task is trained when all is well."""

    task: str
    optimizer: str
    lr: float
    batch: int
    schedule: Callable[[int, int], float] = constant

    def __str__(self) -> str:
        named = {constant: "", warmup_cosine: ", warm-up and cosine"}
        schedule = named.get(self.schedule, f", {self.schedule.__name__.replace('_', ' ')}")
        return f"{self.task}, {self.optimizer}, batch {self.batch}{schedule}"


SETTINGS = (
    Setting("MLP", "SGD", 0.02, 128),
    Setting("MLP", "SGD", 0.01, 8),
    Setting("MLP", "AdamW", 2e-3, 32),
    Setting("MLP", "Adagrad", 1e-2, 256),
    Setting("GPT", "AdamW", 3e-3, 32, warmup_cosine),
    Setting("GPT", "AdamW", 1e-3, 32),
    Setting("GPT", "AdamW", 1e-3, 8),
    Setting("GPT", "SGD", 0.05, 32),
    Setting("ResNet", "SGD", 0.05, 32),
    Setting("ResNet", "AdamW", 3e-3, 8),
    Setting("ResNet", "AdamW", 3e-3, 64, warmup_cosine),
    Setting("LSTM", "AdamW", 3e-3, 32),
    Setting("LSTM", "SGD", 0.2, 8),
    Setting("LSTM", "Adagrad", 2e-2, 64),
)
