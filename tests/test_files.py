"""Files that appear whole or not at all, whatever is in their place."""

import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from histories import append_rows

from gradstat import History, Log2Bins, statistics
from gradstat.util import replacing


def write(path: Path, text: str) -> None:
    with replacing(path) as unfinished:
        unfinished.write_text(text)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_replacing_leaves_one_file(tmp_path: Path) -> None:
    for text in ("first", "second"):
        write(tmp_path / "x", text)
        assert [file.name for file in tmp_path.iterdir()] == ["x"]
        assert (tmp_path / "x").read_text() == text


def test_replacing_that_fails_leaves_the_old_file_alone(tmp_path: Path) -> None:
    def write_half() -> None:
        with replacing(tmp_path / "x") as unfinished:
            unfinished.write_text("half")
            raise KeyError

    write(tmp_path / "x", "first")
    with pytest.raises(KeyError):
        write_half()
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "first"


@pytest.mark.parametrize("old", [0o600, 0o644, 0o640, 0o444, 0o755])
def test_replacing_keeps_the_mode_of_the_file(old: int, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("first")
    (tmp_path / "x").chmod(old)
    with replacing(tmp_path / "x") as unfinished:
        # Nobody else may read what only its owner could.
        assert mode(unfinished) == 0o600
        unfinished.write_text("second")
    assert mode(tmp_path / "x") == old


def test_replacing_gives_a_new_file_the_mode_that_the_process_gives_files(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write(tmp_path / "x", "first")
    finally:
        os.umask(before)
    assert mode(tmp_path / "x") == 0o640


def test_replacing_writes_to_what_a_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    (tmp_path / "x").symlink_to("folder/target")
    for text in ("first", "second"):
        write(tmp_path / "x", text)
        assert (tmp_path / "x").is_symlink()
        assert target.read_text() == text
        assert not target.is_symlink()
    assert len(list((tmp_path / "folder").iterdir())) == 1


def test_replacing_does_not_write_through_a_link_in_place_of_its_unfinished_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_text("another's")
    # As if somebody had guessed.
    monkeypatch.setattr("gradstat.util.secrets.token_hex", lambda n: "guessed")
    (tmp_path / ".gradstat.guessed.tmp").symlink_to("other")
    with pytest.raises(FileExistsError) as raised:
        write(tmp_path / "x", "mine")
    assert raised.value.filename == str(tmp_path / "x")
    assert (tmp_path / "other").read_text() == "another's"
    assert not (tmp_path / "x").exists()


def test_replacing_takes_another_name_each_time(tmp_path: Path) -> None:
    names = set()
    for _ in range(20):
        with replacing(tmp_path / "x") as unfinished:
            names.add(unfinished.name)
    assert len(names) == 20


def test_replacing_writes_to_a_pipe_as_it_is(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    command = [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read())"]
    with subprocess.Popen(
        [*command, str(tmp_path / "pipe")], stdout=subprocess.PIPE, text=True
    ) as reader:
        write(tmp_path / "pipe", "through")
        assert reader.stdout.read() == "through\n"
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_replacing_names_the_file_in_a_folder_that_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as raised:
        write(tmp_path / "missing" / "x", "mine")
    assert raised.value.filename == str(tmp_path / "missing" / "x")


def test_replacing_takes_the_longest_name_that_there_is(tmp_path: Path) -> None:
    write(tmp_path / ("n" * 255), "first")
    assert (tmp_path / ("n" * 255)).read_text() == "first"


@pytest.mark.parametrize("what", ["save", "report"])
def test_two_threads_write_one_path_and_a_reader_always_finds_a_whole_file(
    what: str, tmp_path: Path
) -> None:
    path, failures = tmp_path / "run", []
    histories, pages = [], set()
    for n in (1, 2):
        history = History(["x"], Log2Bins())
        s = statistics([torch.full((3,), float(n))])
        for step in range(10 * n):
            append_rows(history, step, s.integers.numpy(), s.floats.numpy(), s.counts.numpy())
        histories.append(history)
        getattr(history, what)(path)
        pages.add(path.read_bytes())

    def write_again(history: History) -> None:
        try:
            for _ in range(50):
                getattr(history, what)(path)
        except OSError as error:
            failures.append(error)

    threads = [threading.Thread(target=write_again, args=(history,)) for history in histories]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        if what == "report":
            assert path.read_bytes() in pages
            continue
        loaded = History.load(path)
        assert set(loaded["max"][:, 0]) == {len(loaded) / 10}
    assert failures == []
    assert [file.name for file in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("given", ["/dev/full", "missing/x", "link"])
def test_replacing_names_the_file_that_was_asked_for_in_every_error(
    given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("/dev/full")
    with pytest.raises(OSError, match=re.escape(repr(given))) as raised:
        write(Path(given), "x")
    assert raised.value.filename == given


def test_replacing_names_the_file_where_the_unfinished_one_is_named(tmp_path: Path) -> None:
    def fail() -> None:
        with replacing(tmp_path / "x") as unfinished:
            unfinished.unlink()
            unfinished.read_text()

    with pytest.raises(FileNotFoundError) as raised:
        fail()
    assert raised.value.filename == str(tmp_path / "x")
