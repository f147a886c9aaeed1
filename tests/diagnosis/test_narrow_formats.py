"""Findings about narrow formats, and ``gradstat formats``."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from histories import append_rows

import gradstat
from gradstat import History, Log2Bins
from gradstat.cli import main
from gradstat.diagnosis.evidence import Evidence
from gradstat.diagnosis.narrow_formats import layer_fits
from gradstat.record import Row
from gradstat.results import PACKED, packed

FORMATS = ("float8_e5m2", "mxfp8_e4m3", "mxfp4_e2m1")


def recorded(
    tensors: list[list[torch.Tensor]], rows: list[Row], formats: tuple[str, ...] = FORMATS
) -> History:
    """A history of these tensors, one list for each step."""
    history = History(rows, Log2Bins(), formats=formats)
    for step, each in enumerate(tensors):
        s = gradstat.statistics(each)
        fields = torch.empty(len(each), 0, len(PACKED))
        if formats:
            q = gradstat.quantization(each, formats).values()
            parts = ("integers", "floats")
            fields = packed(*(torch.stack([getattr(one, part) for one in q]) for part in parts))
        arrays = s.integers, s.floats, s.counts, fields
        append_rows(history, step, *(x.numpy() for x in arrays))
    return history


def normal(step: int, scale: float, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(1000 * seed + step)
    return torch.randn(64, 64) * scale


ROWS = [Row("grad", "a"), Row("grad", "b"), Row("param", "a")]


@pytest.fixture
def run() -> History:
    steps = [[normal(i, 1.0), normal(i, 1e-7, 1), normal(i, 1.0, 2)] for i in range(60)]
    return recorded(steps, ROWS)


def test_format_underflow_names_the_format_and_the_layer(run: History) -> None:
    found = [each for each in run.diagnose() if each.kind == "format underflow"]
    assert [each.layer for each in found] == ["b"]
    assert found[0].severity == "warning"
    assert found[0].steps == (0, 59)
    assert found[0].numbers == {"share": 1.0, "layers": 1.0}
    assert found[0].sentence == "float8_e5m2 would flush 100% of b's gradient to zero."


def test_format_underflow_says_when() -> None:
    steps = [[normal(i, 1.0 if i < 30 else 1e-7)] for i in range(60)]
    found = recorded(steps, ROWS[:1], ("float8_e5m2",)).diagnose(gradstat.Thresholds(window=5))
    (flushed,) = [each for each in found if each.kind == "format underflow"]
    assert flushed.steps == (30, 59)


def test_format_saturation_is_about_formats_whose_scale_does_not_follow() -> None:
    steps = [[normal(i, 1e6), normal(i, 1e6, 1), normal(i, 1.0)] for i in range(20)]
    found = [each for each in recorded(steps, ROWS).diagnose() if each.kind == "format saturation"]
    assert [each.layer for each in found] == ["b"] or [each.layer for each in found] == ["a"]
    assert found[0].numbers["layers"] == 2
    assert found[0].sentence.startswith("float8_e5m2 is too narrow for 9")
    assert found[0].sentence.endswith("which would saturate, and over 0.1% in 1 other layer.")


def test_narrowest_format_is_recommended(run: History) -> None:
    (note,) = [each for each in run.diagnose() if each.kind == "narrowest format"]
    assert note.severity == "note"
    assert note.layer == "b"
    assert set(note.numbers) == set(FORMATS)
    expected = "mxfp8_e4m3 for all gradients; float8_e5m2 for all parameters."
    assert note.sentence.startswith(f"To keep 20 dB of each layer: {expected}")
    assert note.sentence.endswith(" That is rounding alone, and predicts no convergence.")
    lower = run.diagnose(gradstat.Thresholds(format_snr=15.0))
    (note,) = [each for each in lower if each.kind == "narrowest format"]
    assert "mxfp4_e2m1 for all gradients; mxfp4_e2m1 for all parameters" in note.sentence


def test_narrowest_format_keeps_what_the_weights_of_a_norm_have_learned() -> None:
    rows = [Row("param", "norm.weight"), Row("param", "linear.weight")]
    steps = [[1 + 0.03 * normal(i, 1.0).ravel()[:64], normal(i, 1.0, 1)] for i in range(20)]
    formats = ("mxfp4_e2m1", "float8_e4m3fn", "bfloat16")
    norm, linear = layer_fits(Evidence(recorded(steps, rows, formats), 20))
    # Four bits make 1 of all of them, which is little beside 1.
    assert norm.fits["mxfp4_e2m1"].snr > 25
    assert not norm.fits["mxfp4_e2m1"].keeps(gradstat.Thresholds())
    assert norm.narrowest(gradstat.Thresholds()) == "bfloat16"
    assert linear.narrowest(gradstat.Thresholds()) == "float8_e4m3fn"
    # Nothing is learned yet of weights that are all 1.
    steps = [[torch.ones(64), normal(i, 1.0, 1)] for i in range(20)]
    norm, _ = layer_fits(Evidence(recorded(steps, rows, formats), 20))
    assert norm.narrowest(gradstat.Thresholds()) == "mxfp4_e2m1"


@pytest.mark.parametrize("off", [-0.1, 0.1])
def test_narrowest_format_does_not_change_with_a_tenth_of_a_decibel(off: float) -> None:
    history = recorded([[normal(0, 1.0)]] * 20, ROWS[:1], ("nvfp4", "float8_e4m3fn"))
    snr = layer_fits(Evidence(history, 20))[0].fits["nvfp4"].snr
    found = history.diagnose(gradstat.Thresholds(format_snr=snr + off))
    (note,) = [each for each in found if each.kind == "narrowest format"]
    assert ": float8_e4m3fn for all gradients. At the limit is nvfp4, " in note.sentence


def test_narrowest_format_has_exceptions() -> None:
    rows = [Row("grad", name) for name in "abc"]
    steps = [[normal(i, 1.0), normal(i, 1.0, 1), normal(i, 1e-7, 2)] for i in range(20)]
    found = recorded(steps, rows, ("float8_e5m2", "bfloat16")).diagnose()
    (note,) = [each for each in found if each.kind == "narrowest format"]
    assert "float8_e5m2 for the gradients but c, bfloat16 for these" in note.sentence
    found = recorded(steps, rows, ("float8_e5m2",)).diagnose()
    (note,) = [each for each in found if each.kind == "narrowest format"]
    assert "float8_e5m2 for the gradients but c, no format for these" in note.sentence


def test_layer_fits_are_those_of_the_worst_window() -> None:
    # One bad record in a window says nothing, a bad window does.
    scales = [1.0] * 40
    scales[3] = 1e-9
    scales[25:40] = [1e-9] * 15
    steps = [[normal(i, scale)] for i, scale in enumerate(scales)]
    (early,) = layer_fits(Evidence(recorded(steps[:20], ROWS[:1]), 20))
    assert early.fits["float8_e5m2"].underflow < 0.01
    (whole,) = layer_fits(Evidence(recorded(steps, ROWS[:1]), 20))
    assert whole.fits["float8_e5m2"].underflow == 1.0
    assert whole.fits["mxfp8_e4m3"].snr > 20
    assert whole.fits["mxfp8_e4m3"].scales[0] < -30


def test_run_without_formats_or_values_has_no_such_finding() -> None:
    kinds = {"format underflow", "format saturation", "narrowest format"}
    steps = [[torch.zeros(4, 4)] * 3, [torch.full((4, 4), np.nan)] * 3]
    for formats in ((), FORMATS):
        assert not kinds & {each.kind for each in recorded(steps, ROWS, formats).diagnose()}


def test_layers_without_values_say_nothing_of_a_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [Row("grad", name) for name in "abcde"]
    steps = [[normal(i, 1.0), *[torch.zeros(8)] * 3, torch.ones(0)] for i in range(3)]
    # A record of zeros among others is none either.
    steps[1][0] = torch.zeros(64, 64)
    h = recorded(steps, rows)
    (note,) = [each for each in h.diagnose() if each.kind == "narrowest format"]
    assert note.sentence.startswith("To keep 20 dB of each layer: float8_e5m2 for all gradients.")
    assert [each.layer for each in layer_fits(Evidence(h, 1))] == ["a"]
    h.save(tmp_path / "run.npz")
    assert main(["formats", "--scales", str(tmp_path / "run.npz")]) == 0
    text = capsys.readouterr().out
    assert "4 layers without values other than zero left out" in text
    assert re.search(r"mxfp8_e4m3.*\n.* dB.*, 2\^-[0-9]+\.\.-[0-9]+", text)


def test_format_that_flushes_a_layer_is_not_recommended() -> None:
    # Every other value is small, and shares its block with a large one.
    x = normal(0, 1.0)
    x[:, ::2] *= 1e-4
    found = recorded([[x]] * 5, ROWS[:1], ("float8_e4m3fn_amax", "nvfp4", "bfloat16")).diagnose()
    flushed = [each.sentence for each in found if each.kind == "format underflow"]
    assert flushed[0].startswith("nvfp4 would flush 5")
    (note,) = [each for each in found if each.kind == "narrowest format"]
    assert note.numbers["nvfp4"] > 20
    assert "nvfp4" not in note.sentence


def test_findings_are_json_where_a_format_keeps_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded([[torch.ones(8)]] * 3, ROWS[:1], ("bfloat16",)).save(tmp_path / "run.npz")
    main(["diagnose", "--json", str(tmp_path / "run.npz")])
    found = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert {"narrowest format"} <= {each["kind"] for each in found}


def test_formats_prints_each_layer_the_worst_first(
    run: History, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.save(tmp_path / "run.npz")
    assert main(["formats", str(tmp_path / "run.npz")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["gradient", "narrowest", *FORMATS]
    assert lines[3].split()[:4] == ["b", "mxfp8_e4m3", "0.0", "dB,"]
    assert "100% to 0" in lines[3]
    # A scale for each block takes a quarter of a bit more.
    assert lines[4].split()[:2] == ["a", "float8_e5m2"]
    assert lines[6].split()[0] == "parameter"
    assert " ".join(lines[9:]).startswith("To keep 20 dB of each layer: mxfp8_e4m3 for all")
    assert main(["formats", "--snr", "15", str(tmp_path / "run.npz")]) == 0
    assert main(["formats", "--snr", "nan", str(tmp_path / "run.npz")]) == 2
    printed = capsys.readouterr()
    assert "format_snr" in printed.err
    assert "To keep 15 dB of each layer: mxfp4_e2m1 for all" in printed.out


def test_formats_says_where_there_are_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded([[normal(0, 1.0)]], ROWS[:1], ()).save(tmp_path / "run.npz")
    assert main(["formats", str(tmp_path / "run.npz")]) == 2
    assert "needs a run of watch(formats=...)" in capsys.readouterr().err
