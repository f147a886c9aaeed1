"""What `gpu_suite` times: tensors, lists and a training step, each checked before it is timed."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import itertools
import statistics
import tempfile
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
# And those of `cards` that are like them.
DISTRIBUTIONS = {
    "Gaussian": "Gaussian",
    "lognormal": "lognormal",
    "zeros": "constant",
    "one bin": "constant",
}
TIMES = ("median", "quartiles", "ratio")
NETWORKS = ("MLP", "GPT-2 small")
MODES = ("eager", "compiled", "graphed")
LISTS = {"MLP": MLP, "ResNet-50": RESNET50, "GPT-2 small": GPT2_SMALL}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run; those of a dry run are tiny."""

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
    takes_times: bool = True


TINY = Plan(
    sizes=(1 << 13,),
    distribution_bytes=1 << 12,
    hot_up_to=1 << 13,
    flush_bytes=1 << 12,
    rounds=1,
    lists=("MLP",),
    network={"layers": 1, "width": 16, "heads": 2, "vocabulary": 32, "context": 8},
    batch=1,
    takes_times=False,
)


class Clock:
    """Times calls by CUDA events. In a dry run every call takes a second, which nobody believes."""

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.device, self.rounds, self._takes_times = device, plan.rounds, plan.takes_times
        self.flush = torch.empty(plan.flush_bytes, dtype=torch.int8, device=device)

    def seconds(self, call: Call, *, flushed: bool) -> list[float]:
        """One time for each round, on a card after two rounds of warm-up."""
        if not self._takes_times:
            for _ in range(self.rounds):
                call()
            return self.rounds * [1.0]
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


def contestants(x: Tensor, plan: Plan) -> dict[str, Call]:
    """What is timed for a tensor."""
    target = torch.empty_like(x)
    calls: dict[str, Call] = {
        f"gradstat {name}": functools.partial(gradstat.statistics, x, bins, engine="triton")
        for name, bins in SCHEMES.items()
    }
    calls["torch composite"] = functools.partial(composite, x)
    calls["torch.histc"] = lambda: torch.histc(x.float(), BINS, LOW, HIGH)
    calls["torch.aminmax"] = lambda: torch.aminmax(x)
    if x.nbytes <= plan.hot_up_to:  # it runs on the CPU alone, and waits for the copy
        calls["torch.histogram"] = lambda: torch.histogram(x.float().cpu(), BINS, range=(LOW, HIGH))
    calls["_foreach_norm"] = lambda: torch._foreach_norm([x])
    calls["copy"] = lambda: target.copy_(x)
    if x.device.type == "cuda" and importlib.util.find_spec("cupy"):
        import cupy

        y = cupy.from_dlpack(x.float())
        calls["cupy.histogram"] = lambda: cupy.histogram(y, BINS, (LOW, HIGH))
    return calls


def check_contestants(x: Tensor, plan: Plan) -> None:
    """Whether what counts values counts them right."""
    expected = {name: truth(x, bins) for name, bins in SCHEMES.items()}
    for name, call in contestants(x, plan).items():
        if name.startswith("gradstat "):
            check_statistics(call(), expected[name.removeprefix("gradstat ")])
        elif name == "torch composite":
            check_composite(call(), expected["linear"], x.dtype)
        elif name == "torch.histc":
            check_counts(call(), expected["linear"])
        elif name == "torch.histogram":
            check_counts(call().hist, expected["linear"])
        elif name == "torch.aminmax":
            assert call() == (expected["linear"].min, expected["linear"].max)
        elif name == "cupy.histogram":
            check_counts(call()[0].get(), expected["linear"])


def time_tensors(plan: Plan, clock: Clock) -> Iterator[dict[str, Any]]:
    """Every size, and every distribution at one size."""
    cases = [(size, "Gaussian") for size in plan.sizes]
    cases += [(plan.distribution_bytes, name) for name in list(DISTRIBUTIONS)[1:]]
    for dtype in DTYPES:
        for n_bytes, distribution in cases:
            x = make(n_bytes, dtype, distribution, clock.device)
            check_contestants(x, plan)
            for flushed in (True, False) if n_bytes <= plan.hot_up_to else (True,):
                for name, call in contestants(x, plan).items():
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


class Training:
    """A network in training with AdamW on one batch: one more step at each call.

    Args:
        network: one of `NETWORKS`.
        plan: sizes.
        mode: ``"eager"``, ``"compiled"``, or ``"graphed"``, which captures the step.
        device: to train on.
    """

    def __init__(self, network: str, plan: Plan, mode: str, device: torch.device) -> None:
        torch.manual_seed(20)
        self.model: nn.Module
        if network == "MLP":
            sizes = [784, 10, 10, 10, 10]
            linear = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
            others = [nn.ReLU() for _ in linear[1:]]
            layers = [x for pair in itertools.zip_longest(linear, others) for x in pair if x]
            self.model = nn.Sequential(*layers)
            self.inputs = torch.rand(128, 784, device=device)
            self.targets = torch.randint(10, (128,), device=device)
        else:
            self.model = GPT(**plan.network)
            shape = (plan.batch, plan.network["context"] + 1)
            tokens = torch.randint(plan.network["vocabulary"], shape, device=device)
            self.inputs, self.targets = tokens[:, :-1], tokens[:, 1:].flatten()
        self.model.to(device)
        self._device, self._mode = device, mode
        self._forward = torch.compile(self.model) if mode == "compiled" else self.model
        self._optimizer = torch.optim.AdamW(
            self.model.parameters(), 1e-4, fused=device.type == "cuda", capturable=mode == "graphed"
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        self._watch: gradstat.Watch | None = None

    def begin(self, watch: gradstat.Watch | None = None) -> None:
        """Warm up and, where the mode asks for it, capture; after `gradstat.watch`, if at all."""
        self._watch = watch
        if self._mode != "graphed":
            self._step()
            return
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._step()

    def __call__(self) -> None:
        if self._graph is None:
            self._step()
            return
        self._graph.replay()
        if self._watch is not None:
            self._watch.replayed()

    def _step(self) -> None:
        with torch.autocast(self._device.type, torch.bfloat16):
            output = self._forward(self.inputs)
            loss = nn.functional.cross_entropy(output.float(), self.targets)
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()


def time_training(plan: Plan, clock: Clock) -> Iterator[dict[str, Any]]:
    """Steps of each network in each mode: bare and watched, in turns."""
    modes = MODES if clock.device.type == "cuda" else MODES[:1]
    for network, mode in itertools.product(NETWORKS, modes):
        with contextlib.ExitStack() as stack:
            steps = {
                name: Training(network, plan, mode, clock.device)
                for name in ("bare", "gradstat.watch", "wandb.watch")
                if name != "wandb.watch" or (mode == "eager" and has_wandb(clock.device))
            }
            for name, step in steps.items():
                watch = None
                if name == "gradstat.watch":
                    watch = stack.enter_context(gradstat.watch(step.model, engine="triton"))
                elif name == "wandb.watch":
                    stack.enter_context(watch_with_wandb(step.model))
                step.begin(watch)
            seconds: dict[str, list[float]] = {name: [] for name in steps}
            for _ in range(4):
                for name, step in steps.items():
                    seconds[name] += clock.seconds(step, flushed=False)
        bare = statistics.median(seconds["bare"])
        for name, times in seconds.items():
            yield {
                "suite": "training",
                "contestant": name,
                "network": network,
                "mode": mode,
                "ratio": statistics.median(times) / bare,
                **summarise(times),
            }


def has_wandb(device: torch.device) -> bool:
    return device.type == "cuda" and importlib.util.find_spec("wandb") is not None


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
