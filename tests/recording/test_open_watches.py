"""Watches that are still open when another one of the same model begins, as in a notebook."""

import gc
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from watching import backward, make_model, n_hooks, n_step_hooks

import gradstat

AGAIN = "another watch of this Sequential is still open and measures the same at each step"


def test_watch_takes_the_place_of_an_open_one_of_its_name() -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters())
    options = {"name": "main", "what": ("grad", "activation"), "optimizer": optimizer}
    old = gradstat.watch(model, **options)
    n, n_step = n_hooks(model), n_step_hooks(optimizer)
    backward(model)
    new = gradstat.watch(model, **options)
    assert (n_hooks(model), n_step_hooks(optimizer)) == (n, n_step)
    backward(model)
    assert (len(old.history), len(new.history)) == (1, 1)
    old.close()
    new.close()
    assert (n_hooks(model), n_step_hooks(optimizer)) == (0, 0)


def test_watch_replaces_one_that_nothing_refers_to_any_more() -> None:
    model = make_model()
    gradstat.watch(model, name="main")
    n = n_hooks(model)
    gc.collect()
    gradstat.watch(model, name="main")
    assert n_hooks(model) == n


def test_watch_writes_what_the_replaced_one_has_measured(tmp_path: Path) -> None:
    model = make_model()
    gradstat.watch(model, name="main", path=tmp_path / "run")
    backward(model)
    with gradstat.watch(model, name="main"):
        assert len(gradstat.History.load(tmp_path / "run")) == 1


def test_watch_warns_of_an_open_one_that_measures_the_same() -> None:
    model = make_model()
    first = gradstat.watch(model)
    with pytest.warns(RuntimeWarning, match=AGAIN) as told:
        gradstat.watch(model)
    assert told[0].filename == __file__
    with pytest.warns(RuntimeWarning, match="2 other watches of this Sequential are still open"):
        gradstat.watch(model)
    first.close()
    with pytest.warns(RuntimeWarning, match="2 other watches"):
        gradstat.watch(model)


def test_watch_is_silent_beside_closed_and_other_watches() -> None:
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            with gradstat.watch(model):
                backward(model)
        gradstat.watch(model)
        gradstat.watch(model, every=2)
        gradstat.watch(model, what="param")
        gradstat.watch(model, gradstat.LinearBins(4, -1.0, 1.0))
        gradstat.watch(model, name="another")
        gradstat.watch(make_model())


def test_watch_refuses_a_name_before_it_closes_anything() -> None:
    model = make_model()
    old = gradstat.watch(model, name="main")
    n = n_hooks(model)
    with pytest.raises(TypeError, match=r"watch\(\) needs a string; name is 3"):
        gradstat.watch(model, name=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="every is 0"):
        gradstat.watch(model, every=0, name="main")
    assert n_hooks(model) == n
    old.close()


def test_open_watch_keeps_no_model_alive() -> None:
    model = make_model()
    gradstat.watch(model, what=("grad", "activation"), name="main")
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
