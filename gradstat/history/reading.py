"""What the files of one process say: a ``.npz`` file, or a directory that grows with the run.

`History.load` comes here by `gradstat.history.ranks`, which looks for ranks first, and a run that
grows is read in the same way: piece by piece, until it ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradstat.bins import parse_bins
from gradstat.history.check import check_histograms, check_numbers, check_rows, check_steps
from gradstat.history.file import (
    MAGIC,
    SUFFIX,
    Block,
    Npz,
    Reader,
    RunFile,
    damage_of,
    open_regular,
    write_npz,
)
from gradstat.history.records import Records, Resumption, joined
from gradstat.record import SAME, Placement, Record, Row, Unpacked
from gradstat.results import FLOATS, INTEGERS, PACKED
from gradstat.util import Array, CutOffError, replacing, warn

FORMAT = "gradstat history 1"
# Files of so many bytes in all are verified as a whole when they are loaded, larger ones record by
# record when these are read.
VERIFIED_BYTES = 64 << 20

_LENGTHS = {"I": len(INTEGERS), "N": len(FLOATS), "P": len(PACKED)}
_NO_BLOCK = "it ends within its first block"
_MOST_RANKS = 1 << 31
# What ``run.npz`` holds of its records: type and shape, of S records of L rows with F formats, and
# of E filled bins, whose types may be wider.
_ARRAYS = {
    "steps": ("<i8", "S"),
    "times": ("<f8", "S"),
    "integers": ("<i8", "SLI"),
    "floats": ("<f8", "SLN"),
    "formats": ("<f8", "SLFP"),
    "sizes": ("<i8", "SL"),
    "bins": ("<u2", "E"),
    "counts": ("<u4", "E"),
}


def head_of(records: Records) -> dict[str, Any]:
    """What is said of a run where its file begins."""
    return {
        "format": FORMAT,
        "run": records.run,
        "bins": records.bins.spec,
        "rows": records.rows,
        "layers": records.layers,
        "modules": records.modules,
        "formats": records.formats,
        "rank": records.rank,
        "world": records.world,
    }


def state_of(records: Records) -> dict[str, Any]:
    """What is said of some records, and may be another for the next ones."""
    placements, depth = records.placements, records.depth
    return {
        "owners": [each.owner for each in placements],
        "shards": [list(each.shard) for each in placements],
        "shapes": [list(each.shape) for each in placements],
        "depth": None if depth is None else depth.tolist(),
        "partial_step": records.partial_step,
    }


def _begun(said: Mapping[str, Any]) -> Records:
    """A run without records, from what is said of it where its file begins."""
    if said.get("format") != FORMAT:
        raise ValueError(f"its format is {said.get('format')!r:.80}, not {FORMAT}")
    rows = [Row(*_list({"rows": each}, "rows", of_texts=True)) for each in _list(said, "rows")]
    formats = _list(said, "formats", of_texts=True)
    check_rows(rows, formats)
    records = Records(rows, parse_bins(_text(said, "bins")), formats)
    records.layers = _list(said, "layers", of_texts=True)
    if len(records.layers) != len(rows):
        raise ValueError(f"its layers are {len(records.layers)}, of {len(rows)} rows")
    modules = said.get("modules", {})
    if not isinstance(modules, dict) or not all(type(each) is str for each in modules.values()):
        raise ValueError(f"its modules are {modules!r:.80}")
    records.modules = modules
    for name in ("owners", "shards", "shapes"):
        _list(said, name)
    records.rank, records.world = _number(said, "rank"), _number(said, "world")
    first_step = _number(said, "first_step")
    if first_step is not None:
        records.resumption = Resumption(first_step, _number(said, "number") or 0)
    records.run = None if said.get("run") is None else _text(said, "run")
    return records


def _learn(records: Records, said: Mapping[str, Any]) -> None:
    """Take what is said of records; what is not said is as it was."""
    n_rows = len(records.rows)
    if "owners" in said or "shards" in said or "shapes" in said:
        records.placements = _placements(dict(state_of(records), **said), n_rows)
    if "depth" in said:
        records.depth = None if said["depth"] is None else _integers(said, "depth", n_rows)
        if records.depth is not None and (abs(records.depth) > n_rows).any():
            raise ValueError("its depth is none of its rows")
    if "partial_step" in said:
        records.partial_step = _number(said, "partial_step")
    scalars = said.get("scalars", {})
    if not isinstance(scalars, dict):
        raise ValueError(f"its scalars are {scalars!r:.80}")
    for name, series in scalars.items():
        steps, values = (_list({name: each}, name) for each in _list({name: series}, name))
        if not all(type(step) is int and 0 <= step < 1 << 63 for step in steps):
            raise ValueError(f"its scalars hold what is no step, of {name!r:.80}")
        records.logged.add_all(name, steps, map(_parse_json_number, values))


def _placements(said: Mapping[str, Any], n_rows: int) -> list[Placement]:
    owners, shards = _integers(said, "owners", n_rows), _integers(said, "shards", n_rows, 2)
    if len(bad := owners[(owners < SAME) | (owners >= _MOST_RANKS)]):
        raise ValueError(f"its owners hold {bad[0]}, which is no rank")
    shapes = [tuple(_list({"shapes": each}, "shapes")) for each in _list(said, "shapes")]
    if len(shapes) != n_rows or not all(type(n) is int for shape in shapes for n in shape):
        raise ValueError(f"its shapes are none of {n_rows} rows")
    held = zip(owners.tolist(), map(tuple, shards.tolist()), shapes, strict=True)
    return [Placement(*each) for each in held]


def _json_number(value: float) -> float | str:
    """A value as files have it: JSON has no number that is not finite."""
    return value if math.isfinite(value) else str(float(value))


def _parse_json_number(value: object) -> float:
    """A value from what files have of it; ValueError if it is none."""
    if isinstance(value, int | float) or value in ("nan", "inf", "-inf"):
        return float(value)
    raise ValueError(f"its scalars hold {value!r:.80}, which is no number")


def _list(said: Mapping[str, Any], name: str, *, of_texts: bool = False) -> list[Any]:
    found = said.get(name)
    if not isinstance(found, list):
        raise ValueError(f"it lacks {name}" if found is None else f"its {name} hold {found!r:.80}")
    if of_texts and not all(isinstance(each, str) for each in found):
        raise ValueError(f"its {name} hold what is no text: {found!r:.80}")
    return found


def _text(said: Mapping[str, Any], name: str) -> str:
    return str(_list({name: [said.get(name)]}, name, of_texts=True)[0])


def _integers(said: Mapping[str, Any], name: str, *shape: int) -> Array:
    array = np.array(_list(said, name))
    if array.size == 0 == math.prod(shape):
        return np.zeros(shape, np.int64)
    if array.dtype != np.int64 or array.shape != shape:
        raise ValueError(f"its {name}, {array.dtype} of shape {array.shape}, are none of its rows")
    return array


def _number(said: Mapping[str, Any], name: str) -> int | None:
    found = said.get(name)
    if found is not None and (type(found) is not int or abs(found) >= 1 << 63):
        raise ValueError(f"its {name} is {found!r:.80}")
    return found


def as_said(scalars: Mapping[str, tuple[list[int], list[float]]]) -> dict[str, list[list[Any]]]:
    """What a file says of scalars: of each name its steps and its values."""
    return {
        name: [steps, list(map(_json_number, values))] for name, (steps, values) in scalars.items()
    }


def save(path: Path, records: Records) -> None:
    """As `History.save`."""
    scalars = as_said(records.logged.after({}))
    all_said = head_of(records) | state_of(records) | {"scalars": scalars}
    said = json.dumps(all_said, allow_nan=False).encode()
    n_bins, counts = 0, "<u4"
    for each in records.unpacked():
        n_bins += len(each.bins)
        counts = max(counts, each.counts.dtype.str)
    types = {"bins": records.layout.bin_type.str, "counts": counts}
    lengths = _LENGTHS | {"S": len(records), "L": len(records.rows), "E": n_bins}
    lengths["F"] = len(records.formats)

    def parts(name: str) -> Iterator[Array]:
        if name in ("steps", "times"):
            return iter([getattr(records, name)])
        return (getattr(each, name) for each in records.unpacked())

    arrays = {
        name: (tuple(lengths[each] for each in shape), types.get(name, dtype), parts(name))
        for name, (dtype, shape) in _ARRAYS.items()
    }
    arrays["run"] = (len(said),), "|u1", iter([np.frombuffer(said, np.uint8)])
    with replacing(path) as unfinished:
        write_npz(unfinished, arrays)


def _read_npz(path: Path) -> Records:
    with open_regular(path) as file, damage_of(path):
        npz = Npz(file)
        if missing := [name for name in ("run", *_ARRAYS) if name not in npz.declared]:
            raise ValueError(f"it lacks {', '.join(missing)}")
        said = json.loads(npz.read("run").tobytes())
        records = _begun(said)
        _learn(records, said)
        lengths = _LENGTHS | {"L": len(records.rows), "F": len(records.formats)}
        arrays = _read_arrays(npz, lengths)
        steps, times, integers, floats, formats, sizes, bins, counts = arrays
        if (sizes < 0).any() or sizes.sum(dtype=np.float64) != len(bins):
            raise ValueError(f"its sizes do not sum to its {len(bins)} bins")
        unpacked = Unpacked(integers, floats, formats, np.cumsum(sizes), bins, counts)
        check_steps(steps.tolist())
        check_numbers(records.rows, records.formats, steps.tolist(), unpacked[:3])
        check_histograms(records.rows, records.bins, steps.tolist(), unpacked)
        data = records.layout.pack_all(unpacked)
        records.set_records(list(map(Record, steps.tolist(), times.tolist(), data)))
    return records


def _read_arrays(npz: Npz, lengths: dict[str, int]) -> list[Array]:
    """All arrays, once they are known to fit each other."""
    for name, (dtype, dims) in _ARRAYS.items():
        shape, found = npz.declared[name]
        if found.kind not in ("f" if dtype == "<f8" else "iu"):
            raise ValueError(f"its {name} are {found}")
        if len(shape) != len(dims) or any(
            lengths.setdefault(dim, n) != n for dim, n in zip(dims, shape, strict=True)
        ):
            raise ValueError(f"its {name}, of shape {shape}, do not fit its other arrays")
    arrays = []
    for name, (dtype, dims) in _ARRAYS.items():
        array = npz.read(name)
        # A "safe" cast refuses what could lose anything.
        wide = array if dims == "E" else array.astype(dtype, casting="safe", copy=False)
        arrays.append(wide)
    return arrays


class _Source(NamedTuple):
    """A file of a directory that is to be read."""

    path: Path
    may_end_early: bool  # it may be cut off
    end: float  # the step from which on it is superseded, or infinity


def pieces(path: Path) -> Iterator[Records]:
    """Find the records of a file, or of all files of a directory, some at a time."""
    # Those of a piece have the same rows and placements, and their steps rise. Those at the end of
    # a directory's last file that are cut off are left out, with a warning. Errors are as of
    # `History.load`.
    return (piece for piece in followed(path, math.inf, goes_on=False) if piece is not None)


def followed(path: Path, n_bytes: float, *, goes_on: bool = True) -> Iterator[Records | None]:
    """Read as `pieces`, and go on for ever with a directory's last file, which a run writes."""
    # It looks through so many bytes of a file at once, or a block more. ``None`` stands for nothing
    # new yet, or no whole block of it.
    if not path.is_dir():
        yield from _read_file(_Source(path, True, math.inf), n_bytes)
        return
    run, last_step = None, -1
    plan = _plan(path, quiet=goes_on)
    for source in plan:
        for piece in _read_file(source, n_bytes, goes_on=goes_on and source is plan[-1]):
            if piece is not None:
                found = piece.rows, piece.layers, piece.bins, piece.formats
                run = run or found
                if found != run or (len(piece) and piece.first_step <= last_step):
                    raise ValueError(
                        f"History.load() needs the files of one run; {path} has those of several"
                    )
                last_step = max(last_step, piece.last_step)
            yield piece


def load(path: Path) -> Records:
    """All records of one process, as `pieces` finds them; a small file's are read."""
    records = joined(list(pieces(path)))
    if records.nbytes <= VERIFIED_BYTES:
        records.verify()
    return records


def check_fits(path: Path, records: Records) -> str | None:
    """Refuse a directory with the records of other layers or bins than some, or a damaged one."""
    # Returns the identifier of the run that it holds; ``None`` where no file has a whole block.
    try:
        *_, source = _plan(path, quiet=True)
    except CutOffError:
        return None
    found = _begin(source.path)[0]
    if (found.rows, found.bins) != (records.rows, records.bins):
        raise ValueError(
            f"watch() needs the layers and bins of the run that it goes on with; path is {path}, "
            f"which has {len(found.rows)} rows over {found.bins}, and there are "
            f"{len(records.rows)} over {records.bins}"
        )
    if found.formats != records.formats:
        raise ValueError(
            f"watch() needs the formats of the run that it goes on with; path is {path}, which has "
            f"{', '.join(found.formats) or 'none'}, and there are "
            f"{', '.join(records.formats) or 'none'}"
        )
    return found.run


def segments(path: Path) -> list[Path]:
    """Files of a directory, in their order; none where there is no directory."""
    if not path.is_dir():
        return []
    return sorted(each for each in path.iterdir() if each.suffix == SUFFIX and each.stem.isdigit())


def segment_name(number: int) -> str:
    return f"{number:08}{SUFFIX}"


def is_begun(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return bool(_begin(path))
    return False


def _begin(path: Path) -> tuple[Records, dict[str, Any]]:
    """A run without records and all that is said of it, by the first block of a file."""
    with damage_of(path):
        block = next(Reader(path).blocks(), None)
        if block is None:
            raise CutOffError(_NO_BLOCK)
        return _begun(block.said), block.said


def _plan(path: Path, *, quiet: bool) -> list[_Source]:
    files = segments(path)
    if not files:
        raise ValueError(
            f"History.load() needs a directory that watch() wrote; {path} has no records"
        )
    for number, file in enumerate(files):
        if file.name != segment_name(number):
            raise ValueError(
                f"History.load() needs all files that watch() wrote; {path} lacks number {number}"
            )
    plan: list[_Source] = []
    end = math.inf
    run: tuple[str | None, Path] | None = None
    # The last one comes first: it says how long the others were when it was begun.
    lengths = set[tuple[int, int]]()  # of files by their numbers
    for number, file in reversed(list(enumerate(files))):
        # A file without a whole block was never the last one of a run.
        may_end_early = not plan or (number, file.stat().st_size) in lengths
        try:
            begun, said = _begin(file)
        except CutOffError:
            if not may_end_early or (number == 0 and not plan):
                raise
            if not quiet:
                _warn(file, "all of its records are lost")
            continue
        run = run or (begun.run, file)
        if begun.run != run[0]:
            raise ValueError(
                f"History.load() needs the files of one run; {file} and {run[1]} are of two"
            )
        if said.get("number") != number:
            raise ValueError(
                f"History.load() needs the files of a run in their places; {file} is number "
                f"{said.get('number')} of its run"
            )
        plan.insert(0, _Source(file, may_end_early, end))
        if begun.resumption is not None:
            end = min(end, begun.resumption.first_step)
        lengths |= set(enumerate(said.get("lengths", ())))
    return plan


def _read_file(
    source: _Source, n_bytes: float = math.inf, *, goes_on: bool = False
) -> Iterator[Records | None]:
    """Records of a file before a step, some at a time; ``None`` if there are none yet."""
    path = source.path
    if RunFile(path).read(0, len(MAGIC)) != MAGIC and path.suffix != SUFFIX:
        yield _read_npz(path).between(end=source.end)
        return
    with damage_of(path):
        reader = Reader(path)
    newest: Records | None = None  # of the blocks that were read
    last_step, is_over = -1, False
    while goes_on or not is_over:
        lost, found = "", list[Records]()
        with damage_of(path):
            if not reader.is_same:
                raise ValueError("it has other records than before")
            blocks = list(reader.blocks(n_bytes))
            is_over = reader.is_over
            if is_over and not goes_on:
                while reader.grows():
                    blocks += reader.blocks()
                if reader.is_cut_off:
                    n = reader.n_lost
                    lost = "an unknown number of records" if n is None else f"at most {n} records"
                    if not source.may_end_early:
                        raise CutOffError(f"it is cut off; {lost}")
            if newest is None and not blocks:
                raise CutOffError(_NO_BLOCK)
            for block in blocks:
                newest = _after(newest, block, last_step)
                last_step = max(last_step, newest.last_step)
                found.append(newest)
        if lost:
            _warn(path, lost)
        for _, parts in groupby(found, key=attrgetter("placements")):
            yield joined(list(parts)).between(end=source.end)
        if goes_on and not found:
            yield None


def _after(before: Records | None, block: Block, last_step: int) -> Records:
    """The records of a block, of which what is not said is as in the block before."""
    records = _begun(block.said) if before is None else before.at([])
    _learn(records, block.said)
    check_steps([record.step for record in block.records], last_step)
    records.set_records([*block.records])
    return records


def _warn(path: Path, lost: str) -> None:
    warn(f"History.load() leaves out the end of {path}, which is cut off: {lost}")
