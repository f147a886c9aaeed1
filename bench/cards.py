"""What limits a kernel on a card, by nominal figures and by what others have measured.

Six roofs, each as a share of the memory's nominal speed:

    bandwidth  the time in which the memory delivers an element
    issue      four warp instructions a clock and multiprocessor
    a pipe     the lanes of `Card.lanes`, from the table "Arithmetic Instructions" of the CUDA C++
               Programming Guide (https://docs.nvidia.com/cuda/cuda-c-programming-guide);
               conversions, as `F2I`, run in 16 lanes
    atomics    a warp's shared atomics take a clock for each distinct address in its fullest bank
    in flight  bytes on their way, by Little's law

The atomics' rule, and its check: uniform bytes in 256 bins give 10.2 elements a clock and
multiprocessor, 2.35e12 a second on an H100 at 1.755 GHz. A published kernel of 256 bins measures
2.30e12 on that card (https://yencal.github.io/gpu-histogram-optimization). Nothing else is
calibrated.

`LATENCY_S` under load is an assumption: about three times what an idle H100's memory takes. All of
it is a prediction, and no time was measured.

A launch over a list (`launch_seconds`): a program takes the time that it would take alone, a wait
for memory and its instructions for each round of its loops, as long as all programs that run ask
memory for no more than it delivers; else all of them are slowed down alike. A multiprocessor takes
the next item when one of its programs ends. `LAUNCH_S`, from one kernel's end to the next one's
start where the stream holds both ready, is an assumption as well.
"""

from __future__ import annotations

import functools
import heapq
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gradstat.bins import LOG2_SHIFT

ISSUED = 128  # instructions of a thread that a multiprocessor issues in a clock
REGISTERS = 65536  # of a multiprocessor
WARP, BANKS = 32, 32
LATENCY_S = 800e-9
LAUNCH_S = 1e-6

_LANES = {"alu": 64, "fma": 128, "memory": 32, "conversion": 16}


@dataclass(frozen=True)
class Card:
    """Nominal figures of a card, of its multiprocessors, and lanes of their pipes in a clock."""

    name: str
    architecture: int
    bytes_per_second: float
    multiprocessors: int
    hertz: float
    threads: int
    fma: int = 128

    @property
    def lanes(self) -> dict[str, int]:
        return {**_LANES, "fma": self.fma}

    def elements(self, itemsize: int) -> float:
        """Elements that memory delivers to a multiprocessor in a clock."""
        return self.bytes_per_second / self.hertz / self.multiprocessors / itemsize


CARDS = (
    Card("T4", 75, 0.32e12, 40, 1.59e9, 1024, fma=64),
    Card("A100", 80, 2.04e12, 108, 1.41e9, 2048, fma=64),
    Card("RTX 3090", 86, 0.936e12, 82, 1.695e9, 1536),
    Card("L4", 89, 0.3e12, 58, 2.04e9, 1536),
    Card("RTX 4090", 89, 1.008e12, 128, 2.52e9, 1536),
    Card("H100", 90, 3.35e12, 132, 1.755e9, 2048),
    Card("H200", 90, 4.8e12, 132, 1.755e9, 2048),
    Card("B200", 100, 8.0e12, 148, 1.85e9, 2048),
    Card("RTX 5090", 120, 1.792e12, 170, 2.41e9, 1536),
)
DISTRIBUTIONS = ("Gaussian", "lognormal", "uniform", "constant")


def named(name: str) -> Card | None:
    """The card of a name as its driver tells it, as ``"NVIDIA H100 80GB HBM3"``."""
    return next((card for card in CARDS if re.search(rf"\b{card.name}\b", name)), None)


def values(distribution: str, n: int) -> np.ndarray:
    """So many values, float32: of a deviation of 1, over 20 octaves of both signs, or in +-4."""
    generator = np.random.default_rng(20)
    if distribution == "Gaussian":
        x = generator.normal(size=n)
    elif distribution == "lognormal":
        x = np.exp2(generator.uniform(-20, 0, n)) * generator.choice([-1, 1], n)
    elif distribution == "uniform":
        x = generator.uniform(-4, 4, n)
    else:
        x = np.full(n, 0.3)
    return x.astype(np.float32)


@functools.cache
def atomic_clocks(bins: int, distribution: str, warps: int = 20_000) -> float:
    """Clocks of a warp's shared atomics: log2 bins for 0, or so many linear bins over +-4."""
    x = values(distribution, WARP * warps)
    slots = (x.view(np.uint32) >> LOG2_SHIFT).astype(np.int64)
    if bins:
        slots = np.floor((x + 4) / 8 * bins).astype(np.int64)
        slots = np.where(x < -4, bins + 2, np.where(x > 4, bins + 1, slots))
    return float(np.mean(bank_conflicts(slots.reshape(-1, WARP))))


def bank_conflicts(addresses: np.ndarray) -> np.ndarray:
    """Distinct addresses in the fullest bank, for each row: addresses of a warp, in words."""
    ordered = np.sort(addresses, axis=1)
    is_new = np.ones_like(ordered, dtype=bool)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    rows = np.arange(len(ordered))[:, None]
    each = np.bincount((rows * BANKS + ordered % BANKS)[is_new], minlength=len(ordered) * BANKS)
    return each.reshape(-1, BANKS).max(axis=1)


def predict(card: Card, figures: dict[str, Any], bins: int | None, distribution: str) -> Any:
    """Share of the memory's speed, at most 1, and the roof that sets it.

    Args:
        card: a card of the figures' architecture.
        figures: of a kernel's loop, see `roofline.examine`.
        bins: see `atomic_clocks`; ``None`` for a kernel without a histogram.
        distribution: one of `DISTRIBUTIONS`.
    """
    needed = card.elements(figures["itemsize"])
    roofs = {"bandwidth": 1.0, "issue": ISSUED / figures["instructions"] / needed}
    for pipe, lanes in card.lanes.items():
        if figures["pipes"].get(pipe):
            roofs[pipe] = lanes / figures["pipes"][pipe] / needed
    if bins is not None:
        roofs["atomics"] = WARP / atomic_clocks(bins, distribution) / needed
    programs = min(figures["programs"], card.threads // figures["threads"])
    per_multiprocessor = card.bytes_per_second * LATENCY_S / card.multiprocessors
    roofs["in flight"] = programs * figures["program_bytes"] / per_multiprocessor
    roof = min(roofs, key=lambda name: roofs[name])
    return roofs[roof], roof


def launch_seconds(
    programs: Sequence[tuple[float, int]], at_once: int, bytes_per_second: float
) -> float:
    """Seconds of a launch, from the start of its first program to the end of its last one.

    Args:
        programs: in the order of the launch: seconds that each would take alone, and bytes.
        at_once: programs that a card runs at a time.
        bytes_per_second: that it can read and work on, all programs together.
    """
    # All programs are slowed down by one factor, so they end in the order of their own clock, which
    # runs by that factor behind.
    seconds = own = demand = 0.0
    running: list[tuple[float, float]] = []
    for i in range(len(programs) + at_once):
        if len(running) == at_once or (running and i >= len(programs)):
            end, freed = heapq.heappop(running)
            seconds += (end - own) * max(1.0, demand / bytes_per_second)
            own, demand = end, demand - freed
        if i < len(programs):
            alone, n_bytes = programs[i]
            heapq.heappush(running, (own + alone, n_bytes / alone))
            demand += n_bytes / alone
    return seconds
