"""What `gpu_suite` times: tensors, lists and a training step, each checked before it is timed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from answers import (
    BINS,
    HIGH,
    LOW,
    SCHEMES,
    check_composite,
    check_counts,
    check_statistics,
    composite,
    truth,
)
from networks import GPT
from shapes import GPT2_SMALL, MLP, RESNET50
from torch import Tensor, nn

import gradstat

Call = Callable[[], Any]

DTYPES = (torch.float32, torch.bfloat16)
DISTRIBUTIONS = ("Gaussian", "lognormal", "zeros", "one bin")
LISTS = {"MLP": MLP, "ResNet-50": RESNET50, "GPT-2 small": GPT2_SMALL}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; those of a dry run on the CPU are tiny."""

    sizes: tuple[int, ...] = (1 << 16, 1 << 20, 1 << 24, 1 << 26, 1 << 28, 1 << 30)  # bytes
    distribution_bytes: int = 1 << 28
    hot_up_to: int = 1 << 24
    flush_bytes: int = 1 << 28
    rounds: int = 30
    lists: tuple[str, ...] = tuple(LISTS)
    network: dict[str, int] = field(
        default_factory=lambda: {
            "layers": 12,
            "width": 768,
            "heads": 12,
            "vocabulary": 50257,
            "context": 1024,
        }
    )
    batch: int = 8


TINY = Plan(
    sizes=(1 << 13,),
    distribution_bytes=1 << 12,
    hot_up_to=1 << 13,
    flush_bytes=1 << 12,
    rounds=1,
    lists=("MLP",),
    network={"layers": 1, "width": 16, "heads": 2, "vocabulary": 32, "context": 8},
    batch=1,
)


class Clock:
    """Times calls on a device: CUDA events on a GPU, the host's clock in a dry run."""

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.device, self.rounds = device, plan.rounds
        self.flush = torch.empty(plan.flush_bytes, dtype=torch.int8, device=device)

    def seconds(self, call: Call, *, flushed: bool) -> list[float]:
        """One time for each round, on a GPU after two rounds of warm-up."""
        if self.device.type != "cuda":
            return [_host_seconds(call) for _ in range(self.rounds)]
        for _ in range(2):
            call()
        events = []
        for _ in range(self.rounds):
            if flushed:
                self.flush.zero_()
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            call()
            pair[1].record()
            events.append(pair)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def _host_seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def make(n_bytes: int, dtype: torch.dtype, distribution: str, device: torch.device) -> Tensor:
    """A tensor of so many bytes; Gaussian ones have a standard deviation of 0.1."""
    generator = torch.Generator(device).manual_seed(20)
    n = n_bytes // dtype.itemsize
    if distribution == "zeros":
        return torch.zeros(n, dtype=dtype, device=device)
    x = torch.empty(n, device=device)
    if distribution == "one bin":
        x.uniform_(0.3, 0.301, generator=generator)
    elif distribution == "lognormal":  # over 20 octaves, of both signs
        signs = torch.empty_like(x).normal_(generator=generator)
        x.uniform_(-20, 0, generator=generator).exp2_().copysign_(signs)
    else:
        x.normal_(0, 0.1, generator=generator)
    return x.to(dtype)


def contestants(x: Tensor) -> dict[str, Call]:
    """What is timed for a tensor."""
    target = torch.empty_like(x)
    calls: dict[str, Call] = {
        f"gradstat {name}": functools.partial(gradstat.statistics, x, bins, engine="triton")
        for name, bins in SCHEMES.items()
    }
    calls["torch composite"] = functools.partial(composite, x)
    calls["torch.histc"] = lambda: torch.histc(x.float(), BINS, LOW, HIGH)
    calls["_foreach_norm"] = lambda: torch._foreach_norm([x])
    calls["copy"] = lambda: target.copy_(x)
    if x.device.type == "cuda" and importlib.util.find_spec("cupy"):
        import cupy

        y = cupy.from_dlpack(x.float())
        calls["cupy.histogram"] = lambda: cupy.histogram(y, BINS, (LOW, HIGH))
    return calls


def check_contestants(x: Tensor) -> None:
    """Whether what counts values counts them right."""
    expected = {name: truth(x, bins) for name, bins in SCHEMES.items()}
    for name, call in contestants(x).items():
        if name.startswith("gradstat "):
            check_statistics(call(), expected[name.removeprefix("gradstat ")])
        elif name == "torch composite":
            check_composite(call(), expected["linear"], x.dtype)
        elif name == "torch.histc":
            check_counts(call(), expected["linear"])
        elif name == "cupy.histogram":
            check_counts(call()[0].get(), expected["linear"])


def time_tensors(plan: Plan, clock: Clock) -> Iterator[dict[str, Any]]:
    """Every size, and every distribution at one size."""
    cases = [(size, "Gaussian") for size in plan.sizes]
    cases += [(plan.distribution_bytes, name) for name in DISTRIBUTIONS[1:]]
    for dtype in DTYPES:
        for n_bytes, distribution in cases:
            x = make(n_bytes, dtype, distribution, clock.device)
            check_contestants(x)
            for flushed in (True, False) if n_bytes <= plan.hot_up_to else (True,):
                for name, call in contestants(x).items():
                    yield {
                        "suite": "tensors",
                        "contestant": name,
                        "bytes": n_bytes,
                        "dtype": str(dtype).removeprefix("torch."),
                        "distribution": distribution,
                        "flushed": flushed,
                        **summarise(clock.seconds(call, flushed=flushed)),
                    }


def time_lists(plan: Plan, clock: Clock) -> Iterator[dict[str, Any]]:
    """All gradients of a model."""
    for model in plan.lists:
        for dtype in DTYPES:
            tensors = [
                make(dtype.itemsize * torch.Size(s).numel(), dtype, "Gaussian", clock.device)
                for s in LISTS[model]
            ]
            n_bytes = sum(x.nbytes for x in tensors)
            one = torch.empty(n_bytes, dtype=torch.int8, device=clock.device)
            other = torch.empty_like(one)
            calls: dict[str, Call] = {"copy": functools.partial(other.copy_, one)}
            for name, bins in SCHEMES.items():
                call = functools.partial(gradstat.statistics, tensors, bins, engine="triton")
                for result, x in zip(call(), tensors, strict=True):
                    check_statistics(result, truth(x, bins))
                    check_composite(composite(x), truth(x, SCHEMES["linear"]), dtype)
                calls[f"gradstat {name}"] = call
            calls["torch composite"] = functools.partial(composite_each, tensors)
            calls["_foreach_norm"] = functools.partial(torch._foreach_norm, tensors)
            for name, call in calls.items():
                yield {
                    "suite": "lists",
                    "contestant": name,
                    "model": model,
                    "tensors": len(tensors),
                    "bytes": n_bytes,
                    "dtype": str(dtype).removeprefix("torch."),
                    "flushed": True,
                    **summarise(clock.seconds(call, flushed=True)),
                }


def composite_each(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    """The composite of every tensor of a list."""
    return [composite(x) for x in tensors]


def time_training(plan: Plan, clock: Clock) -> Iterator[dict[str, Any]]:
    """A step of GPT-2 small on random tokens: bare and watched, in turns."""
    torch.manual_seed(20)
    model = GPT(**plan.network).to(clock.device)
    vocabulary, context = plan.network["vocabulary"], plan.network["context"]
    tokens = torch.randint(vocabulary, (plan.batch, context + 1), device=clock.device)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=clock.device.type == "cuda")

    def step() -> None:
        with torch.autocast(clock.device.type, torch.bfloat16):
            logits = model(tokens[:, :-1])
            loss = nn.functional.cross_entropy(logits.float(), tokens[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    ways: dict[str, Callable[[], Any]] = {
        "bare": contextlib.nullcontext,
        "gradstat.watch": functools.partial(gradstat.watch, model, engine="triton"),
    }
    if clock.device.type == "cuda" and importlib.util.find_spec("wandb"):
        ways["wandb.watch"] = functools.partial(watch_with_wandb, model)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(4):
        for name, way in ways.items():
            with way():
                seconds[name] += clock.seconds(step, flushed=False)
    bare = statistics.median(seconds["bare"])
    for name, times in seconds.items():
        ratio = statistics.median(times) / bare
        yield {"suite": "training", "contestant": name, "ratio": ratio, **summarise(times)}


@contextlib.contextmanager
def watch_with_wandb(model: nn.Module) -> Iterator[None]:
    """An offline run that logs every gradient at every step."""
    import wandb

    with wandb.init(project="bench", dir=tempfile.mkdtemp(), mode="offline") as run:
        run.watch(model, log="gradients", log_freq=1)
        # wandb writes what it watched when something is logged.
        handle = model.register_forward_pre_hook(lambda *_: run.log({"step": 1}))
        yield
        handle.remove()
        run.unwatch(model)


def summarise(seconds: list[float]) -> dict[str, Any]:
    """Median and quartiles, in seconds."""
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else 3 * seconds
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]]}
