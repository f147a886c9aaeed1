"""The package as users get it: the wheel, its contents, its names and the examples in its docs."""

import doctest
import importlib
import inspect
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import CUDA, ROOT
from programs import run_python

import gradstat

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(gradstat.__path__, "gradstat.")
    # Triton's kernels have no examples, and are importable only where Triton is.
    if not module.name.startswith("gradstat.kernels")
)


def run(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what the build reads, so that no earlier build is in it."""
    folder = tmp_path_factory.mktemp("build")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("gradstat", "kernels"):
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
    built = run(
        *("-m", "build", "--no-isolation", "--wheel", "--outdir", str(folder), str(source)),
        cwd=folder,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder that the wheel is installed in, far from the checkout."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel))
    result = run(*pip, cwd=target)
    assert result.returncode == 0, result.stderr
    return target


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for package, folder in (("gradstat", "gradstat"), ("gradstat/kernels", "kernels"))
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".css", ".html", ".js") or path.name == "py.typed"
    }
    assert wheel.name.startswith(f"gradstat-{gradstat.__version__}-")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert "gradstat/py.typed" in names
        assert "gradstat/kernels/measure.py" in names
        assert names == expected
        # Not a link: its text.
        source = (ROOT / "kernels" / "measure.py").read_text()
        assert archive.read("gradstat/kernels/measure.py").decode() == source


INSTALLED = """
import sys
sys.path.insert(0, FOLDER)
import torch, gradstat
from gradstat.engines import triton as triton_engine
print(gradstat.__file__)
print(triton_engine.measure_kernel.fn.__code__.co_filename)

model = torch.nn.Linear(4, 3)
with gradstat.watch(model) as w:
    model(torch.ones(2, 4)).sum().backward()
assert w.history["sum"].tolist() == [[24.0]]
x = torch.tensor([1.0, -2.0, 0.0, float("nan")], device=DEVICE)
for engine in ("triton", *(["cpu"] if DEVICE == "cpu" else []), "reference"):
    s = gradstat.statistics(x, engine=engine)
    assert (float(s.l1), int(s.nan), int(s.counts.sum())) == (3.0, 1, 3), engine
if DEVICE == "cpu":
    from gradstat.engines.cpu.work import work_on
    assert type(work_on(torch.float32, False)._cache).__name__ == "NullCache"
"""


# One process for both: to compile takes it long.
def test_wheel_works_outside_the_checkout_where_numba_can_write_no_cache(
    installed: Path, tmp_path: Path
) -> None:
    device = "cuda" if CUDA else "cpu"
    # A file in the place of a directory is unwritable even to the superuser.
    blocked = installed / "gradstat" / "engines" / "cpu" / "__pycache__"
    shutil.rmtree(blocked, ignore_errors=True)
    blocked.touch()
    homes = ("NUMBA_CACHE_DIR", "XDG_CACHE_HOME", "HOME")
    nowhere = dict.fromkeys(homes, str(blocked / "none"))
    code = INSTALLED.replace("FOLDER", repr(str(installed))).replace("DEVICE", repr(device))
    # -I leaves out the current folder, PYTHONPATH and the user's own packages.
    result = run("-I", "-W", "ignore::RuntimeWarning", "-c", code, cwd=tmp_path, **nowhere)
    assert result.returncode == 0, result.stderr
    files = [Path(line) for line in result.stdout.splitlines()]
    assert files == [
        installed / "gradstat" / "__init__.py",
        installed / "gradstat" / "kernels" / "measure.py",
    ]


HEAVY = "'triton', 'numba', 'llvmlite', 'matplotlib', 'tqdm', 'mlxtend', 'tensorboard', 'wandb'"


def test_import_loads_no_heavy_package_and_figures_no_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, torch; before = set(sys.modules); assert 'gradstat' not in before; "
        "import gradstat; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        f"print(sorted(new & {{{HEAVY}}}), 'gradstat.ops' in sys.modules); "
        "import gradstat.plot; "
        "print('matplotlib.figure' in sys.modules, 'matplotlib.pyplot' in sys.modules)"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.stdout == "[] True\nTrue False\n", result.stderr


@pytest.mark.parametrize("arguments", ["--help", "--version", "diagnose --help", "info", "nothing"])
def test_commands_that_read_no_run_start_without_torch(arguments: str, tmp_path: Path) -> None:
    code = (
        "import sys; from gradstat import cli; cli._DRIVERS = (); sys.platform = 'linux'\n"
        f"try: cli.main({arguments.split()!r})\n"
        "except SystemExit: pass\n"
        f"print([each for each in ('torch', 'numpy', {HEAVY}) if each in sys.modules])"
    )
    result = run("-c", code, cwd=tmp_path)
    assert result.stdout.splitlines()[-1] == "[]", result.stderr


def test_names_and_modules_are_imported_when_they_are_used(tmp_path: Path) -> None:
    light = run("-c", "import sys, gradstat; print('torch' in sys.modules)", cwd=tmp_path)
    assert light.stdout == "False\n", light.stderr
    code = (
        "import gradstat, torch; "
        "assert set(gradstat.__all__) | {'plot'} <= set(dir(gradstat)); "
        "f = torch.compile(lambda x: gradstat.statistics(x).l1, backend='eager', fullgraph=True); "
        "assert float(f(torch.ones(3))) == 3; "
        "print(gradstat.plot.curves.__name__, gradstat.ops.statistics is gradstat.statistics); "
        "gradstat.plott"
    )
    result = run_python("-c", code, cwd=tmp_path)
    assert result.stdout == "curves True\n", result.stderr
    assert "AttributeError: module 'gradstat' has no attribute 'plott'" in result.stderr


def test_kernels_refuse_to_be_imported_by_another_name() -> None:
    result = run("-c", "import kernels", cwd=ROOT)
    assert result.returncode == 1
    message = "ImportError: these kernels are part of gradstat: import gradstat.kernels"
    assert result.stderr.splitlines()[-1] == message


def test_public_names_are_sorted_and_documented() -> None:
    assert gradstat.__all__ == sorted(set(gradstat.__all__))
    assert gradstat.__version__ == "0.1.0"
    defined = {
        name
        for name, value in vars(gradstat).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert set(gradstat.__all__) == {*defined, "__version__"}
    for name in defined:
        value = getattr(gradstat, name)
        # Its own docstring, not one that a dataclass or a base class makes up.
        assert "\n" in (value.__doc__ or ""), name
        for member, each in inspect.getmembers(value if inspect.isclass(value) else None):
            if not member.startswith("_") and (callable(each) or isinstance(each, property)):
                assert each.__doc__, f"{name}.{member}"


@pytest.mark.parametrize("name", [*MODULES, "gradstat"])
def test_docstrings_examples_run(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if not name.startswith("gradstat.integrations."):
            raise
        pytest.skip(str(error))
    result = doctest.testmod(module, report=True)
    assert result.failed == 0


def test_public_functions_have_an_example() -> None:
    finder = doctest.DocTestFinder()
    for name in ("LinearBins", "Log2Bins", "Statistics", "histogram", "statistics", "watch"):
        value = getattr(gradstat, name)
        assert any(test.examples for test in finder.find(value, name)), name


def test_private_names_of_pytorch_are_in_one_file() -> None:
    private = re.compile(
        r"\btorch\._(?!_version__)|\b_execution_engine\b|\._orig_mod\b|\._base\b|\"_scale\""
    )
    found = [
        path.relative_to(ROOT).as_posix()
        for path in sorted((ROOT / "gradstat").rglob("*.py"))
        if private.search(path.read_text())
    ]
    assert found == ["gradstat/recording/torch_internals.py"]
