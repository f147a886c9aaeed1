"""NaN and infinities in rows of any kind: where they come from; and that other kinds are let be."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch
from findings import N, diagnose, noise, only
from histories import make_history
from torch import Tensor, nn

import gradstat
from gradstat import Finding, History, Log2Bins
from gradstat.record import KINDS

L = 4  # layers, each of them a module too
Breaks = Callable[[int, str, int], float | None]


def broken(breaks: Breaks, kinds: tuple[str, ...] = KINDS, steps: int = 40) -> History:
    """A healthy run, but for what ``breaks(step, kind, layer)`` puts into three elements."""

    def row(step: int, at: int) -> Tensor:
        x, value = noise(step, at), breaks(step, kinds[at // L], at % L)
        if value is not None:
            x[:3] = value
        return x

    return make_history(Log2Bins(), L, steps, row, kinds=kinds)


@pytest.mark.parametrize(
    ("kinds", "layer", "words"),
    [
        (KINDS, "param/1.weight", "1.weight is the first parameter with NaN or infinity, at"),
        (
            ("grad", "update", "activation", "unit", "grad_output"),
            "activation/1.weight",
            "The output of 1.weight is the first, as modules run, with NaN or infinity, at",
        ),
        (
            ("grad", "update", "grad_output"),
            "grad_output/2.weight",
            "The gradient of the output of 2.weight is the first, from the last module back, with "
            "NaN or infinity, at",
        ),
        (("grad", "update"), "2.weight", "2.weight is where backward first met NaN or infinity"),
        (("update",), "update/1.weight", "1.weight is the first parameter whose change has NaN"),
    ],
)
def test_diagnose_names_what_a_step_computes_first(
    kinds: tuple[str, ...], layer: str, words: str
) -> None:
    history = broken(
        lambda step, kind, layer: math.nan if step >= 12 and 1 <= layer <= 2 else None, kinds
    )
    finding = only(history, "non-finite")
    assert (finding.severity, finding.layer, finding.steps) == ("severe", layer, (12, 39))
    assert finding.sentence.startswith(words)
    assert "at step 12, before 1 other " in finding.sentence
    assert finding.numbers == {
        "nan": 3,
        "posinf": 0,
        "neginf": 0,
        "numel": N,
        "records": 28,
        "layers": 2,
    }


def test_diagnose_names_the_gradients_that_spoilt_the_weights_and_so_the_outputs() -> None:
    def breaks(step: int, kind: str, layer: int) -> float | None:
        onset = 12 if kind in ("grad", "update") else 13
        return math.nan if step >= onset and (kind != "grad" or layer <= 2) else None

    finding = only(broken(breaks), "non-finite")
    assert (finding.layer, finding.steps) == ("2.weight", (12, 39))


def test_diagnose_tells_a_loss_scale_that_was_tried_from_nan_in_the_forward_pass() -> None:
    def breaks(step: int, kind: str, layer: int) -> float | None:
        if step == 3 and kind == "grad":
            return math.inf
        return math.nan if step >= 60 and (kind != "param" or step > 60) else None

    found = [each for each in diagnose(broken(breaks, steps=80)) if each.kind == "non-finite"]
    assert [(each.severity, each.layer, each.steps) for each in found] == [
        ("severe", "activation/0.weight", (60, 79)),
        ("warning", "3.weight", (3, 3)),
    ]
    assert (
        "This holds for 1 of 80 records, the newest not among them; a GradScaler"
        in found[1].sentence
    )


@pytest.mark.parametrize("steps", [60, 150])
@pytest.mark.parametrize("kinds", [("grad",), KINDS], ids=["gradients", "all"])
def test_diagnose_never_calls_steps_severe_that_a_scaler_skips(
    kinds: tuple[str, ...], steps: int
) -> None:
    """Eight at the start, and one later: the scale is raised."""

    def breaks(step: int, kind: str, layer: int) -> float | None:
        return math.inf if kind == "grad" and (step < 8 or step == steps // 2) else None

    finding = only(broken(breaks, kinds, steps), "non-finite")
    assert (finding.severity, finding.steps) == ("warning", (0, steps // 2))
    assert "; a GradScaler skips such steps while it looks for its scale." in finding.sentence
    assert "made it" not in finding.sentence


def test_diagnose_waits_while_a_scaler_looks_for_its_scale() -> None:
    def breaks(step: int, kind: str, layer: int) -> float | None:
        return math.inf if kind == "grad" else None

    assert only(broken(breaks, steps=8), "non-finite").severity == "warning"
    # By then no scale would overflow.
    assert only(broken(breaks, steps=30), "non-finite").severity == "severe"

    def nan(step: int, kind: str, layer: int) -> float | None:
        return math.nan if kind == "grad" else None

    assert only(broken(nan, steps=8), "non-finite").severity == "severe"
    lost = broken(breaks, steps=8)
    for step in range(8):
        lost.add_scalar("loss", step, math.nan)
    assert only(lost, "non-finite").severity == "severe"


def test_diagnose_tells_nan_that_lasts_from_steps_that_were_skipped_before() -> None:
    def breaks(step: int, kind: str, layer: int) -> float | None:
        return math.nan if kind == "grad" and (step in (3, 4) or step >= 30) else None

    found = [f for f in diagnose(broken(breaks, ("grad",))) if f.kind == "non-finite"]
    assert [(f.severity, f.steps) for f in found] == [("severe", (30, 39)), ("warning", (3, 4))]


def test_diagnose_does_not_lay_one_bad_batch_to_a_loss_scale() -> None:
    history = broken(lambda step, kind, layer: math.nan if step == 3 else None, ("activation",))
    finding = only(history, "non-finite")
    assert finding.severity == "warning"
    assert finding.sentence.endswith(
        ": of 400 elements 3 are NaN. This holds for 1 of 40 records, the newest not among them."
    )


@pytest.mark.parametrize("kind", ["activation", "param"])
def test_diagnose_lets_masks_hold_infinities(kind: str) -> None:
    def mask(step: int, each: str, layer: int) -> float | None:
        return -math.inf if each == kind and layer == 1 else None

    assert diagnose(broken(mask)) == []

    def and_nan(step: int, each: str, layer: int) -> float | None:
        lasts = step >= 30 and each == kind and layer >= 2
        return math.nan if lasts else mask(step, each, layer)

    finding = only(broken(and_nan), "non-finite")
    assert (finding.layer, finding.steps) == (f"{kind}/2.weight", (30, 39))

    def overflow(step: int, each: str, layer: int) -> float | None:
        if step < 30 or each != kind or layer == 0:
            return None
        return math.inf if layer == 1 else math.nan

    assert only(broken(overflow), "non-finite").layer == f"{kind}/1.weight"


def test_diagnose_finds_infinite_gradients_behind_a_mask() -> None:
    def breaks(step: int, kind: str, layer: int) -> float | None:
        return -math.inf if kind == "activation" or (kind == "grad" and step == 39) else None

    assert only(broken(breaks), "non-finite").layer == "3.weight"


def test_diagnose_names_the_part_of_a_module_rather_than_the_module() -> None:
    names = ["encoder", "encoder.norm", "encoder.norm2", "encoders"]
    history = make_history(
        Log2Bins(),
        names,
        3,
        lambda step, row: noise(step, row) * (1 if row == 1 else math.nan),
        kinds=["activation"],
    )
    assert only(history, "non-finite").layer == "activation/encoder.norm2"


def test_diagnose_finds_the_module_of_a_real_forward_pass_that_makes_nan() -> None:
    class Log(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.log()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), Log(), nn.Linear(8, 2))
    with gradstat.watch(model, what=("grad", "activation", "grad_output")) as w:
        model(torch.rand(3, 4)).sum().backward()
    assert only(w.history, "non-finite").layer == "activation/2"
    assert only(w.history.select("grad"), "non-finite").layer == "3.weight"


def test_diagnose_reads_gradients_alone_for_what_is_said_of_gradients() -> None:
    kinds = ("grad", "param", "activation", "unit", "grad_output")

    def row(step: int, at: int) -> Tensor:
        # All that would be vanishing, exploding, dead, underflow and out of scale in a gradient.
        extreme = (1e-3 ** (at % L + 1), 1e-30, 1e12 if step > 20 else 1.0, 1e9)
        return noise(step, at) * (1.0 if at < L else extreme[at // L - 1])

    history = make_history(Log2Bins(), L, 40, row, kinds=kinds)
    assert history.diagnose() == history.select("grad").diagnose()
    for kind in kinds[1:]:
        assert history.select(kind).diagnose() == []


def met_at_once(kinds: Sequence[str] = ("grad",), loss: float | None = None) -> Finding:
    """NaN in the gradients of all three layers from a step on."""

    def gradient(step: int, row: int) -> torch.Tensor:
        x = noise(step, row)
        return torch.full_like(x, math.nan) if step >= 30 and row < 3 else x

    history = make_history(Log2Bins(), 3, 40, gradient, kinds=kinds)
    if loss is not None:
        for step in range(40):
            history.add_scalar("loss", step, loss if step == 30 else 1.0)
    return next(each for each in history.diagnose() if each.kind == "non-finite")


def test_diagnose_does_not_blame_the_last_layer_for_nan_that_backward_meets_at_once() -> None:
    finding = met_at_once()
    assert finding.layer == "2.weight"
    assert finding.sentence.endswith(
        " Backward computes that gradient first: the forward pass or the loss made it, not this "
        "layer; what=('grad', 'activation') shows where."
    )
    assert "first and loss is nan: the forward pass" in met_at_once(loss=math.nan).sentence
    assert "and loss" not in met_at_once(loss=1.0).sentence


def test_diagnose_blames_the_loss_for_nan_where_all_outputs_are_finite() -> None:
    finding = met_at_once(("grad", "activation"), math.inf)
    assert finding.layer == "2.weight"
    assert finding.sentence.endswith(
        " All outputs are finite in that step and loss is inf: the loss made it, not a layer."
    )


def test_diagnose_still_blames_a_layer_before_the_last_one() -> None:
    def gradient(step: int, row: int) -> torch.Tensor:
        x = noise(step, row)
        return torch.full_like(x, math.nan) if step >= 30 and row < 2 else x

    (finding,) = diagnose(make_history(Log2Bins(), 3, 40, gradient))
    assert finding.layer == "1.weight"
    assert "not this layer" not in finding.sentence


def test_diagnose_takes_no_overflow_that_begins_and_goes_on_for_a_mask() -> None:
    def outputs(first: int, last: int = 60) -> History:
        return broken(
            lambda step, kind, layer: (
                math.inf if first <= step < last and (kind, layer) == ("activation", 1) else None
            ),
            ("grad", "activation"),
            steps=60,
        )

    finding = only(outputs(40), "non-finite")
    assert (finding.layer, finding.steps) == ("activation/1.weight", (40, 59))
    # There from the start on, or for a while.
    for mask in (outputs(0), outputs(5), outputs(40, 50)):
        assert [each for each in diagnose(mask) if each.kind == "non-finite"] == []


def test_infinite_outputs_are_harmless_only_where_they_are_there_while_all_is_well() -> None:
    def breaks(step: int, kind: str, layer: int) -> float | None:
        if step < 12:
            return None
        if kind == "activation" and layer == 1:
            return math.inf  # no NaN, which is never harmless
        return math.nan if kind == "grad" else None

    finding = only(broken(breaks), "non-finite")
    assert finding.layer == "activation/1.weight"
