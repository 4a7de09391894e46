"""The output grid: WCS and shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from astropy import units
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import celestial_frame_to_wcs, wcs_to_celestial_frame

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.fits.headers import read_wcs_file
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.sky import (
    directions_of,
    icrs_centre,
    least_rectangle,
    most_central,
    pixel_scale,
    separation,
    unit_vectors,
)

#: A mosaic with this many times the pixels of all tiles together holds a tile that does not belong there.
ABSURDLY_EMPTY = 50


@dataclass(frozen=True)
class OutputGrid:
    """WCS and shape (H, W) of the mosaic."""

    wcs: WCS
    shape: tuple[int, int]


def choose_output_grid(tiles: Sequence[Tile], settings: Settings) -> OutputGrid:
    """Output WCS and shape for the tiles, or the user's own where ``output_wcs_file`` names one.

    Raises
    ------
    UsageError
        The mosaic would have more than ``max_output_gigapixels``, or be nearly empty; the sentence names the tile
        farthest out.
    """
    if settings.output_wcs_file:
        wcs, shape = read_wcs_file(settings.output_wcs_file)
        if shape is None:
            raise UsageError(
                f"{settings.output_wcs_file} gives no image size: add NAXIS1 and NAXIS2 to the output WCS file"
            )
        grid = OutputGrid(wcs, shape)
    else:
        refuse_scattered(tiles, settings.max_output_gigapixels, wanted_scale(tiles, settings))
        grid = optimal_grid(tiles, settings)
    pixels = grid.shape[0] * grid.shape[1]
    given = sum(tile.shape[0] * tile.shape[1] for tile in tiles)
    empty = not settings.output_wcs_file and pixels > max(ABSURDLY_EMPTY * given, 1e8)
    if empty or pixels > settings.max_output_gigapixels * 1e9:
        raise UsageError(too_large(tiles, pixels, settings.max_output_gigapixels))
    return grid


def grid_header(grid: OutputGrid) -> fits.Header:
    """FITS header of the output WCS, with everything that a plain ``to_header()`` drops (SIP)."""
    header = grid.wcs.to_header(relax=True)
    for key in ("DATE-OBS", "MJD-OBS", "MJDREF"):
        header.remove(key, ignore_missing=True)
    return header


def optimal_grid(tiles: Sequence[Tile], settings: Settings) -> OutputGrid:
    """Output grid just large enough for the tiles, with the wanted scale, orientation and padding."""
    scale = wanted_scale(tiles, settings)
    turn = settings.global_wcs_orientation == "as_tiles"
    grid = _common_frame_grid(tiles, scale, turn) or _reproject_grid(tiles, scale, turn)
    wcs, shape = grid.wcs, grid.shape
    pad = [round(n * settings.global_wcs_padding_percent / 100 / 2) for n in shape]
    wcs.wcs.crpix = [wcs.wcs.crpix[0] + pad[1], wcs.wcs.crpix[1] + pad[0]]
    return OutputGrid(wcs, (shape[0] + 2 * pad[0], shape[1] + 2 * pad[1]))


def _reproject_grid(tiles: Sequence[Tile], scale: float, turn: bool) -> OutputGrid:
    """The answer of `reproject.mosaicking.find_optimal_celestial_wcs`."""
    from reproject.mosaicking import find_optimal_celestial_wcs

    wcs, shape = find_optimal_celestial_wcs(
        [(tile.shape, tile.wcs) for tile in tiles], resolution=scale * units.deg, auto_rotate=turn, projection="TAN"
    )
    return OutputGrid(wcs, (int(shape[0]), int(shape[1])))


def _common_frame_grid(tiles: Sequence[Tile], scale: float, turn: bool) -> OutputGrid | None:
    """What `reproject.mosaicking.find_optimal_celestial_wcs` answers, for tiles of one celestial frame; None else.

    Importing reproject, with all that it brings, takes longer than a small mosaic's pixels. The definition is
    reproject's: tangent point in the mean direction of the tiles' reference pixels, size from the tiles' corners, and,
    where the grid may ``turn``, the directions of the least rectangle that holds them.
    """
    frames: list[Any] = [wcs_to_celestial_frame(tile.wcs) for tile in tiles]
    frame, *others = frames
    if not all(other.is_equivalent_frame(frame) for other in others):
        return None
    references, corners = [], []
    for tile in tiles:
        height, width = tile.shape
        references.append(tile.wcs.all_pix2world([tile.wcs.wcs.crpix], 1))
        x, y = np.array([-0.5, width - 0.5, width - 0.5, -0.5]), np.array([-0.5, -0.5, height - 0.5, height - 0.5])
        corners.append(tile.wcs.all_pix2world(np.stack([x, y], axis=1), 0))
    # each coordinate is summed by itself, as reproject has it: the last bits are those of its answer
    x, y, z = unit_vectors(*np.concatenate(references).T).T.copy()
    wcs = celestial_frame_to_wcs(frame, projection="TAN")
    wcs.wcs.crval = directions_of([x.mean(), y.mean(), z.mean()])
    wcs.wcs.cdelt = -scale, scale
    wcs.wcs.crpix = 1, 1
    pixels = np.asarray(wcs.wcs_world2pix(np.concatenate(corners), 1))
    if turn:
        angle = least_rectangle(pixels)
        wcs.wcs.pc = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pixels = np.asarray(wcs.wcs_world2pix(np.concatenate(corners), 1))
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    wcs.wcs.crpix = 1.5 - low
    width, height = np.rint(high - low).astype(int)
    return OutputGrid(wcs, (int(height), int(width)))


def wanted_scale(tiles: Sequence[Tile], settings: Settings) -> float:
    """Pixel scale of the mosaic in degrees."""
    if settings.global_wcs_res_override:
        return settings.global_wcs_res_override / 3600.0
    scales = [pixel_scale(tile.wcs) for tile in tiles]
    return float(min(scales) if settings.global_wcs_pixelscale_mode == "min" else np.median(scales))


def refuse_scattered(tiles: Sequence[Tile], max_gigapixels: float, scale: float) -> None:
    """Raise :class:`UsageError` where the tiles lie so far apart that no tangent plane can hold them."""
    farthest = float(distances_from_middle(tiles).max())
    side = 2 * farthest / scale
    if farthest > 60 or side * side > 4 * max_gigapixels * 1e9:
        raise UsageError(too_large(tiles, side * side, max_gigapixels))


def distances_from_middle(tiles: Sequence[Tile]) -> np.ndarray:
    """How far each tile's middle lies from that of the most central tile: degrees, float64 (N,)."""
    centres = np.array([icrs_centre(tile.wcs, tile.shape) for tile in tiles])
    ra, dec = centres.T
    return separation(ra, dec, *most_central(centres))


def too_large(tiles: Sequence[Tile], pixels: float, limit: float) -> str:
    """The sentence that refuses an absurdly large mosaic and names the tile farthest out."""
    distance = distances_from_middle(tiles)
    worst = int(np.argmax(distance))
    return (
        f"the mosaic would have {pixels / 1e9:.3g} gigapixels (max_output_gigapixels is {limit:g}), absurdly many: "
        f"{tiles[worst].name} lies {distance[worst]:.1f} degrees from the others; remove it, set a coarser "
        "global_wcs_res_override, or give the output in an output_wcs_file"
    )
