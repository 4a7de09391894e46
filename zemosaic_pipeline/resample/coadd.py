"""Phase 5 engine: resample and coadd, block by block, on the CPU or the GPU.

A block is a rectangle of the output. What is done for it is a pure function of (tiles, solution, block): for each tile
that touches it, read the rows it needs, normalise them (`zemosaic_photometry.apply_photometric_normalization`),
resample them with the pixel functions of `pixels.kernels`, weight, combine. Peak memory is that of the blocks under
way, however large the mosaic. Where the pixels are is the affair of the `pixels.backend_base.Backend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from zemosaic_photometry import Normalisation, PhotometricSolution
from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.pixels.backend_base import Backend, TilePart
from zemosaic_pipeline.pixels.methods import CombineMethod
from zemosaic_pipeline.resample.blocks import intersection, plan_blocks, without
from zemosaic_pipeline.resample.mesh import source_rows
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, readings
from zemosaic_pipeline.resample.survey import WEIGHT_CELL

#: Bytes of the layers of a block: in smaller ones the time goes into placing tiles, in larger ones into pages that the
#: system clears anew.
LAYERED_BYTES = 112 << 20
#: Takes a finished block: its rectangle (y0, y1, x0, x1), values (C, h, w), coverage (h, w).
Sink = Callable[[Rect, np.ndarray, np.ndarray], None]
#: Pixels of a tile (C, rows, W) and what the kernels must know of them; None where a block needs none.
FoundPart = tuple[np.ndarray, TilePart] | None


@dataclass(frozen=True)
class CoaddPlan:
    """What is coadded, onto what, and how.

    Row k of ``solution`` belongs to ``placed[k]``; None: no normalisation. The pixels come from ``store``.

    Raises
    ------
    ValueError
        The solution belongs to another number of tiles.
    """

    placed: Sequence[PlacedTile]
    solution: PhotometricSolution | None
    grid: OutputGrid
    options: CoaddOptions
    store: PixelStore

    def __post_init__(self) -> None:
        if self.solution is not None and len(self.solution.gain) != len(self.placed):
            raise ValueError(f"a solution of {len(self.solution.gain)} tiles for {len(self.placed)} tiles")

    def normalisation(self, k: int) -> Normalisation | None:
        """What `zemosaic_photometry.apply_photometric_normalization` takes for tile ``k``."""
        return None if self.solution is None else self.solution.row(k)


def tile_part(
    item: PlacedTile,
    block: Rect,
    options: CoaddOptions,
    store: PixelStore,
    normalisation: Normalisation | None = None,
) -> FoundPart:
    """Normalised pixels of a tile that a block needs (host, (C, rows, W)) and what the kernels must know.

    None where the block needs none. Tiles are normalised as they are read, before they go to a device: once a tile
    instead of once a block, and bit-identical for both backends.
    """
    rect = intersection(item.rect, block)
    if rect is None:
        return None
    rows = source_rows(item.mesh, rect, item.tile.shape)
    if rows is None:
        return None
    alpha = item.tile.read_alpha_rows(*rows)
    part = TilePart(
        origin=(rows[0], 0),
        shape=item.tile.shape,
        kernel=options.kernel,
        alpha=np.ones((1, 1, 1), np.float32) if alpha is None else alpha[None],
        weight_map=item.weight_map,
        spacing=float(WEIGHT_CELL),
        feather=float(item.feather),
        scale=float(item.weight),
        mesh=item.mesh.arguments,
        block=(block[0], block[2]),
        rect=rect,
    )
    return store.rows(item.tile, *rows, normalisation, readings(item, block, rows)), part


def coadd_block(
    plan: CoaddPlan, block: Rect, backend: Backend, reader: ThreadPoolExecutor | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """One block of the mosaic.

    Parameters
    ----------
    plan : CoaddPlan
    block : (y0, y1, x0, x1)
    backend : Backend
    reader : executor, optional
        Reads the next tile while this one is worked on.

    Returns
    -------
    values : float32 (C, h, w), NaN where no tile has data
    coverage : float32 (h, w), sum of weights; for min, max, first and last the weight of the one sample taken
    """
    placed, options = plan.placed, plan.options
    touching = [k for k, item in enumerate(placed) if intersection(item.rect, block)]
    channels = placed[0].tile.channels if placed else 1
    shape = (block[1] - block[0], block[3] - block[2])
    if not touching:
        return np.full((channels, *shape), np.nan, np.float32), np.zeros(shape, np.float32)

    def read(k: int) -> FoundPart:
        return tile_part(placed[k], block, options, plan.store, plan.normalisation(k))

    parts = _read_ahead(read, touching, reader)
    if options.streamed:
        return _streamed_block(parts, channels, shape, options, backend)
    return _layered_block(parts, len(touching), channels, shape, options, backend)


def _read_ahead(
    read: Callable[[int], FoundPart], keys: Sequence[int], reader: ThreadPoolExecutor | None
) -> Iterator[FoundPart]:
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


def _streamed_block(
    parts: Iterator[FoundPart], channels: int, shape: tuple[int, int], options: CoaddOptions, backend: Backend
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean or sum, tile by tile into sums; one download a block."""
    sums = backend.zeros((channels + 1, *shape))
    for found in parts:
        if found is not None:
            source, part = found
            backend.resample(backend.upload(source), part, sums[:channels], sums[channels], True)
    sums = backend.download(sums)
    values, coverage = sums[:channels], sums[channels]
    if options.combine is CombineMethod.SUM:
        values[:, coverage == 0] = np.nan
        return values, coverage
    with np.errstate(invalid="ignore", divide="ignore"):
        values /= coverage
    return values, coverage


def _layered_block(
    parts: Iterator[FoundPart],
    layers: int,
    channels: int,
    shape: tuple[int, int],
    options: CoaddOptions,
    backend: Backend,
) -> tuple[np.ndarray, np.ndarray]:
    """Combine that needs all values of a pixel at once: one layer a tile."""
    values = backend.scratch((layers, channels, *shape))  # read only where there is a weight
    weights = backend.zeros((layers, *shape))
    for n, found in enumerate(parts):
        if found is not None:
            source, part = found
            backend.resample(backend.upload(source), part, values[n], weights[n], False)
    out = backend.zeros((channels + 1, *shape))
    backend.combine(values, weights, options.combine, options.limits, out)
    out = backend.download(out)
    return out[:channels], out[channels]


def coadd(
    plan: CoaddPlan,
    backend: Backend,
    sink: Sink,
    bytes_for_blocks: int,
    jobs: int = 1,
    cancelled: Callable[[], bool] = lambda: False,
    done: Sequence[Rect] = (),
) -> None:
    """Make the whole mosaic, block by block, and hand every block to ``sink(block, values, coverage)``.

    ``sink`` is called once for every block, in any order, from several threads on the CPU. Peak memory is
    ``bytes_for_blocks`` for all blocks under way together. ``cancelled`` is asked between blocks. The rectangles
    ``done`` are left out; no pixel's bits depend on how the rest is cut into blocks.

    Raises
    ------
    Cancelled
        The user has stopped the run.
    """
    workers = jobs if backend.parallel_blocks else 1
    limit = max(bytes_for_blocks // workers, 1)
    if not plan.options.streamed:
        limit = min(limit, LAYERED_BYTES)
    blocks = without(plan_blocks(plan.grid.shape, plan.placed, plan.options, limit), done)

    def work(block: Rect, reader: ThreadPoolExecutor | None = None) -> None:
        sink(block, *coadd_block(plan, block, backend, reader))

    if backend.parallel_blocks:
        run_parallel(work, blocks, workers, cancelled)
        return
    with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
        for block in blocks:
            if cancelled():
                raise Cancelled
            work(block, reader)
