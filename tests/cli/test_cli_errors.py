"""What the command line says of runs that cannot be read, and arguments that are none."""

from pathlib import Path

import pytest
from findings import noise
from histories import append_rows, make_history

from gradstat import History, Log2Bins
from gradstat.cli import main
from gradstat.history.journal import Journal


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    make_history(Log2Bins(), 3, 25, noise).save(tmp_path / "healthy.npz")
    return tmp_path / "healthy.npz"


@pytest.fixture
def damaged(healthy: Path, tmp_path: Path) -> Path:
    (tmp_path / "damaged.npz").write_bytes(healthy.read_bytes()[:-700])
    return tmp_path / "damaged.npz"


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    History(["weight"], Log2Bins()).save(tmp_path / "empty.npz")
    return tmp_path / "empty.npz"


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    (tmp_path / "notes.txt").write_text("no run\n")
    return tmp_path / "notes.txt"


@pytest.fixture
def missing(tmp_path: Path) -> Path:
    return tmp_path / "missing.npz"


@pytest.fixture
def circle(tmp_path: Path) -> Path:
    path = tmp_path / "circle.npz"
    path.symlink_to(path.name)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


@pytest.mark.parametrize(
    "command",
    ["diagnose {}", "export {} --to csv {0}.d", "compare {} {0}", "tail {} --updates 1"],
)
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("missing", "No such file or directory: {}"),
        ("circle", "Too many levels of symbolic links: {}"),
        ("damaged", "{} is damaged or another kind"),
        ("foreign", "{} is damaged or another kind"),
    ],
)
def test_commands_fail_with_one_line_that_says_why(
    command: str,
    what: str,
    message: str,
    healthy: Path,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if what in ("missing", "circle") and command.startswith("tail"):
        pytest.skip("tail waits for it")
    path = request.getfixturevalue(what)
    arguments = command.replace("compare {} {0}", f"compare {{}} {healthy}")
    assert run(*arguments.replace("{0}", "{}").format(path, path).split()) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"gradstat {command.partition(' ')[0]}: error: ")
    assert message.format(path) in shown.err
    assert shown.err.count("\n") == 1


def test_diagnose_of_nothing_fails_with_one_line(
    empty: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("diagnose", empty) == 2
    assert capsys.readouterr().err == f"gradstat diagnose: error: {empty} has no records yet\n"
    assert run("diagnose", folder) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("gradstat diagnose: error: ")
    assert f"{folder} has no records" in shown


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ratio=1", "needs NAME=VALUE with a name, one of"),
        ("vanishing_ratio=low", "needs a number; got 'vanishing_ratio=low'"),
        ("window=2.5", "needs a number; got 'window=2.5'"),
    ],
)
def test_diagnose_refuses_what_is_no_threshold(
    healthy: Path, text: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        run("diagnose", healthy, "--threshold", text)
    assert ended.value.code == 2
    shown = capsys.readouterr().err
    assert f"argument --threshold: {message}" in shown


def test_diagnose_says_which_threshold_may_be_meant(
    healthy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("diagnose", healthy, "--threshold", "vanish_ratio=1")
    assert "(did you mean 'vanishing_ratio'" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "1e300"])
def test_tail_refuses_an_interval_that_is_none(
    healthy: Path, seconds: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("tail", healthy, "--interval", seconds) == 2
    message = f"--interval needs a number of seconds above 0, a day at most; it is {float(seconds)}"
    assert capsys.readouterr().err == f"gradstat tail: error: {message}\n"


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("run.npz", "report run.npz -o run.npz"),
        ("run.npz", "report run.npz -o link.npz"),
        ("run.npz", "compare run.npz other.npz -o run.npz"),
        ("run.npz", "compare other.npz run.npz -o folder/../run.npz"),
        ("run.html", "report run.html"),
        ("run.csv", "export run.csv --to csv ."),
        ("run.parquet", "export folder/../run.parquet --to parquet folder/.."),
    ],
)
def test_commands_do_not_write_over_the_run_that_they_read(
    name: str,
    command: str,
    healthy: Path,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for each in (name, "other.npz"):
        (tmp_path / each).write_bytes(healthy.read_bytes())
    (tmp_path / "link.npz").symlink_to(name)
    before = sorted(tmp_path.rglob("*"))
    assert run(*command.split()) == 2
    assert "is the run itself, or a file of it; write to another one" in capsys.readouterr().err
    assert (tmp_path / name).read_bytes() == healthy.read_bytes()
    assert sorted(tmp_path.rglob("*")) == before


def test_report_does_not_write_over_a_file_of_the_directory_that_it_reads(
    healthy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    history = History.load(healthy)
    journal = Journal(tmp_path / "run", history)
    record = history.record()
    append_rows(journal, 0, *(x.numpy() for x in (record.integers, record.floats, record.counts)))
    journal.flush()
    file = tmp_path / "run" / "00000000.gradstat"
    before = file.read_bytes()
    for path in (tmp_path / "run", file):
        assert run("report", path, "-o", file) == 2
        assert "is the run itself, or a file of it" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert run("report", tmp_path / "run", "-o", tmp_path / "run" / "page.html") == 0
