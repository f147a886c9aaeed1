"""The report: what is thinned and how, the file, and what is embedded in it."""

import base64
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import LONG_NAMES, falling, make_history, repeat_record

import gradstat
from gradstat import History
from gradstat.record import KINDS
from gradstat.report import thin
from gradstat.report.page import write

LOG2 = gradstat.Log2Bins()


def contents(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What a page's script reads."""
    page = path.read_text(encoding="utf-8")
    meta = json.loads(
        re.search(r'<script type="application/json" id="meta">(.*?)</script>', page)[1]
    )
    data = base64.b64decode(re.search(r'id="data">(.*?)</script>', page)[1])
    arrays = {
        name: np.frombuffer(data, f"<{kind}", length, offset)
        for name, (kind, offset, length) in meta["arrays"].items()
    }
    return meta, arrays


def test_columns_of_a_short_history_are_its_records() -> None:
    h = make_history(LOG2, layers=3, steps=5, absent=[(2, 1)])
    columns = thin.columns(h)
    assert columns.steps.tolist() == [[s, s] for s in range(5)]
    assert columns.records.tolist() == [1] * 5
    for each in (columns.level, columns.least, columns.most):
        np.testing.assert_allclose(each, np.log2(h["rms"]).T, rtol=1e-6)
    assert np.isnan(columns.level[1, 2])
    assert np.isnan(columns.zeros[1, 2])


def test_columns_of_a_long_history_are_its_elements_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thin, "_MAX_COLUMNS", 2)

    def gradient(step: int, layer: int) -> torch.Tensor:
        x = falling(step, layer)[: 10 + step].double() * 10.0 ** (-200 * layer)
        x[:step] = 0
        return torch.cat([x, torch.full((step,), float("inf"))])

    h = make_history(LOG2, layers=2, steps=5, gradient=gradient)
    columns = thin.columns(h)
    assert columns.steps.tolist() == [[0, 1], [2, 4]]
    assert columns.records.tolist() == [2, 3]
    for layer in range(2):
        x = torch.cat([gradient(step, layer) for step in (2, 3, 4)])
        finite = x[x.isfinite()].double()
        unit = 10.0 ** (-200 * layer)
        rms = float((finite / unit).square().mean().sqrt())
        # Squares of 1e-200 would be zero.
        assert columns.level[layer, 1] == pytest.approx(math.log2(rms) + math.log2(unit), rel=1e-6)
        assert columns.nonfinite[layer, 1] == 2 + 3 + 4
        assert columns.zeros[layer, 1] == pytest.approx(9 / len(finite))
        own = np.log2(h["rms"][2:, layer])
        assert columns.least[layer, 1] == pytest.approx(own.min(), rel=1e-6)
        assert columns.most[layer, 1] == pytest.approx(own.max(), rel=1e-6)


def test_columns_tell_zero_from_nothing() -> None:
    gradients = [torch.zeros(3), torch.full((3,), float("nan")), torch.ones(3)]
    h = make_history(LOG2, 3, 1, lambda step, layer: gradients[layer], absent=[(0, 2)])
    columns = thin.columns(h)
    assert columns.level[0, 0] == -math.inf
    assert np.isnan(columns.level[1:, 0]).all()
    assert columns.nonfinite[:, 0].tolist() == [0, 3, 0]


def test_sample_counts_magnitudes_by_octave() -> None:
    x = torch.tensor([0.0, -0.0, 1e-40, 1.0, -1.5, 1.99, 2.0, -3e38, float("nan")])
    h = make_history(LOG2, 1, 1, lambda step, layer: x)
    sample = thin.sample(h, 0)
    rows = np.flatnonzero(sample.counts) + sample.first[0]
    assert rows.tolist() == [0, 127, 128, 254]
    assert sample.counts[sample.counts > 0].tolist() == [1, 3, 1, 1]
    assert sample.counts.size == sample.rows[0] == 255
    assert (sample.finite[0], sample.zeros[0], sample.nonfinite[0]) == (8, 2, 1)


def test_samples_are_spread_over_the_records_and_end_with_the_newest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(thin, "_MAX_SAMPLES", 4)
    h = make_history(LOG2, layers=2, steps=31, absent=[(10, 1)])
    samples = thin.samples(h)
    assert [each.step for each in samples] == [0, 10, 20, 30]
    assert samples[1].rows[1] == 0
    for sample in samples:
        ends = np.cumsum(sample.rows)
        assert ends[-1] == sample.counts.size
        for layer in range(2):
            if (sample.step, layer) == (10, 1):
                continue
            counts = sample.counts[ends[layer] - sample.rows[layer] : ends[layer]]
            assert counts[[0, -1]].all()
            magnitudes = falling(sample.step, layer).abs().numpy()
            exponents = np.frexp(magnitudes)[1] - 1 + 127 - sample.first[layer]
            assert counts.tolist() == np.bincount(exponents).tolist()


def test_sample_of_linear_bins_sums_neighbours() -> None:
    h = make_history(gradstat.LinearBins(130), layers=2, steps=3)
    sample = thin.sample(h, 2)
    assert sample.rows.tolist() == [44, 44]
    counts, edges = h.histogram("1.weight", 2)
    summed = np.add.reduceat(counts, np.arange(0, 130, 3))
    assert sample.counts[44:].tolist() == summed.tolist()
    assert sample.edges[1].tolist() == [edges[0], edges[-1]]


@pytest.mark.parametrize("bins", [LOG2, gradstat.LinearBins(30), gradstat.LinearBins(4, -1.0, 1.0)])
def test_report_holds_what_was_thinned(tmp_path: Path, bins: gradstat.Log2Bins) -> None:
    h = make_history(bins, layers=3, steps=6, absent=[(5, 0)])
    h.report(tmp_path / "run.html", title="A run")
    meta, arrays = contents(tmp_path / "run.html")
    assert meta["head"]["layers"] == h.layers
    assert meta["records"] == 6
    assert meta["head"]["bins"] == repr(bins)
    columns, samples = thin.columns(h), thin.samples(h)
    np.testing.assert_array_equal(arrays["level"], columns.level.ravel())
    for name in ("counts", "finite", "rows"):
        of_all = np.concatenate([getattr(each, name) for each in samples])
        np.testing.assert_array_equal(arrays[f"sample{name.title()}"], of_all)
    assert meta["samples"] == meta["kept"] == [each.step for each in samples]
    assert arrays["sampleCounts"].dtype == np.uint8
    assert len(arrays["sampleEdges"]) == (0 if bins == LOG2 else 2 * len(samples) * len(h.layers))
    np.testing.assert_array_equal(arrays["newestRms"], [np.nan, *h["rms"][-1, 1:]])
    assert [f["sentence"] for f in meta["findings"]] == [f.sentence for f in h.diagnose()]
    assert [h.layers[f["layer"]] for f in meta["findings"]] == [f.layer for f in h.diagnose()]
    assert meta["findings"]


def test_report_tells_the_kind_of_each_row(tmp_path: Path) -> None:
    h = make_history(LOG2, ["a", "b"], 4, kinds=("grad", "param", "update", "activation", "unit"))
    h.report(tmp_path / "run.html")
    meta, arrays = contents(tmp_path / "run.html")
    head = meta["head"]
    assert head["layers"] == ["a", "b"] * 5
    assert head["nouns"] == ["gradient", "parameter", "update", "activation", "unit peak"]
    assert head["kinds"] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    np.testing.assert_array_equal(arrays["level"], thin.columns(h).level.ravel())
    nothing = np.full(10, np.nan)
    ratio, dead = nothing.copy(), nothing.copy()
    ratio[4:6], dead[6:8] = h.update_ratio()[-1], 0
    np.testing.assert_array_equal(arrays["newestRatio"], ratio)
    np.testing.assert_array_equal(arrays["newestDead"], dead)
    assert [h.layers[f["layer"]] for f in meta["findings"]] == [f.layer for f in h.diagnose()]


def test_report_loads_nothing(tmp_path: Path) -> None:
    make_history(LOG2).report(tmp_path / "run.html")
    page = (tmp_path / "run.html").read_text()
    assert "default-src 'none'" in page
    code = re.sub(r'(?s)<script type="application/.*?</script>', "", page)
    code = code.replace("http://www.w3.org/2000/svg", "")  # a name, of pictures that are saved
    assert re.findall(r"https?:|\bsrc=|@import|url\(|\bfetch\(|\bimport\b", code) == []
    assert "{{" not in code.replace("${{", "")


NASTY = '</script><img src=x onerror="alert(1)">&{{data}}\u2028'


def test_report_escapes_names_and_title(tmp_path: Path) -> None:
    h = make_history(LOG2, layers=[NASTY, "b"])
    h.report(tmp_path / "run.html", title=NASTY)
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert "<img" not in page
    assert "<h1>&lt;/script&gt;&lt;img src=x onerror=&quot;alert(1)&quot;&gt;&amp;{{data}}" in page
    assert contents(tmp_path / "run.html")[0]["head"]["layers"] == [
        NASTY.replace("\u2028", r"\u2028"),
        "b",
    ]


def test_report_appears_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.html"
    path.write_text("before")
    h = make_history(LOG2)

    def fail(self: Path, text: str, encoding: str) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", fail)
        with pytest.raises(OSError, match="disk full"):
            h.report(path)
    assert path.read_text() == "before"
    h.report(path)
    assert path.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [path]


def test_report_refuses_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run.html"
    with pytest.raises(ValueError, match=r"report\(\) needs a History with records; history is"):
        History(["a"], LOG2).report(path)
    with pytest.raises(TypeError, match=r"report\(\) needs a text; title is 3"):
        make_history(LOG2).report(path, title=3)
    with pytest.raises(TypeError, match=r"report\(\) needs a History; history is NoneType"):
        write(None, path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kinds", "columns"), [(("grad",), 240), (KINDS, 40)])
def test_report_of_500_layers_stays_under_10_mb_whatever_the_number_of_steps(
    kinds: tuple[str, ...], columns: int, tmp_path: Path
) -> None:
    # Over 40 octaves, like the gradients of a million elements, and counts that take four bytes.
    octaves = torch.exp2(-torch.arange(40.0)).repeat_interleave(2)
    record = make_history(
        LOG2,
        [f"{name}.{i}" for i in range(42) for name in LONG_NAMES][:500],
        1,
        lambda step, layer: octaves,
        kinds=kinds,
    )
    history = repeat_record(record, 250)
    history.report(tmp_path / "run.html")
    samples = thin.samples(history)
    assert thin.columns(history).level.shape == (500 * len(kinds), columns)
    assert samples[0].rows.tolist() == [40] * 500 * len(kinds)
    # Here they take one byte.
    larger = 4 / 3 * 3 * sum(each.counts.size for each in samples)
    assert (tmp_path / "run.html").stat().st_size + larger < 10e6
