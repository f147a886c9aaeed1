"""Layers that stand still, each in a made-up run, and schedules that are no finding."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from findings import N, diagnose, noise, only
from histories import append_rows, make_history
from torch import Tensor

import gradstat
from gradstat import History, Log2Bins
from gradstat.record import Row
from gradstat.results import INTEGERS

L = 4
KINDS = ("grad", "param", "update")
Rate = Callable[[int, int], float]


def moving(rate: Rate, steps: int = 120, weight: float = 1.0, gradient: float = 1.0) -> History:
    """A run of which a step changes a layer by ``rate(step, layer)`` of its size.

    Layer 1 has weights and gradients of sizes of its own.
    """
    rows = [Row(kind, f"{layer}.weight") for kind in KINDS for layer in range(L)]
    history = History(rows, Log2Bins())
    s = gradstat.statistics([noise(0, row) for row in range(3 * L)], engine="reference")
    sizes, only_zeros = np.ones(3 * L), np.zeros(2048, np.int64)
    only_zeros[1024] = N
    sizes[[1, L + 1]] = gradient, weight
    for step in range(steps):
        sizes[2 * L :] = [rate(step, layer) for layer in range(L)]
        integers, floats, counts = (x.numpy().copy() for x in (s.integers, s.floats, s.counts))
        floats[:, :-2] *= sizes[:, None]
        integers[sizes == 0, INTEGERS.index("zeros")] = N
        counts[sizes == 0] = only_zeros
        append_rows(history, step, integers, floats, counts)
    return history


def stuck(history: History) -> list[tuple[str, str, tuple[int, int]]]:
    found = [each for each in diagnose(history) if each.kind == "stuck"]
    return [(each.severity, each.layer, each.steps) for each in found]


@pytest.mark.parametrize(
    ("pace", "rate", "found"),
    [(1e-2, 8e-7, True), (1e-2, 1.5e-6, False), (1e-4, 5e-8, True), (1e-4, 5e-7, False)],
)
def test_diagnose_finds_a_layer_that_stands_still_while_others_move(
    pace: float, rate: float, found: bool
) -> None:
    history = moving(lambda step, layer: rate if layer == 1 else pace)
    if not found:
        assert diagnose(history) == []
        return
    finding = only(history, "stuck")
    assert [finding] == diagnose(history)
    assert (finding.severity, finding.layer, finding.steps) == (
        "warning",
        "update/1.weight",
        (0, 119),
    )
    assert finding.numbers["ratio"] == history.update_ratio()[:, 1].max()
    assert finding.numbers["ratio"] == pytest.approx(rate, rel=0.3)
    assert finding.numbers["pace"] == pytest.approx(pace, rel=0.3)
    assert finding.numbers["zeros"] == 0
    assert finding.sentence.startswith("1.weight stands still while others move: a step changes")
    assert "round" not in finding.sentence
    assert diagnose(history, stuck_ratio=rate / 2) == []
    assert diagnose(history, stuck_pace=rate / pace / 2) == []


def test_diagnose_says_that_changes_round_to_nothing() -> None:
    history = moving(lambda step, layer: 0.0 if layer == 1 else 1e-3)
    finding = only(history, "stuck")
    assert (finding.numbers["ratio"], finding.numbers["zeros"]) == (0, 1)
    assert "no step changes it, and the median layer by" in finding.sentence
    assert "; no element changes: the changes round" in finding.sentence


@pytest.mark.parametrize(
    ("still", "steps"),
    [
        (range(60, 120), (60, 119)),
        (range(120), (0, 119)),
        (range(80, 120), None),
        (range(80), None),
    ],
)
def test_diagnose_wants_a_layer_to_stand_still_for_three_windows_to_the_end(
    still: range, steps: tuple[int, int] | None
) -> None:
    history = moving(lambda step, layer: 1e-8 if layer == 1 and step in still else 1e-3)
    assert stuck(history) == ([("warning", "update/1.weight", steps)] if steps else [])


@pytest.mark.parametrize(("onset", "found"), [(300, 1), (320, 0)])
def test_diagnose_wants_a_layer_to_stand_still_for_a_quarter_of_a_long_run(
    onset: int, found: int
) -> None:
    history = moving(lambda step, layer: 1e-8 if layer == 1 and step >= onset else 1e-3, 400)
    assert len(stuck(history)) == found


def test_diagnose_lets_a_layer_rest_in_most_steps() -> None:
    # As an expert that few batches need.
    assert stuck(moving(lambda step, layer: 0.0 if layer == 1 and step % 20 else 1e-3)) == []


SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda t: 1.0,
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "exponential": lambda t: 10 ** (-9 * t),
    "steps": lambda t: 0.1 ** (10 * t // 1),
    "cosine to half": lambda t: (1 + math.cos(math.pi * min(1.0, 2 * t))) / 2,
    "warm-up": lambda t: 1e-3 * t,
    "slow warm-up": lambda t: 1e-6 * t,
    "warm-up from something": lambda t: 1e-7 + 1e-6 * t,
    "the end of a linear one": lambda t: 1e-6 * (1 - t),
    "the end of a cosine": lambda t: 1e-6 * (1 - t) ** 2,
    "warm-up and decay": lambda t: min(1.0, 10 * t) * (1 - t),
    "restarts": lambda t: (1 + math.cos(4 * math.pi * t)) / 2 + 1e-9,
}


@pytest.mark.parametrize("rounds", [0.0, 1e-7], ids=["exact", "rounded"])
@pytest.mark.parametrize("slow", [1.0, 1 / 300])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [20, 200])
def test_diagnose_lets_a_schedule_slow_all_layers_down(
    schedule: str, slow: float, steps: int, rounds: float
) -> None:
    def rate(step: int, layer: int) -> float:
        change = 1e-2 * SCHEDULES[schedule](step / steps)
        change *= slow if layer == 1 else 1.0
        # In float32 the steps of a layer with large weights round to nothing first.
        return 0.0 if layer == 1 and change < rounds else change

    assert stuck(moving(rate, steps)) == []


@pytest.mark.parametrize(("steps", "found"), [(19, False), (20, True), (200, True)])
def test_diagnose_finds_that_no_layer_has_moved_from_the_start(steps: int, found: bool) -> None:
    history = moving(lambda step, layer: 1e-8 if layer else 1e-2, steps)
    assert stuck(history) == ([("warning", "update/1.weight", (0, steps - 1))] if found else [])
    if found:
        finding = only(history, "stuck")
        assert finding.numbers["ratio"] == pytest.approx(1e-8, rel=0.3)
        assert (finding.numbers["zeros"], finding.numbers["layers"]) == (0, 3)
        assert finding.sentence.startswith("1.weight and 2 more of 4 layers have not moved from")
        assert finding.sentence.endswith("; the learning rate is far too small.")


@pytest.mark.parametrize(("steps", "severity"), [(20, "warning"), (60, "severe")])
def test_diagnose_calls_it_severe_that_all_changes_round_to_nothing(
    steps: int, severity: str
) -> None:
    history = moving(lambda step, layer: 0.0, steps)
    finding = only(history, "stuck")
    assert (finding.severity, finding.layer) == (severity, "update/0.weight")
    assert finding.numbers == {"ratio": 0, "zeros": 1, "layers": 4}
    assert "no element changes" in finding.sentence


@pytest.mark.parametrize(
    ("rates", "words"),
    [
        ((0.0,), "changes the median layer; the learning rate is 0."),
        ((1e-3,), "round to nothing in the type of the weights."),
        ((1e-3, 0.0), "in the type of the weights, or the learning rate is 0."),
        ((), "in the type of the weights, or the learning rate is 0."),
    ],
)
def test_diagnose_says_what_the_learning_rate_has_to_do_with_it(
    rates: tuple[float, ...], words: str
) -> None:
    history = moving(lambda step, layer: 0.0, 60)
    for step in range(60):
        for group, rate in enumerate(rates):
            history.add_scalar(f"lr/{group}", step, rate)
    assert only(history, "stuck").sentence.endswith(words)


def test_diagnose_does_not_round_the_unchanged_share_up_to_all() -> None:
    def row(step: int, at: int) -> Tensor:
        x = noise(step, at, 1.0)
        # 1 of 10,000.
        return torch.cat([x[:1] * 1e-8, torch.zeros(9999)]) if at >= 2 * L else x

    finding = only(make_history(Log2Bins(), L, 60, row, kinds=KINDS), "stuck")
    assert finding.severity == "severe"
    assert "99.9% of the elements" in finding.sentence


@pytest.mark.parametrize(("rate", "found"), [(1e-3, False), (0.0, True)])
def test_diagnose_of_weights_of_zero_asks_whether_they_stay_so(rate: float, found: bool) -> None:
    history = moving(lambda step, layer: rate if layer == 1 else 1e-3, weight=0.0)
    assert (history["rms"][:, L + 1] == 0).all()
    assert stuck(history) == ([("warning", "update/1.weight", (0, 119))] if found else [])


def test_diagnose_calls_a_layer_without_a_gradient_dead_and_not_stuck() -> None:
    history = moving(lambda step, layer: 0.0 if layer == 1 else 1e-3, gradient=0.0)
    assert [(each.kind, each.layer) for each in diagnose(history)] == [("dead", "1.weight")]


def test_diagnose_says_nothing_of_updates_that_are_absent_or_alone() -> None:
    absent = [(step, 2 * L + layer) for step in range(40) for layer in range(L)]
    history = make_history(Log2Bins(), L, 40, noise, absent=absent, kinds=KINDS)
    assert diagnose(history) == []
    history = moving(lambda step, layer: 0.0)
    assert history.select("update").diagnose() == []


@pytest.mark.parametrize(
    ("dtype", "found"), [(torch.bfloat16, True), (torch.float32, False)], ids=str
)
def test_diagnose_finds_weights_that_round_nearly_all_changes_to_nothing(
    dtype: torch.dtype, found: bool
) -> None:
    torch.manual_seed(20)
    linear = [torch.nn.Linear(64, 64, bias=False) for _ in range(4)]
    model = torch.nn.Sequential(*linear).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    options = {"when": "step", "optimizer": optimizer}
    with gradstat.watch(model, what=("grad", "update"), **options) as w:
        for _ in range(60):
            x = torch.randn(64, 64, dtype=dtype)
            optimizer.zero_grad()
            (model(x) - x).square().mean().backward()
            optimizer.step()
    # What moves keeps the ratio above the threshold.
    assert (w.history.update_ratio() > 1e-6).all()
    findings = [each for each in diagnose(w.history) if each.kind == "stuck"]
    assert [each.severity for each in findings] == ["warning"] * found
    if found:
        assert findings[0].numbers["layers"] == 4
        assert findings[0].numbers["zeros"] > 0.9
        assert findings[0].steps == (0, 59)


@pytest.mark.parametrize(
    ("pace", "final", "found"),
    [(5e-6, 1.0, True), (5e-6, 0.5, False), (5e-5, 1.0, False), (1e-3, 1.0, False)],
)
def test_diagnose_tells_steps_that_are_too_small_for_the_loss_to_fall(
    pace: float, final: float, found: bool
) -> None:
    history = moving(lambda step, layer: pace)
    for step in range(120):
        noise = 0.02 * math.sin(7 * step)
        history.add_scalar("loss", step, 1 + (final - 1) * step / 119 + noise)
        history.add_scalar("lr", step, 1e-6)
    assert stuck(history) == ([("warning", "update/0.weight", (0, 119))] if found else [])
    if found:
        sentence = diagnose(history)[0].sentence
        assert sentence.endswith("stays as it is: the learning rate, 1e-06, is too small.")
    # Nobody knows whether the loss falls.
    assert stuck(moving(lambda step, layer: pace)) == []
