"""The coadd of the reproject package as an engine of its own (``engine="reproject"``): slow, and independent of ours.

It shares with the native engine what is not resampling: the normalised pixels and the weight of every tile pixel. The
tiles are held whole, so that the memory budget does not bound it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.resample.coadd import CoaddPlan, Sink, tile_part
from zemosaic_pipeline.resample.mesh import CoordinateMesh
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile


def coadd_with_reproject(plan: CoaddPlan, sink: Sink, cancelled: Callable[[], bool] = lambda: False) -> None:
    """Make the whole mosaic with `reproject.mosaicking.reproject_and_coadd` and hand it to ``sink`` as one block.

    Parameters
    ----------
    plan, sink, cancelled
        As `resample.coadd.coadd` takes them; bilinear and mean only, which `settings.settings` sees to.

    Raises
    ------
    ValueError
        Another kernel or way to combine.
    Cancelled
        The user has stopped the run.
    """
    from reproject import reproject_interp
    from reproject.mosaicking import reproject_and_coadd

    placed, grid, options, store = plan.placed, plan.grid, plan.options, plan.store
    if options.kernel is not ResamplingKernel.BILINEAR or options.combine is not CombineMethod.MEAN:
        raise ValueError(f"reproject has no {options.kernel.word} {options.combine.word}")
    blank: Any = np.nan  # which reproject takes, though it declares a whole number
    values: list[np.ndarray] = []
    coverage = np.zeros(grid.shape)
    weights = [own_weights(item, options, store) for item in placed]
    for channel in range(placed[0].tile.channels):
        if cancelled():
            raise Cancelled
        images = [
            (store.rows(item.tile, 0, item.tile.shape[0], plan.normalisation(k))[channel], item.tile.wcs)
            for k, item in enumerate(placed)
        ]
        plane, coverage = reproject_and_coadd(
            images,
            grid.wcs,
            shape_out=grid.shape,
            input_weights=weights,
            reproject_function=reproject_interp,
            combine_function="mean",
            blank_pixel_value=blank,
        )
        values.append(plane.astype(np.float32))
    sink((0, grid.shape[0], 0, grid.shape[1]), np.stack(values), coverage.astype(np.float32))


def own_weights(item: PlacedTile, options: CoaddOptions, store: PixelStore) -> np.ndarray:
    """Weight of every pixel of a tile, float32 (H, W), 0 where there are no data.

    The native engine's pixel function, with output pixels that are the tile's: its formulas are not repeated here.
    """
    height, width = item.tile.shape
    nodes = np.stack(np.meshgrid(np.arange(float(width)), np.arange(float(height))))
    rect = (0, height, 0, width)
    weights = np.zeros((height, width), np.float32)
    found = tile_part(replace(item, mesh=CoordinateMesh(nodes, 0, 0, 1, rect, 0.0)), rect, options, store)
    if found is not None:
        source, part = found
        values = np.empty((item.tile.channels, height, width), np.float32)
        CpuBackend().resample(source, part, values, weights, False)
    return weights
