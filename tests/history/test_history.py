import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import histories
import numpy as np
import pytest
import torch
from torch import distributed as dist
from watching import LAYERS, SCHEMES, absent, arrays, make_history

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.bins import Bins
from gradstat.history import FIELDS
from gradstat.record import RecordLayout
from gradstat.results import INTEGERS, SHAPES


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
        if field in SHAPES:  # summed over other bins
            np.testing.assert_allclose(history[field], expected, rtol=1e-12)
        else:
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
    histories.append_rows(history, 0, *(np.concatenate(pair) for pair in pairs))
    for field in FIELDS:
        values = history[field]
        assert np.isnan(values[0, 1]) if field not in INTEGERS else values[0, 1] == 0
    counts, edges = history.histogram(LAYERS[1])
    assert counts.tolist() == [0] * 4
    assert np.isnan(edges).all()


NEEDS_LAYER = f"History needs a layer, one of {', '.join(map(repr, LAYERS))}"
HAS_STEPS = ": it has 3 records, of step 0 to 4"


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (
            lambda h: h["average"],
            f"History[] needs one of {', '.join(FIELDS)}; got 'average': scalar() has what w.log() "
            "has logged",
        ),
        (lambda h: h.histogram("third"), f"{NEEDS_LAYER}; layer is 'third'"),
        (lambda h: h.histograms("third"), f"{NEEDS_LAYER}; layer is 'third'"),
        (
            lambda h: h.histogram(LAYERS[0], 1),
            f"History has no record of step 1{HAS_STEPS}",
        ),
        (lambda h: h.record(6), f"History has no record of step 6{HAS_STEPS}"),
        (lambda h: h.record(-4), f"History has no record of step -4{HAS_STEPS}"),
        (
            lambda h: History(h.layers, h.bins).record(),
            "History has no record of step -1: it has none yet",
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
        histories.append_rows(history, step, *arrays(records[0]))
    assert history.steps.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: History(["a", "a"], Log2Bins()), ValueError, "each layer once; layers is"),
        (lambda: History([1], Log2Bins()), TypeError, r"the names of layers; layers is \[1\]"),
        (lambda: History(["a"], Log2Bins(), kinds=["b"]), ValueError, r"kinds is \['b'\]"),
        (lambda: History(["a"], Log2Bins(), kinds=[]), ValueError, r"of 1 layers .* kinds is \[\]"),
        (lambda: History(["a"], None), TypeError, "LinearBins or a number; bins is None"),
        (lambda: History(["a"], Log2Bins(), capacity=1), ValueError, "2 or more; capacity is 1"),
    ],
)
def test_history_refuses_what_no_file_of_it_could_be_read_with(
    make: Callable[[], History], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=rf"^History\(\) needs .*{message}"):
        make()


@pytest.mark.parametrize("step", [-1, 0.5, None, True, 1 << 62])
def test_history_refuses_what_is_no_step(step: Any) -> None:
    history = History(["a"], Log2Bins())
    error = ValueError if type(step) is int else TypeError
    rows = np.zeros((1, 8), np.int64), np.zeros((1, 8)), np.zeros((1, 2048), np.int64)
    with pytest.raises(error, match=rf"^append\(\) needs .*; step is {step}$"):
        histories.append_rows(history, step, *rows)
    with pytest.raises(error, match=rf"^add_scalar\(\) needs .*; step is {step}$"):
        history.add_scalar("loss", step, 1.0)
    assert (len(history), history.scalars) == (0, [])


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
    counts = torch.stack([one[size] for size in sizes]).numpy()
    layout = RecordLayout(len(sizes), 0, Log2Bins().bins)
    numbers = np.zeros((len(sizes), 8), np.int64), np.zeros((len(sizes), 8))
    assert 20_000 < len(layout.pack(*numbers, None, counts)) < 200_000


def seconds_per_step(n_steps: int) -> float:
    """Processor time of recording and reading, which other processes do not change."""
    history = History([str(layer) for layer in range(20)], Log2Bins())
    x = torch.randn(1000, generator=torch.Generator().manual_seed(20))
    record = arrays(gradstat.statistics([x] * 20))
    start = time.process_time()
    for step in range(n_steps):
        histories.append_rows(history, step, *record)
        history.record()
        history.histogram("1")
        history.histogram("1", step // 2)
    history.histograms("2")
    return (time.process_time() - start) / n_steps


def test_history_reading_every_step_costs_the_same_however_long_the_run() -> None:
    seconds_per_step(50)
    few = min(seconds_per_step(100) for _ in range(3))
    assert seconds_per_step(2000) < 3 * few


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(30)], ids=str)
def test_fields_of_a_record_do_not_depend_on_what_is_read_beside_it(bins: Bins) -> None:
    history = histories.make_history(
        bins, 3, 50, lambda step, at: torch.randn(40 + at, generator=torch.manual_seed(step))
    )
    for field in FIELDS:
        alone = [history.at([at])[field] for at in range(50)]
        assert history[field].tobytes() == np.concatenate(alone).tobytes(), field


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_norm_is_that_of_the_whole_gradient(scale: float) -> None:
    rows = [torch.randn(n, generator=torch.Generator().manual_seed(n)) * scale for n in (50, 70)]

    def gradient(step: int, row: int) -> torch.Tensor:
        return rows[row % 2] * (step + 1) if row < 2 else rows[0]

    history = histories.make_history(Log2Bins(), 2, 3, gradient, kinds=("grad", "param"))
    whole = float(torch.linalg.vector_norm(torch.cat(rows).double()))
    np.testing.assert_allclose(history.norm(), whole * np.arange(1, 4), rtol=1e-6)
    assert history.norm().dtype == np.float64
    one = float(torch.linalg.vector_norm(rows[0].double()))
    np.testing.assert_allclose(history.norm("param"), math.sqrt(2) * one, rtol=1e-6)
    np.testing.assert_allclose(history.select("param").norm(kind="param"), history.norm("param"))


def test_norm_leaves_out_what_is_absent_or_not_finite() -> None:
    def gradient(step: int, row: int) -> torch.Tensor:
        return torch.tensor([3.0, 4.0, math.nan] if row else [0.0, 0.0])

    absent = [(1, 1), (2, 0), (2, 1)]
    history = histories.make_history(Log2Bins(), 2, 3, gradient, absent)
    assert history.norm().tolist()[:2] == [5.0, 0.0]
    assert math.isnan(history.norm()[2])
    with pytest.raises(KeyError, match=r"norm\(\) needs a history with 'update'; it has grad"):
        history.norm("update")


def test_scalars_keep_every_value_with_its_step() -> None:
    history = History(["weight"], Log2Bins(), capacity=2)
    for step in range(5):
        histories.append_rows(history, step, *absent(Log2Bins()))
        history.add_scalar("loss", step, 1 / (step + 1))
    history.add_scalar("tokens", 3, 7)
    history.add_scalar("loss", 4, math.nan)
    assert len(history) == 2
    assert history.scalars == ["loss", "tokens"]
    steps, values = history.scalar("loss")
    assert (steps.dtype, values.dtype) == (np.int64, np.float64)
    assert steps.tolist() == [0, 1, 2, 3, 4, 4]
    np.testing.assert_array_equal(values, [1, 1 / 2, 1 / 3, 1 / 4, 1 / 5, math.nan])
    assert [each.tolist() for each in history.scalar("tokens")] == [[3], [7.0]]
    selected = history.select("grad")
    history.add_scalar("loss", 9, 0.0)
    assert selected.scalars == history.scalars
    assert selected.scalar("loss")[0].tolist() == steps.tolist()


def test_scalars_refuse_what_does_not_fit() -> None:
    history = History(["weight"], Log2Bins())
    with pytest.raises(KeyError, match=r"logged, one of none; name is 'loss'"):
        history.scalar("loss")
    history.add_scalar("loss", 3, 1.0)
    with pytest.raises(ValueError, match=r"add_scalar\(\) needs steps from 3 on; step is 2"):
        history.add_scalar("loss", 2, 1.0)
    assert history.scalar("loss")[0].tolist() == [3]
    with pytest.raises(
        TypeError, match=r"add_scalar\(\) needs a name and a number; they are 'a', '1'"
    ):
        history.add_scalar("a", 3, "1")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"a name and a number; they are \(1, 2\), 1\.0"):
        history.add_scalar((1, 2), 3, 1.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"History needs the number of a step; step is 'last'"):
        history.record("last")  # type: ignore[arg-type]
    assert history.scalars == ["loss"]


def test_reduce_keeps_scalars_by_rank(tmp_path: Path, generator: torch.Generator) -> None:
    history, _ = make_history(Log2Bins(), generator)
    history.add_scalar("loss", 3, 0.5)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        merged = history.reduce().reduce()
    finally:
        dist.destroy_process_group()
    assert merged.scalars == ["rank0/rank0/loss"]
    assert merged.scalar("rank0/rank0/loss")[1].tolist() == [0.5]


def test_record_prints_as_a_table_of_the_rows() -> None:
    history = histories.make_history(Log2Bins(), ["a\nb", "longer.weight"], 1)
    head, *lines = repr(history.record()).splitlines()
    assert head.split() == ["numel", "zeros", "nan", "min", "max", "mean", "std", "l2"]
    assert [line.split()[:2] for line in lines] == [["a\\nb", "50"], ["longer.weight", "50"]]
    assert len({len(line) for line in (head, *lines)}) == 1
    assert repr(history.record()[1:]).splitlines()[1].split() == lines[1].split()
