"""The order of the layers is that in which gradients arrive and modules run."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradstat
from gradstat import History


class Backwards(nn.Module):
    """Registers its layers from the last one on, within a block, and an unused one among them."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Module()
        self.block.last = nn.Linear(4, 2)
        self.block.unused = nn.Linear(4, 4)
        self.block.middle = nn.Linear(4, 4)
        self.first = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.block.last(torch.relu(self.block.middle(self.first(x))))
        return y


IN_ORDER = ["first", "block.middle", "block.last", "block.unused"]


def record(when: str, what: Any, steps: int = 2, every: int = 1) -> History:
    torch.manual_seed(0)
    model = Backwards()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    w = gradstat.watch(model, what=what, when=when, optimizer=optimizer, every=every)  # type: ignore[arg-type]
    for _ in range(steps):
        model(torch.randn(5, 3)).square().sum().backward()
        if when == "call":
            w.measure()
        optimizer.step()
        optimizer.zero_grad()
    w.close()
    return w.history


@pytest.mark.parametrize("when", ["backward", "step", "call"])
def test_order_is_that_in_which_gradients_arrive(when: str) -> None:
    history = record(when, "grad")
    # What has no gradient stays beside what it is registered after.
    assert history.order == [f"{name}.weight" for name in reversed(IN_ORDER)]
    assert history.depth is not None
    assert history.depth.tolist() == [2, 3, 1, 0]


@pytest.mark.parametrize("what", ["activation", "grad_output"])
def test_order_is_that_in_which_modules_run(what: str) -> None:
    history = record("backward", what)
    names = [name.partition("/")[2] for name in history.order]
    assert (names if what == "activation" else names[::-1]) == IN_ORDER


def test_order_of_all_kinds_follows_the_same_pass() -> None:
    history = record("step", ("grad", "update", "activation"))
    for kind in ("param", "update", "activation", "unit"):
        names = [name.removesuffix(".weight") for name in history.select(kind).order]
        assert names == IN_ORDER
    assert history.select("grad").order == history.order


def test_order_takes_a_module_that_holds_others_after_them() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 1))
    with gradstat.watch(model, what="activation", modules="") as w:
        model(torch.ones(1, 2)).sum().backward()
    names = [name.partition("/")[2] for name in w.history.order]
    assert names == ["0.0", "0.1", "0", "1", "(Sequential)"]


def test_order_is_that_of_registration_where_none_was_seen() -> None:
    history = History(["a", "b"], gradstat.Log2Bins())
    assert history.depth is None
    assert history.order == ["b", "a"]
    torch._dynamo.reset()
    model = Backwards()
    compiled = torch.compile(model, backend="aot_eager")
    with gradstat.watch(model) as w:
        compiled(torch.randn(5, 3)).sum().backward()
    assert w.history.depth is None
    assert w.history.order == w.history.layers[::-1]


@pytest.fixture(autouse=True)
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What other tests have compiled in this process does not count."""
    torch._dynamo.utils.counters["stats"].clear()


def test_diagnose_follows_the_order_of_the_layers() -> None:
    """Gradients that shrink towards the input, in a network that is registered backwards."""
    torch.manual_seed(0)
    layers = [nn.Linear(8, 8) for _ in range(9)]
    model = nn.Module()
    for at in reversed(range(9)):
        model.add_module(f"layer{at}", layers[at])
    with gradstat.watch(model) as w:
        for _ in range(25):
            x = torch.rand(4, 8)
            for layer in layers:
                x = torch.sigmoid(layer(x))
            x.square().sum().backward()
            model.zero_grad()
    finding = w.history.diagnose()[0]
    assert (finding.kind, finding.layer) == ("vanishing", "layer0.weight")
    assert "From layer8.weight back to layer0.weight" in finding.sentence


def test_diagnose_names_the_module_that_made_nan_first_in_time() -> None:
    class Broken(Backwards):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x * torch.nan)

    model = Broken()
    with gradstat.watch(model, what=("grad", "activation")) as w:
        model(torch.randn(5, 3)).sum().backward()
    (finding,) = (each for each in w.history.diagnose() if each.severity != "note")
    assert finding.layer == "activation/first"


def test_figures_show_layers_by_depth() -> None:
    import gradstat.plot

    figure = gradstat.plot.curves(record("step", "grad"), "rms")
    key = [text.get_text() for text in figure.legends[0].get_texts()]
    assert key == [f"{name}.weight" for name in IN_ORDER]


def test_rows_that_rules_read_belong_together_in_any_order() -> None:
    """Ratios and histograms are those of the layer that is named."""
    history = record("step", ("grad", "update", "activation"), steps=70)
    straight = history.snapshot()
    straight.depth = None
    from gradstat.diagnosis.evidence import Evidence

    for kind in ("grad", "update", "unit"):
        by_depth, registered = (Evidence(each, 20, kind) for each in (history, straight))
        assert by_depth.layers != registered.layers
        at = [registered.layers.index(layer) for layer in by_depth.layers]
        assert by_depth.places.tolist() == at
        for number in (1, 2):
            one, other = (
                each.shares(lambda _, layers, bins: bins % number == 0)  # noqa: B023 (called here)
                for each in (by_depth, registered)
            )
            np.testing.assert_array_equal(one, other[:, at])
