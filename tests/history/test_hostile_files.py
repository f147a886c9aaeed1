"""Files that no History wrote, or that were changed: refused, without taking time or memory."""

import io
import json
import os
import re
import struct
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from histories import append_rows
from watching import arrays, make_history

import gradstat
from gradstat import History, Log2Bins
from gradstat.history.file import Reader
from gradstat.history.journal import Journal
from gradstat.results import FLOATS, INTEGERS

Data = dict[str, np.ndarray]
Members = list[tuple[str, bytes]]


def saved(generator: torch.Generator, tmp_path: Path) -> Data:
    """What `History.save` writes, by name."""
    history, _ = make_history(Log2Bins(), generator)
    history.save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as file:
        return {name: file[name] for name in file.files}


def write(path: Path, data: Data) -> None:
    """A file of any content."""
    with zipfile.ZipFile(path, "w") as file:
        for name, x in data.items():
            # What is said of the run is not compressed.
            kind = zipfile.ZIP_STORED if name == "run" else zipfile.ZIP_DEFLATED
            file.writestr(f"{name}.npy", npy(x), compress_type=kind)


def npy(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, x)
    return file.getvalue()


def saying(data: Data, **changes: Any) -> Data:
    """The same, but for what is said of the run."""
    said = json.loads(data["run"].tobytes()) | changes
    said = {name: value for name, value in said.items() if value is not LACKING}
    return data | {"run": np.frombuffer(json.dumps(said).encode(), np.uint8)}


LACKING = object()


def assert_load_refuses(path: Path, reason: str = "") -> None:
    message = (
        f"History.load() needs a file that History.save() or watch() wrote; {path} is damaged or "
        f"another kind: {reason}"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        History.load(path)


def test_history_load_refuses_text_without_advice_to_unpickle_it(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    path.write_text("step,loss\n")
    assert_load_refuses(path, "it is no .npz file")


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"gradstat", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x04K\x01."]
)
def test_history_load_refuses_garbage(content: bytes, tmp_path: Path) -> None:
    for name in ("run.npz", "00000000.gradstat"):
        (tmp_path / name).write_bytes(content)
        assert_load_refuses(tmp_path / name)


def test_history_load_refuses_a_single_array(tmp_path: Path) -> None:
    with (tmp_path / "run.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    assert_load_refuses(tmp_path / "run.npz")


def test_history_load_refuses_another_zip(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "run.npz", "w") as file:
        file.writestr("readme.txt", "not an array")
    assert_load_refuses(tmp_path / "run.npz")
    np.savez(tmp_path / "run.npz", x=np.zeros(3))
    assert_load_refuses(tmp_path / "run.npz", "it lacks run, steps, times, ")


def test_history_load_never_unpickles(generator: torch.Generator, tmp_path: Path) -> None:
    data = saved(generator, tmp_path)
    data["steps"] = np.array(data["steps"], dtype=object)
    write(tmp_path / "run.npz", data)
    assert_load_refuses(tmp_path / "run.npz", "steps holds object; it needs numbers")


NAMES = ["steps", "times", "integers", "floats", "formats", "sizes", "bins", "counts", "run"]


@pytest.mark.parametrize("name", NAMES)
def test_history_load_refuses_a_file_without_one_array(
    name: str, generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path)
    assert list(data) == NAMES
    del data[name]
    write(tmp_path / "run.npz", data)
    assert_load_refuses(tmp_path / "run.npz", f"it lacks {name}")


def test_history_load_passes_over_what_later_versions_say(
    generator: torch.Generator, tmp_path: Path
) -> None:
    data = saying(saved(generator, tmp_path), later={"x": [1]}) | {"loss": np.zeros(3)}
    write(tmp_path / "run.npz", data)
    assert len(History.load(tmp_path / "run.npz")) == 3


ROWS = [["grad", "first.weight"], ["grad", "second.weight"]]
NO_STEP = "its scalars hold what is no step, of 'loss'"


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("format", "gradstat history 3", "its format is 'gradstat history 3', not gradstat histo"),
        ("format", LACKING, "its format is None, not gradstat history 1"),
        ("bins", "square 3", "parse_bins() needs the spec of a bin scheme; spec is 'square 3'"),
        ("bins", "linear 2048 0 1 maybe", "parse_bins() needs the spec of a bin scheme"),
        ("bins", 7, "its bins hold what is no text"),
        ("rows", LACKING, "it lacks rows"),
        ("rows", 3, "its rows hold 3"),
        ("rows", [["grad", "x"], "y"], "its rows hold 'y'"),
        ("rows", [["grad", "x"], ["grad"]], "is damaged or another kind: "),
        ("rows", [["grad", "x"], ["grad", 3]], "its rows hold what is no text"),
        ("rows", [ROWS[0], ["0", "x"]], "its rows are of '0', which is none of grad, param, "),
        ("rows", [ROWS[0], ROWS[0]], "its rows are not all different"),
        ("rows", ROWS[:1], "its layers are 2, of 1 rows"),
        ("layers", [1, 2], "its layers hold what is no text"),
        ("modules", ["ReLU"], "its modules are ['ReLU']"),
        ("modules", {"0": 1}, "its modules are {'0': 1}"),
        ("formats", "nvfp4", "its formats hold 'nvfp4'"),
        ("rank", "0", "its rank is '0'"),
        ("rank", True, "its rank is True"),
        ("world", 1 << 70, "its world is 1180591620717411303424"),
        ("run", 5, "its run hold what is no text"),
        ("owners", LACKING, "it lacks owners"),
        ("owners", [0], "its owners, int64 of shape (1,), are none of its rows"),
        ("owners", [0, 0.5], "its owners, float64 of shape (2,), are none of its rows"),
        ("owners", [0, "x"], "are none of its rows"),
        ("owners", [0, [1]], "is damaged or another kind: "),
        ("owners", [0, -3], "its owners hold -3, which is no rank"),
        ("owners", [0, 2**40], "its owners hold 1099511627776, which is no rank"),
        ("owners", [0, 2**70], "are none of its rows"),
        ("shards", [[0, 1, 2]] * 2, "its shards, int64 of shape (2, 3), are none of its rows"),
        ("shards", LACKING, "it lacks shards"),
        ("shapes", LACKING, "it lacks shapes"),
        ("shapes", [[1]], "its shapes are none of 2 rows"),
        ("shapes", [[1], [1.5]], "its shapes are none of 2 rows"),
        ("shapes", [[1], 2], "its shapes hold 2"),
        ("depth", [0], "its depth, int64 of shape (1,), are none of its rows"),
        ("depth", [0, 3], "its depth is none of its rows"),
        ("partial_step", 0.5, "its partial_step is 0.5"),
        ("scalars", [], "its scalars are []"),
        ("scalars", {"loss": 3}, "its loss hold 3"),
        ("scalars", {"loss": [[1]]}, "is damaged or another kind: "),
        ("scalars", {"loss": [[1, 2], [0.5]]}, "is damaged or another kind: "),
        ("scalars", {"loss": [[-1], [0.5]]}, NO_STEP),
        ("scalars", {"loss": [[0.5], [0.5]]}, NO_STEP),
        ("scalars", {"loss": [[2, 1], [0.5, 1]]}, "add_scalar() needs steps from 2 on"),
        ("scalars", {"loss": [[1], ["x"]]}, "its scalars hold 'x', which is no number"),
        ("scalars", {"loss": [[1], [None]]}, "its scalars hold None, which is no number"),
    ],
)
def test_history_load_refuses_what_no_run_says(
    name: str, value: object, reason: str, generator: torch.Generator, tmp_path: Path
) -> None:
    write(tmp_path / "run.npz", saying(saved(generator, tmp_path), **{name: value}))
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        History.load(tmp_path / "run.npz")
    assert str(tmp_path / "run.npz") in str(raised.value)


@pytest.mark.parametrize("text", [b"", b"[]", b"{", b"\xff", b"[" * 100_000, b"null"])
def test_history_load_refuses_what_says_nothing(
    text: bytes, generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path) | {"run": np.frombuffer(text, np.uint8)}
    write(tmp_path / "run.npz", data)
    assert_load_refuses(tmp_path / "run.npz")


def set_first(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(x: np.ndarray) -> np.ndarray:
        signed = x.astype(np.int64) if value < 0 and x.dtype.kind == "u" else x
        signed.reshape(-1)[0] = value
        return signed

    return change


def set_field(name: str, value: float) -> Callable[[np.ndarray], np.ndarray]:
    """Of the first record's second layer, which has seven values, all in the range."""
    fields = INTEGERS if name in INTEGERS else FLOATS

    def change(x: np.ndarray) -> np.ndarray:
        x[0, 1, fields.index(name)] = value
        return x

    return change


OTHERS = "do not fit its other arrays"
WHERE = ", in step 0 of 'second.weight'"


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("steps", lambda x: x[:-1], OTHERS),
        ("steps", lambda x: x[::-1], "its steps do not rise from 0 or more"),
        ("steps", lambda x: x * 0, "its steps do not rise from 0 or more"),
        ("steps", lambda x: x - 1, "its steps do not rise from 0 or more"),
        ("steps", lambda x: x[:, None], OTHERS),
        ("steps", lambda x: x + 0.5, "its steps are float64"),
        ("times", lambda x: x[:-1], OTHERS),
        ("times", lambda x: x.astype(int), "its times are int64"),
        ("integers", lambda x: x[:, :, :-1], OTHERS),
        ("integers", lambda x: x.reshape(-1), OTHERS),
        ("integers", lambda x: x + 0.5, "its integers are float64"),
        ("integers", set_field("above", -1), f"its numbers of elements are negative{WHERE}"),
        ("integers", set_field("numel", 2**62), f"its numbers of elements are too large{WHERE}"),
        ("integers", set_field("nan", 1), f"its elements are not those finite and not{WHERE}"),
        ("integers", set_field("zeros", 8), f"its zeros are more than its finite elements{WHERE}"),
        ("integers", set_field("below", 1), "its counts do not sum to its finite elements in the"),
        ("floats", lambda x: x[:-1], OTHERS),
        ("floats", set_field("min", 9.0), f"its min is above its max{WHERE}"),
        ("floats", set_field("std", -1.0), f"its std and norms are negative{WHERE}"),
        ("floats", set_field("l1", -1.0), f"its std and norms are negative{WHERE}"),
        *(
            (
                "floats",
                set_field(name, np.nan),
                f"its statistics are NaN beside finite elements{WHERE}",
            )
            for name in FLOATS
        ),
        ("floats", set_field("low", np.inf), None),
        ("floats", set_field("high", -np.inf), None),
        ("sizes", lambda x: x[:-1], OTHERS),
        ("sizes", lambda x: x + 1, "its sizes do not sum to its"),
        ("sizes", set_first(-1), "its sizes do not sum to its"),
        ("sizes", lambda x: x + 0.5, "its sizes are float64"),
        ("sizes", lambda x: x * 0 + 2**62, "its sizes do not sum to its"),
        ("sizes", lambda x: x.ravel(), OTHERS),
        ("bins", lambda x: x[:-1], OTHERS),
        ("bins", lambda x: x + 0.5, "its bins are float64"),
        ("bins", lambda x: x[::-1], "its histogram has counts that are not positive or not in"),
        ("bins", lambda x: x * 0, "its histogram has counts that are not positive or not in"),
        ("bins", set_first(-1), "its histogram has counts that are not positive or not in"),
        ("bins", set_first(2048), "its histogram has counts that are not positive or not in"),
        ("bins", set_first(65535), "its histogram has counts that are not positive or not in"),
        ("counts", lambda x: x[:-1], OTHERS),
        ("counts", set_first(-1), "its histogram has counts that are not positive or not in"),
        ("counts", set_first(0), "its histogram has counts that are not positive or not in"),
        ("counts", lambda x: x * 2, "its counts do not sum to its finite elements in the range"),
        ("counts", lambda x: x + np.int64(2**62), "its histogram has counts that are not"),
        ("counts", lambda x: np.full(len(x), 2**60), "its counts are too large"),
        ("formats", lambda x: x[:, :, :, :-1], OTHERS),
    ],
)
def test_history_load_refuses_what_no_history_holds(
    name: str,
    change: Callable[[np.ndarray], np.ndarray],
    reason: str | None,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    data = saved(generator, tmp_path)
    data[name] = change(data[name])
    write(tmp_path / "run.npz", data)
    if reason is None:  # an end of the range alone
        assert len(History.load(tmp_path / "run.npz")) == 3
        return
    with pytest.raises(ValueError, match=re.escape(reason)) as raised:
        History.load(tmp_path / "run.npz")
    assert str(tmp_path / "run.npz") in str(raised.value)


def test_history_load_refuses_values_of_no_element(
    generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path)
    data["integers"][0, 0, :2] = 0
    kept = int(data["sizes"][0, 0])
    data["sizes"][0, 0] = 0
    data |= {name: data[name][kept:] for name in ("bins", "counts")}
    write(tmp_path / "run.npz", data)
    assert_load_refuses(tmp_path / "run.npz", "its min and max are of no element, in step 0 of")


def test_history_load_takes_nan_where_there_is_no_number(tmp_path: Path) -> None:
    largest = np.finfo(np.float64).max
    tensors = [
        torch.tensor(x, dtype=torch.float64)
        for x in ([], [np.nan, np.inf], [3.0, np.nan], [largest, -largest] * 4096)
    ]
    s = gradstat.statistics(tensors)
    s = s.merge(gradstat.statistics([x * 0.5 for x in tensors]))
    history = History([str(i) for i in range(4)], Log2Bins())
    append_rows(history, 0, *arrays(s))
    append_rows(history, 1, *arrays(gradstat.statistics(tensors)))
    assert history["finite"][1].tolist() == [0, 0, 1, 8192]
    assert np.isfinite(history["std"]).tolist() == [[False, False, True, False], [False] * 4]
    history.save(tmp_path / "run.npz")
    assert len(History.load(tmp_path / "run.npz")) == 2


def test_history_load_refuses_zeros_outside_min_and_max(
    generator: torch.Generator, tmp_path: Path
) -> None:
    data = saved(generator, tmp_path)
    data["integers"][0, 0, INTEGERS.index("zeros")] = 1
    # Smaller than what a device may count as zero, and larger.
    data["floats"][0, 0, FLOATS.index("min")] = 1e-40
    write(tmp_path / "run.npz", data)
    assert len(History.load(tmp_path / "run.npz")) == 3
    data["floats"][0, 0, FLOATS.index("min")] = 1e-3
    write(tmp_path / "run.npz", data)
    assert_load_refuses(tmp_path / "run.npz", "its zeros are outside min and max, in step 0 of")


def write_members(path: Path, members: Members, method: int) -> None:
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members:
            kind = zipfile.ZIP_STORED if name == "run.npy" else method
            file.writestr(zipfile.ZipInfo(name), content, compress_type=kind)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_history_load_refuses_members_of_one_name(
    generator: torch.Generator, tmp_path: Path
) -> None:
    members = [(f"{name}.npy", npy(x)) for name, x in saved(generator, tmp_path).items()]
    path = tmp_path / "run.npz"
    for name in ("bins.npy", "bins"):
        write_members(path, [*members, (name, members[6][1])], zipfile.ZIP_DEFLATED)
        assert_load_refuses(path, "it has two members of one name")
    write_members(path, members, zipfile.ZIP_LZMA)
    assert_load_refuses(path, "steps is compressed in a way that NumPy does not use")


def peak_of_refusal(path: Path, reason: str) -> int:
    """Bytes of memory that it takes."""
    tracemalloc.start()
    try:
        assert_load_refuses(path, reason)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = 64 << 20


def declared(dtype: str, shape: tuple[int, ...], n_bytes: int) -> bytes:
    """A member that declares an array, and has so many bytes of zeros."""
    file = io.BytesIO()
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + bytes(n_bytes)


def replaced(members: Members, name: str, content: bytes) -> list[tuple[str, bytes]]:
    return [(each, content if each == name else old) for each, old in members]


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "reason"),
    [
        ("counts", "<i8", (HUGE // 8,), "its counts, of shape (8388608,), do not fit"),
        ("integers", "<i8", (HUGE // 128, 2, 8), "its integers, of shape (524288, 2, 8), do not"),
        ("steps", f"<U{HUGE // 12}", (3,), "steps holds <U5592405; it needs numbers"),
        ("steps", "<i8", (3,), "steps is not of the size that its shape, (3,), needs"),
    ],
)
def test_history_load_inflates_nothing_that_does_not_fit(
    name: str,
    dtype: str,
    shape: tuple[int, ...],
    reason: str,
    generator: torch.Generator,
    tmp_path: Path,
) -> None:
    members = [(f"{each}.npy", npy(x)) for each, x in saved(generator, tmp_path).items()]
    members = replaced(members, f"{name}.npy", declared(dtype, shape, HUGE))
    write_members(tmp_path / "run.npz", members, zipfile.ZIP_DEFLATED)
    del members
    assert (tmp_path / "run.npz").stat().st_size < 1_000_000
    assert peak_of_refusal(tmp_path / "run.npz", reason) < 4_000_000


def test_history_load_passes_over_a_huge_array_that_it_does_not_know(
    generator: torch.Generator, tmp_path: Path
) -> None:
    members = [(f"{each}.npy", npy(x)) for each, x in saved(generator, tmp_path).items()]
    members.append(("later.npy", declared("|u1", (HUGE,), HUGE)))
    write_members(tmp_path / "run.npz", members, zipfile.ZIP_DEFLATED)
    del members
    tracemalloc.start()
    assert len(History.load(tmp_path / "run.npz")) == 3
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


def test_history_load_refuses_a_header_of_any_size(
    generator: torch.Generator, tmp_path: Path
) -> None:
    members = [(f"{each}.npy", npy(x)) for each, x in saved(generator, tmp_path).items()]
    header = b"\x93NUMPY\x02\x00" + struct.pack("<I", HUGE) + bytes(HUGE)
    members = replaced(members, "steps.npy", header)
    write_members(tmp_path / "run.npz", members, zipfile.ZIP_DEFLATED)
    del members, header
    reason = "steps is of version 2.0 of NumPy's format"
    assert peak_of_refusal(tmp_path / "run.npz", reason) < 4_000_000


def test_history_load_refuses_what_is_said_if_it_is_compressed(
    generator: torch.Generator, tmp_path: Path
) -> None:
    np.savez_compressed(tmp_path / "run.npz", **saved(generator, tmp_path))
    reason = "run is compressed; texts need to be stored as they are"
    assert peak_of_refusal(tmp_path / "run.npz", reason) < 4_000_000


def test_history_load_refuses_a_member_that_declares_more_than_it_can_hold(
    generator: torch.Generator, tmp_path: Path
) -> None:
    members = [(f"{each}.npy", npy(x)) for each, x in saved(generator, tmp_path).items()]
    path = tmp_path / "run.npz"
    whole = declared("<i8", (1 << 40,), 0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in replaced(members, "steps.npy", whole):
            file.writestr(name, content)
        # What the archive's directory says of it.
        file.getinfo("steps.npy").file_size = len(whole) + (8 << 40)
    assert peak_of_refusal(path, "steps is larger than what it is compressed to") < 4_000_000


def test_history_load_refuses_a_huge_directory_of_members(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    with zipfile.ZipFile(path, "w") as file:
        for number in range(20_000):
            file.writestr(f"{number}.npy", b"")
    assert peak_of_refusal(path, "its directory is too large") < 4_000_000


def test_history_load_takes_at_most_three_times_the_memory_of_the_history(tmp_path: Path) -> None:
    s = gradstat.statistics(list(torch.randn(20, 100_000)))
    history = History([str(i) for i in range(20)], Log2Bins())
    for step in range(1_500):
        append_rows(history, step, *arrays(s))
    history.save(tmp_path / "run.npz")
    kept = Journal(tmp_path / "run", history)
    for step in range(1_500):
        append_rows(kept, step, *arrays(s))
        if step % 10 == 0:
            kept.flush()
    kept.flush()
    for path in ("run.npz", "run"):
        tracemalloc.start()
        loaded = History.load(tmp_path / path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert loaded.nbytes > 20_000_000
        assert peak < 3 * loaded.nbytes


def test_history_load_refuses_what_is_no_regular_file_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    os.mkfifo(tmp_path / "00000000.gradstat")
    start_s = time.monotonic()
    for path in (tmp_path / "pipe", tmp_path / "00000000.gradstat", Path("/dev/zero")):
        message = f"^History.load\\(\\) needs a regular file; {path} is none$"
        with pytest.raises(ValueError, match=message):
            History.load(path)
    with pytest.raises(ValueError, match="needs a regular file"):
        History.load(tmp_path)
    assert time.monotonic() - start_s < 5


def test_history_load_does_not_read_a_block_that_is_larger_than_its_file(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(Log2Bins(), generator)
    Journal(tmp_path, history)
    file = tmp_path / "00000000.gradstat"
    reader = Reader(file)
    list(reader.blocks())
    header = struct.pack("<8sIIIIQI", b"gradstat", 1, 1, 8, 7, 1 << 50, 0)
    with file.open("ab") as end:
        end.write(header + struct.pack("<I", zlib.crc32(header, reader._link.checksum)))
        # A hole takes no room on the disk.
        end.truncate(1 << 34)
    tracemalloc.start()
    with pytest.warns(RuntimeWarning, match="cut off: at most 7 records"):
        assert len(History.load(file)) == 0
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4_000_000


FORMAT_NAMES = ["mxfp8_e4m3", "nvfp4"]
NONZERO, UNDERFLOWED, SATURATED, NONFINITE, BLOCKS, EMPTY, LEAST, MOST, NORM, ERROR = range(10)


def with_formats(tmp_path: Path) -> Data:
    """What a run with two formats wrote: a weight's gradient, and peaks of units."""
    torch.manual_seed(0)
    model = torch.nn.Linear(64, 8)
    with gradstat.watch(model, what=("grad", "activation"), formats=FORMAT_NAMES) as w:
        for _ in range(2):
            model(torch.randn(4, 64)).square().sum().backward()
    w.history.save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        ((0, 0, 0), np.nan, "formats are not of the rows that have values"),
        ((0, -1, 0), 1.0, "formats are not of the rows that have values"),
        ((1, 0, 1, NONZERO), np.nan, "formats are not of the rows that have values"),
        ((1, 0, 1, NONZERO), -1.0, "formats have elements that no tensor has"),
        ((1, 0, 1, NONZERO), 1e15, "formats have elements that no tensor has"),
        ((1, 0, 1, NONFINITE), 1e15, "formats have elements that no tensor has"),
        ((1, 0, 1, UNDERFLOWED), 513.0, "formats have lost elements that no tensor has"),
        ((1, 0, 1, SATURATED), 513.0, "formats have lost elements that no tensor has"),
        ((1, 0, 1, SATURATED), 0.5, "formats have counts that no tensor has"),
        ((1, 0, 1, BLOCKS), 1e6, "formats have blocks that no tensor has"),
        ((1, 0, 1, EMPTY), 1e3, "formats have blocks that no tensor has"),
        ((1, 0, 1, LEAST), 1e300, "formats have scales that no tensor has"),
        ((1, 0, 1, LEAST), np.inf, "formats have scales that no tensor has"),
        ((1, 0, 1, LEAST), 0.5, "formats have counts that no tensor has"),
        ((1, 0, 1, LEAST), 300.0, "formats have scales that no tensor has"),
        ((1, 0, 1, NORM), -1.0, "formats have norms that no tensor has"),
        ((1, 0, 1, ERROR), 1e300, "formats have norms that no tensor has"),
    ],
)
def test_history_load_refuses_what_no_format_does(
    place: tuple[int, ...], value: float, reason: str, tmp_path: Path
) -> None:
    data = with_formats(tmp_path)
    data["formats"][place] = value
    write(tmp_path / "run.npz", data)
    assert_load_refuses(tmp_path / "run.npz", f"its {reason}, in step {place[0]} of ")


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["nvfp4", "nvfp4"], "its formats are not all different"),
        (["nvfp4", "x" * 1000], ""),
        (["nvfp4", "float8_e4m3fn_scale_10"], "its formats hold 'float8_e4m3fn_scale_10'"),
        (["nvfp4"], "its formats, of shape (2, 3, 2, 10), do not fit its other arrays"),
        ([], "its formats, of shape (2, 3, 2, 10), do not fit its other arrays"),
    ],
)
def test_history_load_refuses_names_of_no_formats(
    names: list[str], reason: str, tmp_path: Path
) -> None:
    write(tmp_path / "run.npz", saying(with_formats(tmp_path), formats=names))
    assert_load_refuses(tmp_path / "run.npz", reason)


def test_history_load_refuses_a_directory_of_several_lists_of_formats(tmp_path: Path) -> None:
    model = torch.nn.Linear(8, 2)
    for name, formats in (("a", FORMAT_NAMES), ("b", FORMAT_NAMES[::-1])):
        for first_step in (0, 3):
            path = tmp_path / name
            with gradstat.watch(model, formats=formats, path=path, first_step=first_step):
                for _ in range(3):
                    model(torch.ones(1, 8)).sum().backward()
    newest = "00000001.gradstat"
    (tmp_path / "a" / newest).write_bytes((tmp_path / "b" / newest).read_bytes())
    with pytest.raises(ValueError, match="needs the files of one run"):
        History.load(tmp_path / "a")


def long_file(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[np.ndarray], None]
) -> History:
    """A file too large to be verified at once, with a change to the integers of a record."""
    monkeypatch.setattr("gradstat.history.reading.VERIFIED_BYTES", 0)
    history = History(["a.weight"], Log2Bins())
    journal = Journal(path, history)
    for step in range(3):
        integers, floats, counts = arrays(gradstat.statistics([torch.randn(40)]))
        if step == 1:
            change(integers)
        append_rows(journal, step, integers, floats, counts)
    journal.flush()
    return History.load(path)


def test_history_checks_numbers_without_histograms_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(integers: np.ndarray) -> None:
        integers[0, INTEGERS.index("finite")] -= 1

    history = long_file(tmp_path, monkeypatch, change)
    with pytest.raises(ValueError, match="its elements are not those finite and not, in step 1"):
        history["std"]


def test_history_checks_histograms_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(integers: np.ndarray) -> None:
        integers[0, INTEGERS.index("finite")] -= 1
        integers[0, INTEGERS.index("nan")] += 1

    for read in (
        lambda history: history.record(1),
        lambda history: history.histogram("a.weight", 1),
        lambda history: history["kurtosis"],
        lambda history: history.verify(),
        lambda history: list(history.unpacked()),
        lambda history: history.save(tmp_path / "copy.npz"),
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        history = long_file(folder, monkeypatch, change)
        # Numbers that are plausible need no histogram.
        assert history["nan"].tolist() == [[0], [1], [0]]
        with pytest.raises(ValueError, match=r"counts do not sum to its finite elements .* step 1"):
            read(history)


@pytest.mark.parametrize("place", ["numbers", "histogram"])
def test_history_finds_any_damage_when_a_record_is_first_read(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = long_file(tmp_path, monkeypatch, lambda _: None)
    record = history.find(1)
    at = record.of_block.starts[1] + (80 if place == "numbers" else record.n_bytes - 9)
    with (tmp_path / "00000000.gradstat").open("r+b") as file:
        file.seek(at)
        file.write(b"\xaa")
    with pytest.raises(ValueError, match="its record of step 1 has another checksum"):
        history["std"]
