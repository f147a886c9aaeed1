"""Under pytest each test starts with an idle device, no error and a schedule of its own.

With ``--schedules=lazy,reverse,random:1`` a test runs under the first of them, and under the others
if the device had a choice: if two commands could ever have run at one time. Where it never had one,
all schedules are the same.
"""

from __future__ import annotations

import os
import zlib
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from _pytest.runner import runtestprotocol

from cuda_device import device

_counts: Counter[str] = Counter()


def pytest_addoption(parser: pytest.Parser) -> None:
    schedule, seed = os.environ["SOFTWARE_CUDA_SCHEDULE"], os.environ["SOFTWARE_CUDA_SEED"]
    parser.addoption(
        "--schedules",
        default=f"{schedule}:{seed}",
        help="of the CUDA device in software, with seeds: lazy,reverse,random:1",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    first, *others = item.config.getoption("schedules").split(",")
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    run(item, nextitem, first)
    if device.runtime.device_had_choice() and "schedule" not in item.fixturenames:
        for other in others:
            item._initrequest()
            run(item, nextitem, other)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def run(item: pytest.Item, nextitem: pytest.Item | None, schedule: str) -> None:
    name, _, seed = schedule.partition(":")
    device.reset()
    # A capture that fails leaves its stream the current one.
    torch.cuda.set_stream(torch.cuda.default_stream())
    device.schedule(name, int(seed or 0) * 65537 + zlib.crc32(item.nodeid.encode()) % 65537)
    for report in runtestprotocol(item, nextitem=nextitem, log=False):
        report.schedule = schedule
        if report.failed:
            # Not in its name, by which pytest-xdist knows a test.
            report.sections.append(("CUDA device in software", f"schedule {schedule}"))
        item.ihook.pytest_runtest_logreport(report=report)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown() -> None:
    device.runtime.device_run_all()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" and not report.skipped:
        _counts[report.schedule] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{n} under {schedule}" for schedule, n in _counts.items())
    terminalreporter.write_line(f"CUDA device in software: tests run {counts}")


@pytest.fixture
def schedule() -> Iterator[object]:
    """Sets the schedule: the test is of the device, and runs once."""
    yield device.schedule
    device.reset()
