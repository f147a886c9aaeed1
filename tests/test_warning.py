"""Warnings point at the line of the user's that has led to them."""

import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from watching import backward, make_model

import gradstat
from gradstat.util import warn


def line_of(part: str) -> int:
    """The only line of this file that has a text at its end."""
    lines = Path(__file__).read_text().splitlines()
    (at,) = (i for i, line in enumerate(lines, 1) if line.endswith(f"# {part}"))
    return at


def test_warn_points_at_the_line_that_ran_backward() -> None:
    layer = nn.Linear(3, 2).eval()
    with (
        gradstat.watch(layer, what=("grad", "activation")),
        pytest.warns(RuntimeWarning, match="has seen no output") as told,
    ):
        layer(torch.ones(1, 3)).sum().backward()  # backward
    assert (told[0].filename, told[0].lineno) == (__file__, line_of("backward"))


def test_warn_points_at_the_line_that_watched_or_loaded(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(RuntimeWarning, match="cannot write") as told:
        w = gradstat.watch(make_model(), path=tmp_path / "file" / "run")  # watch
    assert (told[0].filename, told[0].lineno) == (__file__, line_of("watch"))
    w.close()

    model = make_model()
    with gradstat.watch(model, path=tmp_path / "run"):
        backward(model)
    (file,) = (tmp_path / "run").iterdir()
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="which is cut off") as told:
        gradstat.History.load(tmp_path / "run")  # load
    assert (told[0].filename, told[0].lineno) == (__file__, line_of("load"))


def test_warn_in_a_thread_of_its_own_has_no_line_of_the_users() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        thread = threading.Thread(target=warn, args=("late",))
        thread.start()
        thread.join()
    assert [str(each.message) for each in told] == ["late"]
