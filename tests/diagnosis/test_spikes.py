"""Spikes and jumps: when they are told, and which row moved first."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from findings import diagnose, noise, only
from histories import make_history

from gradstat import Finding, History, Log2Bins
from gradstat.diagnosis.usual import find_departures
from gradstat.record import ACTIVATION, GRAD, PARAM, UPDATE

STEPS, AT = 80, 60
KINDS = (GRAD, PARAM, UPDATE, ACTIVATION)
LAYERS = ["in.weight", "mid.weight", "out.weight"]
Scale = Callable[[int, str, int], float]


def wavering(step: int, seed: int = 0) -> float:
    """A factor as of a batch."""
    return math.exp(0.1 * np.random.default_rng(1000 * seed + step).standard_normal())


def run(
    losses: Callable[[int], float] | None = None,
    scale: Scale = lambda step, kind, layer: 1.0,
    kinds: Sequence[str] = KINDS,
    steps: int = STEPS,
) -> History:
    """Healthy rows times a factor, of step, kind and layer, and a loss."""
    n = len(LAYERS)

    def gradient(step: int, row: int) -> torch.Tensor:
        factor = scale(step, kinds[row // n], row % n)
        size = 1.0 if kinds[row // n] == PARAM else wavering(step, row)
        size *= 1e-3 if kinds[row // n] == UPDATE else 1.0
        # Weights are the same from step to step but for a little.
        return factor * size * noise(step if kinds[row // n] != PARAM else 0, row)

    history = make_history(Log2Bins(), LAYERS, steps, gradient, kinds=kinds)
    if losses is not None:
        for step in range(steps):
            history.add_scalar("loss", step, losses(step) * wavering(step))
    return history


def first_mover(finding: Finding) -> str:
    """What the sentence says of it."""
    return finding.sentence.partition("First to leave its usual range was ")[2]


@pytest.mark.parametrize(
    "losses",
    [
        lambda step: 2.0,
        lambda step: 3 * 0.95**step,
        lambda step: 1 + 0.01 * step,
        lambda step: 1e-6,
        lambda step: -1.0,
    ],
    ids=["level", "decay", "slow growth", "tiny", "negative"],
)
def test_diagnose_is_silent_about_a_loss_that_wavers(losses: Callable[[int], float]) -> None:
    assert diagnose(run(losses)) == []


def test_diagnose_tells_a_spike_of_a_loss_that_falls() -> None:
    """It is no higher than the loss was a window before, and far above the trend."""

    def falling(step: int) -> float:
        return 20 * 0.96**step * (2.4 if step == AT else 1.0)

    assert falling(AT) < falling(AT - 22)
    finding = only(run(falling), "loss spike")
    assert finding.steps == (AT, AT)
    assert 1.9 < finding.numbers["times"] < 2.5
    # It stops falling all at once, as at the end of a schedule.
    assert diagnose(run(lambda step: 20 * 0.96 ** min(step, AT))) == []


def test_diagnose_adds_up_values_that_are_each_too_near() -> None:
    def noisy(step: int, times: float) -> float:
        return math.exp(0.2 * np.random.default_rng(step + 7).standard_normal()) * times

    assert diagnose(run(lambda step: noisy(step, 1.0))) == []
    assert diagnose(run(lambda step: noisy(step, 2.6 if step == AT else 1.0))) == []
    found = diagnose(run(lambda step: noisy(step, 2.6 if step >= AT else 1.0)))
    assert [each.kind for each in found] == ["loss spike"]
    assert abs(found[0].steps[0] - AT) <= 1


@pytest.mark.parametrize(
    ("times", "joins", "is_told"),
    [(1.4, False, False), (1.4, True, True), (1.7, False, True)],
    ids=["alone", "with a gradient", "far"],
)
def test_diagnose_lets_a_loss_rise_alone_for_a_step_within_the_noise_of_batches(
    times: float, joins: bool, is_told: bool
) -> None:
    def scale(step: int, kind: str, layer: int) -> float:
        return 20.0 if joins and step == AT and kind == GRAD and layer == 1 else 1.0

    history = run(scale=scale)
    for step in range(STEPS):
        value = (times if step == AT else 1.0) * wavering(step) ** 0.5
        history.add_scalar("loss", step, value)
    losses = np.log(history.scalar("loss")[1])
    (departure,) = find_departures(losses, math.log(1.3), 6.0)
    assert (departure.begin, departure.end) == (AT, AT + 1)
    assert (times > 1.5) == (departure.over(losses) > math.log(1.5))
    assert [each.kind for each in diagnose(history)] == ["loss spike"] * is_told


def test_diagnose_lets_one_of_several_losses_gain_what_another_loses() -> None:
    history = run()
    for step in range(STEPS):
        gained = 0.45 * (step == AT)
        for name, value in (("judge_loss", 1.0 + gained), ("maker_loss", 1.0 - gained)):
            history.add_scalar(name, step, value * math.exp(0.02 * math.sin(step)))
    assert diagnose(history) == []
    alone = run()
    for step in range(STEPS):
        alone.add_scalar(
            "judge_loss", step, (1.45 if step == AT else 1.0) * math.exp(0.02 * math.sin(step))
        )
    assert [each.kind for each in diagnose(alone)] == ["loss spike"]


def test_diagnose_tells_a_spike_of_two_losses_whose_sum_no_float64_holds() -> None:
    history = run()
    for step in range(STEPS):
        for name in ("judge_loss", "maker_loss"):
            history.add_scalar(name, step, 1.5e308 if step == AT else wavering(step))
    # The second one begins with the first.
    assert [each.kind for each in diagnose(history)] == ["loss spike"]


def test_diagnose_lets_weights_grow_little_by_little_while_the_loss_falls() -> None:
    def scale(step: int, kind: str, layer: int) -> float:
        return 1.04 ** max(0, step - 40) if kind == PARAM and layer == 1 else 1.0

    assert diagnose(run(lambda step: 3 * 0.97**step, scale)) == []
    assert only(run(lambda step: 1.0, scale), "jump").layer == "param/mid.weight"


def test_diagnose_lets_weights_speed_up_as_in_a_warm_up() -> None:
    """The same growth is a jump where nothing led up to it."""

    def alarms(paces: list[float]) -> list[Finding]:
        grown = np.cumsum(np.append(np.zeros(AT - 20), paces))

        def scale(step: int, kind: str, layer: int) -> float:
            is_it = kind == PARAM and layer == 1
            return math.exp(grown[min(step, len(grown) - 1)]) if is_it else 1.0

        return diagnose(run(lambda step: 3 * 0.97**step, scale))

    paces = [0.02, 0.04, 0.06, 0.08, 0.1, 0.12, 0.13, 0.13, 0.12, 0.1, 0.08, 0.06, 0.04, 0.02]
    assert alarms(paces) == []
    assert [each.kind for each in alarms(paces[6:])] == ["jump"]


def test_diagnose_tells_a_loss_spike_that_is_over() -> None:
    finding = only(run(lambda step: 20.0 if step in (AT, AT + 1) else 1.0), "loss spike")
    assert finding.severity == "warning"
    assert finding.steps == (AT, AT + 1)
    assert finding.numbers["times"] == pytest.approx(20, rel=0.3)
    assert finding.numbers["recovered"] == 1
    assert "and was back after 2 steps." in finding.sentence
    assert "Nothing had left its usual range before, nor a gradient with it" in finding.sentence


def test_diagnose_tells_a_loss_that_does_not_come_back() -> None:
    finding = only(run(lambda step: 20.0 if step >= AT else 1.0), "loss spike")
    assert finding.severity == "severe"
    assert finding.steps == (AT, STEPS - 1)
    assert finding.numbers["recovered"] == 0
    assert "has not come back" in finding.sentence


def test_diagnose_waits_before_it_calls_the_newest_spike_severe() -> None:
    finding = only(run(lambda step: 20.0 if step == STEPS - 1 else 1.0), "loss spike")
    assert finding.severity == "warning"
    assert "where the record ends" in finding.sentence


@pytest.mark.parametrize("kind", [PARAM, UPDATE, ACTIVATION])
def test_loss_spike_names_the_row_that_moved_first(kind: str) -> None:
    def scale(step: int, of: str, layer: int) -> float:
        if of == kind and layer == 1:
            return 50.0 if AT - 3 <= step < AT else 1.0
        # What follows it.
        return 30.0 if step == AT and of in (GRAD, ACTIVATION) else 1.0

    finding = only(run(lambda step: 9.0 if step == AT else 1.0, scale), "loss spike")
    assert finding.layer == f"{kind}/mid.weight"
    assert finding.numbers["ahead"] == 3
    assert finding.numbers["first_step"] == AT - 3
    name = {PARAM: "parameter", UPDATE: "update", ACTIVATION: "activation"}[kind]
    assert first_mover(finding).startswith(f"mid.weight's {name}, ")
    assert ", 3 steps before" in finding.sentence


def test_loss_spike_names_weights_that_changed_in_the_same_step_before_outputs() -> None:
    def scale(step: int, kind: str, layer: int) -> float:
        if kind == PARAM:
            return 10.0 if layer == 1 and step >= AT else 1.0
        return 8.0 if step == AT else 1.0

    finding = only(run(lambda step: 9.0 if step == AT else 1.0, scale), "loss spike")
    assert finding.layer == "param/mid.weight"
    assert "in the same step; then in.weight's activation" in finding.sentence
    assert finding.numbers["ahead"] == 0


def test_loss_spike_names_a_module_in_the_middle_but_not_the_first_one() -> None:
    def scale_from(first: int) -> Scale:
        return lambda step, kind, layer: (
            30.0 if step == AT and kind == ACTIVATION and layer >= first else 1.0
        )

    def loss(step: int) -> float:
        return 9.0 if step == AT else 1.0

    middle = only(run(loss, scale_from(1)), "loss spike")
    assert middle.layer == "activation/mid.weight"
    every = only(run(loss, scale_from(0)), "loss spike")
    assert "look at the batch" in every.sentence
    assert every.numbers["moved"] == 0


def test_loss_spike_counts_the_gradients_that_moved_with_it() -> None:
    history = run(
        lambda step: 9.0 if step == AT else 1.0,
        lambda step, kind, layer: 30.0 if step == AT and kind == GRAD else 1.0,
    )
    finding = only(history, "loss spike")
    assert "3 of 3 gradients did with it" in finding.sentence
    # The spike of the gradient is no finding of its own.
    assert [each.kind for each in diagnose(history)] == ["loss spike"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_spike_follows_the_chain_to_a_loss_that_is_not_finite(value: float) -> None:
    history = run(
        lambda step: value if step >= AT else 1.0,
        lambda step, kind, layer: (
            5.0 ** max(0, step - AT + 4) if kind == PARAM and layer == 2 else 1.0
        ),
        steps=AT + 12,
    )
    finding = only(history, "loss spike")
    assert finding.severity == "severe"
    assert f"is {value} at step {AT}" in finding.sentence
    assert finding.layer == "param/out.weight"
    assert finding.numbers["ahead"] == 3
    assert all(map(math.isfinite, finding.numbers.values()))


def test_loss_spike_is_told_of_a_run_that_begins_with_nan() -> None:
    history = run(lambda step: math.nan, steps=5)
    assert only(history, "loss spike").steps == (0, 4)


def test_loss_spike_reads_the_mean_of_the_passes_of_a_step() -> None:
    history = run()
    for step in range(STEPS):
        for _ in range(4):
            history.add_scalar("train_loss", step, 30.0 if step == AT else wavering(step))
        history.add_scalar("eval_loss", step, 30.0 if step == 40 else wavering(step))
    (finding,) = diagnose(history)
    assert (finding.kind, finding.steps) == ("loss spike", (AT, AT))
    assert finding.sentence.startswith("The loss 'train_loss' rose ")


def test_loss_spike_between_records_looks_at_the_record_before_it() -> None:
    whole = run(
        scale=lambda step, kind, layer: 50.0 if kind == PARAM and layer and step >= 50 else 1.0
    )
    history = History(whole.rows, whole.bins)
    for step in range(0, STEPS, 5):
        history.append(step, whole.packed(whole.find(step)).data)
    for step in range(STEPS):
        history.add_scalar("loss", step, 9.0 if step in (57, 58) else wavering(step))
    finding = only(history, "loss spike")
    assert (finding.steps, finding.numbers["ahead"]) == ((57, 58), 7)


def test_diagnose_tells_a_gradient_spike_without_a_loss() -> None:
    history = run(scale=lambda step, kind, layer: 40.0 if step == AT and kind == GRAD else 1.0)
    finding = only(history, "gradient spike")
    assert (finding.severity, finding.steps) == ("warning", (AT, AT))
    assert finding.numbers["times"] == pytest.approx(40, rel=0.5)
    assert finding.numbers["peak"] == pytest.approx(history.norm()[AT])


def test_diagnose_lets_a_gradient_fall_by_chance_and_come_back() -> None:
    def sizes(step: int, kind: str, layer: int) -> float:
        return 0.8 ** min(max(step - 48, 0), 12) if step < AT else size

    size = 1.0
    assert diagnose(run(scale=sizes, kinds=[GRAD, PARAM])) == []
    size = 2.5
    assert only(run(scale=sizes, kinds=[GRAD, PARAM]), "gradient spike").steps[0] == AT


def test_gradient_spike_blames_no_batch_where_only_gradients_are_known() -> None:
    history = run(scale=lambda step, *_: 40.0 if step == AT else 1.0, kinds=[GRAD])
    finding = only(history, "gradient spike")
    assert "3 of 3 gradients did with it; what=('grad', 'update', 'activation')" in finding.sentence
    assert "batch" not in finding.sentence


def test_diagnose_leaves_a_gradient_that_is_not_finite_to_another_rule() -> None:
    def gradient(step: int, row: int) -> torch.Tensor:
        x = noise(step, row)
        return torch.cat([1e4 * x, torch.tensor([math.inf])]) if step == AT else x

    assert [each.kind for each in diagnose(make_history(Log2Bins(), 3, STEPS, gradient))] == [
        "non-finite"
    ]


@pytest.mark.parametrize(("kind", "times"), [(UPDATE, 150.0), (ACTIVATION, 150.0), (PARAM, 10.0)])
def test_diagnose_tells_a_jump_of_one_row(kind: str, times: float) -> None:
    history = run(
        lambda step: 1.0,
        lambda step, of, layer: times if (of, layer, step) == (kind, 1, AT) else 1.0,
    )
    finding = only(history, "jump")
    assert (finding.layer, finding.steps) == (f"{kind}/mid.weight", (AT, AT))
    assert finding.numbers["times"] == pytest.approx(times, rel=0.4)
    assert "and came back" in finding.sentence


@pytest.mark.parametrize("kind", [GRAD, PARAM, UPDATE, ACTIVATION])
@pytest.mark.parametrize("exponent", [200, 300, 308])
def test_diagnose_tells_a_jump_farther_than_float64_reaches(kind: str, exponent: int) -> None:
    def gradient(step: int, row: int) -> torch.Tensor:
        x = noise(step, row).double()
        is_far = row == 3 * KINDS.index(kind) + 1 and AT <= step < AT + 4
        return x * 10.0 ** (exponent if is_far else -exponent if KINDS[row // 3] == kind else 0)

    history = make_history(Log2Bins(), LAYERS, STEPS, gradient, kinds=KINDS)
    for step in range(STEPS):
        history.add_scalar("loss", step, wavering(step) + 9 * (AT <= step < AT + 4))
    found = diagnose(history)
    (spike,) = (each for each in found if each.kind == "loss spike")
    assert spike.numbers["first_step"] == AT
    assert all(math.isfinite(x) for each in found for x in each.numbers.values())


def test_diagnose_tells_weights_that_grow_step_by_step_from_their_first_step() -> None:
    history = run(
        lambda step: 1.0,
        lambda step, kind, layer: (
            1.15 ** max(0, step - 50) if kind == PARAM and layer == 1 else 1.0
        ),
    )
    finding = only(history, "jump")
    assert finding.layer == "param/mid.weight"
    assert abs(finding.steps[0] - 51) <= 1


def test_jump_that_a_spike_has_told_is_no_finding_of_its_own() -> None:
    history = run(
        lambda step: 9.0 if step == AT else 1.0,
        lambda step, kind, layer: 150.0 if kind == UPDATE and step == AT - 1 else 1.0,
    )
    assert [each.kind for each in diagnose(history)] == ["loss spike"]


@pytest.mark.parametrize("kinds", [(GRAD,), (GRAD, ACTIVATION)], ids=str)
def test_diagnose_is_silent_about_small_batches(kinds: Sequence[str]) -> None:
    """The last of each epoch has a sixteenth of the inputs: four times as much noise."""

    def gradient(step: int, row: int) -> torch.Tensor:
        x = wavering(step, row) * noise(step, row)
        if step % 20 < 19:
            return x
        return 8 * x if row < 3 else x[: len(x) // 16]

    history = make_history(Log2Bins(), LAYERS, STEPS, gradient, kinds=kinds)
    for step in range(STEPS):
        history.add_scalar("loss", step, (5.0 if step % 20 == 19 else 1.0) * wavering(step))
    assert diagnose(history) == []
    # Two in a row are no small batch.
    history = make_history(Log2Bins(), LAYERS, STEPS, gradient, kinds=kinds)
    for step in range(STEPS):
        history.add_scalar("loss", step, (5.0 if step in (50, 51) else 1.0) * wavering(step))
    assert only(history, "loss spike").steps == (50, 51)


def test_spikes_have_thresholds() -> None:
    history = run(lambda step: 2.0 if step == AT else 1.0)
    assert [each.kind for each in diagnose(history)] == ["loss spike"]
    assert diagnose(history, spike_loss=3.0) == []
    assert diagnose(history, spike_deviations=50.0) == []


def test_diagnose_does_not_compare_an_expert_with_what_it_was_when_it_was_used() -> None:
    def scale(unused: int) -> Scale:
        def factor(step: int, kind: str, layer: int) -> float:
            if kind != ACTIVATION or layer != 1:
                return 1.0
            return 0.0 if AT - unused <= step < AT else 30.0 if step >= AT else 1.0

        return factor

    kinds = (GRAD, ACTIVATION)
    assert [each.kind for each in diagnose(run(scale=scale(3), kinds=kinds))] == ["jump"]
    assert diagnose(run(scale=scale(8), kinds=kinds)) == []


def test_find_departures_minds_the_tails_of_what_is_usual() -> None:
    def found(stretched: float) -> list[int]:
        """Where values leave whose distances above one deviation are so much larger."""
        x = 0.05 * np.random.default_rng(0).standard_normal(60)
        x = np.where(abs(x) > 0.05, stretched * x, x)
        x[50] = 0.35
        return [each.begin for each in find_departures(x, math.log(1.3), 6.0)]

    assert found(1.0) == [50]
    assert found(2.0) == []
