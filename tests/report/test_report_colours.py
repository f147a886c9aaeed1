"""The page's colours are told apart by all readers, also by those who are colour-blind."""

import re

import numpy as np
import pytest
from conftest import ROOT

REPORT = ROOT / "gradstat" / "report"

# Machado, Oliveira and Fernandes, 2009: what is seen of linear red, green and blue.
READERS = {
    "all cones": np.eye(3),
    "no long ones": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "no medium ones": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "no short ones": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}
XYZ = np.array(
    [
        [0.4124564, 0.3575761, 0.1804375],
        [0.2126729, 0.7151522, 0.0721750],
        [0.0193339, 0.1191920, 0.9503041],
    ]
)
WHITE = XYZ.sum(1)
# Two that are 2.3 apart are just told apart side by side.
LEAST = 14.0


def seen(colors: np.ndarray, reader: str) -> np.ndarray:
    """Colours, ``(N, 3)`` from 0 to 255, in CIELAB as somebody sees them."""
    x = colors / 255
    linear = np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)
    ratio = np.clip(linear @ READERS[reader].T, 0, 1) @ XYZ.T / WHITE
    f = np.where(ratio > 216 / 24389, np.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    parts = (116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2]))
    return np.stack(parts, 1)


def rgb(colors: list[str]) -> np.ndarray:
    return np.array([[int(color[i : i + 2], 16) for i in (1, 3, 5)] for color in colors], float)


def ramp(name: str) -> np.ndarray:
    """256 colours, as the page makes them of its stops."""
    text = (REPORT / "canvas.js").read_text()
    stops = rgb(re.findall(r"#[0-9a-f]{6}", re.search(rf"{name} = .*", text)[0]))
    at = np.linspace(0, len(stops) - 1, 256)
    below = np.minimum(at.astype(int), len(stops) - 2)
    return stops[below] + (at - below)[:, None] * (stops[below + 1] - stops[below])


def variables(scheme: str) -> dict[str, str]:
    css = (REPORT / "report.css").read_text()
    light, dark = re.findall(r":root \{(.*?)\}", css, re.DOTALL)[:2]
    found = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", light))
    return found | (dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", dark)) if scheme == "dark" else {})


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_cells_without_a_magnitude_are_like_none_with_one(scheme: str, reader: str) -> None:
    names = ["broken", "zero", "sunken"]
    others = seen(rgb([variables(scheme)[name] for name in names]), reader)
    all_others = np.concatenate([seen(ramp("VIRIDIS"), reader), others])
    for name, color in zip(names, others, strict=True):
        distances = np.linalg.norm(all_others - color, axis=1)
        assert np.sort(distances)[1] >= LEAST, name  # after itself


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    ("name", "sign"), [("VIRIDIS", 1), ("densityLight", -1), ("densityDark", 1)]
)
def test_scales_go_from_dark_to_light_or_back_for_all(name: str, sign: int, reader: str) -> None:
    lightness = seen(ramp(name), reader)[:, 0]
    assert (np.diff(lightness) * sign > 0).all()
    assert abs(lightness[-1] - lightness[0]) > 70


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(scheme: str) -> None:
    found = variables(scheme)

    def luminance(name: str) -> float:
        x = rgb([found[name]])[0] / 255
        return float(np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4) @ XYZ[1])

    for text in ("ink", "muted", "severe", "warning", "note", "accent"):
        for ground in ("surface", "ground"):
            light, dark = sorted((luminance(text), luminance(ground)), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)
