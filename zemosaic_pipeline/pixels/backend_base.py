"""What a backend does, what it takes, and how a device fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel

#: An array where the backend keeps its pixels: numpy's or cupy's.
DeviceArray = Any
#: Nodes (2, ny, nx), the output pixel (y, x) of the first, their distance: see `resample.mesh.CoordinateMesh`.
Mesh = tuple[np.ndarray, int, int, int]
#: What `pixels.combine` takes: two limits in sigma (low, high), two fractions (low, high).
CombineLimits = tuple[float, float, float, float]


@dataclass(frozen=True, eq=False)
class TilePart:
    """One tile's share of one block, as the pixel functions take it: see `pixels.kernels.resample_pixel`.

    ``rect`` = (y0, y1, x0, x1) are the output pixels to be made.
    """

    origin: tuple[int, int]
    shape: tuple[int, int]
    kernel: ResamplingKernel
    alpha: np.ndarray
    weight_map: np.ndarray
    spacing: float
    feather: float
    scale: float
    mesh: Mesh
    block: tuple[int, int]
    rect: Rect


@dataclass(frozen=True, eq=False)
class TileCells:
    """The coarse cells to be measured on one tile, as the pixel functions take them: see `pixels.kernels.measure_cell`.

    ``wanted`` is uint8 (h, w); cells where it is 0 are left out.
    """

    origin: tuple[int, int]
    shape: tuple[int, int]
    mesh: Mesh
    cell_px: int
    every: int
    corner: tuple[int, int]
    wanted: np.ndarray


class Backend(Protocol):
    """Holds pixels and runs the pixel functions on them; nothing outside `pixels` asks which one it has got.

    Raises
    ------
    DeviceFailure
        From any method: the device could not do what it was asked.
    """

    @property
    def name(self) -> str:
        """``cpu`` or ``gpu``."""
        ...

    @property
    def description(self) -> str:
        """Which card it is; empty for the CPU."""
        ...

    @property
    def parallel_blocks(self) -> bool:
        """Whether blocks are to be made on many threads at a time."""
        ...

    def upload(self, array: np.ndarray) -> DeviceArray:
        """A host array, where the backend keeps its pixels. The host's may be changed as soon as this is back."""
        ...

    def download(self, array: DeviceArray) -> np.ndarray:
        """An array of the backend on the host; waits for everything that was asked before."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: str = "float32") -> DeviceArray: ...

    def scratch(self, shape: tuple[int, ...]) -> DeviceArray:
        """Float32 array of any content, until the same thread asks for the next one."""
        ...

    def resample(
        self, source: DeviceArray, part: TilePart, values: DeviceArray, weights: DeviceArray, add: bool
    ) -> None:
        """Resample one tile into a block.

        Parameters
        ----------
        source : float32 (C, h, w)
            The part of the tile in memory; what ``part`` holds are host arrays.
        values, weights : float32 (C, H', W'), (H', W')
            The block: sums of weight times value and of weights (``add``), or a layer of values and weights.
        """
        ...

    def measure(self, source: DeviceArray, cells: TileCells, sums: DeviceArray, counts: DeviceArray) -> None:
        """Add samples of coarse cells to ``sums``, float64 (C, h, w), and their number to ``counts``, int32 (h, w)."""
        ...

    def combine(
        self, values: DeviceArray, weights: DeviceArray, method: CombineMethod, limits: CombineLimits, out: DeviceArray
    ) -> None:
        """Combine layers into ``out`` (C, h, w), or (C + 1, h, w) with the weight of each pixel.

        ``values`` is (K, C, h, w), which may be sorted in place; ``weights`` the same, or (K, h, w) for all channels.
        """
        ...

    def free_bytes(self, fraction: float) -> int | None:
        """Bytes of device memory that a run may use: ``fraction`` of what is free; None: the run's own budget holds."""
        ...

    def close(self) -> None:
        """Give the memory back."""
        ...


class DeviceFailure(Exception):
    """The GPU could not do what it was asked; the reason is the message."""


class NoGpuSupport(DeviceFailure):
    """The libraries that drive a GPU are not installed: nothing has failed."""


def trial(backend: Backend) -> list[np.ndarray]:
    """A few pixels through every kernel; the float64 sums show a difference of one bit."""
    rng = np.random.default_rng(5)
    source = rng.normal(100.0, 30.0, (2, 8, 8)).astype(np.float32)
    y, x = np.meshgrid(np.arange(-4.0, 12.0, 4), np.arange(-4.0, 12.0, 4), indexing="ij")
    part = TilePart(
        origin=(0, 0), shape=(8, 8), kernel=ResamplingKernel.BILINEAR, alpha=rng.uniform(0.5, 1, (1, 8, 8)).astype(np.float32),
        weight_map=np.array([[0.7, 1.0]], np.float32), spacing=8.0, feather=3.0, scale=0.9,
        mesh=(np.stack([1.3 + 0.71 * x - 0.13 * y, 0.9 + 0.13 * x + 0.71 * y]), -4, -4, 4),
        block=(0, 0), rect=(0, 4, 0, 4),
    )  # fmt: skip
    image = backend.upload(source)
    values, weights = backend.zeros((3, 2, 4, 4)), backend.zeros((3, 4, 4))
    for k in range(3):
        backend.resample(image, part, values[k], weights[k], k == 2)
    layers = [backend.download(values), backend.download(weights)]  # combining may sort them
    out = backend.zeros((3, 4, 4))
    backend.combine(values, weights, CombineMethod.MEAN, (3.0, 3.0, 0.05, 0.05), out)
    sums, counts = backend.zeros((2, 2, 2), "float64"), backend.zeros((2, 2), "int32")
    cells = TileCells((0, 0), (8, 8), part.mesh, cell_px=2, every=1, corner=(0, 0), wanted=np.ones((2, 2), np.uint8))
    backend.measure(image, cells, sums, counts)
    return layers + [backend.download(array) for array in (out, sums, counts)]
