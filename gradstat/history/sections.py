"""Records as sections, arrays by name: what files hold. docs/format.md has the layout."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from gradstat.bins import parse_bins
from gradstat.history.blocks import Sections
from gradstat.history.packed_counts import SparseRows
from gradstat.history.placements import Placements
from gradstat.history.records import OWN, Records, no_formats
from gradstat.history.scalars import Scalars
from gradstat.history.source import Shaped, Source, encoded, floats, integer, integers, names_of
from gradstat.record import GRAD, Row
from gradstat.results import FLOATS, INTEGERS, PACKED
from gradstat.util import Array

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
# These may be lacking, as where nothing is logged. V bytes of names of N scalars, P values; K files
# that the run was resumed after.
_OPTIONAL = {
    "scalar_names": ("u", "V"),
    "scalar_name_ends": ("i", "N"),
    "scalar_ids": ("i", "P"),
    "scalar_steps": ("i", "P"),
    "scalar_values": ("f", "P"),
    "order": ("i", "L"),
    "partial": ("b", "S"),
    "parts": ("i", "LT"),
    "shapes": ("i", "Z"),
    "shape_ends": ("i", "L"),
    "rank": ("i", ""),
    "world": ("i", ""),
    "first_step": ("i", ""),
    "bytes_before": ("i", "K"),
    "narrow_formats": ("U", "Q"),
    "narrow": ("f", "SLQY"),
}
_LAYOUT = ("parts", "shapes", "shape_ends")
_QUANTIZED = ("narrow_formats", "narrow")
_SCALARS = tuple(name for name in _OPTIONAL if name.startswith("scalar"))
# Sections of numbers of names or of their bytes, and where these are.
_NUMBERS_OF = {"scalar_ids": "scalar_name_ends", "scalar_name_ends": "scalar_names"}
# Those of the last version, whose first files lack some of them.
_SECTIONS_1 = {
    "layers": ("U", "L"),
    **{name: _HEAD[name] for name in ("format", "bins", "kinds")},
    **{name: each for name, each in _BODY.items() if name != "times"},
}
_DEFAULTS_1 = ("kinds", "origins")


def head(records: Records) -> Sections:
    """What all records of a run have in common."""
    names, ends = encoded([row.name for row in records.rows])
    formats = {"narrow_formats": np.array(records.formats, np.str_)} if records.formats else {}
    place = {"rank": records.rank, "world": records.world}
    return {
        **{name: np.array(x, np.int64) for name, x in place.items() if x is not None},
        **formats,
        "format": np.array(FORMAT),
        "bins": np.array(records.bins.spec),
        "names": names,
        "name_ends": ends,
        "kinds": np.array([row.kind for row in records.rows], dtype=np.str_),
        "has_kinds": np.array(records.layers == [str(row) for row in records.rows]),
    }


def resumed(first_step: int, bytes_before: Sequence[int]) -> Sections:
    """The first step of a resumed run, and how long the files are that it goes on from."""
    return {
        "first_step": np.array(first_step, dtype=np.int64),
        "bytes_before": np.array(bytes_before, dtype=np.int64),
    }


def resumption(source: Source) -> tuple[int | None, list[int]]:
    """What `resumed` was given; ``None`` and none of a file that goes on from no other."""
    has_before = "bytes_before" in source.headers
    before: list[int] = integers(source, "bytes_before").tolist() if has_before else []
    return integer(source, "first_step"), before


def body(records: Records) -> Sections:
    """The records themselves."""
    sizes, indices, values = records.counts.arrays()
    return _optional(records) | {
        "steps": np.array(records.steps, dtype=np.int64),
        "times": records.times,
        "integers": records.integers,
        "floats": records.floats,
        "sizes": sizes,
        "indices": indices,
        "values": values,
        "origins": records.origins,
    }


def _optional(records: Records) -> Sections:
    """What not every run has."""
    found: Sections = {}
    scalars = records.scalars
    if scalars.names:
        arrays = *encoded(scalars.names), *scalars.flat()
        found |= dict(zip(_SCALARS, arrays, strict=True))
    if records.layout is not None:
        found |= dict(zip(_LAYOUT, records.layout.flat(), strict=True))
    if records.depth is not None:
        found["order"] = records.depth.astype(np.int32)
    if records.formats:
        found["narrow"] = records.quantized
    if records.partial_step is not None:
        found["partial"] = np.array(records.steps, dtype=np.int64) == records.partial_step
    return found


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
    # Blocks may lack them; each numbers its own scalars.
    logged = [part for part in parts if "scalar_ids" in part]
    for name in _SCALARS if logged else ():
        arrays = [part[name] for part in logged]
        if name in _NUMBERS_OF:
            sizes = [len(part[_NUMBERS_OF[name]]) for part in logged]
            starts = accumulate(sizes[:-1], initial=0)
            arrays = [array + start for array, start in zip(arrays, starts, strict=True)]
        joined[name] = np.concatenate(arrays)
    if any("partial" in part for part in parts):
        joined["partial"] = np.concatenate(
            [part.get("partial", np.zeros(len(part["steps"]), bool)) for part in parts]
        )
    if all("narrow" in part for part in parts):
        joined["narrow"] = np.concatenate([part["narrow"] for part in parts])
    for name in ("order", *_LAYOUT):
        said = [part[name] for part in parts if name in part]
        joined |= {name: said[-1]} if said else {}
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
    known = _SECTIONS_1 if is_first else _HEAD | _BODY | _OPTIONAL
    needed = set(known) - set(_DEFAULTS_1 if is_first else _OPTIONAL)
    for together in (_SCALARS, _LAYOUT, _QUANTIZED):
        if any(name in headers for name in together):
            needed |= set(together)
    if missing := [name for name in known if name in needed and name not in headers]:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if is_first and (unknown := set(headers) - set(known)):
        # There is no checksum: the name may be damaged.
        raise ValueError(f"it holds {min(unknown)!r}, which is unknown")
    n_layers = _check_shapes(headers, known)
    # Before anything of their size is read.
    sizes = integers(source, "sizes")
    n_entries = headers["indices"].shape[0]
    if (sizes < 0).any() or sizes.sum(dtype=np.float64) != n_entries:
        raise ValueError(f"its sizes do not sum to its {n_entries} indices")
    kinds = source.texts("kinds") if "kinds" in headers else [GRAD] * n_layers
    if is_first:
        layers = source.texts("layers")
        rows = [Row.printed(kind, layer) for kind, layer in zip(kinds, layers, strict=True)]
    else:
        rows = [Row(*each) for each in zip(kinds, names_of(source, ""), strict=True)]
        has_kinds = bool(source.read("has_kinds"))
        layers = [str(row) if has_kinds else row.name for row in rows]
    steps = integers(source, "steps")
    has_formats = "narrow_formats" in headers
    return Records(
        rows,
        layers,
        parse_bins(*source.texts("bins")),
        steps.tolist(),
        floats(source, "times") if "times" in headers else np.full(len(steps), np.nan),
        integers(source, "integers"),
        floats(source, "floats"),
        floats(source, "narrow") if has_formats else no_formats(len(steps), n_layers),
        SparseRows(sizes, source.read("indices"), source.read("values")),
        integers(source, "origins") if "origins" in headers else np.full(n_layers, OWN),
        _scalars(source) if "scalar_ids" in headers else Scalars(),
        integers(source, "order") if "order" in headers else None,
        _partial_step(source, steps) if "partial" in headers else None,
        integer(source, "rank"),
        integer(source, "world"),
        _layout(source) if "parts" in headers else None,
        _resumption(source),
        source.texts("narrow_formats") if has_formats else [],
    )


def _scalars(source: Source) -> Scalars:
    ids, steps = (integers(source, name) for name in ("scalar_ids", "scalar_steps"))
    names = names_of(source, "scalar_")
    return Scalars.from_flat(names, ids, steps, floats(source, "scalar_values"))


def _layout(source: Source) -> Placements:
    return Placements.from_flat(*(integers(source, name) for name in _LAYOUT))


def _resumption(source: Source) -> tuple[int, int] | None:
    first_step, before = resumption(source)
    return None if first_step is None else (first_step, len(before))


def _partial_step(source: Source, steps: Array) -> int | None:
    partial = steps[source.read("partial")]
    return int(partial[-1]) if len(partial) else None


def _check_shapes(headers: Mapping[str, Shaped], known: Mapping[str, tuple[str, str]]) -> int:
    """Refuse types and shapes that do not fit each other; gives the number of layers."""
    lengths = {"I": len(INTEGERS), "F": len(FLOATS), "T": 2, "Y": len(PACKED)}
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
