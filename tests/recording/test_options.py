import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from watching import (
    WEIGHTS,
    assert_record,
    backward,
    gradients,
    make_model,
    n_hooks,
    n_step_hooks,
)

import gradstat


def biases_alone() -> nn.Module:
    """A model whose biases alone are trained."""
    model = make_model()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("bias" in name)
    return model


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        (None, WEIGHTS),
        ("", [name for name, _ in make_model().named_parameters()]),
        ("^2", ["2.weight", "2.bias"]),
        ("bias$", ["0.bias", "2.bias", "4.bias"]),
        (lambda name, p: p.ndim == 1 and "4" not in name, ["0.bias", "2.bias"]),
    ],
)
def test_watch_selects_parameters(parameters: Any, expected: list[str]) -> None:
    model = make_model()
    with gradstat.watch(model, parameters=parameters) as w:
        backward(model)
    assert w.history.layers == expected
    assert_record(w.last, gradstat.statistics(gradients(model, expected)))


NEEDS_BINS = "Log2Bins, LinearBins or a number; bins is "
MODEL = make_model()


OPTIMIZER = torch.optim.SGD(MODEL.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: gradstat.watch(3), TypeError, "a torch.nn.Module; model is int"),
        (lambda: gradstat.watch(MODEL, "30"), TypeError, NEEDS_BINS + "'30'"),
        (
            lambda: gradstat.watch(MODEL, every=0),
            ValueError,
            "a number of 1 or more; every is 0",
        ),
        (
            lambda: gradstat.watch(MODEL, stream="other"),
            ValueError,
            "one of current, side; stream is 'other'",
        ),
        (lambda: gradstat.watch(MODEL, every=True), TypeError, "an integer; every is True"),
        (lambda: gradstat.watch(MODEL, every=1.5), TypeError, "an integer; every is 1.5"),
        (
            lambda: gradstat.watch(MODEL, accumulation_steps=-1),
            ValueError,
            "a number of 1 or more; accumulation_steps is -1",
        ),
        (
            lambda: gradstat.watch(MODEL, bucket_bytes="25 MB"),
            TypeError,
            "an integer; bucket_bytes is '25 MB'",
        ),
        (
            lambda: gradstat.watch(MODEL, when="forward"),
            ValueError,
            "one of backward, step, call; when is 'forward'",
        ),
        (
            lambda: gradstat.watch(MODEL, optimizer=MODEL),
            TypeError,
            "a torch.optim.Optimizer; optimizer is Sequential",
        ),
        (
            lambda: gradstat.watch(MODEL, when="step"),
            TypeError,
            "a torch.optim.Optimizer for when='step': give it optimizer=",
        ),
        (
            lambda: gradstat.watch(
                MODEL, when="step", optimizer=OPTIMIZER, scaler=GradScaler("cpu")
            ),
            ValueError,
            "no scaler for when='step', which sees unscaled gradients; scaler is GradScaler",
        ),
        (
            lambda: gradstat.watch(MODEL, when="step", optimizer=OPTIMIZER, accumulation_steps=2),
            ValueError,
            "accumulation_steps of 1 for when='step', which counts steps; accumulation_steps is 2",
        ),
        (
            lambda: gradstat.watch(make_model(), when="step", optimizer=OPTIMIZER),
            ValueError,
            "an optimizer of the model's parameters; optimizer is SGD with 6 others, 3 are "
            "selected",
        ),
        (
            lambda: gradstat.watch(MODEL, when="call", scaler=GradScaler("cpu")),
            ValueError,
            "no scaler for when='call', which sees unscaled gradients; scaler is GradScaler",
        ),
        (
            lambda: gradstat.watch(MODEL, when="call", accumulation_steps=2),
            ValueError,
            "accumulation_steps of 1 for when='call', which counts steps; accumulation_steps is 2",
        ),
        (
            lambda: gradstat.watch(MODEL, capacity=1),
            ValueError,
            "a number of 2 or more; capacity is 1",
        ),
        (lambda: gradstat.watch(MODEL, capacity=9.0), TypeError, "an integer; capacity is 9.0"),
        (lambda: gradstat.watch(MODEL, sink=[]), TypeError, "a function; sink is []"),
        (lambda: gradstat.watch(MODEL, path=3), TypeError, "a directory's path; path is 3"),
        (
            lambda: gradstat.watch(MODEL, scaler=2.0),
            TypeError,
            "a torch.amp.GradScaler; scaler is float",
        ),
        (
            lambda: gradstat.watch(MODEL, engine="cuda"),
            ValueError,
            "one of the engines cpu, reference, triton; engine is 'cuda'",
        ),
        (
            lambda: gradstat.watch(MODEL, parameters=3),
            TypeError,
            "a regular expression or a function; parameters is 3",
        ),
        (
            lambda: gradstat.watch(MODEL, parameters="("),
            ValueError,
            "a regular expression; parameters is '(': missing ), unterminated subpattern at "
            "position 0",
        ),
        (
            lambda: gradstat.watch(MODEL, parameters="lora"),
            ValueError,
            "a model with parameters that require gradients; model is Sequential with 6 "
            "parameters, 0 selected by parameters='lora', none of them requiring a gradient",
        ),
        (
            lambda: gradstat.watch(nn.ReLU()),
            ValueError,
            "a model with parameters that require gradients; model is ReLU with 0 parameters, 0 "
            "selected by parameters=None, none of them requiring a gradient",
        ),
        (
            lambda: gradstat.watch(biases_alone()),
            ValueError,
            "a model with parameters that require gradients; model is Sequential with 6 "
            "parameters, 3 selected by parameters=None, none of them requiring a gradient; "
            "parameters='' takes biases too",
        ),
        (
            lambda: gradstat.watch(make_model().requires_grad_(False)),
            ValueError,
            "a model with parameters that require gradients; model is Sequential with 6 "
            "parameters, 3 selected by parameters=None, none of them requiring a gradient",
        ),
        (
            lambda: gradstat.watch(nn.Sequential(nn.LazyLinear(2))),
            ValueError,
            "initialised parameters; 0.weight of Sequential gets its shape from the first batch: "
            "run one first",
        ),
    ],
)
def test_watch_refuses_by_argument(
    call: Callable[[], object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape('watch() needs ' + message)}$"):
        call()
    assert n_hooks(MODEL) == n_step_hooks(OPTIMIZER) == 0


def test_a_side_stream_changes_nothing_where_there_are_no_streams() -> None:
    model = make_model()
    with gradstat.watch(model, stream="side", bucket_bytes=1) as w:
        backward(model)
    assert_record(w.last, gradstat.statistics(gradients(model, WEIGHTS)))


def test_watch_refuses_a_path_that_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    model = make_model()
    with pytest.raises(ValueError, match=r"^watch\(\) needs a directory's path; path is ''$"):
        gradstat.watch(model, path="")
    message = r"^watch\(\) needs a directory; path is 'file', another file$"
    with pytest.raises(ValueError, match=message):
        gradstat.watch(model, path="file")
    assert n_hooks(model) == 0
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
