"""Whether a figure can be drawn, and every text of it read."""

import itertools

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

PIXEL = 1.0


def draw_small(figure: Figure) -> None:
    """Draw all of a figure, once and in few pixels, to see that nothing warns or fails."""
    figure.set_dpi(30)
    FigureCanvasAgg(figure).draw()


def drawn_texts(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Bbox]]:
    """Every text that drawing the figure really draws, and where."""
    texts = []
    draw = Text.draw

    def record(text: Text, renderer: object) -> None:
        if text.get_visible() and text.get_text():
            texts.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    with monkeypatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(figure).draw()
    return texts


def overlaps(a: Bbox, b: Bbox) -> bool:
    width = min(a.x1, b.x1) - max(a.x0, b.x0)
    height = min(a.y1, b.y1) - max(a.y0, b.y0)
    return width > PIXEL and height > PIXEL


def assert_legible(figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """No text over another, over the colour bar, or beyond the figure."""
    texts = drawn_texts(figure, monkeypatch)
    assert len(texts) > 4
    pairs = itertools.combinations(texts, 2)
    over = [(a, b) for (a, at), (b, to) in pairs if overlaps(at, to)]
    assert not over, f"texts over each other: {over}"
    width, height = figure.bbox.size
    beyond = [
        text
        for text, box in texts
        if min(box.x0, box.y0) < -PIXEL or box.x1 > width + PIXEL or box.y1 > height + PIXEL
    ]
    assert not beyond, f"texts beyond the figure: {beyond}"
    bars = [ax.get_window_extent() for ax in figure.axes if ax.get_label() == "<colorbar>"]
    on_bar = [text for text, box in texts for bar in bars if overlaps(box, bar)]
    assert not on_bar, f"texts on the colour bar: {on_bar}"
