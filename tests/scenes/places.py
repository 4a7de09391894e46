"""Where things are: the repository, the benchmarks' modules, the real data beside the repository."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Begin of the reason for which a test on real data is skipped; conftest.py counts them at the end.
NO_REAL_DATA = "NO REAL DATA"


def real_files(folder: str, pattern: str = "*.fit*") -> list[Path]:
    """The real files of a folder of ``../shared/data``, in order; the test, or its module, is skipped without them."""
    where = ROOT.parent / "shared" / "data" / folder
    found = sorted(where.glob(pattern))
    if not found:
        pytest.skip(f"{NO_REAL_DATA}: shared/data/{folder} is absent", allow_module_level=True)
    return found


def benchmark(name: str) -> ModuleType:
    """A module of ``benchmarks/``, which is no part of the program."""
    if (known := sys.modules.get(f"benchmark_{name}")) is not None:
        return known
    path = ROOT / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = before
    return module
