"""How the CPU's loops are compiled: by numba, kept on disk for the next start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit


def compiled(function: Callable) -> Any:
    """Compile a function at its first call, for threads (without the interpreter's lock), and keep the code.

    numba compares the age of what it has kept with the function's own file only, and would go on with the old code after
    an update of what the function calls. So whatever is older than any module of the function's folder is forgotten: all
    that a loop is made of lies there.

    Raises
    ------
    PermissionError
        Old code cannot be removed.
    """
    kernel: Any = njit(nogil=True, cache=True, error_model="numpy")(function)
    source = Path(function.__code__.co_filename)
    newest = max((module.stat().st_mtime for module in source.parent.glob("*.py")), default=0.0)
    for index in Path(kernel.stats.cache_path).glob(f"{source.stem}.{function.__qualname__}-*.nbi"):
        if index.stat().st_mtime < newest:
            index.unlink(missing_ok=True)
    return kernel
