"""Diagnoses of networks that are trained: no false alarm, and no vanishing gradient missed."""

import math
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import ROOT
from findings import diagnose, only
from torch import Tensor, nn

import gradstat
from gradstat import History

sys.path.insert(0, str(ROOT / "examples"))
import digits
import relu_vs_sigmoid as study


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small gain nothing from a second thread, and on a busy machine wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["digits", "mnist"])
def images(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor]:
    x, y = digits.load(request.param)
    return torch.from_numpy(x), torch.from_numpy(y)


def train(name: str, images: tuple[Tensor, Tensor], *, epochs: int, seed: int) -> History:
    """The study's network on its 5,000 images, 40 steps an epoch."""
    return study.train(name, *images, epochs=epochs, batch_size=128, seed=seed).every_step


EVERYDAY = [pytest.param(seed, marks=[pytest.mark.slow] if seed > 2 else []) for seed in range(20)]


@pytest.mark.parametrize("seed", EVERYDAY)
def test_diagnose_finds_the_sigmoid_networks_vanishing_within_the_first_epoch(
    images: tuple[Tensor, Tensor], seed: int
) -> None:
    history = train("sigmoid", images, epochs=1, seed=seed)
    finding = only(history, "vanishing")
    assert (finding.severity, finding.layer) == ("severe", "layer1.weight")
    assert finding.steps == (0, 39)
    assert [each.kind for each in diagnose(history)] == ["vanishing"]


def test_diagnose_finds_the_sigmoid_networks_vanishing_when_it_has_long_passed() -> None:
    x, y = digits.load("digits")
    images = torch.from_numpy(x), torch.from_numpy(y)
    first, last = only(train("sigmoid", images, epochs=35, seed=0), "vanishing").steps
    assert first == 0
    assert 400 < last < 700  # of 1,400


@pytest.mark.parametrize("seed", EVERYDAY)
def test_diagnose_raises_no_alarm_over_the_relu_network(
    images: tuple[Tensor, Tensor], seed: int
) -> None:
    assert diagnose(train("ReLU", images, epochs=5, seed=seed)) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_diagnose_raises_no_alarm_over_the_relu_network_in_50_epochs(
    images: tuple[Tensor, Tensor], seed: int
) -> None:
    assert diagnose(train("ReLU", images, epochs=50, seed=seed)) == []


class Block(nn.Module):
    """A transformer layer: causal attention, then a feed-forward network, each with its norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (
            part.view(batch, length, 2, -1).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """3 layers, width 32, 256 tokens of which a batch holds a few."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(256, 32), nn.Embedding(16, 32)
        self.blocks = nn.Sequential(*(Block(32) for _ in range(3)))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.flatten(0, 1)


def train_gpt(
    *,
    seed: int = 0,
    steps: int = 60,
    schedule: Callable[[float], float] = lambda t: 1.0,
    dtype: torch.dtype = torch.float32,
    parameters: str | None = None,
) -> History:
    """Every kind of row of a run in which the loss falls."""
    torch.manual_seed(seed)
    model, following = GPT().to(dtype), torch.randint(256, (256, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step / steps))
    what = ("grad", "update", "activation", "grad_output")
    losses = []
    with gradstat.watch(
        model, what=what, when="step", optimizer=optimizer, parameters=parameters
    ) as w:
        for _ in range(steps):
            text = [torch.randint(256, (8,))]
            for _ in range(16):
                text.append(following[text[-1], torch.randint(3, (8,))])
            tokens = torch.stack(text, 1)
            loss = nn.functional.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert len(w.history) == steps
    return w.history


@pytest.mark.parametrize("parameters", [None, "."], ids=["weights", "all"])
@pytest.mark.parametrize("seed", range(2))
def test_diagnose_raises_no_alarm_over_a_gpt(seed: int, parameters: str | None) -> None:
    assert diagnose(train_gpt(seed=seed, parameters=parameters)) == []


@pytest.mark.parametrize(
    "schedule",
    [
        lambda t: 1 - t,
        lambda t: (1 + math.cos(math.pi * t)) / 2,
        lambda t: min(1.0, 5 * t) * (1 - t) ** 2,
        lambda t: max(0.0, 1 - 2 * t),
    ],
    ids=["linear", "cosine", "warm-up", "at zero for a half"],
)
def test_diagnose_raises_no_alarm_over_a_schedule_that_ends_at_zero(
    schedule: Callable[[float], float],
) -> None:
    history = train_gpt(steps=120, schedule=schedule)
    ratio = history.update_ratio()
    assert (ratio[-1] < 0.05 * ratio[40]).all()
    assert diagnose(history) == []


def test_diagnose_finds_the_norms_of_a_gpt_in_bfloat16_whose_steps_round_to_nothing() -> None:
    history = train_gpt(dtype=torch.bfloat16)
    finding = only(history, "stuck")
    norms = {name for name in history.select("update").layers if "norm" in name}
    stuck = finding.layer, *finding.others
    assert {each.removeprefix("update/") for each in stuck} == norms
    assert (finding.numbers["zeros"], finding.numbers["layers"]) == (1, len(norms))
    assert finding.sentence.endswith(f"The same holds for {len(norms) - 1} other layers.")


@pytest.mark.parametrize("batch_size", [16, 128])
@pytest.mark.parametrize("seed", range(2))
def test_diagnose_raises_no_alarm_over_the_units_and_updates_of_the_relu_network(
    images: tuple[Tensor, Tensor], seed: int, batch_size: int
) -> None:
    x, y = images
    generator = torch.Generator().manual_seed(seed)
    model = study.build(nn.ReLU, x.shape[1], generator)
    optimizer = torch.optim.Adam(model.parameters())
    what = ("grad", "update", "activation")
    with gradstat.watch(model, what=what, when="step", optimizer=optimizer) as w:
        for _ in range(100):
            batch = torch.randint(len(x), (batch_size,), generator=generator)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
    assert diagnose(w.history) == []


@pytest.mark.parametrize(("rate", "severity"), [(0.1, None), (3.0, "severe")])
def test_diagnose_finds_that_training_diverges(rate: float, severity: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), rate)
    with gradstat.watch(model) as w:
        for _ in range(30):
            x = torch.rand(32, 8)
            loss = nn.functional.mse_loss(model(x).squeeze(1), x.sum(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    found = [each.severity for each in diagnose(w.history) if each.kind == "exploding"]
    assert found == ([severity] if severity else [])
