"""Order, thresholds and odd histories."""

import dataclasses
import math
import re
from typing import Any

import pytest
import torch
from findings import diagnose, noise
from histories import make_history
from torch import Tensor

from gradstat import History, LinearBins, Log2Bins, Thresholds
from gradstat.diagnosis import FINDINGS, SEVERITIES


def test_diagnose_puts_the_worst_first() -> None:
    def gradient(step: int, layer: int) -> Tensor:
        x = noise(step, layer, (1e-30, 1e-9, 1e-2, 1e-2, 1e6)[layer])
        if layer == 3:
            x[0] = math.nan
        return x * (0 if layer == 2 else 1)

    found = make_history(Log2Bins(), 5, 30, gradient).diagnose()
    order = [(SEVERITIES.index(f.severity), FINDINGS.index(f.kind)) for f in found]
    assert order == sorted(order)
    assert [(f.kind, f.layer, f.others) for f in found[:4]] == [
        ("non-finite", "3.weight", ()),
        ("vanishing", "0.weight", ()),
        ("vanishing", "0.weight", ("1.weight",)),
        ("dead", "2.weight", ()),
    ]
    assert {f.severity for f in found[:4]} == {"severe"}
    assert {f.severity for f in found[4:]} == {"warning"}


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_diagnose_gets_through_a_history_of_nothing_but(value: float) -> None:
    for bins in (Log2Bins(), LinearBins(4)):
        for steps in (1, 2, 50):
            found = make_history(
                bins, 3, steps, lambda step, layer: torch.full((9,), value)
            ).diagnose()
            kind = "dead" if value == 0 else "non-finite"
            assert [f.kind for f in found if f.severity != "note"] == [kind]


def test_diagnose_gets_through_records_without_any_gradient() -> None:
    for steps in (1, 30):
        absent = [(step, layer) for step in range(steps) for layer in range(3)]
        assert diagnose(make_history(Log2Bins(), 3, steps, noise, absent=absent)) == []


def test_diagnose_refuses_what_it_cannot_read() -> None:
    empty = History(["weight"], Log2Bins())
    message = f"diagnose() needs a History with records; history is {empty!r}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        empty.diagnose()
    with pytest.raises(TypeError, match=r"^diagnose\(\) needs Thresholds; thresholds is dict$"):
        make_history(Log2Bins(), 1, 1).diagnose({"window": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"window": 2.5}, TypeError, "an integer; window is 2.5"),
        ({"window": 0}, ValueError, "positive numbers; window is 0"),
        ({"vanishing_ratio": "1"}, TypeError, "numbers; vanishing_ratio is '1'"),
        ({"exploding_growth": math.nan}, ValueError, "positive numbers; exploding_growth is nan"),
        ({"stuck_ratio": 1.5}, ValueError, "stuck_ratio up to 1; it is 1.5"),
        ({"stuck_pace": 2}, ValueError, "stuck_pace up to 1; it is 2"),
        ({"dead_units_severe": 2.0}, ValueError, "dead_units_severe up to 1; it is 2.0"),
        (
            {"dead_units_severe": 0.5},
            ValueError,
            "dead_units_severe at least dead_units_share, 0.7; dead_units_severe is 0.5",
        ),
        ({"underflow_share": 1.5}, ValueError, "underflow_share up to 1; it is 1.5"),
        (
            {"vanishing_severe": 0.5},
            ValueError,
            f"vanishing_severe up to vanishing_ratio, {1 / 30}; vanishing_severe is 0.5",
        ),
        (
            {"exploding_severe": 10},
            ValueError,
            "exploding_severe at least exploding_growth, 1000.0; exploding_severe is 10",
        ),
    ],
)
def test_thresholds_refuse_what_is_no_threshold(
    arguments: dict[str, Any], kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind) as raised:
        Thresholds(**arguments)
    assert str(raised.value) == f"Thresholds() needs {message}"


def test_thresholds_and_findings_cannot_be_changed() -> None:
    finding = make_history(Log2Bins(), 1, 1).diagnose()[0]
    for each, name in ((Thresholds(), "window"), (finding, "layer")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(each, name, 1)


@pytest.mark.parametrize("name", ["spike_loss", "spike_gradient", "spike_single", "jump"])
def test_thresholds_refuses_a_factor_that_is_no_rise(name: str) -> None:
    with pytest.raises(ValueError, match=rf"Thresholds\(\) needs {name} above 1; it is 1"):
        Thresholds(**{name: 1.0})
