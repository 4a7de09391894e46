"""Phase 5 engine: resample and coadd, block by block, on the CPU or the GPU.

A block is a rectangle of the output. What is done for it is a pure function of (tiles, solution, block): for each tile
that touches it, read the rows it needs, normalise them (`zemosaic_photometry.apply_photometric_normalization`),
resample them with the pixel functions of `zemosaic_kernels`, weight, combine. Peak memory is that of the blocks under
way, however large the mosaic. The backend (`zemosaic_backend`) says where the pixels are; this module does not.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np

from zemosaic_grid import source_rows
from zemosaic_photometry import PhotometricSolution, apply_photometric_normalization
from zemosaic_tiles import WEIGHT_CELL, PixelStore, PlacedTile, Rect

KERNELS = ("bilinear", "lanczos3")
COMBINE = ("mean", "median", "sigma_clip", "winsorized", "min", "max", "first", "last")
#: Smallest side of a block, in output pixels.
SMALLEST_BLOCK = 16


@dataclass(frozen=True)
class CoaddOptions:
    """How pixels are resampled and combined; names and meanings as in `zemosaic_settings`."""

    kernel: str = "bilinear"
    combine: str = "mean"
    kappa_low: float = 3.0
    kappa_high: float = 3.0
    winsor_limits: tuple[float, float] = (0.05, 0.05)

    @property
    def method(self) -> int:
        """Number of the resampling kernel in `zemosaic_kernels`."""
        return KERNELS.index(self.kernel)

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """What the combining functions of `zemosaic_kernels` take."""
        return (float(self.kappa_low), float(self.kappa_high), *map(float, self.winsor_limits))


@dataclass(frozen=True, eq=False)
class Part:
    """One tile's share of one block, as the pixel functions take it: see `zemosaic_kernels.deposit`."""

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


# --------------------------------------------------------------------------------------------------------- blocks


def intersection(a: Rect, b: Rect) -> Rect | None:
    """Common part of two rectangles; None where they do not meet."""
    rect = max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])
    return rect if rect[0] < rect[1] and rect[2] < rect[3] else None


def plan_blocks(
    shape: tuple[int, int], placed: Sequence[PlacedTile], options: CoaddOptions, bytes_per_block: int
) -> list[Rect]:
    """Rectangles (y0, y1, x0, x1) that cover the output, each of which can be made within ``bytes_per_block``.

    Full-width bands where they fit (one write a channel); halved, the longer side first, where they do not.
    """
    height, width = shape
    rows = max(SMALLEST_BLOCK, min(height, 512))
    blocks: list[Rect] = []
    pending = [(y, min(y + rows, height), 0, width) for y in range(0, height, rows)][::-1]
    while pending:
        block = pending.pop()
        h, w = block[1] - block[0], block[3] - block[2]
        if block_bytes(block, placed, options) <= bytes_per_block or max(h, w) <= SMALLEST_BLOCK:
            blocks.append(block)
        elif w > 4 * h:
            middle = (block[2] + block[3]) // 2
            pending += [(block[0], block[1], middle, block[3]), (block[0], block[1], block[2], middle)]
        else:
            middle = (block[0] + block[1]) // 2
            pending += [(middle, block[1], block[2], block[3]), (block[0], middle, block[2], block[3])]
    return blocks


def block_bytes(block: Rect, placed: Sequence[PlacedTile], options: CoaddOptions) -> int:
    """Estimated working memory of a block: sums or layers, the finished pixels, and the largest tile part."""
    touching = [(item, rect) for item in placed if (rect := intersection(item.rect, block))]
    channels = touching[0][0].tile.channels if touching else 1
    pixels = (block[1] - block[0]) * (block[3] - block[2])
    layers = len(touching) if options.combine != "mean" else 1
    plane = 4 * pixels
    source = max((_source_bytes(item, rect) for item, rect in touching), default=0)
    # layers: values, weights per channel and the weight; then finished values, their copy in file order
    work = plane * (channels + 1) if layers == 1 else plane * layers * (2 * channels + 1)
    return work + 3 * plane * channels + 3 * source


def _source_bytes(item: PlacedTile, rect: Rect) -> int:
    rows = source_rows(item.mesh, rect, item.tile.shape)
    return 0 if rows is None else 4 * item.tile.channels * (rows[1] - rows[0]) * item.tile.shape[1]


def tile_part(
    item: PlacedTile, block: Rect, options: CoaddOptions, store: PixelStore
) -> tuple[np.ndarray, Part] | None:
    """Pixels of a tile that a block needs (host, (C, rows, W)) and what the kernels must know; None if there are none."""
    rect = intersection(item.rect, block)
    rows = source_rows(item.mesh, rect, item.tile.shape) if rect else None
    if rows is None:
        return None
    alpha = item.tile.read_alpha_rows(*rows)
    part = Part(
        origin=(rows[0], 0),
        shape=item.tile.shape,
        method=options.method,
        alpha=np.ones((1, 1, 1), np.float32) if alpha is None else alpha[None],
        weight_map=item.map(),
        spacing=float(WEIGHT_CELL),
        feather=float(item.feather),
        scale=float(item.weight),
        mesh=item.mesh.arguments,
        block=(block[0], block[2]),
        rect=rect,
    )
    return store.rows(item.tile, *rows), part


def coadd_block(
    placed: Sequence[PlacedTile],
    solution: PhotometricSolution | None,
    block: Rect,
    options: CoaddOptions,
    store: PixelStore,
    backend: Any,
    reader: ThreadPoolExecutor | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """One block of the mosaic.

    Parameters
    ----------
    placed : sequence of PlacedTile
    solution : PhotometricSolution or None
        Row k belongs to ``placed[k]``; None: no normalisation.
    block : (y0, y1, x0, x1)
    reader : executor, optional
        Reads the next tile while this one is worked on.

    Returns
    -------
    values : float32 (C, h, w), NaN where nothing was seen
    coverage : float32 (h, w), sum of weights
    """
    touching = [k for k, item in enumerate(placed) if intersection(item.rect, block)]
    channels = placed[0].tile.channels
    shape = (block[1] - block[0], block[3] - block[2])
    if not touching:
        return np.full((channels, *shape), np.nan, np.float32), np.zeros(shape, np.float32)
    parts = _read_ahead(lambda k: (k, tile_part(placed[k], block, options, store)), touching, reader)
    if options.combine == "mean":
        return _mean_block(parts, solution, channels, shape, backend)
    return _layered_block(parts, len(touching), solution, channels, shape, options, backend)


def _read_ahead(read: Callable, keys: Sequence[int], reader: ThreadPoolExecutor | None) -> Iterator:
    """``read(key)`` for every key in order, one ahead of the consumer where there is a reader."""
    if reader is None:
        yield from map(read, keys)
        return
    ahead = None
    for key in keys:
        future = reader.submit(read, key)
        if ahead is not None:
            yield ahead.result()
        ahead = future
    if ahead is not None:
        yield ahead.result()


def _normalised(source, solution: PhotometricSolution | None, k: int):
    """Tile pixels in the common photometric system, on the backend that holds them."""
    if solution is None:
        return source
    return apply_photometric_normalization(source, solution.gain[k], solution.pivot[k], solution.level[k])


def _mean_block(parts: Iterator, solution, channels: int, shape: tuple[int, int], backend):
    """Weighted mean, tile by tile into sums; one download a block."""
    sums = backend.zeros((channels + 1, *shape))
    for k, found in parts:
        if found is not None:
            source, part = found
            source = _normalised(backend.upload(source), solution, k)
            backend.resample(source, part, sums[:channels], sums[channels], True)
    sums = backend.download(sums)
    values, coverage = sums[:channels], sums[channels]
    with np.errstate(invalid="ignore", divide="ignore"):
        values /= coverage
    return values, coverage


def _layered_block(
    parts: Iterator,
    layers: int,
    solution,
    channels: int,
    shape: tuple[int, int],
    options: CoaddOptions,
    backend,
):
    """Combine that needs all values of a pixel at once: one layer a tile."""
    from zemosaic_kernels import FIRST, LAST, MAXIMUM, MEDIAN, MINIMUM, SIGMA_CLIP, WINSORIZED

    methods = {
        "median": MEDIAN,
        "sigma_clip": SIGMA_CLIP,
        "winsorized": WINSORIZED,
        "min": MINIMUM,
        "max": MAXIMUM,
        "first": FIRST,
        "last": LAST,
    }
    values = backend.zeros((layers, channels, *shape))
    weights = backend.zeros((layers, *shape))
    for n, (k, found) in enumerate(parts):
        if found is not None:
            source, part = found
            source = _normalised(backend.upload(source), solution, k)
            backend.resample(source, part, values[n], weights[n], False)
    xp = values.__array_namespace__()
    out = backend.zeros((channels + 1, *shape))
    # sorting moves the weights with the values, in every channel differently
    ordered = xp.stack([weights] * channels, axis=1)
    backend.combine(values, ordered, methods[options.combine], options.limits, out[:channels])
    out[channels, ...] = xp.sum(weights, axis=0, dtype=weights.dtype)
    out = backend.download(out)
    return out[:channels], out[channels]


def coadd(
    placed: Sequence[PlacedTile],
    solution: PhotometricSolution | None,
    shape: tuple[int, int],
    options: CoaddOptions,
    store: PixelStore,
    backend: Any,
    sink: Callable[[Rect, np.ndarray, np.ndarray], None],
    bytes_for_blocks: int,
    jobs: int = 1,
    cancelled: Callable[[], bool] = lambda: False,
) -> None:
    """Make the whole mosaic, block by block, and hand every block to ``sink(block, values, coverage)``.

    ``sink`` is called once for every block, in any order, from several threads on the CPU. Peak memory is
    ``bytes_for_blocks`` for all blocks under way together. ``cancelled`` is asked between blocks.
    """
    workers = jobs if backend.parallel_blocks else 1
    blocks = plan_blocks(shape, placed, options, max(bytes_for_blocks // workers, 1))

    def work(block: Rect, reader: ThreadPoolExecutor | None = None) -> None:
        sink(block, *coadd_block(placed, solution, block, options, store, backend, reader))

    if backend.parallel_blocks:
        run_parallel(work, blocks, workers, cancelled)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        for block in blocks:
            if cancelled():
                return
            work(block, reader)


def run_parallel(
    work: Callable[[Any], Any], items: Sequence[Any], jobs: int, cancelled: Callable[[], bool] = lambda: False
) -> list[Any]:
    """``[work(item) for item in items]`` on ``jobs`` threads; the first error ends it, and so does ``cancelled``."""
    results: list[Any] = [None] * len(items)
    stop = threading.Event()

    def one(k: int) -> None:
        if not stop.is_set():
            results[k] = work(items[k])

    with ThreadPoolExecutor(max(jobs, 1), thread_name_prefix="work") as pool:
        pending = {pool.submit(one, k) for k in range(len(items))}
        try:
            while pending:
                done, pending = wait(pending, timeout=0.2, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()
                if cancelled():
                    break
        finally:
            stop.set()
    return results
