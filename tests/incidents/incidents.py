"""Runs in which nothing happens, or one thing at a known step, and whether it is found."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from tasks import OPTIMIZERS, SETTINGS, TASKS, Batch, Setting
from torch import Tensor, nn

import gradstat
from gradstat import Finding, History

WHAT = ("grad", "update", "activation")
# Thresholds were chosen by what seeds up to 20 and from 100 on show.
SEEDS = range(20, 40)
STEPS, AT = 160, 120  # of a run with an incident, and when that begins


class Incident:
    """What goes wrong from the step `at` on. Each method may change what a step computes.

    Args:
        at: the step.
        layer: the parameter or module it happens to, or "" where it is none of them.
    """

    def __init__(self, at: int = AT, layer: str = "") -> None:
        self.at, self.layer = at, layer

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Before the forward pass."""

    def batch(self, batch: Batch, step: int) -> Batch:
        return batch

    def loss(self, loss: Tensor, logits: Tensor, step: int) -> Tensor:
        return loss


def train(
    setting: Setting,
    seed: int,
    incident: Incident | None = None,
    steps: int = STEPS,
    what: tuple[str, ...] = WHAT,
    every: int = 1,
) -> History:
    """The record of a run, its loss logged at every step."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    task = TASKS[setting.task]
    model = task.build().train()
    # A group for each parameter, so that an incident can reach one.
    groups = [{"params": [parameter]} for parameter in model.parameters()]
    optimizer = OPTIMIZERS[setting.optimizer](groups, setting.lr)
    incident = incident or Incident(at=steps)
    with gradstat.watch(model, what=what, when="step", optimizer=optimizer, every=every) as w:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = setting.lr * setting.schedule(step, steps)
            batch = task.batch(setting.batch, generator)
            if step >= incident.at:
                incident.begin(model, optimizer, step)
                batch = incident.batch(batch, step)
            logits = model(batch[0])
            loss = nn.functional.cross_entropy(logits, batch[1])
            if step >= incident.at:
                loss = incident.loss(loss, logits, step)
            w.log(loss=loss)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return w.history


class HotLayer(Incident):
    """The learning rate of one parameter times 100 for three steps."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step < self.at + 3:
            chosen = model.get_parameter(self.layer)
            for group in optimizer.param_groups:
                if group["params"][0] is chosen:
                    group["lr"] *= 100


class LargeWeights(Incident):
    """The weights of one layer times 10."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == self.at:
            with torch.no_grad():
                model.get_parameter(self.layer).mul_(10)


class LargeInputs(Incident):
    """A batch of inputs times 1,000."""

    def batch(self, batch: Batch, step: int) -> Batch:
        return (batch[0] * 1000, batch[1]) if step == self.at else batch


class ShuffledLabels(Incident):
    """The labels of one batch in another order."""

    def batch(self, batch: Batch, step: int) -> Batch:
        generator = torch.Generator().manual_seed(step)
        order = torch.randperm(len(batch[1]), generator=generator)
        return (batch[0], batch[1][order]) if step == self.at else batch


class LogOfZero(Incident):
    """A probability that has become zero under the loss's logarithm."""

    def loss(self, loss: Tensor, logits: Tensor, step: int) -> Tensor:
        if step != self.at:
            return loss
        return loss - torch.log(logits.softmax(-1).min() * 0)


class Float16(Incident):
    """One module computes in float16 and leaves its range, as without a loss scaler."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        if step == self.at:
            module = model.get_submodule(self.layer)
            module.register_forward_hook(
                lambda _, inputs, x: (x * (4e5 / float(x.detach().abs().max()))).half().float(),
                prepend=True,
            )


class OtherData(Incident):
    """From one step on every label means something else."""

    def batch(self, batch: Batch, step: int) -> Batch:
        classes = 10 if batch[0].is_floating_point() else 32
        return batch[0], (batch[1] + 3) % classes


class GrowingLogits(Incident):
    """Queries and keys of one block grow by a tenth at each step."""

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        weight = model.get_parameter(self.layer)
        with torch.no_grad():
            weight[: 2 * len(weight) // 3] *= 1.1


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

    def incident(self, setting: Setting, seed: int) -> Incident:
        if not self.layers:
            return self.kind()
        names = [
            name
            for name, parameter in TASKS[setting.task].build().named_parameters()
            if parameter.dim() > 1 and name.endswith(self.layers) and "lstm.weight_hh" not in name
        ]
        if self.kind is Float16:  # the places' module never runs: its weight is read as it is
            names = [name.rpartition(".")[0] for name in names if name != "places.weight"]
        return self.kind(AT, random.Random(seed).choice(names))


CASES = {
    "learning rate of a layer x 100 for 3 steps": Case(
        HotLayer, (MLP, GPT, RESNET, LSTM), "weight"
    ),
    "weights of a layer x 10": Case(LargeWeights, (MLP, GPT, RESNET, LSTM), "weight"),
    "a batch of inputs x 1,000": Case(LargeInputs, (MLP, RESNET)),
    "labels of a batch shuffled": Case(ShuffledLabels, (MLP, GPT, RESNET, LSTM)),
    "log of zero in the loss": Case(LogOfZero, (MLP, GPT)),
    "float16 overflow in a module": Case(Float16, (MLP, GPT, GPT_SGD, RESNET), "weight"),
    "other data, under AdamW": Case(OtherData, (GPT, LSTM)),
    "attention logits growing": Case(GrowingLogits, (GPT, GPT_STEADY), "qkv.weight"),
}


def alarms(history: History) -> list[Finding]:
    """Findings that are no mere notes."""
    return [finding for finding in history.diagnose() if finding.severity != "note"]


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
    else:
        # No layer is blamed: none moved before, or what is not finite came from the loss.
        layer = first.numbers.get("moved", 0) == 0 and (
            first.kind != "non-finite" or "not a layer" in first.sentence
        )
    return Verdict(True, abs(began - incident.at) <= 1, layer, str(first))
