"""Records as sections, arrays by name: what files hold. docs/format.md has the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from gradstat.arrays import Array
from gradstat.bins import parse_bins
from gradstat.history.blocks import Sections
from gradstat.history.packed_counts import SparseRows
from gradstat.history.records import OWN, Records
from gradstat.kinds import GRAD, Row
from gradstat.results import FLOATS, INTEGERS

FORMAT = "gradstat history 2"
_FORMAT_1 = "gradstat history 1"

# What each section is: kinds of NumPy's types, and dimensions. B bytes, L layers, S records,
# R = S x L rows, E entries of their histograms.
_HEAD = {
    "format": ("U", ""),
    "bins": ("U", ""),
    "names": ("u", "B"),
    "name_ends": ("i", "L"),
    "kinds": ("U", "L"),
    "has_kinds": ("b", ""),
}
_BODY = {
    "steps": ("i", "S"),
    "times": ("f", "S"),
    "integers": ("i", "SLI"),
    "floats": ("f", "SLF"),
    "sizes": ("i", "R"),
    "indices": ("iu", "E"),
    "values": ("iu", "E"),
    "origins": ("i", "L"),
}
# The last version's; its first files lack some of them.
_SECTIONS_1 = {
    "layers": ("U", "L"),
    **{name: _HEAD[name] for name in ("format", "bins", "kinds")},
    **{name: each for name, each in _BODY.items() if name != "times"},
}
_DEFAULTS_1 = ("kinds", "origins")


def head(records: Records) -> Sections:
    """What all records of a run have in common."""
    names = [row.name.encode("utf-8", "surrogatepass") for row in records.rows]
    return {
        "format": np.array(FORMAT),
        "bins": np.array(records.bins.spec),
        "names": np.frombuffer(b"".join(names), np.uint8),
        "name_ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "kinds": np.array([row.kind for row in records.rows], dtype=np.str_),
        "has_kinds": np.array(records.layers == [str(row) for row in records.rows]),
    }


def body(records: Records) -> Sections:
    """The records themselves."""
    sizes, indices, values = records.counts.arrays()
    return {
        "steps": np.array(records.steps, dtype=np.int64),
        "times": records.times,
        "integers": records.integers,
        "floats": records.floats,
        "sizes": sizes,
        "indices": indices,
        "values": values,
        "origins": records.origins,
    }


class Shaped(Protocol):
    """An array, or what a file declares of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As an array's."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """As an array's."""


class Source(Protocol):
    """Sections of a file, which are read one by one."""

    @property
    def has_checksum(self) -> bool:
        """Whether one was found, and right."""

    @property
    def headers(self) -> Mapping[str, Shaped]:
        """What there is, by name."""

    def read(self, name: str) -> Array:
        """An array of numbers."""

    def texts(self, name: str) -> list[str]:
        """An array of texts, flat."""


class _Joined(NamedTuple):
    """Sections of blocks."""

    headers: Sections
    has_checksum: bool = True

    def read(self, name: str) -> Array:
        return self.headers[name]

    def texts(self, name: str) -> list[str]:
        return [str(text) for text in self.headers[name].flat]


def join(parts: Sequence[Sections]) -> Source:
    """The sections of a file's blocks, which hold some of its records each, in their order."""
    joined = dict(parts[0])
    for name, (_, dims) in _BODY.items():
        arrays = [part[name] for part in parts]
        joined[name] = arrays[-1] if dims == "L" else np.concatenate(arrays)
    return _Joined(joined)


def to_records(source: Source) -> Records:
    """Records from the sections of a file.

    Args:
        source: what it holds; whatever is not known is passed over.

    Returns:
        Records of fitting shapes, whose numbers are not checked.

    Raises:
        ValueError: it lacks a section, or they do not fit each other.
    """
    headers = source.headers
    for name in ("format", "bins"):
        if name not in headers or headers[name].shape or headers[name].dtype.kind != "U":
            raise ValueError(f"it lacks {name}")
    (version,) = source.texts("format")
    if version not in (FORMAT, _FORMAT_1):
        raise ValueError(f"its format is {version}, not {FORMAT}")
    is_first = version == _FORMAT_1
    if not (is_first or source.has_checksum):
        raise ValueError("it lacks its checksum")
    known = _SECTIONS_1 if is_first else _HEAD | _BODY
    needed = set(known) - set(_DEFAULTS_1 if is_first else ())
    if missing := [name for name in known if name in needed and name not in headers]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if is_first and (unknown := set(headers) - set(known)):
        # Without a checksum, a name that is damaged.
        raise ValueError(f"it holds {min(unknown)!r}, which is unknown")
    n_layers = _check_shapes(headers, known)
    # Before anything of their size is read.
    sizes = _integers(source, "sizes")
    n_entries = headers["indices"].shape[0]
    if (sizes < 0).any() or sizes.sum(dtype=np.float64) != n_entries:
        raise ValueError(f"its sizes do not sum to its {n_entries} indices")
    kinds = source.texts("kinds") if "kinds" in headers else [GRAD] * n_layers
    if is_first:
        layers = source.texts("layers")
        rows = [Row.printed(kind, layer) for kind, layer in zip(kinds, layers, strict=True)]
    else:
        rows = [Row(*each) for each in zip(kinds, _names(source), strict=True)]
        has_kinds = bool(source.read("has_kinds"))
        layers = [str(row) if has_kinds else row.name for row in rows]
    steps = _integers(source, "steps")
    return Records(
        rows,
        layers,
        parse_bins(*source.texts("bins")),
        steps.tolist(),
        _floats(source, "times") if "times" in headers else np.full(len(steps), np.nan),
        _integers(source, "integers"),
        _floats(source, "floats"),
        SparseRows(sizes, source.read("indices"), source.read("values")),
        _integers(source, "origins") if "origins" in headers else np.full(n_layers, OWN),
    )


def _check_shapes(headers: Mapping[str, Shaped], known: Mapping[str, tuple[str, str]]) -> int:
    """Refuse types and shapes that do not fit each other; gives the number of layers."""
    lengths = {"I": len(INTEGERS), "F": len(FLOATS)}
    for name, header in ((name, headers[name]) for name in known if name in headers):
        kinds, dims = known[name]
        if header.dtype.kind not in kinds:
            raise ValueError(f"its {name} are {header.dtype}")
        fits = len(header.shape) == len(dims) and all(
            lengths.setdefault(dim, length) == length
            for dim, length in zip(dims, header.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"its {name}, of shape {header.shape}, do not fit its other arrays")
    if lengths["R"] != lengths["S"] * lengths["L"]:
        raise ValueError(f"its sizes, of shape ({lengths['R']},), do not fit its other arrays")
    return lengths["L"]


def _names(source: Source) -> list[str]:
    ends, n_bytes = source.read("name_ends").tolist(), source.headers["names"].shape[0]
    starts = [0, *ends[:-1]] if ends else []
    falls = any(start > end for start, end in zip(starts, ends, strict=True))
    if falls or sum(ends[-1:]) != n_bytes:
        raise ValueError(f"its name_ends do not divide the {n_bytes} bytes of its names")
    data = source.read("names").tobytes()
    return [data[a:b].decode("utf-8", "surrogatepass") for a, b in zip(starts, ends, strict=True)]


def _integers(source: Source, name: str) -> Array:
    # A "safe" cast refuses what could lose anything.
    return source.read(name).astype(np.int64, casting="safe", copy=False)


def _floats(source: Source, name: str) -> Array:
    return source.read(name).astype(np.float64, casting="safe", copy=False)
