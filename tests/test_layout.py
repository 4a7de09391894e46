"""The house: rooms one deep, imports only down, no circles; docs/architecture.md draws it."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

from scenes.places import ROOT

PACKAGE = "zemosaic_pipeline"
#: From the top floor down: a module imports from its own room and from those below. ``photometry`` is
#: `zemosaic_photometry`; ``""`` the modules that lie in the package itself.
FLOORS = (
    "cli", "gui", "phases", "reproject_compat", "raw", "resume", "resample", "stars", "platesolve", "host", "fits",
    "photometry", "overlaps", "settings", "pixels", "synthetic", "",
)  # fmt: skip
TOP = {"zemosaic_worker", "zemosaic_utils", "zemosaic_photometry"}


def modules() -> dict[str, Path]:
    """Every module of the program, by its dotted name; a package by its own."""
    found = {name: ROOT / f"{name}.py" for name in TOP}
    for path in (ROOT / PACKAGE).rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def room_of(name: str) -> str:
    parts = name.split(".")
    if parts[0] != PACKAGE:
        return parts[0].removeprefix("zemosaic_")
    return parts[1] if len(parts) > 2 else ""


def imports_of(path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the program that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def test_imports_run_down_and_never_in_a_circle():
    known = modules()
    graph = {name: imports_of(path, known) for name, path in known.items()}
    inner = {name: below for name, below in graph.items() if name not in ("zemosaic_worker", "zemosaic_utils")}
    upwards = [
        (name, other)
        for name, below in inner.items()
        for other in below
        if room_of(other) not in FLOORS or FLOORS.index(room_of(other)) < FLOORS.index(room_of(name))
    ]
    assert not upwards
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_top_level_holds_three_modules_and_the_rooms_are_one_deep():
    assert {path.stem for path in ROOT.glob("*.py")} == TOP
    folders = {path.relative_to(ROOT / PACKAGE) for path in (ROOT / PACKAGE).rglob("*") if path.is_dir()}
    rooms = {str(folder) for folder in folders if folder.name != "__pycache__"}
    assert rooms == set(FLOORS) - {"photometry", ""}
    for room in rooms:
        text = ast.parse((ROOT / PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
        assert len(text.body) == 1 and ast.get_docstring(text), f"{room}: three lines that say what it is for"
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    assert [room for room in rooms if f"{room}/" not in page] == []
