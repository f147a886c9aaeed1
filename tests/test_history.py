import io
import pickle
import re
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import gradstat
from gradstat import History, LinearBins, Log2Bins, Statistics
from gradstat.bins import Bins
from gradstat.history import FIELDS
from gradstat.sparse import SparseRows
from gradstat.statistics import FLOATS, INTEGERS

SCHEMES = [Log2Bins(), LinearBins(30), LinearBins(7, -0.5, 0.5), LinearBins(5, track=True)]
LAYERS = ["first.weight", "second.weight"]


def arrays(s: Statistics) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return s.integers.numpy(), s.floats.numpy(), s.counts.numpy()


def absent(bins: Bins) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of one layer without a gradient."""
    floats = np.full((1, len(FLOATS)), np.nan)
    return np.zeros((1, len(INTEGERS)), int), floats, np.zeros((1, bins.bins), int)


def make_history(
    bins: Bins, generator: torch.Generator, n_steps: int = 3
) -> tuple[History, list[Statistics]]:
    """A history at the steps 0, 2, 4 ... and the record of each."""
    history = History(LAYERS, bins)
    records = []
    for step in range(n_steps):
        tensors = [torch.randn(n, generator=generator) * 10.0**-step for n in (100, 7)]
        records.append(gradstat.statistics(tensors, bins))
        history.append(2 * step, *arrays(records[-1]))
    return history, records


def assert_same(one: History, other: History) -> None:
    assert one.layers == other.layers
    assert one.bins == other.bins
    assert one.steps.dtype == other.steps.dtype == np.int64
    assert one.steps.tolist() == other.steps.tolist()
    for field in FIELDS:
        assert one[field].dtype == other[field].dtype
        assert one[field].tobytes() == other[field].tobytes()
    for layer in one.layers:
        for mine, theirs in zip(one.histograms(layer), other.histograms(layer), strict=True):
            assert mine.shape == theirs.shape
            assert mine.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
def test_history_gives_back_every_field_and_histogram(
    bins: Bins, generator: torch.Generator
) -> None:
    history, records = make_history(bins, generator)
    assert len(history) == 3
    assert history.steps.dtype == np.int64
    assert history.steps.tolist() == [0, 2, 4]
    for field in FIELDS:
        expected = np.stack([getattr(record, field).numpy() for record in records])
        assert history[field].dtype == expected.dtype
        np.testing.assert_array_equal(history[field], expected)
    for column, layer in enumerate(LAYERS):
        all_counts, all_edges = history.histograms(layer)
        assert all_counts.dtype == np.int64
        assert all_edges.dtype == np.float64
        for at, (step, record) in enumerate(zip((0, 2, 4), records, strict=True)):
            row = record[column]
            for number in (step, at - 3):
                counts, edges = history.histogram(layer, number)
                np.testing.assert_array_equal(counts, row.counts.numpy())
                np.testing.assert_array_equal(edges, row.edges.numpy())
            np.testing.assert_array_equal(all_counts[at], row.counts.numpy())
            step_edges = all_edges if isinstance(bins, Log2Bins) else all_edges[at]
            np.testing.assert_array_equal(step_edges, row.edges.numpy())


def test_history_record_is_the_statistics_of_all_layers(generator: torch.Generator) -> None:
    history, records = make_history(LinearBins(30), generator)
    for number, expected in ((2, records[1]), (-1, records[2]), (-3, records[0])):
        record = history.record(number)
        assert record.bins == LinearBins(30)
        assert torch.equal(record.integers, expected.integers)
        assert torch.equal(record.floats, expected.floats)
        assert torch.equal(record.counts, expected.counts)


def test_history_results_are_the_readers_own(generator: torch.Generator) -> None:
    history, records = make_history(Log2Bins(), generator)
    expected = records[2].counts.clone()
    history["min"][:] = 7
    history["numel"][:] = 7
    history.histogram(LAYERS[0])[0][:] = 7
    history.histograms(LAYERS[0])[0][:] = 7
    record = history.record()
    for x in (record.integers, record.floats, record.counts):
        x.fill_(7)
    assert history["numel"].tolist() == [[100, 7]] * 3
    assert history["min"][2].tolist() == records[2].min.tolist()
    assert torch.equal(history.record().counts, expected)


def test_history_shows_a_layer_without_a_gradient_as_nan_and_zero_counts(
    generator: torch.Generator,
) -> None:
    bins = LinearBins(4)
    history = History(LAYERS, bins)
    present = arrays(gradstat.statistics([torch.randn(9, generator=generator)], bins))
    pairs = zip(present, absent(bins), strict=True)
    history.append(0, *(np.concatenate(pair) for pair in pairs))
    for field in FIELDS:
        values = history[field]
        assert np.isnan(values[0, 1]) if field not in INTEGERS else values[0, 1] == 0
    counts, edges = history.histogram(LAYERS[1])
    assert counts.tolist() == [0] * 4
    assert np.isnan(edges).all()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda h: h["average"], f"History[] needs one of {', '.join(FIELDS)}; got 'average'"),
        (lambda h: h.histogram("third"), f"History needs a layer of {LAYERS}; layer is 'third'"),
        (lambda h: h.histograms("third"), f"History needs a layer of {LAYERS}; layer is 'third'"),
        (
            lambda h: h.histogram(LAYERS[0], 1),
            "History needs a recorded step; step is 1 of 3 records",
        ),
        (lambda h: h.record(6), "History needs a recorded step; step is 6 of 3 records"),
        (lambda h: h.record(-4), "History needs a recorded step; step is -4 of 3 records"),
        (
            lambda h: History(h.layers, h.bins).record(),
            "History needs a recorded step; step is -1 of 0 records",
        ),
    ],
)
def test_history_refuses_what_it_does_not_hold(
    read: Callable[[History], Any], message: str, generator: torch.Generator
) -> None:
    history, _ = make_history(Log2Bins(), generator)
    with pytest.raises(KeyError) as raised:
        read(history)
    assert raised.value.args == (message,)


@pytest.mark.parametrize("step", [4, 3])
def test_history_append_refuses_a_step_that_is_not_higher(
    step: int, generator: torch.Generator
) -> None:
    history, records = make_history(Log2Bins(), generator)
    with pytest.raises(ValueError, match=f"^append\\(\\) needs a step after 4; step is {step}$"):
        history.append(step, *arrays(records[0]))
    assert history.steps.tolist() == [0, 2, 4]


@pytest.mark.parametrize("bins", SCHEMES, ids=repr)
@pytest.mark.parametrize("n_steps", [0, 1, 40])
def test_history_survives_save_and_load(
    bins: Bins, n_steps: int, generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(bins, generator, n_steps)
    pairs = zip(absent(bins), absent(bins), strict=True)
    if n_steps:
        history.append(100, *(np.concatenate(pair) for pair in pairs))
    history.save(tmp_path / "run.npz")
    loaded = History.load(str(tmp_path / "run.npz"))
    assert_same(loaded, history)
    # What was loaded goes on recording.
    more = arrays(gradstat.statistics([torch.ones(3), torch.zeros(2)], bins))
    for each in (history, loaded):
        each.append(101, *more)
    assert_same(loaded, history)


def test_history_survives_pickling(generator: torch.Generator) -> None:
    history, _ = make_history(LinearBins(30), generator)
    assert_same(pickle.loads(pickle.dumps(history)), history)


@pytest.mark.parametrize("name", ["run", "run.1", "run.npz"])
def test_history_save_keeps_the_name_as_it_is(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(Log2Bins(), generator)
    history.save(str(tmp_path / name))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert_same(History.load(tmp_path / name), history)


def test_history_save_that_fails_leaves_the_old_file_alone(
    generator: torch.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.npz"
    history, records = make_history(Log2Bins(), generator)
    history.save(path)
    before = path.read_bytes()

    def fail(file: io.BufferedWriter, **_: object) -> None:
        file.write(b"half a file")
        raise OSError("No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    history.append(9, *arrays(records[0]))
    with pytest.raises(OSError, match="No space left"):
        history.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    assert path.read_bytes() == before


def test_history_save_replaces_an_older_file(generator: torch.Generator, tmp_path: Path) -> None:
    history, records = make_history(Log2Bins(), generator)
    history.save(tmp_path / "run.npz")
    history.append(9, *arrays(records[0]))
    history.save(tmp_path / "run.npz")
    assert History.load(tmp_path / "run.npz").steps.tolist() == [0, 2, 4, 9]


def test_history_load_says_that_a_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        History.load(tmp_path / "run.npz")


def saved(generator: torch.Generator, tmp_path: Path) -> dict[str, np.ndarray]:
    """What `History.save` writes, by name."""
    history, _ = make_history(Log2Bins(), generator)
    history.save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as file:
        return {name: file[name] for name in file.files}


def assert_load_refuses(path: Path, reason: str = "") -> None:
    message = (
        f"History.load() needs a file that History.save() wrote; {path} is damaged or another "
        f"kind: {reason}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        History.load(path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_history_load_refuses_a_truncated_file(
    share: float, generator: torch.Generator, tmp_path: Path
) -> None:
    saved(generator, tmp_path)
    path, whole = tmp_path / "run.npz", (tmp_path / "whole.npz").read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert_load_refuses(path)


def test_history_load_notices_any_damaged_byte(generator: torch.Generator, tmp_path: Path) -> None:
    saved(generator, tmp_path)
    whole, path = (tmp_path / "whole.npz").read_bytes(), tmp_path / "run.npz"
    intact = History.load(tmp_path / "whole.npz")
    messages = []
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        try:
            loaded = History.load(path)
        except ValueError as error:
            messages.append(str(error))
        else:  # a byte that zip files do not need, such as a date
            assert_same(loaded, intact)
    assert len(messages) > len(whole) / 7 / 2
    assert all(str(path) in message for message in messages)


@pytest.mark.parametrize("content", [b"garbage", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04K\x01."])
def test_history_load_refuses_garbage(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.npz").write_bytes(content)
    assert_load_refuses(tmp_path / "run.npz")


def test_history_load_refuses_a_single_array(tmp_path: Path) -> None:
    with (tmp_path / "run.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert_load_refuses(tmp_path / "run.npz")


def test_history_load_refuses_another_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "run.npz", "w") as file:
        file.writestr("readme.txt", "not an array")
    assert_load_refuses(tmp_path / "run.npz", "it lacks format")


def test_history_load_never_unpickles(generator: torch.Generator, tmp_path: Path) -> None:
    data = saved(generator, tmp_path)
    data["layers"] = np.array(data["layers"], dtype=object)
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(tmp_path / "run.npz", "Object arrays cannot be loaded")


@pytest.mark.parametrize(
    "name",
    ["format", "bins", "layers", "steps", "integers", "floats", "sizes", "indices", "values"],
)
def test_history_load_refuses_a_file_without_one_array(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path)
    del data[name]
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(tmp_path / "run.npz", f"it lacks {name}")


def test_history_load_refuses_another_format(generator: torch.Generator, tmp_path: Path) -> None:
    data = saved(generator, tmp_path) | {"format": np.array("gradstat history 2")}
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(
        tmp_path / "run.npz", "its format is gradstat history 2, not gradstat history 1"
    )


def test_history_load_refuses_unknown_bins(generator: torch.Generator, tmp_path: Path) -> None:
    data = saved(generator, tmp_path) | {"bins": np.array("square 3")}
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(
        tmp_path / "run.npz", "parse_bins() needs the spec of a bin scheme; spec is 'square 3'"
    )


def negative_first(x: np.ndarray) -> np.ndarray:
    signed = x.astype(np.int64)
    signed[0] = -1
    return signed


def replace_first(value: int) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        x[0] = value
        return x

    return change


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers", lambda x: x[:1]),
        ("layers", lambda x: x.reshape(2, 1)[:, [0, 0]]),
        ("layers", lambda x: x[[0, 0]]),
        ("steps", lambda x: x[:-1]),
        ("steps", lambda x: x[::-1]),
        ("steps", lambda x: x * 0),
        ("steps", lambda x: x - 1),
        ("steps", lambda x: x[:, None]),
        ("integers", lambda x: x[:, :, :-1]),
        ("integers", lambda x: x.reshape(-1)),
        ("floats", lambda x: x[:-1]),
        ("sizes", lambda x: x[:-1]),
        ("sizes", lambda x: x + 1),
        ("sizes", negative_first),
        ("indices", lambda x: x[:-1]),
        ("indices", lambda x: x[::-1]),
        ("indices", lambda x: x * 0),
        ("indices", negative_first),
        ("indices", replace_first(2048)),
        ("indices", replace_first(65535)),
        ("values", lambda x: x[:-1]),
        ("values", negative_first),
        ("values", replace_first(0)),
    ],
)
def test_history_load_refuses_arrays_that_do_not_fit(
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    data = saved(generator, tmp_path)
    data[name] = change(data[name])
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(tmp_path / "run.npz", "its arrays do not fit each other")


@pytest.mark.parametrize("name", ["steps", "integers", "sizes", "indices", "values"])
def test_history_load_refuses_floats_for_integers(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path)
    data[name] = data[name] + 0.5
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(tmp_path / "run.npz", "Cannot cast array data")


def test_history_load_refuses_sizes_whose_sum_overflows(
    generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path)
    data["sizes"] = np.full(len(data["sizes"]), 2**62, dtype=np.int64)
    np.savez(tmp_path / "run.npz", **data)
    assert_load_refuses(tmp_path / "run.npz", "its arrays do not fit each other")


def gpt2_sizes() -> list[int]:
    """Elements of GPT-2 small's 148 parameters."""
    width = 768
    linear = [
        size
        for n_in, n_out in ((1, 3), (1, 1), (1, 4), (4, 1))
        for size in (n_in * n_out * width**2, n_out * width)
    ]
    return [50257 * width, 1024 * width, *(12 * (4 * [width] + linear)), width, width]


def test_history_packs_a_record_of_gpt2_into_less_than_200_kb(
    generator: torch.Generator,
) -> None:
    sizes = gpt2_sizes()
    assert len(sizes) == 148
    assert sum(sizes) == 124_439_808
    one = {
        size: gradstat.statistics(1e-3 * torch.randn(size, generator=generator)).counts
        for size in set(sizes)
    }
    rows = SparseRows.empty()
    rows.extend(torch.stack([one[size] for size in sizes]).numpy())
    assert 20_000 < sum(array.nbytes for array in rows.arrays()) < 200_000


def test_sparse_rows_keep_counts_and_bins_too_large_for_the_small_types() -> None:
    rows = SparseRows.empty()
    dense = np.zeros((2, 70_000), dtype=np.int64)
    dense[0, [0, 69_999]] = 1, 2**40
    rows.extend(dense[1:])
    rows.extend(dense)
    for at, expected in enumerate((dense[1], dense[0], dense[1])):
        np.testing.assert_array_equal(rows.row(at, 70_000), expected)
    again = SparseRows(*rows.arrays())
    np.testing.assert_array_equal(again.row(1, 70_000), dense[0])


def seconds_per_step(n_steps: int) -> float:
    history = History(LAYERS, Log2Bins())
    record = arrays(gradstat.statistics([torch.ones(9), torch.zeros(4)]))
    start = time.perf_counter()
    for step in range(n_steps):
        history.append(step, *record)
        history.record()
        history.histogram(LAYERS[1])
        history.histogram(LAYERS[1], step // 2)
    history.histograms(LAYERS[0])
    return (time.perf_counter() - start) / n_steps


def test_history_reading_every_step_costs_the_same_however_long_the_run() -> None:
    seconds_per_step(50)
    few = min(seconds_per_step(100) for _ in range(3))
    assert min(seconds_per_step(4000) for _ in range(2)) < 3 * few
