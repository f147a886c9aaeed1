"""Runs that another process writes, and the server and the page that show them."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

import gradstat
from gradstat import History
from gradstat.cli.server import RunList, Server
from gradstat.history import journal

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).parent.parent  # conftest, which has it, is more than a writer needs
Look: TypeAlias = "Callable[..., Page]"

# What a writer imports, the process that all of them are forked from imports once.
WRITERS = multiprocessing.get_context("forkserver")
WRITERS.set_forkserver_preload(
    ["torch", "torch._dynamo", "gradstat.recording", "gradstat.engines.cpu"]
)


def train(path: Path, first_step: int | None, orders: Connection) -> None:
    """Train so many steps at each order, and answer once they are on the disk."""
    journal._INTERVAL_S = 0.05
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(8, 8), nn.Tanh())])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"what": ("grad", "param"), "first_step": first_step}
    with gradstat.watch(model, optimizer=optimizer, path=path, **options) as w:
        orders.send("begun")
        while steps := orders.recv():
            for _ in range(steps):
                loss = model(torch.rand(16, 8)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                w.log(loss=loss.detach())
            newest = int(w.history.steps[-1])
            while History.load(path).steps[-1:].tolist() != [newest]:
                time.sleep(0.01)
            orders.send(newest)


class Writer:
    """A process that trains when it is told to."""

    def __init__(self, path: Path, first_step: int | None = None) -> None:
        self.orders, theirs = WRITERS.Pipe()
        self.process = WRITERS.Process(target=train, args=(path, first_step, theirs))
        self.process.start()
        theirs.close()
        assert self.orders.recv() == "begun"

    def train(self, steps: int) -> int:
        """The newest step, which is on the disk."""
        self.orders.send(steps)
        return self.orders.recv()

    def end(self) -> None:
        self.orders.send(0)
        self.process.join(60)
        assert self.process.exitcode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join(60)


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
