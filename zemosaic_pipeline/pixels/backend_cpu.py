"""The CPU: numpy arrays and compiled loops."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from zemosaic_pipeline.arrays import page_array
from zemosaic_pipeline.pixels.backend_base import CombineLimits, TileCells, TilePart, trial
from zemosaic_pipeline.pixels.methods import CombineMethod


class CpuBackend:
    """Pixels in numpy arrays, kernels on the CPU (they release the interpreter lock: call them from many threads).

    Without ``compiled`` the kernels run as ordinary Python, for a few pixels.
    """

    name = "cpu"
    description = ""
    parallel_blocks = True

    def __init__(self, compiled: bool = True) -> None:
        self._compiled = compiled
        self._own = threading.local()

    def upload(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def download(self, array: np.ndarray) -> np.ndarray:
        """The array itself."""
        return array

    def zeros(self, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
        return page_array(shape) if dtype == "float32" else np.zeros(shape, dtype)

    def scratch(self, shape: tuple[int, ...]) -> np.ndarray:
        """Float32 array of any content, until the same thread asks for the next one."""
        kept = getattr(self._own, "scratch", None)
        size = math.prod(shape)
        if kept is None or kept.size < size:
            self._own.scratch = kept = page_array((size,))
        return kept[:size].reshape(shape)

    def resample(self, source: np.ndarray, part: TilePart, values: np.ndarray, weights: np.ndarray, add: bool) -> None:
        """As :meth:`Backend.resample`."""
        from zemosaic_pipeline.pixels.cpu_loops import resample_rows

        self._loop(resample_rows)(
            *strided_line(source), part.origin, part.shape, int(part.kernel), part.alpha, part.weight_map, part.spacing,
            part.feather, part.scale, part.mesh, part.block, part.rect, values, weights, add,
        )  # fmt: skip

    def measure(self, source: np.ndarray, cells: TileCells, sums: np.ndarray, counts: np.ndarray) -> None:
        """As :meth:`Backend.measure`."""
        from zemosaic_pipeline.pixels.cpu_loops import measure_cells

        self._loop(measure_cells)(
            *strided_line(source), cells.origin, cells.shape, cells.mesh, cells.cell_px, cells.every, cells.corner,
            cells.wanted, sums, counts,
        )  # fmt: skip

    def combine(
        self, values: np.ndarray, weights: np.ndarray, method: CombineMethod, limits: CombineLimits, out: np.ndarray
    ) -> None:
        """As :meth:`Backend.combine`."""
        from zemosaic_pipeline.pixels.cpu_combine import combine_layers

        weights = weights[:, None] if weights.ndim == 3 else weights
        self._loop(combine_layers)(values, weights, int(method), *limits, out)

    def _loop(self, loop: Any) -> Callable[..., None]:
        """A compiled loop, or the Python that it is made of."""
        return loop if self._compiled else loop.py_func

    def free_bytes(self, fraction: float) -> int | None:
        """No limit of its own: the memory budget of the run holds."""
        return None

    def close(self) -> None:
        """Nothing to release."""


def strided_line(image: np.ndarray) -> tuple[np.ndarray, int, int]:
    """An image (C, h, w) as one line of pixels, and the strides of its planes and rows in pixels; a view where its rows
    are whole."""
    if image.strides[2] != image.itemsize:
        image = np.ascontiguousarray(image)
    plane, row = image.strides[0] // image.itemsize, image.strides[1] // image.itemsize
    length = (image.shape[0] - 1) * plane + (image.shape[1] - 1) * row + image.shape[2] if image.size else 0
    return np.lib.stride_tricks.as_strided(image, (length,), (image.itemsize,)), plane, row


def load_kernels() -> None:
    """Have the compiled CPU kernels ready, which takes a moment even where they come from numba's cache."""
    trial(CpuBackend())
