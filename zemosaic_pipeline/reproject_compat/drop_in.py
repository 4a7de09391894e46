"""reproject_and_coadd in the place of the one of the reproject package."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from zemosaic_photometry import identity_solution
from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.methods import CombineMethod
from zemosaic_pipeline.resample.blocks import intersection
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd, coadd_block
from zemosaic_pipeline.resample.mesh import coordinate_mesh
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile

#: Working memory of `reproject_and_coadd`: blocks, and pixels of the inputs kept as float32.
COMPAT_BYTES = 512 << 20
#: Ways to combine of `reproject_and_coadd`: those of reproject, and the median.
COMPAT_COMBINE = ("mean", "sum", "first", "last", "min", "max", "median")


def reproject_and_coadd(
    input_data,
    output_projection,
    shape_out=None,
    input_weights=None,
    hdu_in=None,
    hdu_weights=None,
    reproject_function=None,
    combine_function="mean",
    match_background=False,
    background_reference=None,
    output_array=None,
    output_footprint=None,
    block_sizes=None,
    progress_bar=None,
    blank_pixel_value=0,
    intermediate_memmap=False,
    *,
    backend="auto",
    **kwargs,
) -> tuple[np.ndarray, np.ndarray]:
    """Reproject images and coadd them: `reproject.mosaicking.reproject_and_coadd` with ``reproject_interp``, faster.

    The arguments mean what they mean there, and so does the result. What differs:

    - Pixels are handled in float32, the result is float64 as there.
    - A missing (NaN) pixel never reaches an output pixel that lies exactly on its neighbour.
    - ``match_background`` solves the same least squares exactly: ``background_reference=0`` is the first image, an
      image without overlap keeps its background, and every connected group of images has a mean correction of 0.
    - What ``output_array`` and ``output_footprint`` held before is overwritten, never added to.
    - Negative weights count as 0.

    Parameters
    ----------
    input_data : iterable
        FITS file names, HDUs, HDU lists, (array, WCS or header) tuples or NDData. Images (H, W), or (..., H, W) where
        ``shape_out`` has the same leading axes.
    output_projection : WCS or Header
    shape_out : tuple of int, optional
    input_weights : iterable, optional
        One array, HDU or file name for each input.
    hdu_in, hdu_weights : int or str, optional
    reproject_function : callable, optional
        ``reproject_interp``, which is also what None means.
    combine_function : {"mean", "sum", "first", "last", "min", "max", "median"}
        The median, unweighted, is an addition.
    match_background : bool
        Subtract from each image what makes the medians of the differences in the overlaps vanish.
    background_reference : int, optional
        The image that keeps its background; None: the mean of the corrections is 0.
    output_array, output_footprint : ndarray, optional
        Where to put the result.
    progress_bar : callable, optional
        Wraps the iterable of input numbers.
    blank_pixel_value : float
        Value of pixels without data.
    block_sizes, intermediate_memmap
        Accepted without effect: memory is bounded in any case.
    backend : {"auto", "cpu", "gpu"}
        Where the pixels are computed; without a usable GPU, the CPU.
    **kwargs
        Those of ``reproject_interp``: ``order`` can only be bilinear; ``parallel`` is the number of threads (default:
        all cores); the others have no effect.

    Returns
    -------
    array : ndarray, float64 unless ``output_array`` was given
    footprint : ndarray, of the same shape
        Sum of the weights (number of images without weights); for first, last, min and max the weight of the one
        image taken; 0 where there are no data.

    Raises
    ------
    ValueError
        The arguments do not fit together, or ask for what only reproject itself can do.
    """
    from zemosaic_pipeline.reproject_compat import arguments as compat

    compat.check_arguments(reproject_function, combine_function, COMPAT_COMBINE, kwargs)
    grid, shape = compat.output_grid(output_projection, shape_out)
    array = compat.output_array(output_array, shape, "output array")
    footprint = compat.output_array(output_footprint, shape, "output footprint")
    inputs: list[list[PlacedTile]] = []
    for k in (progress_bar or iter)(range(len(input_data))):
        weights = None if input_weights is None else input_weights[k]
        planes = compat.input_planes(input_data[k], hdu_in, weights, hdu_weights, shape[:-2], f"input {k}")
        inputs.append(_placed_planes(planes, grid))
    within = [k for k, planes in enumerate(inputs) if planes]
    store = PixelStore(COMPAT_BYTES)
    solution = None
    if match_background and len(within) > 1:
        offsets = _median_offsets(inputs, grid, store)
        solution = identity_solution(len(inputs), 1)
        solution.pivot[:, 0] = compat.background_corrections(offsets, len(inputs), background_reference)
        solution = solution.subset(within)
    jobs = compat.thread_count(kwargs.get("parallel", True))
    options = CoaddOptions(combine=CombineMethod(combine_function))

    def step(engine: Backend) -> None:
        for number, plane in enumerate(np.ndindex(shape[:-2])):
            plan = CoaddPlan([inputs[k][number] for k in within], solution, grid, options, store)

            def sink(block: Rect, values: np.ndarray, weights: np.ndarray, plane: tuple[int, ...] = plane) -> None:
                window = (*plane, slice(*block[:2]), slice(*block[2:]))
                array[window] = np.where(weights > 0, values[0], blank_pixel_value)
                footprint[window] = weights

            coadd(plan, engine, sink, COMPAT_BYTES, jobs)

    compat.run_on(backend, step)
    return array, footprint


def _placed_planes(planes: Sequence[Tile], grid: OutputGrid) -> list[PlacedTile]:
    """The planes of one input on the output, all with the same mesh; none where the input does not touch it."""
    mesh = coordinate_mesh(planes[0], grid)
    return [] if mesh is None else [PlacedTile(plane, mesh) for plane in planes]


def _median_offsets(
    inputs: Sequence[Sequence[PlacedTile]], grid: OutputGrid, store: PixelStore
) -> dict[tuple[int, int], float]:
    """Median of input i minus input j over the pixels (of all planes) where both have data, for i < j."""
    cpu, options = CpuBackend(), CoaddOptions(combine=CombineMethod.LAST)

    def pixels(item: PlacedTile, rect: Rect) -> np.ndarray:
        return coadd_block(CoaddPlan([item], None, grid, options, store), rect, cpu)[0][0]

    offsets = {}
    for i, j in combinations(range(len(inputs)), 2):
        overlap = intersection(inputs[i][0].rect, inputs[j][0].rect) if inputs[i] and inputs[j] else None
        if overlap is None:
            continue
        differences = []
        for a, b in zip(inputs[i], inputs[j], strict=True):
            first, second = pixels(a, overlap), pixels(b, overlap)
            differences.append((first - second)[np.isfinite(first) & np.isfinite(second)])
        values = np.concatenate(differences)
        if values.size:
            offsets[i, j] = float(np.median(values))
    return offsets
