from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from watching import WEIGHTS, assert_record, backward, gradients, make_model

import gradstat


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.manual_seed(20)
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module) -> nn.Module:
    # What inductor makes of a graph is no concern of watch, and takes a C++ compiler half a minute.
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("order", ["watched first", "compiled first", "run first"])
@pytest.mark.parametrize("when", ["backward", "step"])
def test_watch_neither_breaks_nor_repeats_the_graph_of_a_compiled_model(
    order: str, when: str
) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"when": when, "optimizer": optimizer} if when == "step" else {}
    if order != "watched first":
        run = compiled(model)
    if order == "run first":
        backward(run)
        optimizer.zero_grad()
    with gradstat.watch(model, **options) as w, torch._dynamo.config.patch(error_on_recompile=True):
        if order == "watched first":
            run = compiled(model)
        for step in range(4):
            backward(run)
            expected = gradstat.statistics(gradients(model, WEIGHTS))
            optimizer.step()
            assert_record(w.history.record(step), expected)
            optimizer.zero_grad()
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


@pytest.mark.parametrize("is_whole_step", [False, True], ids=["model", "whole step"])
def test_watch_at_any_cadence_compiles_nothing_again(is_whole_step: bool) -> None:
    histories = []
    for is_compiled in (False, True):
        torch.manual_seed(20)
        model = make_model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"what": ("grad", "param", "activation", "grad_output"), "accumulation_steps": 2}

        def step(run: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            run(torch.randn(8, 6)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        with gradstat.watch(model, every=3, **options) as w:
            run = step
            if is_compiled and is_whole_step:
                # There are breaks at backward() and in the optimizer's own code.
                run = torch.compile(step, backend="aot_eager")
            elif is_compiled:
                run = partial(step, compiled(model))
            for number in range(20):
                if number < 2:
                    # The optimizer makes its state in the first step.
                    run()
                    continue
                with torch._dynamo.config.patch(error_on_recompile=True):
                    run()
        histories.append(w.history)
    eager, history = histories
    assert history.steps.tolist() == eager.steps.tolist() == [0, 3, 6, 9]
    for number in eager.steps.tolist():
        assert_record(history.record(number), eager.record(number))


# Dynamo looks at .grad of a compiled layer's input.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize(
    "wrap",
    [
        "compile",
        "data_parallel",
        pytest.param(
            "both", marks=pytest.mark.host("Dynamo cannot trace what scatters to devices")
        ),
        "layer",
        "checkpoint",
    ],
)
def test_watch_names_layers_alike_however_they_are_wrapped(wrap: str) -> None:
    model: nn.Module = make_model()
    what = ("grad", "activation")
    with gradstat.watch(model, what=what, modules=lambda *_: True) as plain:
        backward(model)
    if wrap == "layer":
        model[2] = compiled(model[2])
    if wrap == "checkpoint":
        model[2] = checkpoint_wrapper(model[2])
    if wrap in ("data_parallel", "both"):
        model = nn.DataParallel(model)
    if wrap in ("compile", "both"):
        model = compiled(model)
    with gradstat.watch(model, what=what, modules=lambda *_: True) as w:
        backward(model)
    assert w.history.layers == plain.history.layers
    assert w.history.select("grad").layers == WEIGHTS
    assert w.history["numel"][:, : len(WEIGHTS)].min() > 0


def test_watch_selects_by_the_plain_names_of_a_compiled_model() -> None:
    run = compiled(make_model())
    with gradstat.watch(run, parameters=r"^0\.weight$") as w:
        backward(run)
    assert w.history.layers == ["0.weight"]


def test_watch_leaves_a_child_that_is_called_module_its_name() -> None:
    model = nn.ModuleDict({"module": nn.Linear(3, 2)})
    with gradstat.watch(model) as w:
        model["module"](torch.ones(1, 3)).sum().backward()
    assert w.history.layers == ["module.weight"]


def test_closing_watch_leaves_the_compiled_model_as_it_is() -> None:
    model = make_model()
    with gradstat.watch(model) as w:
        run = compiled(model)
        backward(run)
    with torch._dynamo.config.patch(error_on_recompile=True):
        backward(run)
    assert len(w.history) == 1


# PyTorch's own code of compiled autograd warns of what it does itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_watch_at_step_sees_the_gradients_of_compiled_autograd(fullgraph: bool) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradstat.watch(model, when="step", optimizer=optimizer) as w:
        for _ in range(2):
            optimizer.zero_grad()
            compile_autograd(model, fullgraph)
            expected = gradstat.statistics(gradients(model, WEIGHTS))
            optimizer.step()
            assert_record(w.last, expected)
    assert len(w.history) == 2


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("fullgraph", [True, False])
def test_watch_during_compiled_autograd_fails_rather_than_lose_records(fullgraph: bool) -> None:
    model = make_model()
    with (
        gradstat.watch(model),
        pytest.raises(Exception, match=r"BackwardHooks._hook_of|when='step'"),
    ):
        compile_autograd(model, fullgraph)


def compile_autograd(model: nn.Module, fullgraph: bool) -> None:
    with torch._dynamo.compiled_autograd._enable(
        torch.compile(backend="aot_eager", fullgraph=fullgraph)
    ):
        backward(model)
