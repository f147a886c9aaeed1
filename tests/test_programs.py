import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_python

PROGRAM = """
import atexit, os, sys
atexit.register(print, "the end")
print(__name__, sys.argv[1:], sys.path[0], os.getcwd(), os.environ.get("ONE"), "TWO" in os.environ)
print("an error", file=sys.stderr)
if sys.argv[1] == "killed":
    sys.stdout.flush()
    os.kill(os.getpid(), 9)
sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("kind", ["-c", "-m", "file"])
@pytest.mark.parametrize("end", ["0", "3", "killed"])
def test_run_python_is_as_a_new_interpreter(
    kind: str, end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    program = {"-c": ["-c", PROGRAM], "-m": ["-m", "program"], "file": [tmp_path / "program.py"]}
    command = [*map(str, program[kind]), end]
    monkeypatch.setenv("TWO", "2")
    new = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**{k: v for k, v in os.environ.items() if k != "TWO"}, "ONE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    forked = run_python(*command, cwd=tmp_path, ONE="1", TWO=None)
    assert (forked.returncode, forked.stderr) == (new.returncode, new.stderr)
    assert forked.stdout == new.stdout != ""
