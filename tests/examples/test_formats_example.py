"""What the example shows, and that what is predicted of its GPT is what real casts do."""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from quantizing import expected

import gradstat
from gradstat.formats import FORMATS

sys.path.insert(0, str(ROOT / "examples"))
import formats

pytestmark = pytest.mark.host("the example trains on the CPU")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_formats_prints_the_table_worst_first_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "formats.png"
    monkeypatch.setattr(sys, "argv", ["formats.py", "-o", str(path), "--steps", "40"])
    formats.main()
    shown = capsys.readouterr().out
    rows = [line.split() for line in shown.splitlines() if ".weight " in line and "dB" in line]
    assert len(rows) == 11
    assert rows[-1][0] == "head.weight"
    shares = [float(row[1].rstrip("%")) for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert "nvfp4, 4.5 bits, keeps every gradient above 20 dB" in shown
    assert path.stat().st_size > 10_000


def test_what_is_predicted_to_starve_really_stays_where_it_was() -> None:
    full = formats.train(steps=60)
    starving = formats.train(formats.STARVING, steps=60)
    remedy = formats.train(formats.REMEDY, steps=60)
    predicted = full.underflow[formats.STARVING]
    moved = starving.moved / full.moved
    # Of the weights' gradients that are predicted to be zero nearly everywhere, each lost most of
    # its updates; the one that is predicted to keep the most moved the furthest.
    assert (predicted > 0.999).any()
    assert (moved[predicted > 0.999] < 0.3).all()
    assert moved.argmax() == predicted.argmin()
    assert (full.underflow[formats.REMEDY] < 0.01).all()
    assert np.abs(remedy.moved / full.moved - 1).max() < 0.02
    assert np.mean(starving.loss[-10:]) > np.mean(full.loss[-10:]) + 0.3


def tensors_of_the_gpt() -> dict[str, torch.Tensor]:
    """Weights and gradients after some steps."""
    model, text = formats.make_model(), formats.make_text()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(3):
        optimizer.zero_grad()
        formats.backward(model, text)
        optimizer.step()
    found = {f"{name}, weight": p.detach() for name, p in model.named_parameters()}
    return found | {f"{name}, gradient": p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("form", FORMATS)
def test_quantization_of_the_gpt_is_what_real_casts_do(form: str) -> None:
    tensors = tensors_of_the_gpt()
    q = gradstat.quantization(tensors, form)
    for (name, x), integers, floats in zip(tensors.items(), q.integers, q.floats, strict=True):
        wanted_integers, wanted_floats = expected(x.cpu(), FORMATS[form])
        assert integers.tolist() == wanted_integers, name
        assert floats.tolist() == pytest.approx(wanted_floats, rel=1e-5, abs=0), name


@pytest.mark.parametrize("form", [formats.STARVING, formats.REMEDY])
def test_quantization_of_the_gpt_is_what_the_example_casts(form: str) -> None:
    for name, x in tensors_of_the_gpt().items():
        back, q = formats.cast(x, form).double(), gradstat.quantization(x, form)
        assert int(q.underflowed) == int(((back == 0) & (x != 0)).sum()), name
        error = float((back - x.double()).norm() / x.double().norm())
        assert float(q.error) == pytest.approx(error, rel=1e-5), name
