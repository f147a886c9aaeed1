"""Runs that another process writes, and the server and the page that show them."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from conftest import ROOT

from gradstat.cli.server import RunList, Server

if TYPE_CHECKING:
    from playwright.sync_api import Page

Look: TypeAlias = "Callable[..., Page]"

# Trains so many steps at each line that it reads, and answers once they are on the disk.
WRITER = """
import sys, time, torch, gradstat
from torch import nn
from gradstat.history import History, journal
journal._INTERVAL_S = 0.05
path, first = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else None
torch.manual_seed(0)
model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh())])
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
what = ("grad", "param")
with gradstat.watch(model, optimizer=optimizer, path=path, what=what, first_step=first) as w:
    print("begun", flush=True)
    while line := sys.stdin.readline():
        for _ in range(int(line)):
            loss = model(torch.rand(16, 8)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            w.log(loss=loss.detach())
        newest = int(w.history.steps[-1])
        while History.load(path).steps[-1:].tolist() != [newest]:
            time.sleep(0.01)
        print(newest, flush=True)
"""


class Writer:
    """A process that trains when it is told to."""

    def __init__(self, path: Path, first_step: int | None = None) -> None:
        arguments = [str(path), *([] if first_step is None else [str(first_step)])]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", WRITER, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        assert self.process.stdout.readline() == "begun\n"

    def train(self, steps: int) -> int:
        """The newest step, which is on the disk."""
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def end(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


@contextmanager
def serving(*paths: Path, port: int = 0) -> Iterator[Server]:
    with Server(RunList(list(paths)), port) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def commanded(path: Path, port: str = "0") -> Iterator[str]:
    """The command itself, and the address that it prints."""
    command = [sys.executable, "-m", "gradstat", "serve", str(path), "--port", port]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def wait_for(page: Page, text: str, timeout_ms: float = 60_000) -> None:
    """Wait until the line on the run's state begins with a text."""
    page.wait_for_function(
        "(text) => document.querySelector('#live').innerText.trim().startsWith(text)",
        arg=text,
        timeout=timeout_ms,
    )


def facts(page: Page) -> str:
    return page.locator("#facts").inner_text()
