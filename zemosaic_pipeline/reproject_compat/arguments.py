"""What `reproject.mosaicking.reproject_and_coadd` takes, in terms of tiles: inputs, weights, output projection.

The arguments are read by reproject's own parsers, so that whatever it accepts is understood alike; what it does not
say (its treatment of weights, its matching of backgrounds) follows what reproject 0.21 does.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from astropy.wcs import WCS

from zemosaic_pipeline.fits.tile import Tile, array_tile
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.backend_switch import BackendSwitch
from zemosaic_pipeline.resample.output_grid import OutputGrid

#: Keyword arguments of ``reproject_interp`` that are understood, or change nothing here.
INTERP_KEYWORDS = ("order", "roundtrip_coords", "parallel", "block_size", "return_type", "dask_method")


class InputPlane(Tile):
    """One plane of an input. Its weights are no mask: a pixel of weight 0 still lends its value to its neighbours."""

    def read_rows(self, y0: int, y1: int) -> np.ndarray:
        return self._read(self.pixels.image, self.channels, y0, y1)


def check_arguments(reproject_function: Any, combine_function: str, possible: Sequence[str], keywords: dict) -> None:
    """Raise ValueError (TypeError for an unknown keyword) for what only reproject itself can do."""
    from reproject import reproject_interp

    if reproject_function not in (None, reproject_interp):
        raise ValueError(
            "reproject_function can only be reproject_interp here; use reproject.mosaicking.reproject_and_coadd "
            f"for {getattr(reproject_function, '__name__', reproject_function)}"
        )
    if combine_function not in possible:
        raise ValueError(f"combine_function should be one of {'/'.join(possible)}, not {combine_function!r}")
    unknown = [key for key in keywords if key not in INTERP_KEYWORDS]
    if unknown:
        raise TypeError(f"reproject_and_coadd() got an unexpected keyword argument {unknown[0]!r}")
    if keywords.get("order", 1) not in ("bilinear", 1):
        raise ValueError(
            f"order can only be 'bilinear' here, not {keywords['order']!r}; use reproject.mosaicking.reproject_and_coadd"
        )


def output_grid(output_projection: Any, shape_out: tuple[int, ...] | None) -> tuple[OutputGrid, tuple[int, ...]]:
    """The output grid, and the shape of the output with its leading (broadcast) axes."""
    from reproject.utils import parse_output_projection

    parsed: Any = parse_output_projection(output_projection, shape_out=shape_out)
    wcs, shape = parsed
    if len(shape) < 2:
        raise ValueError(f"shape_out must have two axes or more, not {shape}")
    return OutputGrid(sky_wcs(wcs, "output_projection"), (int(shape[-2]), int(shape[-1]))), tuple(map(int, shape))


def output_array(array: np.ndarray | None, shape: tuple[int, ...], what: str) -> np.ndarray:
    """The caller's array, or a new one of float64."""
    if array is None:
        return np.zeros(shape)
    if array.shape != shape:
        raise ValueError(f"If you specify an {what}, it must have a shape matching the output shape {shape}")
    return array


def sky_wcs(wcs: Any, what: str) -> WCS:
    """The two-dimensional FITS WCS of an input or of the output; axes without a meaning (RGB planes) are dropped."""
    if isinstance(wcs, WCS):
        if wcs.naxis > 2 and wcs.has_celestial and not any(str(wcs.wcs.ctype[k]) for k in range(2, wcs.naxis)):
            wcs = wcs.celestial
        if wcs.naxis == 2:
            return wcs
    raise ValueError(
        f"{what} must have a two-dimensional FITS WCS (astropy.wcs.WCS) here; use "
        "reproject.mosaicking.reproject_and_coadd for other coordinates"
    )


def input_planes(
    data: Any, hdu_in: int | str | None, weights: Any, hdu_weights: int | str | None, planes: tuple[int, ...], name: str
) -> list[InputPlane]:
    """The planes of one input, in C order, with their weights.

    Parameters
    ----------
    data, hdu_in, weights, hdu_weights
        As `reproject_and_coadd` takes them, for one input; ``weights`` None: uniform.
    planes : tuple of int
        Leading axes of the output, which those of the input must equal.
    name : str
        For messages.
    """
    from reproject.utils import parse_input_data

    array, wcs = parse_input_data(data, hdu_in=hdu_in)
    wcs = sky_wcs(wcs, name)
    array = np.asarray(array)
    if array.shape[:-2] != planes:
        raise ValueError(f"{name} has the shape {array.shape}, which does not fit an output of {(*planes, 'H', 'W')}")
    cube = array.reshape(-1, *array.shape[-2:])
    maps: Iterable[np.ndarray | None] = [None] * len(cube)
    if weights is not None:
        found = weight_map(weights, hdu_weights, wcs, array.shape[-2:])
        maps = np.broadcast_to(found, array.shape).reshape(cube.shape)
    return [
        InputPlane(**vars(array_tile(plane, wcs, name, plane_weights)))
        for plane, plane_weights in zip(cube, maps, strict=True)
    ]


def weight_map(weights: Any, hdu_weights: int | str | None, wcs: WCS, shape: tuple[int, int]) -> np.ndarray:
    """Weights of the pixels of an input; resampled onto it where they come with a celestial WCS of their own."""
    from reproject import reproject_interp
    from reproject.utils import parse_input_weights

    parsed: Any = parse_input_weights(weights, hdu_weights=hdu_weights)
    array, own = parsed
    array = np.nan_to_num(np.asarray(array))
    if own is None or not own.has_celestial or (array.shape[-2:] == shape and same_wcs(own, wcs)):
        return array
    return np.nan_to_num(reproject_interp((array, own.celestial), wcs, shape_out=shape, return_footprint=False))


def same_wcs(a: WCS, b: WCS) -> bool:
    """Whether two FITS headers describe the same coordinates."""
    return a.celestial.to_header_string(relax=True) == b.celestial.to_header_string(relax=True)


def background_corrections(offsets: dict[tuple[int, int], float], count: int, reference: int | None) -> np.ndarray:
    """What is to be subtracted from each image so that their median differences vanish in the least-squares sense.

    Parameters
    ----------
    offsets : dict
        ``(i, j)``: median of image i minus image j where both have data.
    count : int
        Number of images.
    reference : int, optional
        The image that keeps its background; None: the mean of the corrections of each connected group is 0.

    Returns
    -------
    ndarray, float64, (count,)
        0 for an image without overlap (reproject 0.21 turns it into NaN).
    """
    matrix = np.zeros((len(offsets), count))
    for row, (i, j) in enumerate(offsets):
        matrix[row, i], matrix[row, j] = 1.0, -1.0
    # the solution of least norm has a mean of 0 in every connected group
    corrections = (
        np.linalg.lstsq(matrix, np.array(list(offsets.values())), rcond=None)[0] if offsets else np.zeros(count)
    )
    return corrections if reference is None else corrections - corrections[reference]


def thread_count(parallel: bool | int | str) -> int:
    """Number of threads that ``parallel`` of ``reproject_interp`` asks for; all cores for True or a scheduler."""
    if parallel is False:
        return 1
    return parallel if isinstance(parallel, int) and parallel is not True else os.cpu_count() or 1


def run_on(backend: str, step: Callable[[Backend], None]) -> None:
    """``step(engine)`` on the GPU where it is wanted and works, else on the CPU; a fallback is a logged warning."""
    modes = {"auto": "auto", "cpu": "off", "gpu": "on"}
    if backend not in modes:
        raise ValueError(f"backend should be one of auto/cpu/gpu, not {backend!r}")
    log = logging.getLogger(__name__)
    switch = BackendSwitch(modes[backend], tell=lambda key, text: log.warning("%s", text))
    switch.start()
    try:
        switch.run(step)
    finally:
        switch.close()
