"""How the device in software comes to a process: its libraries, its cache, `run.py`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CUDA

from cuda_device import build

RUN = Path(__file__).parent / "run.py"


def missing() -> str:
    try:
        build.wheels()
    except build.MissingError as e:
        return str(e)
    return ""


pytestmark = pytest.mark.skipif(bool(missing()), reason=missing())
# They need no card, but `make test-cuda` runs them, and not each run of the others.
with_the_device = pytest.mark.gpu


def environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SOFTWARE_CUDA") and name not in ("PYTEST_PLUGINS", "PYTHONPATH")
    }
    return kept | variables


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUN), "--", *command],
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@with_the_device
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_processes_that_build_at_once_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(RUN), "--", "true"]
    quick = tmp_path / "quick"  # no optimisation: who is first is what matters here
    quick.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    quick.chmod(0o755)
    env = environment(SOFTWARE_CUDA_CACHE=str(tmp_path / "new"), CXX=str(quick))
    both = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    (built,) = (tmp_path / "new").iterdir()
    found = sorted(path.name for path in built.iterdir())
    assert found == ["done", "libcuda.so.1", "libcudart.so.13"]


@with_the_device
@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"PATH": "/nonexistent"}, "g++ is not found"),
        ({"CXX": "no-such-compiler"}, "no-such-compiler is not found"),
        ({"CXX": "false"}, "false fails with status 1"),
    ],
    ids=["no compiler on the path", "another compiler", "a compiler that fails"],
)
def test_without_a_compiler_one_line_says_so(
    tmp_path: Path, variables: dict[str, str], says: str
) -> None:
    done = run("true", SOFTWARE_CUDA_CACHE=str(tmp_path / "new"), **variables)
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert line.startswith("cuda_device: ")
    assert says in line
    assert list((tmp_path / "new").iterdir()) == []


@with_the_device
def test_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for where in (file, file / "folder"):
        done = run("true", SOFTWARE_CUDA_CACHE=str(where))
        assert done.returncode == 3
        (line,) = done.stderr.splitlines()
        assert "SOFTWARE_CUDA_CACHE" in line


@with_the_device
def test_exit_status_is_the_commands() -> None:
    assert run(sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    assert run("no-such-command").returncode == 127
    assert run().returncode == 2


@pytest.mark.skipif(CUDA, reason="the suite takes the CUDA device that is here")
def test_suite_without_a_compiler_skips_in_one_line(tmp_path: Path) -> None:
    suite = RUN.parent.parent / "cuda_suite.py"
    done = subprocess.run(
        [sys.executable, str(suite)],
        env=environment(PATH="/nonexistent", SOFTWARE_CUDA_CACHE=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    assert line.startswith("skipped: there is no CUDA device, and none in software: g++ is not")
