"""How the CPU's loops are compiled: by numba, kept on disk for the next start."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from numba import njit


def compiled(*definitions: ModuleType) -> Callable[[Callable], Callable]:
    """Decorator: compile a function at its first call, for threads (without the interpreter's lock), and keep the code.

    Parameters
    ----------
    *definitions
        Modules whose functions it is made of, besides its own. numba compares the age of what it has kept with the
        function's own file only, and would go on with the old code after an update of these.

    Raises
    ------
    PermissionError
        Old code cannot be removed.
    """

    def compile_it(function: Callable) -> Callable:
        kernel = njit(nogil=True, cache=True, error_model="numpy")(function)
        newest = max((Path(module.__file__).stat().st_mtime for module in definitions), default=0.0)
        own = Path(function.__code__.co_filename).stem
        for index in Path(kernel.stats.cache_path).glob(f"{own}.{function.__qualname__}-*.nbi"):
            if index.stat().st_mtime < newest:
                index.unlink(missing_ok=True)
        return kernel

    return compile_it
