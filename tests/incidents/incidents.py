"""Runs in which nothing happens, or one thing at a known step, and whether it is found."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import torch
from foreign import FOREIGN, HEALTHY
from tasks import OPTIMIZERS, SETTINGS, TASKS, Batch, Setting
from torch import Tensor, nn

import gradstat
from gradstat import Finding, History

WHAT = ("grad", "update", "activation")
# Thresholds were chosen by what seeds below 20 and from 100 on show.
SEEDS = range(20, 40)
# Rules were mended by what seeds below 29 show of foreign networks.
FOREIGN_SEEDS = range(29, 32)
STEPS, AT = 160, 120  # of a run with an incident, and when that begins
ALL_TASKS = TASKS | FOREIGN


class Incident:
    """What goes wrong from the step `at` on. Each method may change what a step computes.

    Args:
        at: the step.
        layer: the parameter or module it happens to, or "" where it is none of them.
        size: how much; each kind has its own.
    """

    def __init__(self, at: int = AT, layer: str = "", size: float = 1.0) -> None:
        self.at, self.layer, self.size = at, layer, size

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Before the forward pass."""

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch

    def loss(self, loss: Tensor, step: int) -> Tensor:
        return loss


def train(
    setting: Setting,
    seed: int,
    incident: Incident | None = None,
    steps: int = STEPS,
    what: tuple[str, ...] = WHAT,
    every: int = 1,
    parameters: str | None = None,
) -> History:
    """The record of a run, its loss logged at every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    task = ALL_TASKS[setting.task]
    model = task.build().train()
    incident = incident or Incident(at=steps)
    # A group for each parameter, so that an incident can reach one.
    each = [[parameter] for parameter in model.parameters()]
    groups = each if incident.layer else [list(model.parameters())]
    named = [{"params": group, "full": setting.lr} for group in groups]
    optimizer = OPTIMIZERS[setting.optimizer](named, setting.lr)
    options = {"when": "step", "every": every, "parameters": parameters}
    with gradstat.watch(model, what=what, optimizer=optimizer, **options) as w:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * setting.schedule(step, steps)
            batch = task.batch(setting.batch, generator)
            if step >= incident.at:
                incident.begin(model, optimizer, step)
                batch = incident.batch(batch, step)
            loss = task.loss(model, batch)
            if step >= incident.at:
                loss = incident.loss(loss, step)
            w.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return w.history


class HotLayer(Incident):
    """The learning rate of one parameter times the size for three steps."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step < self.at + 3:
            chosen = model.get_parameter(self.layer)
            for group in optimizer.param_groups:
                if group["params"][0] is chosen:
                    group["lr"] *= self.size


class HotRate(Incident):
    """The learning rate, as it is without a schedule, times the size, for good."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        for group in optimizer.param_groups:
            group["lr"] = group["full"] * self.size


class LargeWeights(Incident):
    """The weights of one layer times the size."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == self.at:
            with torch.no_grad():
                model.get_parameter(self.layer).mul_(self.size)


class LargeInputs(Incident):
    """A batch of inputs times the size."""

    def batch(self, batch: Batch, step: int) -> Batch:
        return (batch[0] * self.size, batch[1]) if step == self.at else batch


class ShuffledLabels(Incident):
    """The labels of a share of one batch in another order."""

    def batch(self, batch: Batch, step: int) -> Batch:
        if step != self.at:
            return batch
        labels, n = batch[1].clone(), round(self.size * len(batch[1]))
        labels[:n] = labels[torch.randperm(n, generator=torch.Generator().manual_seed(step))]
        return batch[0], labels


class LogOfZero(Incident):
    """A probability that has become zero under the loss's logarithm."""

    def loss(self, loss: Tensor, step: int) -> Tensor:
        return loss - torch.log(loss * 0) if step == self.at else loss


class Float16(Incident):
    """One module computes in float16 and leaves its range, as without a loss scaler."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == self.at:
            module = model.get_submodule(self.layer)
            module.register_forward_hook(_overflow, prepend=True)


def _overflow(module: nn.Module, inputs: object, x: Tensor) -> Tensor:
    # An expert may have no inputs.
    return (x * (4e5 / x.detach().norm(math.inf))).half().float() if x.numel() else x


class OtherData(Incident):
    """From one step on a share of the labels means something else."""

    def batch(self, batch: Batch, step: int) -> Batch:
        labels, n = batch[1].clone(), round(self.size * len(batch[1]))
        labels[:n] = (labels[:n] + 3) % (10 if batch[0].is_floating_point() else 32)
        return batch[0], labels


class GrowingLogits(Incident):
    """Queries and keys of one block grow by a factor at each step."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        weight = model.get_parameter(self.layer)
        with torch.no_grad():
            weight[: 2 * len(weight) // 3] *= self.size


MLP, GPT, GPT_SGD, GPT_STEADY, RESNET, LSTM = (
    next(each for each in SETTINGS if str(each) == name)
    for name in (
        "MLP, SGD, batch 128",
        "GPT, AdamW, batch 32, warm-up and cosine",
        "GPT, SGD, batch 32",
        "GPT, AdamW, batch 32",
        "ResNet, SGD, batch 32",
        "LSTM, AdamW, batch 32",
    )
)


@dataclass(frozen=True)
class Case:
    """An incident, what it happens to, and where it is tried."""

    kind: type[Incident]
    settings: tuple[Setting, ...]
    layers: str = ""  # a parameter or module of those, by the end of its name; "" for none
    size: float = 1.0

    def incident(self, setting: Setting, seed: int) -> Incident:
        if not self.layers:
            return self.kind(size=self.size)
        names = [
            name
            for name, parameter in ALL_TASKS[setting.task].build().named_parameters()
            if parameter.dim() > 1 and name.endswith(self.layers) and "lstm.weight_hh" not in name
        ]
        if self.kind is Float16:  # some modules never run: their weights are read as they are
            names = [
                n.rpartition(".")[0] for n in names if n != "places.weight" and "attn" not in n
            ]
        return self.kind(AT, random.Random(seed).choice(names), self.size)


CASES = {
    "learning rate of a layer x 100 for 3 steps": Case(
        HotLayer, (MLP, GPT, RESNET, LSTM), "weight", 100
    ),
    "weights of a layer x 10": Case(LargeWeights, (MLP, GPT, RESNET, LSTM), "weight", 10),
    "a batch of inputs x 1,000": Case(LargeInputs, (MLP, RESNET), size=1000),
    "labels of a batch shuffled": Case(ShuffledLabels, (MLP, GPT, RESNET, LSTM)),
    "log of zero in the loss": Case(LogOfZero, (MLP, GPT)),
    "float16 overflow in a module": Case(Float16, (MLP, GPT, GPT_SGD, RESNET), "weight"),
    "other data, under AdamW": Case(OtherData, (GPT, LSTM)),
    "attention logits growing": Case(GrowingLogits, (GPT, GPT_STEADY), "qkv.weight", 1.1),
}

_NAMED = {f"{setting.task}, {setting.optimizer}": setting for setting in HEALTHY}


def _of(*names: str) -> tuple[Setting, ...]:
    return tuple(_NAMED[name] for name in names)


FOREIGN_CASES = {
    "learning rate of a layer x 100 for 3 steps": Case(
        HotLayer,
        _of("GRU, SGD", "encoder, AdamW", "ViT, AdamW", "U-Net, SGD", "diffusion, Adam", "CNN, SGD",
            "autoencoder, Adam"),
        ".weight",
        100,
    ),
    "weights of a layer x 10": Case(
        LargeWeights,
        _of("post-norm, AdamW", "cell, Adam", "VAE, Adam", "MoE, AdamW", "DQN, Adam", "CNN, AdamW",
            "tanh, SGD"),
        ".weight",
        10,
    ),
    "learning rate x 40, for good": Case(
        HotRate,
        _of("GRU, AdamW", "RNN, AdamW", "encoder, AdamW", "ViT, AdamW", "U-Net, SGD", "CNN, SGD",
            "diffusion, Adam"),
        size=40,
    ),
    "a batch of inputs x 1,000": Case(
        LargeInputs,
        _of("ViT, AdamW", "VAE, Adam", "U-Net, Adam", "MoE, AdamW", "diffusion, RAdam", "CNN, SGD",
            "autoencoder, Adam"),
        size=1000,
    ),
    "labels of a batch shuffled": Case(
        ShuffledLabels,
        _of("GRU, AdamW", "cell, Adam", "LSTM of 2, Adam", "ViT, AdamW", "MoE, AdamW",
            "U-Net, Adam", "tanh, SGD"),
    ),
    "float16 overflow in a module": Case(
        Float16,
        _of("encoder, AdamW", "post-norm, AdamW", "VAE, Adam", "U-Net, Adam", "MoE, AdamW",
            "diffusion, Adam", "tanh, SGD"),
        ".weight",
    ),
}  # fmt: skip
SUBTLE = {
    "learning rate of a layer x 15 for 3 steps": Case(
        HotLayer, _of("ViT, AdamW", "CNN, SGD", "diffusion, Adam"), ".weight", 15
    ),
    "weights of a layer x 2": Case(
        LargeWeights, _of("cell, Adam", "MoE, AdamW", "tanh, SGD"), ".weight", 2
    ),
    "learning rate x 8, for good": Case(
        HotRate, _of("RNN, AdamW", "encoder, AdamW", "U-Net, SGD"), size=8
    ),
    "a batch of inputs x 10": Case(
        LargeInputs, _of("U-Net, Adam", "MoE, AdamW", "autoencoder, Adam"), size=10
    ),
    "labels of a third of a batch shuffled": Case(
        ShuffledLabels, _of("GRU, AdamW", "ViT, AdamW", "MoE, AdamW"), size=1 / 3
    ),
    "a third of the data is other, from then on": Case(
        OtherData, (LSTM, *_of("GRU, AdamW", "tanh, SGD")), size=1 / 3
    ),
    "attention logits grow by a thirtieth a step": Case(
        GrowingLogits, (GPT, GPT_STEADY, GPT_SGD), "qkv.weight", 1.033
    ),
}


def alarms(history: History) -> list[Finding]:
    """Findings that are no mere notes."""
    return [finding for finding in history.diagnose() if finding.severity != "note"]


def sudden(found: list[Finding]) -> list[Finding]:
    """Those that say that something happened, or that training does not work."""
    kinds = ("divergence", "non-finite", "loss spike", "gradient spike", "jump")
    return [finding for finding in found if finding.kind in kinds or finding.severity == "severe"]


@dataclass(frozen=True)
class Verdict:
    """What the first finding says of an incident: that it is there, when, and in which layer."""

    found: bool
    step: bool
    layer: bool
    sentence: str


def judge(history: History, incident: Incident) -> Verdict:
    found = alarms(history)
    if not found:
        return Verdict(False, False, False, "nothing found")
    first = found[0]
    began = first.numbers.get("first_step", first.steps[0])
    if incident.layer:
        module = incident.layer.removesuffix(".weight")
        layer = first.layer.rpartition("/")[2].startswith(module)
    elif isinstance(incident, HotRate):
        layer = "learning rate" in first.sentence
    else:
        # No layer is blamed: none moved before, or what is not finite came from the loss.
        layer = first.numbers.get("moved", 0) == 0 and (
            first.kind != "non-finite" or "not a layer" in first.sentence
        )
    return Verdict(True, abs(began - incident.at) <= 1, layer, str(first))
