"""Event files, read back with TensorBoard's own reader."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from histories import make_history

import gradstat
from gradstat import History
from gradstat.cli import main
from gradstat.integrations import tensorboard, viewers

pytestmark = pytest.mark.integrations
event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


VIEWERS = ROOT / "docs" / "viewers.md"


def read(folder: Path) -> "event_accumulator.EventAccumulator":
    events = event_accumulator.EventAccumulator(
        str(folder), size_guidance={"histograms": 0, "scalars": 0, "tensors": 0}
    )
    return events.Reload()


def values(events: "event_accumulator.EventAccumulator", tag: str) -> list[float]:
    return [event.value for event in events.Scalars(tag)]


@pytest.mark.parametrize(
    "bins", [gradstat.Log2Bins(), gradstat.LinearBins(7), gradstat.LinearBins(9, -0.5, 0.5)]
)
def test_write_keeps_every_count_and_every_filled_edge(
    tmp_path: Path, bins: gradstat.LinearBins | gradstat.Log2Bins
) -> None:
    h = make_history(bins, layers=2, steps=4)
    tensorboard.write(h, tmp_path)
    events = read(tmp_path)
    for layer in h.layers:
        written = events.Histograms(f"{layer}/gradient")
        assert [event.step for event in written] == [0, 1, 2, 3]
        for event in written:
            histogram, column = event.histogram_value, h.layers.index(layer)
            counts, edges = h.histogram(layer, event.step)
            ends = dict(zip(histogram.bucket_limit, histogram.bucket, strict=True))
            inside = {r: n for r, n in zip(edges[1:], counts, strict=True) if n}
            assert {end: n for end, n in ends.items() if end in inside and n} == inside
            assert sum(ends.values()) == h["finite"][event.step, column] == histogram.num
            assert histogram.bucket[0] == 0
            first = edges[np.flatnonzero(counts)[0]]
            below = h["below"][event.step, column]
            assert histogram.bucket_limit[0] == (histogram.min if below else first)
            for name in ("min", "max", "sum"):
                assert getattr(histogram, name) == h[name][event.step, column]
            assert histogram.sum_squares == h["l2"][event.step, column] ** 2


def test_write_gives_each_layer_a_folder_of_scalars(tmp_path: Path) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        return torch.tensor([0.0, 3.0, -4.0, float("nan"), float("inf")][: 5 - layer])

    h = make_history(gradstat.Log2Bins(), layers=["a.weight", "b/c"], steps=2, gradient=gradient)
    tensorboard.write(h, tmp_path)
    events = read(tmp_path)
    names = ("l2", "mean", "nonfinite", "rms", "std", "zero_fraction")
    assert sorted(events.Tags()["scalars"]) == [f"{x}/{n}" for x in h.layers for n in names]
    assert sorted(events.Tags()["histograms"]) == ["a.weight/gradient", "b/c/gradient"]
    assert values(events, "a.weight/nonfinite") == [2, 2]
    assert values(events, "b/c/nonfinite") == [1, 1]
    assert values(events, "a.weight/l2") == [5, 5]
    assert values(events, "a.weight/zero_fraction") == pytest.approx([1 / 3] * 2)
    for name in ("mean", "std", "rms"):
        assert values(events, f"a.weight/{name}") == pytest.approx(h[name][:, 0])


def test_write_puts_each_kind_in_a_folder_of_its_own(tmp_path: Path) -> None:
    kinds = ("grad", "param", "update", "activation", "unit")

    def value(step: int, row: int) -> torch.Tensor:
        x = torch.tensor([0.0, 3.0, -4.0, 0.0]) * (1 + step)
        # The second layer's weights are zero at first.
        return x * (0 if row == 3 and step == 0 else 1)

    h = make_history(gradstat.Log2Bins(), ["a", "b"], 3, value, absent=[(1, 4)], kinds=kinds)
    tensorboard.write(h, tmp_path)
    tags = (events := read(tmp_path)).Tags()
    rest = [f"{kind}/{x}/histogram" for kind in kinds[1:] for x in "ab"]
    assert sorted(tags["histograms"]) == sorted(["a/gradient", "b/gradient", *rest])
    rows = [x if kind == "grad" else f"{kind}/{x}" for kind in kinds for x in "ab"]
    names = ("mean", "std", "rms", "l2", "zero_fraction", "nonfinite")
    derived = [f"update/{x}/ratio" for x in "ab"] + [f"activation/{x}/dead_units" for x in "ab"]
    expected = [f"{row}/{name}" for row in rows for name in names] + derived
    assert sorted(tags["scalars"]) == sorted(expected)
    assert [event.step for event in events.Scalars("update/a/ratio")] == [0, 2]
    assert [event.step for event in events.Scalars("update/b/ratio")] == [1, 2]
    assert values(events, "update/b/ratio") == [1, 1]
    assert values(events, "activation/b/dead_units") == [0.5] * 3
    assert values(events, "update/b/l2") == [5, 10, 15]


def test_write_leaves_out_what_is_absent_or_undefined(tmp_path: Path) -> None:
    def gradient(step: int, layer: int) -> torch.Tensor:
        return torch.full((3,), float("nan")) if layer else torch.ones(1)

    h = make_history(gradstat.Log2Bins(), 2, 3, gradient, absent=[(1, 0)])
    tensorboard.write(h, tmp_path)
    events = read(tmp_path)
    assert [event.step for event in events.Histograms("0.weight/gradient")] == [0, 2]
    assert [event.step for event in events.Scalars("0.weight/rms")] == [0, 2]
    assert values(events, "1.weight/nonfinite") == [3, 3, 3]
    tags = events.Tags()
    assert tags["histograms"] == ["0.weight/gradient"]
    # One element has no standard deviation, and no finite one nothing but its number.
    assert [tag for tag in tags["scalars"] if tag.startswith("1.")] == ["1.weight/nonfinite"]
    assert "0.weight/std" not in tags["scalars"]


def test_write_draws_the_largest_float64_and_the_smallest_float32(tmp_path: Path) -> None:
    x = torch.tensor([-1e300, -1e-44, 1e-44, 1e300], dtype=torch.float64)
    h = make_history(gradstat.Log2Bins(), 1, 1, lambda step, layer: x)
    tensorboard.write(h, tmp_path)
    (event,) = read(tmp_path).Histograms("0.weight/gradient")
    limits = event.histogram_value.bucket_limit
    assert np.isfinite(limits).all()
    assert (limits[0], limits[-1]) == (-1e300, 1e300)
    assert sum(event.histogram_value.bucket) == 4


def test_write_thins_to_so_many_records_and_keeps_the_newest(tmp_path: Path) -> None:
    h = make_history(gradstat.Log2Bins(), 1, 50)
    done: list[int] = []
    tensorboard.write(h, tmp_path / "few", max_records=5, progress=done.append)
    few = [event.step for event in read(tmp_path / "few").Scalars("0.weight/l2")]
    assert few == [0, 12, 24, 37, 49]
    assert done == [1, 12, 12, 13, 12]
    tensorboard.write(h, tmp_path / "one", max_records=1)
    assert [e.step for e in read(tmp_path / "one").Histograms("0.weight/gradient")] == [49]
    tensorboard.write(h, tmp_path / "all", max_records=None)
    assert len(read(tmp_path / "all").Histograms("0.weight/gradient")) == 50


@pytest.mark.parametrize(
    ("history", "max_records", "error", "message"),
    [
        (None, 5, TypeError, r"write\(\) needs a History; history is NoneType"),
        (
            History(["a"], gradstat.Log2Bins()),
            5,
            ValueError,
            r"with records; history is History\(0",
        ),
        ("made", 0, ValueError, r"write\(\) needs a number of 1 or more; max_records is 0"),
        ("made", 2.0, TypeError, r"an integer; max_records is 2\.0"),
    ],
)
def test_write_refuses_by_name_and_makes_no_folder(
    tmp_path: Path, history: object, max_records: int, error: type[Exception], message: str
) -> None:
    if history == "made":
        history = make_history(gradstat.Log2Bins())
    with pytest.raises(error, match=message):
        tensorboard.write(history, tmp_path / "run", max_records=max_records)
    assert not (tmp_path / "run").exists()


def test_the_line_of_the_documentation_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"^```py\n([^`]*tensorboard[^`]*)^```$", VIEWERS.read_text(), re.M)
    model = torch.nn.Linear(2, 1)
    names = {"gradstat": gradstat, "model": model, "history": make_history(gradstat.Log2Bins())}
    exec(code, names | {"train": lambda model: model(torch.ones(1, 2)).sum().backward()})
    assert read(tmp_path / "runs" / "sigmoid").Tags()["histograms"]
    assert read(tmp_path / "runs" / "live").Tags()["histograms"] == ["weight/gradient"]


def buckets(s: gradstat.Statistics, most: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Those of one tensor."""
    numbers, edges = s.counts.nonzero()[:, 0].numpy(), s.edges.numpy()
    filled = np.stack([edges[:-1], edges[1:]], 1)[numbers]
    return viewers.buckets(s, numbers, s.counts.numpy()[numbers], filled, most)


def test_buckets_are_few_where_bins_are_empty() -> None:
    s = gradstat.statistics(torch.tensor([-1.0, -1.0, 0.0, 1.0]))
    counts, edges = buckets(s)
    # Hundreds of bins lie between 0 and 1.
    assert counts.tolist() == [2, 0, 1, 0, 1]
    assert edges[[0, 1, -2, -1]] == pytest.approx([-1.25, -1.0, 1.0, 1.25])


@pytest.mark.parametrize("most", [1, 3, 50])
def test_buckets_sums_neighbours_when_there_are_too_many(
    most: int, generator: torch.Generator
) -> None:
    x = torch.randn(5000, generator=generator)
    s = gradstat.statistics(x)
    counts, edges = buckets(s, most)
    assert most / 2 < len(counts) <= most
    assert counts.tolist() == np.histogram(x.numpy(), bins=edges)[0].tolist()
    assert counts.sum() == 5000


def test_buckets_counts_what_is_outside_a_linear_range() -> None:
    x = torch.tensor([-9.0, -8.0, 0.25, 0.75, 7.0])
    s = gradstat.statistics(x, gradstat.LinearBins(2, 0.0, 1.0))
    counts, edges = buckets(s)
    assert (counts.tolist(), edges.tolist()) == ([2, 1, 1, 1], [-9, 0, 0.5, 1, 7])
    inside = gradstat.statistics(x[2:4], gradstat.LinearBins(2, 0.0, 1.0))
    assert buckets(inside)[0].tolist() == [1, 1]


def test_write_keeps_what_was_logged(tmp_path: Path) -> None:
    h = make_history(gradstat.Log2Bins(), layers=2, steps=2)
    logged = [(0, 1.5), (1, float("nan")), (1, 0.5), (7, -2.0)]
    for step, value in logged:
        h.add_scalar("loss", step, value)
    tensorboard.write(h, tmp_path)
    events = read(tmp_path).Scalars("loss")
    assert [event.step for event in events] == [0, 1, 1, 7]
    np.testing.assert_array_equal([event.value for event in events], [v for _, v in logged])


def test_write_gives_each_point_the_time_of_its_record(tmp_path: Path) -> None:
    h = make_history(gradstat.Log2Bins(), layers=1, steps=4)
    timed = History(h.rows, h.bins)
    for step in range(4):
        timed.append(10 * step, h.packed(h.find(step)).data, time_s=1e9 + 60.0 * step)
    for step, value in ((0, 1.0), (5, 0.5), (30, 0.2)):
        timed.add_scalar("loss", step, value)
    tensorboard.write(timed, tmp_path)
    events = read(tmp_path)
    assert [e.wall_time for e in events.Histograms("0.weight/gradient")] == [
        1e9 + 60.0 * step for step in range(4)
    ]
    assert [e.wall_time for e in events.Scalars("loss")] == [1e9, 1e9 + 30, 1e9 + 180]


def test_write_names_tags_by_kind_as_wandb_watch(tmp_path: Path) -> None:
    h = make_history(gradstat.Log2Bins(), ["a"], 2, kinds=("grad", "param", "update"))
    options = ["--to", "tensorboard", "--tags", "kind"]
    assert main(["export", str(saved(h, tmp_path)), *options, str(tmp_path)]) == 0
    events = read(tmp_path / "run")
    kinds = ("gradients", "parameters", "updates")
    assert sorted(events.Tags()["histograms"]) == [f"{kind}/a" for kind in kinds]
    assert {"gradients/a/rms", "updates/a/ratio"} <= set(events.Tags()["scalars"])
    with pytest.raises(ValueError, match=r"^write\(\) needs tags 'layer' or 'kind'; tags is 'x'$"):
        tensorboard.write(h, tmp_path / "x", tags="x")


def test_export_refuses_tags_of_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = saved(make_history(gradstat.Log2Bins(), 1, 1), tmp_path)
    assert main(["export", str(path), "--to", "csv", "--tags", "kind", str(tmp_path)]) == 2
    assert "--tags needs --to tensorboard or wandb; --to is csv" in capsys.readouterr().err


def saved(history: History, folder: Path) -> Path:
    history.save(folder / "run.npz")
    return folder / "run.npz"


def train(model: torch.nn.Module, w: gradstat.Watch, steps: int) -> None:
    for step in range(steps):
        model.zero_grad()
        loss = model(torch.full((2, 4), 1.0 + step)).square().mean()
        loss.backward()
        w.log(loss=loss)


def points(folder: Path) -> dict[str, list[tuple[int, object]]]:
    """Step and value of every point, by tag."""
    events = read(folder)
    found: dict[str, list[tuple[int, object]]] = {}
    for tag in events.Tags()["scalars"]:
        found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    for tag in events.Tags()["histograms"]:
        found[tag] = [(event.step, str(event.histogram_value)) for event in events.Histograms(tag)]
    return found


@pytest.mark.parametrize("tags", ["layer", "kind"])
def test_writer_writes_what_write_does(tmp_path: Path, tags: str) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sink = tensorboard.writer(tmp_path / "live", tags=tags)
    options = {"what": "all", "when": "step", "optimizer": optimizer}
    with gradstat.watch(model, sink=sink, **options) as w:
        for step in range(3):
            loss = model(torch.full((2, 4), 1.0 + step)).square().mean()
            loss.backward()
            w.log(loss=loss)
            optimizer.step()
            optimizer.zero_grad()
    tensorboard.write(w.history, tmp_path / "afterwards", tags=tags)
    live, afterwards = points(tmp_path / "live"), points(tmp_path / "afterwards")
    assert {"loss", "lr"} <= set(live)
    assert any("ratio" in tag for tag in live)
    assert live == afterwards


def test_writer_shows_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Linear(4, 1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with gradstat.watch(model, sink=tensorboard.writer("runs")) as w:
        train(model, w, 3)
        len(w.history)  # waits for a device
        found = points(tmp_path / "runs")
        assert [step for step, _ in found["weight/gradient"]] == [0, 1, 2]
        assert [step for step, _ in found["loss"]] == [0, 1, 2]
        monkeypatch.chdir(tmp_path / "elsewhere")
        train(model, w, 1)
    assert [step for step, _ in points(tmp_path / "runs")["weight/rms"]] == [0, 1, 2, 3]


def test_writer_supersedes_what_a_resumed_run_does_again(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 1)
    for first_step, steps in ((None, 6), (3, 6)):
        sink = tensorboard.writer(tmp_path)
        with gradstat.watch(model, sink=sink, first_step=first_step) as w:
            train(model, w, steps)
    found = points(tmp_path)
    assert [step for step, _ in found["weight/rms"]] == list(range(9))
    assert [step for step, _ in found["loss"]] == list(range(9))


@pytest.mark.parametrize("limit", [0, 1500])
def test_writer_on_a_full_disk_warns_and_stops_no_training(tmp_path: Path, limit: int) -> None:
    script = """
import resource, signal, sys, warnings
import torch, gradstat
from gradstat.integrations import tensorboard
warnings.simplefilter("always")
model, sink = torch.nn.Linear(64, 8), tensorboard.writer(sys.argv[1])
with gradstat.watch(model) as w:  # what is written when it is first used is there
    model(torch.randn(1, 64)).sum().backward()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
with gradstat.watch(model, sink=sink) as w:
    for _ in range(3):
        model(torch.randn(1, 64)).sum().backward()
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
print(len(w.history))
"""
    out = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "run"), str(limit)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert out.stdout == "3\n"
    assert out.stderr.count("RuntimeWarning") == 1
    assert "tensorboard.writer() has stopped writing" in out.stderr
    assert "Traceback" not in out.stderr


def test_writer_takes_any_name(tmp_path: Path) -> None:
    with gradstat.watch(torch.nn.Linear(4, 1), sink=tensorboard.writer(tmp_path)) as w:
        w.log(**{"a b/\udcff": 1.0, "": 2.0})
    assert set(points(tmp_path)) == {"a b/\\udcff", ""}


def test_writer_refuses_by_name(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"writer\(\) needs a directory.s path; log_dir is None"):
        tensorboard.writer(None)
    with pytest.raises(ValueError, match="tags 'layer' or 'kind'; tags is 'x'"):
        tensorboard.writer(tmp_path, tags="x")
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"needs a directory; log_dir is '.*file', another file"):
        tensorboard.writer(tmp_path / "file")
    with pytest.raises(ValueError, match=r"needs a directory's path; log_dir is ''"):
        tensorboard.writer("")
