"""What a notebook shows of a History and of a Watch."""

import base64
import io
import math
import re
from html.parser import HTMLParser

import matplotlib.image
import numpy as np
import pytest
import torch
from histories import falling, make_history

import gradstat
from gradstat import History, LinearBins, Log2Bins


class Checked(HTMLParser):
    """Fails where an element is not closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag != "img":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def breaking(step: int, layer: int) -> torch.Tensor:
    if layer == 1:
        return torch.zeros(9)
    return torch.full((9,), math.nan) if layer == 2 and step >= 7 else falling(step, layer)


def image(text: str) -> np.ndarray:
    (data,) = re.findall(r"data:image/png;base64,([^\"]+)", text)
    return matplotlib.image.imread(io.BytesIO(base64.b64decode(data)), format="png")


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(9)])
def test_history_shows_size_findings_line_and_map(bins: Log2Bins) -> None:
    h = make_history(bins, 4, 20, breaking, absent=[(3, 0)])
    for step in range(20):
        h.add_scalar("loss", step, 2.0 - step / 20)
    text = h._repr_html_()
    Checked(text)
    assert "20 records of 4 layers, steps 0 to 19: gradients" in text
    assert h.diagnose()[0].sentence in text
    assert "loss, 1.05 to 2" in text
    assert "<script" not in text
    assert not re.search(r"https?:", text)
    pixels = (image(text) * 255).round().astype(int)
    assert pixels.shape == (4, 20, 4)
    assert (pixels[2, 7:, :3] == [229, 53, 43]).all()
    assert (pixels[1, :, :3] == [150, 157, 166]).all()
    assert pixels[0, 3, 3] == 0
    assert (pixels[[0, 3], 5, 1] > 0).all()


def test_history_shows_itself_without_records_and_whatever_its_layers_are_called() -> None:
    assert "0 records of 1 layer: gradients" in History(["a"], Log2Bins())._repr_html_()
    assert "0 records of 0 layers" in History([], Log2Bins())._repr_html_()
    text = make_history(Log2Bins(), ["<b>&\x1b", "z"], 3)._repr_html_()
    Checked(text)
    assert "&lt;b&gt;&amp;" in text
    one = make_history(Log2Bins(), ["a"], 1, lambda step, layer: torch.full((3,), math.nan))
    Checked(one._repr_html_())


def test_watch_shows_its_history_while_it_runs() -> None:
    model = torch.nn.Linear(3, 2)
    with gradstat.watch(model) as w:
        model(torch.ones(1, 3)).sum().backward()
        assert "Watch, open" in w._repr_html_()
        assert "1 record of 1 layer" in w._repr_html_()
    assert "Watch, closed" in w._repr_html_()


def test_fragment_stays_small_for_a_large_run() -> None:
    h = make_history(Log2Bins(), 200, 30)
    assert len(h._repr_html_()) < 100_000
