"""Set-up that must happen before any test module is imported, and the engines under test."""

import gc
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

# Processes that share the tests out would have more threads than there are processors.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import hypothesis
import numpy as np
import pytest
import torch

CUDA = torch.cuda.is_available()
# A CUDA device in software: the order of what runs there is right or wrong, its speed is nothing.
IN_SOFTWARE = "SOFTWARE_CUDA" in os.environ
if not CUDA:
    # Triton reads it when it is imported: without a GPU its kernels run in its interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["MPLBACKEND"] = "agg"
# What files measure while they are collected, each process does: it is to wait for no compiler.
os.environ["GRADSTAT_ENGINE"] = "reference"

# The environment comes first.
import faster_formulas  # noqa: E402
import faster_interpreter  # noqa: E402

from gradstat import History, Log2Bins, Statistics, ops  # noqa: E402
from gradstat.bins import Bins  # noqa: E402
from gradstat.formats import Format  # noqa: E402

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page
    from serving import Writer

ROOT = Path(__file__).parent.parent
# Processes share the tests, or whole files of them: those that take longest are begun first, so
# that none is left alone with one of them at the end.
LONGEST = (
    "recording/test_cadence.py",  # on a CUDA device in software
    "engines/test_engines.py",
    "engines/test_format_engines.py",
    "examples/test_study.py",
    "engines/test_cpu_engine.py",
    "bench/test_bench.py",
    "recording/test_shards.py",
    "incidents/test_incidents.py",
    "engines/test_compiled.py",
    "test_float_mode.py",
    "test_package.py",
    "plot/test_arguments.py",
    "plot/test_labels.py",
    "diagnosis/test_diagnosis_runs.py",
    "engines/test_bit_patterns.py",
    # With a browser, wandb or a notebook.
    "report/test_report_rows.py",
    "cli/test_serve_page.py",
    "report/test_report_page.py",
    "integrations/test_trainers.py",
    "integrations/test_wandb.py",
    "integrations/test_tensorboard.py",
    "integrations/test_notebook.py",
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

# The everyday run tries the same examples each time; the slow one explores and prints what fails.
hypothesis.settings.register_profile(
    "everyday", max_examples=50, deadline=None, derandomize=True, database=None
)
hypothesis.settings.load_profile("everyday")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--on-cuda",
        action="store_true",
        help="put tensors on the CUDA device that a test makes without naming a device",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--on-cuda"):
        config.pluginmanager.import_plugin("on_cuda")
    faster_formulas.install()
    if not CUDA:
        faster_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {ROOT / "tests" / name: at for at, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if not CUDA:
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def pytest_collection_finish() -> None:
    # The engine that a user prefers is not the one under test.
    os.environ.pop("GRADSTAT_ENGINE")
    # What is loaded now stays: the garbage collector need not look at it a hundred times.
    gc.freeze()


def sized(on_card: int, in_software: int) -> int:
    """A size for a real card, or a smaller one where a kernel runs in software."""
    return on_card if CUDA and not IN_SOFTWARE else in_software


@dataclass(frozen=True)
class Engine:
    """An engine, and the device that its tests give it tensors on."""

    name: str
    device: str

    @property
    def is_interpreted(self) -> bool:
        """Whether Triton's interpreter, in Python and NumPy, takes the place of a GPU."""
        return self.name == "triton" and self.device == "cpu"

    def measure(
        self,
        tensors: Sequence[torch.Tensor],
        bins: Bins | None = None,
    ) -> Statistics:
        with numpy_silent_as_a_gpu() if self.is_interpreted else nullcontext():
            return ops.measure(tensors, bins or Log2Bins(), self.name)

    def measure_formats(
        self, tensors: Sequence[torch.Tensor], formats: Sequence[Format], dim: int = -1
    ) -> tuple[torch.Tensor, torch.Tensor]:
        with numpy_silent_as_a_gpu() if self.is_interpreted else nullcontext():
            integers, floats = ops.measure_formats(tensors, formats, dim, self.name)
        return integers.cpu(), floats.cpu()


@contextmanager
def numpy_silent_as_a_gpu() -> Iterator[None]:
    """The interpreter computes in NumPy, which warns of NaN, infinities, overflow, 1 / 0."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"), warnings.catch_warnings():
        # nanmin and nanmax, which stand for tl.min and tl.max.
        warnings.filterwarnings("ignore", "All-NaN (slice|axis) encountered", RuntimeWarning)
        yield


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever waits for the CUDA device raises."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype feature")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


ENGINES = [
    pytest.param(Engine("reference", "cpu"), id="reference"),
    pytest.param(Engine("cpu", "cpu"), id="cpu"),
    # On a GPU where there is one, in the interpreter elsewhere.
    pytest.param(
        Engine("triton", "cuda" if CUDA else "cpu"),
        id="triton",
        marks=[pytest.mark.gpu] if CUDA else [],
    ),
]


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    selected: Engine = request.param
    return selected


@pytest.fixture(autouse=True)
def seed() -> None:
    """Draw what a test draws without a generator, such as weights, the same in every run."""
    torch.manual_seed(20)


@pytest.fixture
def generator() -> torch.Generator:
    """Random numbers that are the same in every run."""
    return torch.Generator(torch.get_default_device()).manual_seed(20)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    playwright = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs one of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_report(browser: "Browser", tmp_path: Path) -> Iterator[Callable[..., "Page"]]:
    """Writes a history's report and opens it; no error, message or request may follow."""
    seen: list[str] = []
    pages = []

    def open_report(history: History, width: int = 1400, scheme: str = "light") -> "Page":
        path = tmp_path / f"run{len(pages)}.html"
        history.report(path, title="A run")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        page.on("request", lambda request: seen.append(request.url))
        page.goto(path.as_uri())
        assert seen.pop(0) == path.as_uri()
        pages.append(page)
        return page

    yield open_report
    for page in pages:
        page.close()
    assert seen == []


@pytest.fixture
def write() -> Iterator[Callable[..., "Writer"]]:
    """Starts processes that write runs, and ends them."""
    from serving import Writer

    writers: list[Writer] = []

    def write(*arguments: object) -> "Writer":
        writers.append(Writer(*arguments))
        return writers[-1]

    yield write
    for writer in writers:
        writer.kill()
        writer.orders.close()


@pytest.fixture
def look(browser: "Browser") -> Iterator[Callable[..., "Page"]]:
    """Opens a page; no error, message or request elsewhere may follow."""
    seen: list[str] = []
    contexts = []

    def look(address: str, width: int = 1400, height: int = 900) -> "Page":
        context = browser.new_context(viewport={"width": width, "height": height})
        page = context.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: seen.append(dialog.message))
        origin = "/".join(address.split("/")[:3])
        page.on("request", lambda it: it.url.startswith(origin) or seen.append(it.url))
        page.goto(address)
        page.evaluate("window.isTheSame = true")
        contexts.append(context)
        return page

    look.seen = seen
    yield look
    for context in contexts:
        context.close()
    assert seen == []
