"""The layout of a record: what is packed is read again, and it is where docs/format.md says."""

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import gradstat
from gradstat.bins import Bins, LinearBins, Log2Bins
from gradstat.record import RecordLayout, Unpacked, union
from gradstat.results import FLOATS, INTEGERS, PACKED

LAYOUT = RecordLayout(5, 2, 7)


def make_arrays(
    layout: RecordLayout = LAYOUT, seed: int = 0, most: int = 1 << 20
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Integers, floats, formats and counts of as many rows, a third of the bins filled."""
    rng = np.random.default_rng(seed)
    n_rows = layout.n_rows
    counts = rng.integers(1, most, (n_rows, layout.n_bins))
    counts[rng.random(counts.shape) < 2 / 3] = 0
    integers = rng.integers(0, 1 << 20, (n_rows, len(INTEGERS)))
    integers[:, 0] = counts.sum(1)
    formats = rng.standard_normal((n_rows, layout.n_formats, len(PACKED)))
    return integers, rng.standard_normal((n_rows, len(FLOATS))), formats, counts


def equal(unpacked: Unpacked, arrays: tuple[np.ndarray, ...], bins: int) -> None:
    """Each number of one record is the same."""
    for found, expected in zip(unpacked[:3], arrays[:3], strict=True):
        np.testing.assert_array_equal(found[0], expected, strict=True)
    dense = np.zeros((len(arrays[0]), bins), np.int64)
    dense[np.repeat(np.arange(len(dense)), np.diff(unpacked.ends, prepend=0)), unpacked.bins] = (
        unpacked.counts
    )
    np.testing.assert_array_equal(dense, arrays[3])


# No rows, one, more; no formats and some; one bin, more than uint16 tells apart.
@pytest.mark.parametrize("n_rows", [0, 1, 5])
@pytest.mark.parametrize("n_formats", [0, 3])
@pytest.mark.parametrize("n_bins", [1, 2048, 65_537])
def test_pack_is_read_again(n_rows: int, n_formats: int, n_bins: int) -> None:
    layout = RecordLayout(n_rows, n_formats, n_bins)
    arrays = make_arrays(layout)
    data = layout.pack(*arrays)
    assert len(data) % 8 == 0
    assert layout.fits(data)
    for found, expected in zip((*layout.views(data), layout.dense(data)), arrays, strict=True):
        np.testing.assert_array_equal(found, expected, strict=True)
    equal(layout.unpack([data]), arrays, n_bins)
    for row in range(n_rows):
        np.testing.assert_array_equal(
            layout.dense(data, slice(row, row + 1)), arrays[3][[row]], strict=True
        )


def test_pack_puts_numbers_where_the_format_says() -> None:
    layout = RecordLayout(2, 1, 4)
    integers, floats, formats, _ = make_arrays(layout)
    integers[:, 0] = 9
    data = layout.pack(integers, floats, formats, np.array([[0, 4, 0, 5], [0, 0, 9, 0]]))
    written = (*integers.ravel(), *floats.ravel(), *formats.ravel(), 2, 3, 1, 3, 2, 4, 5, 9)
    assert data == struct.pack("<16q16d20d2I3H2x3I4x", *written)


@pytest.mark.parametrize("numel", [2**32 - 1, 2**32])
def test_pack_takes_wide_counts_where_a_row_is_large(numel: int) -> None:
    layout = RecordLayout(2, 0, 3)
    integers, floats, _, counts = make_arrays(layout)
    integers[1, 0] = counts[1, 2] = numel
    data = layout.pack(integers, floats, None, counts)
    np.testing.assert_array_equal(layout.dense(data), counts)
    assert layout.entries(data)[2].dtype == ("<u8" if numel >= 2**32 else "<u4")
    assert layout.fits(data)


def test_dense_takes_rows_that_follow_each_other() -> None:
    arrays = make_arrays()
    data = LAYOUT.pack(*arrays)
    for part in (slice(0, 0), slice(0, 2), slice(3, 99), slice(-1, None)):
        np.testing.assert_array_equal(LAYOUT.dense(data, part), arrays[3][part], strict=True)


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(7, -1.0, 1.0)], ids=repr)
def test_statistics_are_those_that_were_packed(bins: Bins) -> None:
    s = gradstat.statistics([torch.randn(50), torch.zeros(0), torch.ones(3)], bins)
    layout = RecordLayout(3, 0, bins.bins)
    data = layout.pack(s.integers.numpy(), s.floats.numpy(), None, s.counts.numpy())
    for part in (slice(None), slice(1, 3)):
        found = layout.statistics(data, bins, part)
        for field in ("integers", "floats", "counts"):
            mine, theirs = getattr(found, field), getattr(s, field)[part]
            assert torch.equal(mine.nan_to_num(), theirs.nan_to_num())
            assert mine.numpy().flags.writeable


def test_fits_takes_no_other_length() -> None:
    data = LAYOUT.pack(*make_arrays())
    assert LAYOUT.fits(data)
    for other in (b"", data[:-8], data[: len(data) // 2], data + bytes(8)):
        assert not LAYOUT.fits(other)
    assert not RecordLayout(4, 2, 7).fits(data)


def test_unpack_puts_records_one_after_the_other() -> None:
    several = [make_arrays(seed=seed, most=5) for seed in range(3)]
    # Counts of one record are wide.
    several[1][0][2, 0] = several[1][3][2, 4] = 2**33
    records = [LAYOUT.pack(*arrays) for arrays in several]
    unpacked = LAYOUT.unpack(records)
    for at in range(3):
        np.testing.assert_array_equal(unpacked.integers[at], several[at][0])
        np.testing.assert_array_equal(unpacked.floats[at], several[at][1])
        np.testing.assert_array_equal(unpacked.formats[at], several[at][2])
    assert LAYOUT.pack_all(unpacked) == records
    assert LAYOUT.pack_all(LAYOUT.unpack([])) == []
    sizes, bins, counts = unpacked.histograms(np.array([7, -1, 3]))
    dense = several[1][3][2], several[0][3][3]
    assert sizes.tolist() == [np.count_nonzero(dense[0]), 0, np.count_nonzero(dense[1])]
    assert bins.tolist() == [at for each in dense for at in np.flatnonzero(each)]
    assert counts.tolist() == [n for each in dense for n in each[each > 0]]


def test_take_leaves_absent_rows_without_values() -> None:
    integers, floats, formats, counts = make_arrays()
    taken = LAYOUT.unpack([LAYOUT.pack(integers, floats, formats, counts)]).take(
        np.array([3, -1, 0])
    )
    absent = np.array([False, True, False])
    at = np.array([3, 0, 0])
    expected = (
        np.where(absent[:, None], 0, integers[at]),
        np.where(absent[:, None], np.nan, floats[at]),
        np.where(absent[:, None, None], np.nan, formats[at]),
        np.where(absent[:, None], 0, counts[at]),
    )
    equal(taken, expected, LAYOUT.n_bins)


@given(
    st.lists(st.lists(st.integers(0, 4), unique=True, max_size=5), min_size=1, max_size=6),
    st.integers(0, 2),
)
def test_assemble_puts_rows_of_several_launches_together(
    launches: list[list[int]], n_formats: int
) -> None:
    integers, floats = np.zeros((5, 8), np.int64), np.full((5, 8), np.nan)
    formats = np.full((5, n_formats, len(PACKED)), np.nan)
    counts = np.zeros((5, 7), np.int64)
    whole = integers, floats, formats, counts
    parts = []
    for seed, rows in enumerate(launches):
        layout = RecordLayout(len(rows), n_formats, 7)
        arrays = make_arrays(layout, seed)
        parts.append((rows, layout.pack(*arrays)))
        for each, new in zip(whole, arrays, strict=True):
            each[rows] = new
    layout = RecordLayout(5, n_formats, 7)
    assert layout.assemble(parts) == layout.pack(*whole)


# More rows than are dense at a time, counts that do not fit uint32.
@pytest.mark.parametrize(("n_rows", "most"), [(0, 9), (5, 9), (5000, 1 << 33)])
def test_union_adds_histograms_up(n_rows: int, most: int) -> None:
    layout = RecordLayout(n_rows, 0, 64)
    several = [make_arrays(layout, seed, most) for seed in range(3)]
    parts = [layout.unpack([layout.pack(*arrays)] * 2) for arrays in several]
    whole = union(parts, 64)
    assert len(layout.pack_all(whole)) == 2
    for data in layout.pack_all(whole):
        np.testing.assert_array_equal(layout.dense(data), sum(each[3] for each in several))
        np.testing.assert_array_equal(layout.views(data)[0], sum(each[0] for each in several))


@pytest.mark.parametrize("bins", [Log2Bins(), LinearBins(7, -1.0, 1.0)], ids=repr)
def test_union_is_what_statistics_of_all_values_are(bins: Bins) -> None:
    generator = torch.Generator().manual_seed(3)
    shards = [
        [torch.randn(n, generator=generator, dtype=torch.float64) * size for n, size in sizes]
        for sizes in ([(40, 1.0), (7, 1e-30)], [(0, 1.0), (3, 1e30)], [(9, 1.0), (1, 0.0)])
    ]
    layout = RecordLayout(2, 0, bins.bins)
    parts = []
    for tensors in shards:
        s = gradstat.statistics(tensors, bins, engine="reference")
        data = layout.pack(s.integers.numpy(), s.floats.numpy(), None, s.counts.numpy())
        parts.append(layout.unpack([data]))
    # A row that a part has not adds nothing.
    parts.append(parts[0].take(np.array([-1, -1])))
    (data,) = layout.pack_all(union(parts, bins.bins))
    whole = [torch.cat(row) for row in zip(*shards, strict=True)]
    expected = gradstat.statistics(whole, bins, engine="reference")
    found = layout.statistics(data, bins)
    assert torch.equal(found.integers, expected.integers)
    assert torch.equal(found.counts, expected.counts)
    torch.testing.assert_close(found.floats, expected.floats, rtol=1e-12, atol=0)
