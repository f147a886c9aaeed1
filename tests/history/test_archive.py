import io
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from watching import SCHEMES, absent, arrays, assert_same, make_history

import gradstat
from gradstat import History, LinearBins, Log2Bins
from gradstat.bins import Bins


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


def test_history_load_refuses_text_without_advice_to_unpickle_it(tmp_path: Path) -> None:
    path = tmp_path / "run.npz"
    path.write_text("step,loss\n")
    assert_load_refuses(path, "it is no .npz file")


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


def test_history_load_takes_ranges_that_followed_the_record_before(
    generator: torch.Generator, tmp_path: Path
) -> None:
    history, _ = make_history(LinearBins(6), generator)
    history.save(tmp_path / "whole.npz")
    with np.load(tmp_path / "whole.npz") as file:
        data = {name: file[name] for name in file.files}
    # As the version before wrote it for LinearBins(6, track=True).
    data["bins"] = np.array("linear 6 None None False True")
    np.savez(tmp_path / "run.npz", **data)
    loaded = History.load(tmp_path / "run.npz")
    assert_same(loaded, history)


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
