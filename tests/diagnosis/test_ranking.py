"""The cause comes first, and what follows it says so."""

import math

import torch
from findings import noise
from histories import make_history

from gradstat import Finding, Log2Bins
from gradstat.diagnosis.findings import put_in_order
from gradstat.record import ACTIVATION, GRAD, UNIT

STEPS, AT = 120, 50


def findings(*listed: Finding) -> list[tuple[str, str]]:
    history = make_history(Log2Bins(), 1, STEPS, noise)
    return [(each.kind, each.after) for each in put_in_order(list(listed), history, 20)]


def spike(*steps: int, recovered: float = 0.0, first: int = AT) -> Finding:
    numbers = {"recovered": recovered, "first_step": float(first)}
    return Finding("loss spike", "warning", "0.weight", steps, numbers, "It rose.")  # type: ignore[arg-type]


def vanishing(*steps: int) -> Finding:
    return Finding("vanishing", "severe", "0.weight", steps, {}, "It fell.")  # type: ignore[arg-type]


def test_put_in_order_puts_what_follows_after_its_cause() -> None:
    assert findings(vanishing(60, 119), spike(52, 119)) == [
        ("loss spike", ""),
        ("vanishing", "loss spike at step 50"),
    ]


def test_put_in_order_leaves_alone_what_was_there_before() -> None:
    assert findings(spike(52, 119), vanishing(0, 119)) == [("vanishing", ""), ("loss spike", "")]
    assert findings(spike(52, 119), vanishing(20, 119)) == [("vanishing", ""), ("loss spike", "")]


def test_put_in_order_takes_a_spike_that_is_over_for_no_cause_of_what_comes_much_later() -> None:
    over = spike(50, 52, recovered=1.0)
    assert findings(over, vanishing(90, 119)) == [("vanishing", ""), ("loss spike", "")]
    assert findings(over, vanishing(60, 119))[1] == ("vanishing", "loss spike at step 50")


def test_put_in_order_takes_the_earliest_of_a_chain_for_the_cause() -> None:
    broken = Finding("non-finite", "severe", "0.weight", (70, 119), {}, "NaN.")
    assert findings(vanishing(80, 119), broken, spike(52, 119)) == [
        ("loss spike", ""),
        ("non-finite", "loss spike at step 50"),
        ("vanishing", "loss spike at step 50"),
    ]


def test_diagnose_names_symptoms_as_such() -> None:
    def gradient(step: int, row: int) -> torch.Tensor:
        if step < AT:
            return noise(step, row)
        return noise(step, row, 1e3 if step == AT else 1e-10)

    found = make_history(Log2Bins(), 4, STEPS, gradient).diagnose()
    assert found[0].kind == "gradient spike"
    after = [each for each in found if each.kind == "vanishing"]
    assert len(after) == 1
    assert len(after[0].others) == 3
    assert {each.after for each in after} == {f"gradient spike at step {AT}"}
    assert f", after the gradient spike at step {AT}: {after[0].layer}'s gradient" in str(after[0])
    assert math.isfinite(found[0].numbers["times"])


def test_diagnose_puts_units_that_are_dead_before_what_comes_of_it() -> None:
    kinds = (GRAD, ACTIVATION, UNIT)

    def row(step: int, at: int) -> torch.Tensor:
        is_dead = at in (0, 4, 7)  # the first gradient, and the second module
        return noise(step, at) * (not is_dead)

    history = make_history(Log2Bins(), 3, STEPS, row, kinds=kinds)
    found = [each for each in history.diagnose() if each.severity != "note"]
    assert [(each.kind, each.layer, each.after) for each in found] == [
        ("dead units", "unit/1.weight", ""),
        ("dead", "0.weight", "dead units at step 0"),
    ]


def test_findings_print_as_text_a_paragraph_for_each() -> None:
    history = make_history(Log2Bins(), 4, 40, lambda step, layer: noise(step, layer, 10.0**layer))
    found = history.diagnose()
    assert len(found) > 1
    assert " ".join(str(found).split()) == " ".join(map(str, found))
    assert max(map(len, str(found).splitlines())) <= 88
    assert str(found[:1]) == "\n".join(str(found).splitlines()[: len(str(found[:1]).splitlines())])
    assert str(found[:0]) == "nothing found"


def test_findings_print_names_that_hold_a_line_break_in_one_line() -> None:
    history = make_history(Log2Bins(), ["a\nb"], 40, lambda step, layer: noise(step, layer))
    assert "a\\nb" in str(history.diagnose())
