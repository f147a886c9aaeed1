"""The command `gradstat serve`: its port, the line it prints, and how it ends."""

import http.client
import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from histories import make_history

from gradstat import Log2Bins
from gradstat.cli import main


@pytest.fixture
def run(tmp_path: Path) -> Path:
    make_history(Log2Bins(), 3, 5).save(tmp_path / "run.npz")
    return tmp_path / "run.npz"


@pytest.mark.parametrize("port", ["99999", "65536", "-1", "x", "80.5", "\u0661"])
def test_serve_refuses_what_is_no_port(port: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["serve", "run", f"--port={port}"])
    assert ended.value.code == 2
    message = f"argument --port: needs a number from 0 to 65535; got {port!r}\n"
    assert capsys.readouterr().err.endswith(message)


def test_serve_says_that_a_port_is_taken(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run), "--port", str(port)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    message = f"Address already in use: 127.0.0.1:{port}"
    assert shown.err == f"gradstat serve: error: {message}\n"


@pytest.mark.parametrize("is_busy", [False, True])
def test_serve_prints_one_address_and_ends_quietly_with_ctrl_c(run: Path, is_busy: bool) -> None:
    # A shell that starts its jobs in the background has them ignore Ctrl-C. Findings take long.
    code = f"""
import signal, sys, time, torch
from gradstat.cli import main
from gradstat.report import live_run
signal.signal(signal.SIGINT, signal.default_int_handler)
def diagnose(history):
    end_s = time.monotonic() + 60 * {is_busy}
    while time.monotonic() < end_s:
        torch.ones(100_000).sum()
    return []
live_run.diagnose = diagnose
sys.exit(main())
"""
    with subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        try:
            assert process.stdout
            address = process.stdout.readline()
            port = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/\n", address)[1]
            # A browser's connection stays open.
            connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
            connection.request("GET", "/run/0/data")
            assert json.loads(connection.getresponse().read())["records"] == 5
            time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            began_s = time.monotonic()
            rest, errors = process.communicate(timeout=60)
            connection.close()
        finally:
            process.kill()
    assert time.monotonic() - began_s < 10
    assert (rest, errors, process.returncode) == ("\n", "", 0)
