"""The benchmarks of a machine with a GPU: first the gate, then the timings.

The gate: ``pytest -m gpu``, and ``compute-sanitizer`` on a small run where it is installed. The
timings: each checked against the reference before it is timed, with the L2 cache flushed and, up
to 16 MB, hot. One JSON and one PNG, named after the card, come out.

Usage: python bench/gpu_suite.py [--out DIR] [--dry-run]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
DRY_RUN = "--dry-run" in sys.argv
if DRY_RUN:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch
import triton
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
SANITIZED = """
import torch, gradstat
x = torch.randn(99999).cuda()
xs = [x, x[1:], x[::3], x.half(), x.bfloat16(), x[:99000].view(300, 330).t(), x[:0]]
for bins in (gradstat.Log2Bins(), gradstat.LinearBins(64, -1.0, 1.0), gradstat.LinearBins(30)):
    print(gradstat.statistics(xs, bins))
"""
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


def gate() -> list[dict[str, Any]]:
    """Run what must hold before anything is timed.

    Raises:
        SystemExit: one of them fails.
    """
    commands = {"pytest -m gpu": [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]}
    if shutil.which("compute-sanitizer"):
        tool = ["compute-sanitizer", "--error-exitcode", "1"]
        commands["compute-sanitizer"] = [*tool, sys.executable, "-c", SANITIZED]
    passed = []
    for name, command in commands.items():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        print(f"{name}: {done.stdout.strip().splitlines()[-1:]}", flush=True)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        passed.append({"gate": name, "output": done.stdout.strip().splitlines()[-1]})
    return passed


def describe(device: torch.device) -> dict[str, Any]:
    """Card, versions and commit."""
    git = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    card: dict[str, Any] = {"name": f"none: {platform.machine()}, interpreted"}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False)
        card = {
            "name": properties.name,
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": driver.stdout.strip(),
        }
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
    }
    return {"card": card, "versions": versions, "commit": commit}


def draw(document: dict[str, Any], path: Path) -> None:
    """Input read in a second, against its size, for each dtype."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for ax, dtype in zip(figure.subplots(1, 2, sharey=True), ("float32", "bfloat16"), strict=True):
        rows = [
            row
            for row in document["benchmarks"]
            if row["suite"] == "tensors"
            and (row["dtype"], row["distribution"], row["flushed"]) == (dtype, "Gaussian", True)
        ]
        for name in dict.fromkeys(row["contestant"] for row in rows):
            mine = [row for row in rows if row["contestant"] == name]
            sizes = [row["bytes"] for row in mine]
            ax.loglog(
                sizes,
                [row["bytes"] / row["median"] / 1e9 for row in mine],
                marker=".",
                linewidth=2 if name.startswith("gradstat") else 1,
                label=name,
            )
        ax.set_title(dtype)
        ax.set_xlabel("bytes")
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("GB/s of input")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", frameon=False)
    figure.suptitle(document["card"]["name"])
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU")
    options = parser.parse_args()
    if not options.dry_run and not torch.cuda.is_available():
        print(
            "There is no CUDA device here, so nothing was measured. With one, this runs the tests "
            f"marked gpu, times tensors of {', '.join(f'{n >> 10} KB' for n in Plan().sizes)} in "
            f"float32 and bfloat16 over {', '.join(DISTRIBUTIONS)} values, the gradients of "
            f"{', '.join(LISTS)}, and a training step of GPT-2 small, bare and watched.\n"
            "--dry-run goes through all of it on the CPU, at tiny sizes, in Triton's interpreter."
        )
        return 1
    plan, device = (TINY, "cpu") if options.dry_run else (Plan(), "cuda")
    clock = Clock(torch.device(device), plan)
    document = {**describe(clock.device), "gate": [] if options.dry_run else gate()}
    rows = document["benchmarks"] = []
    for suite in (time_tensors, time_lists, time_training):
        for row in suite(plan, clock):
            rows.append(row)
            print(" ".join(f"{key}={value}" for key, value in row.items()), flush=True)
    name = "".join(c if c.isalnum() else "-" for c in document["card"]["name"]).lower()
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / ("dry-run.json" if options.dry_run else f"gpu-{name}.json")
    path.write_text(json.dumps(document, indent=1) + "\n")
    draw(document, path.with_suffix(".png"))
    print(f"Results are in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
