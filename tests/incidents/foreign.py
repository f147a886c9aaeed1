"""Networks, tasks and schedules that no rule was made for, in which all is well."""

from __future__ import annotations

import functools
import itertools
import math

import torch
from tasks import (
    VOCABULARY,
    Batch,
    Setting,
    Task,
    image_batch,
    small_image_batch,
    text_batch,
)
from torch import Tensor, nn

import gradstat
from gradstat import History

F = nn.functional


class Recurrent(nn.Module):
    """Tokens through a recurrent network of some layers."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.rnn = kind(24, 40, layers, batch_first=True)
        self.out = nn.Linear(40, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.rnn(self.embed(x))[0])
        return logits.flatten(0, 1)


class Reader(nn.Module):
    """A recurrent network that is asked when it has read all tokens."""

    def __init__(self, kind: type[nn.RNNBase], layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 24)
        self.rnn = kind(24, 40, layers, batch_first=True)
        self.out = nn.Linear(40, 8)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.out(self.rnn(self.embed(x))[0][:, -1])
        return logits


class Cell(nn.Module):
    """A recurrent network written by hand: no name says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.gates, self.new = nn.Linear(64, 64), nn.Linear(64, 32)
        self.out = nn.Linear(32, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        state, states = tokens.new_zeros(len(x), 32), []
        for at in range(x.shape[1]):
            update, reset = self.gates(torch.cat([tokens[:, at], state], 1)).sigmoid().chunk(2, 1)
            new = self.new(torch.cat([tokens[:, at], reset * state], 1)).tanh()
            state = update * state + (1 - update) * new
            states.append(state)
        logits: Tensor = self.out(torch.stack(states, 1))
        return logits.flatten(0, 1)


class Encoder(nn.Module):
    """A transformer that sees all tokens and is asked for the most frequent of a few."""

    def __init__(self, *, norm_first: bool) -> None:
        super().__init__()
        self.embed, self.at = nn.Embedding(VOCABULARY, 32), nn.Parameter(0.02 * torch.randn(16, 32))
        layer = functools.partial(
            nn.TransformerEncoderLayer, 32, 4, 64, 0.0, batch_first=True, norm_first=norm_first
        )
        self.layers = nn.ModuleList([layer() for _ in range(3)])
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x) + self.at
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(self.norm(x.mean(1)))
        return logits


def frequent_batch(size: int, generator: torch.Generator) -> Batch:
    x = torch.randint(VOCABULARY, (size, 16), generator=generator)
    return x, F.one_hot(x % 8, 8).sum(1).argmax(1)


class Patches(nn.Module):
    """A vision transformer over patches of 7 x 7."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 7, stride=7)
        self.at = nn.Parameter(0.02 * torch.randn(16, 32))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(32, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x.view(-1, 1, 28, 28)).flatten(2).transpose(1, 2) + self.at
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.out(x.mean(1))
        return logits


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Sequential(nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32))
        self.decode = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 784))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, log_var = self.encode(x).chunk(2, 1)
        z = mean + torch.randn_like(mean) * (log_var / 2).exp()
        return self.decode(z), mean, log_var


def vae_loss(model: nn.Module, batch: Batch) -> Tensor:
    # Some of the digits' pixels are above 1: not a probability, but near one.
    logits, mean, log_var = model(batch[0])
    made = F.binary_cross_entropy_with_logits(logits, batch[0].clamp(0, 1), reduction="none")
    divergence = -0.5 * (1 + log_var - mean.square() - log_var.exp())
    return made.sum(1).mean() + divergence.sum(1).mean()


class UNet(nn.Module):
    """Two levels; it marks the strokes of noisy digits."""

    def __init__(self) -> None:
        super().__init__()

        def twice(a: int, b: int) -> nn.Module:
            return nn.Sequential(
                nn.Conv2d(a, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU(),
                nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(2, b), nn.SiLU(),
            )  # fmt: skip

        self.down, self.bottom, self.up = twice(1, 8), twice(8, 16), twice(24, 8)
        self.out = nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        high = self.down(x)
        low = F.interpolate(self.bottom(F.max_pool2d(high, 2)), scale_factor=2)
        mask: Tensor = self.out(self.up(torch.cat([high, low], 1)))
        return mask


def mask_batch(size: int, generator: torch.Generator) -> Batch:
    x, _ = small_image_batch(size, generator)
    return x + 0.3 * torch.randn(x.shape, generator=generator), (x > 0.3).float()


def mask_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])


class Experts(nn.Module):
    """Each input goes to the one of four experts that a gate chooses."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate = nn.Linear(784, 32), nn.Linear(32, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(4)
        )
        self.out = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.stem(x))
        shares = self.gate(x).softmax(1)
        share, chosen = shares.max(1)
        y = torch.zeros_like(x)
        for at, expert in enumerate(self.experts):
            rows = (chosen == at).nonzero()[:, 0]
            y = y.index_add(0, rows, expert(x[rows]) * share[rows, None])
        used = nn.functional.one_hot(chosen, 4).float().mean(0)
        self.balance = 4 * (used * shares.mean(0)).sum()
        logits: Tensor = self.out(x + y)
        return logits


def experts_loss(model: nn.Module, batch: Batch) -> Tensor:
    loss = F.cross_entropy(model(batch[0]), batch[1])
    balance: Tensor = model.balance
    return loss + 0.1 * balance


class Denoiser(nn.Module):
    """What diffusion learns: the noise in a point, given how much there is."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(8, 48), nn.SiLU())
        self.parts = nn.ModuleList([nn.Linear(2, 48), nn.Linear(48, 48), nn.Linear(48, 48)])
        self.out = nn.Linear(48, 2)

    def forward(self, x: Tensor) -> Tensor:
        points, time = x[:, :2], x[:, 2:]
        waves = time * 2.0 ** torch.arange(4)
        emb = self.time(torch.cat([waves.sin(), waves.cos()], 1))
        h = points
        for part in self.parts:
            h = F.silu(part(h) + emb)
        noise: Tensor = self.out(h)
        return noise


def diffusion_batch(size: int, generator: torch.Generator) -> Batch:
    turn = 6.28 * torch.rand(size, 1, generator=generator)
    points = torch.cat([turn.sin(), turn.cos()], 1) * (0.5 + turn / 6.28)
    noise = torch.randn(size, 2, generator=generator)
    time = torch.rand(size, 1, generator=generator)
    mixed = points * (1.57 * time).cos() + noise * (1.57 * time).sin()
    return torch.cat([mixed, time], 1), noise


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def mlp_of(sizes: list[int], activation: type[nn.Module]) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b), activation()]
    return nn.Sequential(*layers[:-1])


def copy_batch(size: int, generator: torch.Generator) -> Batch:
    x, _ = image_batch(size, generator)
    return x, x


def q_network() -> nn.Module:
    model = mlp_of([4, 64, 64, 3], nn.ReLU)
    target = mlp_of([4, 64, 64, 3], nn.ReLU)
    target.load_state_dict(model.state_dict())
    # No module of the model: it has no gradient, and is not watched.
    object.__setattr__(model, "target", target)
    return model


def move_batch(size: int, generator: torch.Generator) -> Batch:
    """Points that are rewarded near the middle, and which way they were pushed."""
    state = 2 * torch.rand(size, 4, generator=generator) - 1
    push = torch.randint(3, (size, 1), generator=generator)
    return torch.cat([state, push.float()], 1), push


def q_loss(model: nn.Module, batch: Batch) -> Tensor:
    state, push = batch[0][:, :4], batch[1]
    moved = (state + 0.2 * (push - 1) * torch.tensor([1.0, -1.0, 0.5, 0.0])).clamp(-1, 1)
    reward = -moved.square().sum(1, keepdim=True)
    with torch.no_grad():
        for slow, fast in zip(model.target.parameters(), model.parameters(), strict=True):
            slow.lerp_(fast, 0.05)
        wanted = reward + 0.9 * model.target(moved).max(1, keepdim=True).values
    return F.smooth_l1_loss(model(state).gather(1, push), wanted)


def plain_cnn() -> nn.Module:
    def conv(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1), nn.LeakyReLU(0.1)]

    return nn.Sequential(
        *conv(1, 8), nn.MaxPool2d(2), *conv(8, 16), nn.MaxPool2d(2), *conv(16, 16),
        nn.Flatten(), nn.Linear(144, 10),
    )  # fmt: skip


FOREIGN = {
    "GRU": Task(lambda: Recurrent(nn.GRU), text_batch),
    "LSTM of 2": Task(lambda: Recurrent(nn.LSTM, 2), text_batch),
    "RNN": Task(lambda: Recurrent(nn.RNN), text_batch),
    "cell": Task(Cell, text_batch),
    "LSTM, last": Task(lambda: Reader(nn.LSTM), frequent_batch),
    "LSTM of 3, last": Task(lambda: Reader(nn.LSTM, 3), frequent_batch),
    "GRU, last": Task(lambda: Reader(nn.GRU), frequent_batch),
    "encoder": Task(lambda: Encoder(norm_first=True), frequent_batch),
    "post-norm": Task(lambda: Encoder(norm_first=False), frequent_batch),
    "ViT": Task(Patches, image_batch),
    "VAE": Task(VAE, image_batch, vae_loss),
    "U-Net": Task(UNet, mask_batch, mask_loss),
    "MoE": Task(Experts, image_batch, experts_loss),
    "diffusion": Task(Denoiser, diffusion_batch, squares),
    "autoencoder": Task(lambda: mlp_of([784, 64, 16, 64, 784], nn.GELU), copy_batch, squares),
    "DQN": Task(q_network, move_batch, q_loss),
    "CNN": Task(plain_cnn, small_image_batch),
    "tanh": Task(lambda: mlp_of([784, 48, 48, 48, 10], nn.Tanh), image_batch),
}


def one_cycle(step: int, steps: int) -> float:
    """From a 25th up to the most in a third of the steps, then down to nothing."""
    top = 0.3 * steps
    if step < top:
        return 0.52 - 0.48 * math.cos(math.pi * step / top)
    return 0.5 + 0.5 * math.cos(math.pi * (step - top) / (steps - top)) + 1e-5


def triangles(step: int, steps: int) -> float:
    """Up and down three times, between a tenth and the most."""
    phase = 6 * step / steps % 2
    return 0.1 + 0.9 * min(phase, 2 - phase)


def restarts(step: int, steps: int) -> float:
    """Cosines from the most to a hundredth, each begun anew."""
    return 0.505 + 0.495 * math.cos(math.pi * (3 * step / steps % 1))


def in_steps(step: int, steps: int) -> float:
    return 0.2 ** (3 * step // steps)


def warmup(step: int, steps: int) -> float:
    """Up over a fifth of the steps, then down as the root."""
    first = steps / 5
    return min((step + 1) / first, math.sqrt(first / (step + 1)))


HEALTHY = (
    Setting("GRU", "AdamW", 3e-3, 32, one_cycle),
    Setting("GRU", "SGD", 0.3, 32),
    Setting("LSTM of 2", "AdamW", 1e-2, 32, one_cycle),
    Setting("LSTM of 2", "Adam", 3e-3, 16),
    Setting("LSTM", "Adam", 2e-2, 32, one_cycle),
    Setting("LSTM", "RMSprop", 3e-3, 32, warmup),
    Setting("LSTM, last", "AdamW", 5e-3, 32, one_cycle),
    Setting("LSTM of 3, last", "Adam", 3e-3, 32),
    Setting("GRU, last", "RMSprop", 2e-3, 32),
    Setting("RNN", "AdamW", 2e-3, 32),
    Setting("cell", "Adam", 3e-3, 32, triangles),
    Setting("encoder", "AdamW", 2e-3, 32, warmup),
    Setting("post-norm", "AdamW", 1e-3, 64, one_cycle),
    Setting("ViT", "AdamW", 2e-3, 32, one_cycle),
    Setting("ViT", "NAdam", 1e-3, 32),
    Setting("VAE", "Adam", 1e-3, 64),
    Setting("VAE", "Adam", 2e-3, 32, restarts),
    Setting("U-Net", "Adam", 3e-3, 16, triangles),
    Setting("U-Net", "SGD", 0.1, 16, warmup),
    Setting("MoE", "AdamW", 3e-3, 64, warmup),
    Setting("diffusion", "Adam", 2e-3, 128, warmup),
    Setting("diffusion", "RAdam", 3e-3, 64),
    Setting("autoencoder", "Adam", 2e-3, 64, in_steps),
    Setting("DQN", "Adam", 1e-3, 64),
    Setting("DQN", "RMSprop", 1e-3, 32, triangles),
    Setting("CNN", "SGD", 0.05, 32, in_steps),
    Setting("CNN", "AdamW", 2e-3, 16, restarts),
    Setting("tanh", "SGD", 0.05, 32, one_cycle),
)


def train_gan(
    seed: int, steps: int = 160, what: tuple[str, ...] = ("grad", "activation")
) -> History:
    """Two networks against each other, each with its own loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    maker, judge = mlp_of([8, 48, 48, 2], nn.ReLU), mlp_of([2, 48, 48, 1], nn.LeakyReLU)
    both = nn.ModuleDict({"maker": maker, "judge": judge})
    make = torch.optim.Adam(maker.parameters(), 1e-3, (0.5, 0.999))
    tell = torch.optim.Adam(judge.parameters(), 1e-3, (0.5, 0.999))
    with gradstat.watch(both, what=what, when="call") as w:
        for _ in range(steps):
            turn = 6.28 * torch.rand(64, 1, generator=generator)
            real = torch.cat([turn.sin(), turn.cos()], 1)
            made = maker(torch.randn(64, 8, generator=generator))
            right = F.softplus(-judge(real)).mean() + F.softplus(judge(made.detach())).mean()
            both.zero_grad()
            right.backward()
            tell.step()
            fooled = F.softplus(-judge(made)).mean()
            maker.zero_grad()
            fooled.backward()
            make.step()
            w.measure()
            w.log(d_loss=right, g_loss=fooled)
    return w.history
