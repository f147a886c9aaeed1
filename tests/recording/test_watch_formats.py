"""``watch(formats=...)``: what is measured, and that it is kept wherever a record goes."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import gradstat
from gradstat import History
from gradstat.formats import FORMATS
from gradstat.record import Row
from gradstat.results import QUANTIZATION_COUNTS, QUANTIZATION_FIELDS

NAMES = ("float8_e4m3fn", "mxfp8_e4m3", "nvfp4")


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 33), nn.ReLU(), nn.Linear(33, 5))


def train(model: nn.Module, w: gradstat.Watch, steps: int = 3) -> None:
    for step in range(steps):
        model.zero_grad()
        torch.manual_seed(step)
        x = torch.randn(8, 40)
        (model(x).square().mean() * 1e-3).backward()


def equal(a: History, b: History) -> None:
    assert a.formats == b.formats == list(NAMES)
    np.testing.assert_array_equal(a.unpack().formats, b.unpack().formats)
    assert a.steps.tolist() == b.steps.tolist()


def test_watch_measures_what_quantization_does() -> None:
    model, expected = small(), []
    with gradstat.watch(model, what=("grad", "param"), formats=NAMES) as w:
        for step in range(2):
            train(model, w, 1 + step)
            weights = [model[0].weight, model[2].weight]
            tensors = [weight.grad for weight in weights] + weights
            expected.append(gradstat.quantization(tensors, NAMES))
    h = w.history
    for name in NAMES:
        found = h.quantization(name)
        assert set(found) == set(QUANTIZATION_FIELDS)
        for at, step in enumerate((0, 2)):
            for field in QUANTIZATION_FIELDS:
                values = getattr(expected[at][name], field).numpy()
                np.testing.assert_array_equal(found[field][step], values, err_msg=f"{name} {field}")
    with pytest.raises(KeyError, match=r"one of float8_e4m3fn, mxfp8_e4m3, nvfp4; name is 'fp4'"):
        h.quantization("fp4")


@pytest.mark.host("it names the engines of a computer")
@pytest.mark.parametrize("engine", ["cpu", "reference"])
@pytest.mark.parametrize("what", ["grad", "activation", "all"])
def test_watch_measures_the_same_on_each_engine(engine: str, what: str) -> None:
    model = small()
    with gradstat.watch(model, what=what, formats=NAMES, engine=engine) as w:
        train(model, w, 2)
    assert len(w.history) == 2
    for row, snr in zip(w.history.rows, w.history.quantization("nvfp4")["snr"].T, strict=True):
        assert np.isnan(snr).all() == (row.kind == "unit")


def test_watch_counts_outputs_of_one_record_together() -> None:
    model = small()
    outputs: list[torch.Tensor] = []
    model[0].register_forward_hook(lambda module, inputs, output: outputs.append(output.detach()))
    with gradstat.watch(model, what="activation", formats="nvfp4") as w:
        loss = sum(model(torch.randn(n, 40)).sum() for n in (3, 4, 300))
        loss.backward()
    h = w.history
    each = gradstat.quantization(outputs, "nvfp4")
    whole = each[0].merge(each[1]).merge(each[2])
    column, found = h.layers.index("activation/0"), h.quantization("nvfp4")
    for field in QUANTIZATION_COUNTS:
        assert found[field][0, column] == int(getattr(whole, field)), field
    for field in ("underflow", "snr", "scale_min", "scale_max"):
        assert found[field][0, column] == pytest.approx(float(getattr(whole, field)), rel=1e-5)


def test_watch_leaves_out_peaks_and_absent_layers() -> None:
    model = small()
    model[2].weight.requires_grad_(False)
    with gradstat.watch(model, what=("grad", "activation"), formats=NAMES) as w:
        train(model, w)
    found = w.history.quantization("mxfp8_e4m3")
    for row, snr, n in zip(w.history.rows, found["snr"].T, found["nonzero"].T, strict=True):
        is_absent = row.kind == "unit" or row == Row("grad", "2.weight")
        assert np.isnan(snr).all() == is_absent, row
        assert (n == 0).all() == is_absent, row


@pytest.mark.parametrize("capacity", [None, 2])
def test_formats_are_kept_by_files_and_directories(tmp_path: Path, capacity: int | None) -> None:
    model = small()
    options = {"what": ("grad", "activation"), "formats": NAMES, "capacity": capacity}
    with gradstat.watch(model, path=tmp_path / "run", **options) as w:
        train(model, w, 5)
    h = w.history
    assert len(h) == (capacity or 5)
    h.save(tmp_path / "run.npz")
    equal(History.load(tmp_path / "run.npz"), h)
    written = History.load(tmp_path / "run")
    assert len(written) == 5
    kept = np.isin(written.steps, h.steps)
    np.testing.assert_array_equal(written.unpack().formats[kept], h.unpack().formats)
    equal(h.snapshot(), h)
    chosen = h.select("activation").quantization("nvfp4")["snr"]
    columns = np.array(h.kinds) == "activation"
    np.testing.assert_array_equal(chosen, h.quantization("nvfp4")["snr"][:, columns])


def test_resumed_run_goes_on_with_its_formats(tmp_path: Path) -> None:
    model = small()
    with gradstat.watch(model, formats=NAMES, path=tmp_path / "run") as w:
        train(model, w)
    with pytest.raises(ValueError, match="the formats of the run that it goes on with") as error:
        gradstat.watch(model, path=tmp_path / "run", first_step=3, formats="nvfp4")
    assert "which has float8_e4m3fn, mxfp8_e4m3, nvfp4, and there are nvfp4" in str(error.value)
    with gradstat.watch(model, formats=NAMES, path=tmp_path / "run", first_step=2) as w:
        train(model, w)
    h = History.load(tmp_path / "run")
    assert h.steps.tolist() == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(h.unpack().formats[2:], w.history.unpack().formats)


def test_merge_puts_formats_of_ranks_together(tmp_path: Path) -> None:
    model, parts = small(), []
    for rank in range(3):
        with gradstat.watch(model, formats=NAMES) as w:
            train(model, w, 2)
            torch.nn.init.normal_(model[0].weight, std=10.0**-rank)
        w.history.rank, w.history.world = rank, 3
        parts.append(w.history)
    merged = History.merge(parts)
    assert merged.formats == list(NAMES)
    for name in NAMES:
        each = [part.quantization(name) for part in parts]
        whole = merged.quantization(name)
        for field in QUANTIZATION_COUNTS:
            np.testing.assert_array_equal(whole[field], sum(part[field] for part in each))
        np.testing.assert_array_equal(
            whole["scale_min"], np.fmin.reduce([part["scale_min"] for part in each])
        )
        assert (whole["snr"] <= np.max([part["snr"] for part in each], 0)).all()
    other = History(merged.rows, merged.bins)
    other.rank, other.world = 3, 3
    with pytest.raises(ValueError, match="the same formats on each rank"):
        History.merge([*parts, other])


def test_merge_is_that_of_the_whole_tensor() -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32) * 1e30
    parts = []
    for rank, shard in enumerate((x[:30], x[30:])):
        layer = nn.Linear(32, len(shard), bias=False)
        with gradstat.watch(layer, formats=("mxfp8_e4m3", "bfloat16"), when="call") as w:
            layer.weight.grad = shard.clone()
            w.measure()
        w.history.rank, w.history.world = rank, 2
        parts.append(w.history)
    whole = gradstat.quantization(x, ("mxfp8_e4m3", "bfloat16"))
    merged = History.merge(parts, replicated=False)
    for name, expected in whole.items():
        for field in QUANTIZATION_FIELDS:
            found = merged.quantization(name)[field][0, 0]
            assert found == pytest.approx(float(getattr(expected, field)), rel=1e-9, nan_ok=True)


def test_tables_have_columns_of_each_format(tmp_path: Path) -> None:
    model = small()
    with gradstat.watch(model, formats=NAMES) as w:
        train(model, w)
        w.log(loss=1.5)
    w.history.to_csv(tmp_path / "run.csv")
    with (tmp_path / "run.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = w.history.quantization("nvfp4")
    assert float(rows[0]["nvfp4_snr"]) == found["snr"][0, 0]
    assert int(rows[0]["nvfp4_blocks"]) == found["blocks"][0, 0]
    assert (rows[-1]["kind"], rows[-1]["nvfp4_snr"], rows[-1]["nvfp4_blocks"]) == (
        "scalar",
        "",
        "0",
    )


@pytest.mark.parametrize(
    ("formats", "error", "message"),
    [
        ("mxfp8", ValueError, r"watch\(\) needs formats, each .*mxfp8_e4m3.*; one is 'mxfp8'"),
        (("nvfp4", "nvfp4"), ValueError, "each format once; formats has 'nvfp4' twice"),
        ((4,), TypeError, r"watch\(\) needs formats, each a name or a Format"),
        (4, TypeError, r"watch\(\) needs a format or several; formats is 4"),
    ],
)
def test_watch_refuses_formats_by_name(
    formats: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        gradstat.watch(small(), formats=formats)


def test_formats_given_by_themselves() -> None:
    given = FORMATS["float8_e5m2"].with_scale(0.25)
    model = small()
    with gradstat.watch(model, formats=[given, "float16"]) as w:
        train(model, w)
    assert w.history.formats == ["float8_e5m2_scale_0.25", "float16"]
    assert np.isfinite(w.history.quantization(given.name)["snr"]).all()


def test_formats_with_a_scaler_see_what_would_be_cast() -> None:
    model = small()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    with gradstat.watch(model, scaler=scaler, formats="float8_e5m2") as scaled:
        scaler.scale(model(torch.ones(8, 40)).square().mean() * 1e-6).backward()
    gradients = [p.grad for p in model.parameters() if p.dim() > 1]
    expected = gradstat.quantization(gradients, "float8_e5m2").underflow
    assert scaled.history.quantization("float8_e5m2")["underflow"][0].tolist() == expected.tolist()
    assert (expected < 0.5).all()
    unscaled = gradstat.quantization([x / 2**16 for x in gradients], "float8_e5m2").underflow
    assert (unscaled > 0.9).all()
