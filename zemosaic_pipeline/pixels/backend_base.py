"""What both backends take, and how a device fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from zemosaic_pipeline.arrays import Rect


@dataclass(frozen=True, eq=False)
class TilePart:
    """One tile's share of one block, as the pixel functions take it: see `pixels.kernels.resample_pixel`."""

    origin: tuple[int, int]
    shape: tuple[int, int]
    method: int
    alpha: np.ndarray
    weight_map: np.ndarray
    spacing: float
    feather: float
    scale: float
    mesh: tuple[np.ndarray, int, int, int]
    block: tuple[int, int]
    rect: Rect


class DeviceFailure(Exception):
    """The GPU could not do what it was asked; the reason is the message."""


class NoGpuSupport(DeviceFailure):
    """The libraries that drive a GPU are not installed: nothing has failed."""


def trial(backend: Any) -> list[np.ndarray]:
    """A few pixels through every kernel; the float64 sums show a difference of one bit."""
    rng = np.random.default_rng(5)
    source = rng.normal(100.0, 30.0, (2, 8, 8)).astype(np.float32)
    y, x = np.meshgrid(np.arange(-4.0, 12.0, 4), np.arange(-4.0, 12.0, 4), indexing="ij")
    part = TilePart(
        origin=(0, 0), shape=(8, 8), method=0, alpha=rng.uniform(0.5, 1, (1, 8, 8)).astype(np.float32),
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
    backend.combine(values, weights, 0, (3.0, 3.0, 0.05, 0.05), out)
    sums, counts = backend.zeros((2, 2, 2), "float64"), backend.zeros((2, 2), "int32")
    backend.measure(image, (0, 0), (8, 8), part.mesh, 2, 1, (0, 0), np.ones((2, 2), np.uint8), sums, counts)
    return layers + [backend.download(array) for array in (out, sums, counts)]


Backend = Any
