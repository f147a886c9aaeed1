"""The house: each room imports from those before it alone, and no import goes in a circle."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

from conftest import ROOT

PACKAGE = ROOT / "gradstat"
# Rooms in the order of the data, each from those before it; rooms of one line from one another.
ORDER = (
    ("util", "thresholds"),
    ("bins",),
    ("formats",),
    ("results",),
    ("record",),
    ("kernels",),
    ("engines",),
    ("ops",),
    ("history",),
    ("diagnosis",),
    ("recording",),
    ("plot",),
    ("tables", "gradient_noise"),
    ("report",),
    ("integrations",),
    ("cli", "__main__"),
)
# The one exception: methods of History that call a reader, which they import when they are called.
READERS_OF_HISTORY = {
    "gradstat.diagnosis",
    "gradstat.tables",
    "gradstat.report.page",
    "gradstat.report.notebook",
}


class Import(NamedTuple):
    """An import of a module of the package; whether it is inside a function or for types alone."""

    importer: str
    imported: str
    is_late: bool
    is_for_types: bool


def modules() -> dict[str, Path]:
    """Each module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    # What a symbolic link leads to is not searched.
    for path in sorted((PACKAGE / "kernels").glob("*.py")):
        name = "gradstat.kernels" + ("" if path.stem == "__init__" else f".{path.stem}")
        found[name] = path
    return found


MODULES = modules()


def imports_of(name: str, tree: ast.AST) -> Iterator[Import]:
    """All imports of the package in a syntax tree, those within functions too."""

    def walk(node: ast.AST, is_late: bool, is_for_types: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} has a relative import"
            base = node.module or ""
            # A name imported from a package may be a module of it.
            targets = [
                f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base
                for alias in node.names
            ]
        else:
            is_late |= isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            is_for_types |= isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
            for child in ast.iter_child_nodes(node):
                yield from walk(child, is_late, is_for_types)
            return
        for target in targets:
            if target.partition(".")[0] == "gradstat":
                yield Import(name, target, is_late, is_for_types)

    return walk(tree, False, False)


def room(module: str) -> str:
    return [*module.split("."), ""][1]


def level(module: str) -> int:
    return next(at for at, rooms in enumerate(ORDER) if room(module) in rooms)


def is_exception(each: Import) -> bool:
    return (
        each.importer == "gradstat.history.history"
        and each.imported in READERS_OF_HISTORY
        and (each.is_late or each.is_for_types)
    )


IMPORTS = [
    each
    for name, path in MODULES.items()
    for each in imports_of(name, ast.parse(path.read_text()))
    if name != "gradstat"
]


def test_every_module_is_in_a_room_of_the_order() -> None:
    known = {each for rooms in ORDER for each in rooms}
    assert {room(name) for name in MODULES if name != "gradstat"} == known
    assert len(IMPORTS) > 200


def test_imports_go_one_way() -> None:
    upward = [
        each
        for each in IMPORTS
        if not is_exception(each)
        and (each.imported == "gradstat" or level(each.imported) > level(each.importer))
    ]
    assert upward == []


def test_exception_of_history_is_still_needed() -> None:
    assert {each.imported for each in IMPORTS if is_exception(each)} == READERS_OF_HISTORY


def test_imports_make_no_circle() -> None:
    graph: dict[str, set[str]] = {}
    for each in IMPORTS:
        if not is_exception(each) and each.imported != each.importer:
            graph.setdefault(each.importer, set()).add(each.imported)
    # Raises CycleError, which names the circle.
    assert list(TopologicalSorter(graph).static_order())


def test_imports_of_finds_what_is_hidden() -> None:
    source = """
def late():
    if True:
        from gradstat.cli import commands
class A:
    from gradstat import bins
if TYPE_CHECKING:
    import gradstat.report.page
"""
    found = [(each.imported, each.is_late) for each in imports_of("x", ast.parse(source))]
    assert found == [
        ("gradstat.cli.commands", True),
        ("gradstat.bins", False),
        ("gradstat.report.page", False),
    ]
