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
from itertools import combinations
from typing import Any

import numpy as np

from zemosaic_backend import CpuBackend
from zemosaic_fits import Tile
from zemosaic_grid import OutputGrid, coordinate_mesh, source_rows
from zemosaic_photometry import Normalisation, PhotometricSolution, identity_solution
from zemosaic_tiles import WEIGHT_CELL, PixelStore, PlacedTile, Rect, readings

KERNELS = ("bilinear", "lanczos3")
COMBINE = (
    "mean", "sum", "median", "sigma_clip", "winsorized", "winsorized_clip", "linear_fit_clip", "min", "max", "first", "last",
)  # fmt: skip
#: Ways to combine that need no more than running sums; the others keep a layer a tile.
STREAMED = ("mean", "sum")
#: Pixels of a band: few enough that what is done to a finished block stays near the processor.
CACHED_PIXELS = 1 << 20
#: Bytes of the layers of a block: in smaller ones the time goes into placing tiles, in larger ones into pages that the
#: system clears anew.
LAYERED_BYTES = 112 << 20
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
        """What the combining functions of `zemosaic_combine` take: two limits in sigma, two fractions.

        For ``winsorized_clip`` the limits are in units of the narrowed spread of winsorized samples.
        """
        narrowed = winsorized_spread(*self.winsor_limits) if self.combine == "winsorized_clip" else 1.0
        return (self.kappa_low / narrowed, self.kappa_high / narrowed, *map(float, self.winsor_limits))


def winsorized_spread(low: float, high: float) -> float:
    """Standard deviation about the median of a unit Gaussian whose fractions ``low`` and ``high`` are drawn in to their
    quantiles; from the integral of z^2 over the normal density."""
    variance = 1.0
    for fraction in (low, high):
        if fraction > 0:
            from scipy.special import ndtri

            z = -ndtri(fraction)
            density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
            # beyond z lie the second moment z * density + fraction, and after drawing in z^2 * fraction
            variance += z * z * fraction - (z * density + fraction)
    return float(np.sqrt(variance))


@dataclass(frozen=True, eq=False)
class Part:
    """One tile's share of one block, as the pixel functions take it: see `zemosaic_kernels.resample_rect`."""

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
    rows = min(max(SMALLEST_BLOCK, CACHED_PIXELS // width), height)
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


def without(blocks: Sequence[Rect], done: Sequence[Rect]) -> list[Rect]:
    """What of ``blocks`` lies outside the rectangles ``done``, in rectangles."""
    if not done:
        return list(blocks)
    boxes, rest = np.array(done), []
    for block in blocks:
        pieces = [block]
        meets = (boxes[:, ::2] < block[1::2]).all(axis=1) & (boxes[:, 1::2] > block[::2]).all(axis=1)
        for n in np.nonzero(meets)[0]:
            pieces = [part for piece in pieces for part in _minus(piece, done[n])]
        rest += pieces
    return rest


def _minus(a: Rect, b: Rect) -> list[Rect]:
    """At most four rectangles: above, below, left and right of ``b`` in ``a``."""
    common = intersection(a, b)
    if common is None:
        return [a]
    y0, y1, x0, x1 = common
    parts = [(a[0], y0, a[2], a[3]), (y1, a[1], a[2], a[3]), (y0, y1, a[2], x0), (y0, y1, x1, a[3])]
    return [part for part in parts if part[0] < part[1] and part[2] < part[3]]


def block_bytes(block: Rect, placed: Sequence[PlacedTile], options: CoaddOptions) -> int:
    """Estimated working memory of a block: sums or layers, the finished pixels, and the largest tile part."""
    touching = [(item, rect) for item in placed if (rect := intersection(item.rect, block))]
    channels = touching[0][0].tile.channels if touching else 1
    pixels = (block[1] - block[0]) * (block[3] - block[2])
    layers = len(touching) if options.combine not in STREAMED else 1
    plane = 4 * pixels
    source = max((_source_bytes(item, rect) for item, rect in touching), default=0)
    # layers: values, weights per channel and the weight; then finished values, their copy in file order
    work = plane * (channels + 1) if layers == 1 else plane * layers * (2 * channels + 1)
    return work + 3 * plane * channels + 3 * source


def _source_bytes(item: PlacedTile, rect: Rect) -> int:
    rows = source_rows(item.mesh, rect, item.tile.shape)
    return 0 if rows is None else 4 * item.tile.channels * (rows[1] - rows[0]) * item.tile.shape[1]


def tile_part(
    item: PlacedTile,
    block: Rect,
    options: CoaddOptions,
    store: PixelStore,
    normalisation: Normalisation | None = None,
) -> tuple[np.ndarray, Part] | None:
    """Normalised pixels of a tile that a block needs (host, (C, rows, W)) and what the kernels must know.

    None where the block needs none. Tiles are normalised as they are read, before they go to a device: once a tile
    instead of once a block, and bit-identical for both backends.
    """
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
    return store.rows(item.tile, *rows, normalisation, readings(item, block, rows)), part


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
    coverage : float32 (h, w), sum of weights; for min, max, first and last the weight of the one sample taken
    """
    touching = [k for k, item in enumerate(placed) if intersection(item.rect, block)]
    channels = placed[0].tile.channels if placed else 1
    shape = (block[1] - block[0], block[3] - block[2])
    if not touching:
        return np.full((channels, *shape), np.nan, np.float32), np.zeros(shape, np.float32)

    def read(k: int) -> tuple[np.ndarray, Part] | None:
        return tile_part(placed[k], block, options, store, None if solution is None else solution.row(k))

    parts = _read_ahead(read, touching, reader)
    if options.combine in STREAMED:
        return _streamed_block(parts, channels, shape, options, backend)
    return _layered_block(parts, len(touching), channels, shape, options, backend)


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


def _streamed_block(
    parts: Iterator, channels: int, shape: tuple[int, int], options: CoaddOptions, backend
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted mean or sum, tile by tile into sums; one download a block."""
    sums = backend.zeros((channels + 1, *shape))
    for found in parts:
        if found is not None:
            source, part = found
            backend.resample(backend.upload(source), part, sums[:channels], sums[channels], True)
    sums = backend.download(sums)
    values, coverage = sums[:channels], sums[channels]
    if options.combine == "sum":
        values[:, coverage == 0] = np.nan
        return values, coverage
    with np.errstate(invalid="ignore", divide="ignore"):
        values /= coverage
    return values, coverage


def _layered_block(
    parts: Iterator,
    layers: int,
    channels: int,
    shape: tuple[int, int],
    options: CoaddOptions,
    backend,
):
    """Combine that needs all values of a pixel at once: one layer a tile."""
    import zemosaic_combine as how

    methods = {
        "median": how.MEDIAN,
        "sigma_clip": how.SIGMA_CLIP,
        "winsorized": how.WINSORIZED,
        "winsorized_clip": how.WINSORIZED_CLIP,
        "linear_fit_clip": how.LINEAR_FIT_CLIP,
        "min": how.MINIMUM,
        "max": how.MAXIMUM,
        "first": how.FIRST,
        "last": how.LAST,
    }
    values = backend.scratch((layers, channels, *shape))  # read only where there is a weight
    weights = backend.zeros((layers, *shape))
    for n, found in enumerate(parts):
        if found is not None:
            source, part = found
            backend.resample(backend.upload(source), part, values[n], weights[n], False)
    out = backend.zeros((channels + 1, *shape))
    backend.combine(values, weights, methods[options.combine], options.limits, out)
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
    done: Sequence[Rect] = (),
) -> None:
    """Make the whole mosaic, block by block, and hand every block to ``sink(block, values, coverage)``.

    ``sink`` is called once for every block, in any order, from several threads on the CPU. Peak memory is
    ``bytes_for_blocks`` for all blocks under way together. ``cancelled`` is asked between blocks. The rectangles
    ``done`` are left out; no pixel's bits depend on how the rest is cut into blocks.

    Raises
    ------
    ValueError
        The solution belongs to another number of tiles.
    """
    if solution is not None and len(solution.gain) != len(placed):
        raise ValueError(f"a solution of {len(solution.gain)} tiles for {len(placed)} tiles")
    workers = jobs if backend.parallel_blocks else 1
    limit = max(bytes_for_blocks // workers, 1)
    if options.combine not in STREAMED:
        limit = min(limit, LAYERED_BYTES)
    blocks = without(plan_blocks(shape, placed, options, limit), done)

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


# -------------------------------------------------------------------------------- in the place of reproject's coadd

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
    import zemosaic_compat as compat

    compat.check_arguments(reproject_function, combine_function, COMPAT_COMBINE, kwargs)
    grid, shape = compat.output_grid(output_projection, shape_out)
    array = compat.output_array(output_array, shape, "output array")
    footprint = compat.output_array(output_footprint, shape, "output footprint")
    inputs: list[list[PlacedTile]] = []
    for k in (progress_bar or iter)(range(len(input_data))):
        weights = None if input_weights is None else input_weights[k]
        planes = compat.input_planes(input_data[k], hdu_in, weights, hdu_weights, shape[:-2], f"input {k}")
        inputs.append(_placed_planes(planes, grid))
    seen = [k for k, planes in enumerate(inputs) if planes]
    store = PixelStore(COMPAT_BYTES)
    solution = None
    if match_background and len(seen) > 1:
        offsets = _median_offsets(inputs, store)
        solution = identity_solution(len(inputs), 1)
        solution.pivot[:, 0] = compat.background_corrections(offsets, len(inputs), background_reference)
        solution = solution.subset(seen)
    jobs = compat.thread_count(kwargs.get("parallel", True))
    options = CoaddOptions(combine=combine_function)

    def step(engine) -> None:
        for number, plane in enumerate(np.ndindex(shape[:-2])):
            placed = [inputs[k][number] for k in seen]

            def sink(block: Rect, values: np.ndarray, weights: np.ndarray, plane: tuple[int, ...] = plane) -> None:
                window = (*plane, slice(*block[:2]), slice(*block[2:]))
                array[window] = np.where(weights > 0, values[0], blank_pixel_value)
                footprint[window] = weights

            coadd(placed, solution, grid.shape, options, store, engine, sink, COMPAT_BYTES, jobs)

    compat.run_on(backend, step)
    return array, footprint


def _placed_planes(planes: Sequence[Tile], grid: OutputGrid) -> list[PlacedTile]:
    """The planes of one input on the output, all with the same mesh; none where the input does not touch it."""
    mesh = coordinate_mesh(planes[0], grid)
    return [] if mesh is None else [PlacedTile(plane, mesh) for plane in planes]


def _median_offsets(inputs: Sequence[Sequence[PlacedTile]], store: PixelStore) -> dict[tuple[int, int], float]:
    """Median of input i minus input j over the pixels (of all planes) where both have data, for i < j."""
    cpu, options = CpuBackend(), CoaddOptions(combine="last")
    offsets = {}
    for i, j in combinations(range(len(inputs)), 2):
        overlap = intersection(inputs[i][0].rect, inputs[j][0].rect) if inputs[i] and inputs[j] else None
        if overlap is None:
            continue
        differences = []
        for a, b in zip(inputs[i], inputs[j], strict=True):
            first, second = (coadd_block([item], None, overlap, options, store, cpu)[0][0] for item in (a, b))
            differences.append((first - second)[np.isfinite(first) & np.isfinite(second)])
        values = np.concatenate(differences)
        if values.size:
            offsets[i, j] = float(np.median(values))
    return offsets
