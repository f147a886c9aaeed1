"""Python programs that tests run in processes of their own.

To import torch takes a process two seconds. So one process imports it, and a fork of that runs each
program: as a new interpreter would, from its first line to its last atexit handler.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path

TIMEOUT_S = 300


def run_python(
    *arguments: object, cwd: Path | None = None, check: bool = False, **variables: str | None
) -> subprocess.CompletedProcess[str]:
    """Run a program that may have torch imported before it begins.

    Args:
        arguments: those of ``python``: ``-c`` and code, ``-m`` and a module, or a file; then the
            program's own.
        cwd: where it runs.
        check: whether it must succeed.
        variables: of the environment; without those that are ``None``.
    """
    environment = {**os.environ, **variables}
    environment = {name: value for name, value in environment.items() if value is not None}
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        request = command, str(cwd or Path.cwd()), environment, str(out), str(err)
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        if not select.select([server.stdout], [], [], TIMEOUT_S)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(command, TIMEOUT_S, out.read_text(), err.read_text())
        done = subprocess.CompletedProcess(
            command, int(server.stdout.readline()), out.read_text(), err.read_text()
        )
    if check:
        assert done.returncode == 0, done.stderr
    return done


@functools.cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(server.communicate)
    return server


def _serve() -> tuple[list[str], str, dict[str, str], str, str]:
    """Fork for each request; returns in the child, with its request."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return tuple(json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    sys.exit()


def _become(cwd: str, environment: dict[str, str], out: str, err: str) -> None:
    """Make this process what a new one would be."""
    for descriptor, path in enumerate((os.devnull, out, err)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.dont_write_bytecode = bool(environment.get("PYTHONDONTWRITEBYTECODE"))
    sys.pycache_prefix = environment.get("PYTHONPYCACHEPREFIX")
    sys.path[1:1] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))


def _run(what: str, *arguments: str) -> None:
    """Run a program as ``python`` does."""
    sys.path[0] = {"-c": "", "-m": str(Path.cwd())}.get(what, str(Path(what).parent))
    if what == "-m":
        sys.argv[:] = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif what == "-c":
        sys.argv[:] = what, *arguments[1:]
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(arguments[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = what, *arguments
        runpy.run_path(what, run_name="__main__")


if __name__ == "__main__":
    import torch  # noqa: F401

    command, *rest = _serve()
    _become(*rest)
    _run(*command)
