"""Phase 4 and all coordinates: the output grid, and where each of its pixels falls on each tile.

Coordinates are computed here and nowhere else, on the CPU and in float64, by astropy's full transformation (every
projection, SIP, TPV, different celestial frames). A tile gets a :class:`CoordinateMesh`: exact positions at the nodes
of a coarse mesh over its footprint. Between the nodes the pixel functions interpolate with bicubic Lagrange
polynomials; the mesh certifies itself, as SWarp's does, by halving its step until the error measured at four times
the node density is below :data:`MESH_TOLERANCE`. A step of 1 is the exact transformation.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from astropy import units
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import (
    celestial_frame_to_wcs,
    pixel_to_pixel,
    proj_plane_pixel_scales,
    wcs_to_celestial_frame,
)

from zemosaic_fits import Tile
from zemosaic_headers import read_wcs_file
from zemosaic_settings import Settings
from zemosaic_utils import UsageError

#: Largest accepted error of an interpolated coordinate, in tile pixels. Beside a bright star 1e-3 pixel is 1e-3 of the
#: image's robust range; astropy's own inverse of a distortion is good to a few 1e-6.
MESH_TOLERANCE = 1e-5
#: A mosaic with this many times the pixels of all tiles together holds a tile that does not belong there.
ABSURDLY_EMPTY = 50
#: Largest distance between mesh nodes, in output pixels.
MESH_STEP = 64


@dataclass(frozen=True)
class CoordinateMesh:
    """Tile pixel coordinates at the nodes of a mesh on the output grid.

    ``nodes`` is float64 (2, ny, nx), x then y; node (j, i) lies at output pixel ``(y + j * step, x + i * step)``.
    ``rect`` = (y0, y1, x0, x1) is the part of the output that the tile can touch, the mesh reaching at least one
    node beyond it. ``error`` is the largest measured interpolation error in tile pixels (0 for a step of 1).
    """

    nodes: np.ndarray
    y: int
    x: int
    step: int
    rect: tuple[int, int, int, int]
    error: float

    @property
    def arguments(self) -> tuple[np.ndarray, int, int, int]:
        """What the pixel functions take: (nodes, y, x, step)."""
        return self.nodes, self.y, self.x, self.step

    @cached_property
    def magnification(self) -> float:
        """Tile pixels per output pixel, with half as much again for what varies over the tile."""
        steps = [np.nanmedian(np.hypot(*np.diff(self.nodes, axis=axis))) for axis in (1, 2)]
        return 1.5 * float(max(steps)) / self.step


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
    wcs, shape = _common_frame_grid(tiles, scale, turn)
    if wcs is None:
        from reproject.mosaicking import find_optimal_celestial_wcs

        wcs, shape = find_optimal_celestial_wcs(
            [(tile.shape, tile.wcs) for tile in tiles],
            resolution=scale * units.deg,
            auto_rotate=turn,
            projection="TAN",
        )
    pad = [round(n * settings.global_wcs_padding_percent / 100 / 2) for n in shape]
    wcs.wcs.crpix = [wcs.wcs.crpix[0] + pad[1], wcs.wcs.crpix[1] + pad[0]]
    return OutputGrid(wcs, (int(shape[0]) + 2 * pad[0], int(shape[1]) + 2 * pad[1]))


def _common_frame_grid(tiles: Sequence[Tile], scale: float, turn: bool) -> tuple[WCS | None, tuple[int, int] | None]:
    """What `reproject.mosaicking.find_optimal_celestial_wcs` answers, for tiles of one celestial frame; None else.

    Importing reproject, with all that it brings, takes longer than a small mosaic's pixels. The definition is
    reproject's: tangent point in the mean direction of the tiles' reference pixels, size from the tiles' corners, and,
    where the grid may ``turn``, the directions of the least rectangle that holds them.
    """
    frame = wcs_to_celestial_frame(tiles[0].wcs)
    if not all(wcs_to_celestial_frame(tile.wcs).is_equivalent_frame(frame) for tile in tiles[1:]):
        return None, None
    references, corners = [], []
    for tile in tiles:
        height, width = tile.shape
        references.append(tile.wcs.all_pix2world([tile.wcs.wcs.crpix], 1))
        x, y = np.array([-0.5, width - 0.5, width - 0.5, -0.5]), np.array([-0.5, -0.5, height - 0.5, height - 0.5])
        corners.append(tile.wcs.all_pix2world(np.stack([x, y], axis=1), 0))
    lon, lat = np.deg2rad(np.concatenate(references)).T
    middle = np.mean([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)
    wcs = celestial_frame_to_wcs(frame, projection="TAN")
    wcs.wcs.crval = np.rad2deg(
        [np.arctan2(middle[1], middle[0]) % (2 * np.pi), np.arctan2(middle[2], np.hypot(*middle[:2]))]
    )
    wcs.wcs.cdelt = -scale, scale
    wcs.wcs.crpix = 1, 1
    pixels = wcs.wcs_world2pix(np.concatenate(corners), 1)
    if turn:
        angle = least_rectangle(pixels)
        wcs.wcs.pc = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
        pixels = wcs.wcs_world2pix(np.concatenate(corners), 1)
    low, high = pixels.min(axis=0), pixels.max(axis=0)
    wcs.wcs.crpix = 1.5 - low
    width, height = np.rint(high - low).astype(int)
    return wcs, (int(height), int(width))


def least_rectangle(points: np.ndarray) -> float:
    """Direction of the rectangle of least area around ``points`` (N, 2): radians, from -pi/4 to pi/4.

    One of its sides lies along a side of the convex hull (Freeman & Shapira 1975).
    """
    hull = convex_hull(points)
    sides = np.roll(hull, -1, axis=0) - hull
    angles = np.arctan2(sides[:, 1], sides[:, 0])
    along, across = (
        np.ptp(np.outer(u, hull[:, 0]) + np.outer(v, hull[:, 1]), axis=1)
        for u, v in ((np.cos(angles), np.sin(angles)), (-np.sin(angles), np.cos(angles)))
    )
    angle = angles[np.argmin(along * across)] % (np.pi / 2)
    return float(angle - np.pi / 2 if angle > np.pi / 4 else angle)


def convex_hull(points: np.ndarray) -> np.ndarray:
    """Corners of the convex hull of ``points`` (N, 2), counter-clockwise (Andrew 1979, "monotone chain")."""
    ordered = np.unique(points, axis=0)
    chains = []
    for run in (ordered, ordered[::-1]):
        chain: list[np.ndarray] = []
        for point in run:
            while len(chain) > 1 and _turn(chain[-2], chain[-1], point) <= 0:
                chain.pop()
            chain.append(point)
        chains += chain[:-1]
    return np.array(chains)


def _turn(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> float:
    """Above 0 where the way from ``a`` by ``b`` to ``c`` turns left."""
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def wanted_scale(tiles: Sequence[Tile], settings: Settings) -> float:
    """Pixel scale of the mosaic in degrees."""
    if settings.global_wcs_res_override:
        return settings.global_wcs_res_override / 3600.0
    scales = [pixel_scale(tile.wcs) for tile in tiles]
    return float(min(scales) if settings.global_wcs_pixelscale_mode == "min" else np.median(scales))


def pixel_scale(wcs: WCS) -> float:
    """Geometric mean pixel scale in degrees."""
    return float(np.sqrt(np.prod(proj_plane_pixel_scales(wcs.celestial))))


def tile_centre(tile: Tile) -> SkyCoord:
    """Sky position of the centre of a tile, in ICRS."""
    height, width = tile.shape
    centre = tile.wcs.pixel_to_world((width - 1) / 2, (height - 1) / 2).icrs
    return SkyCoord(centre.ra, centre.dec)  # without the attributes of the frame it came from


def refuse_scattered(tiles: Sequence[Tile], max_gigapixels: float, scale: float) -> None:
    """Raise :class:`UsageError` where the tiles lie so far apart that no tangent plane can hold them."""
    centres = SkyCoord([tile_centre(tile) for tile in tiles])
    spread = centres.separation(middle_of(centres)).deg
    side = 2 * float(spread.max()) / scale
    if spread.max() > 60 or side * side > 4 * max_gigapixels * 1e9:
        raise UsageError(too_large(tiles, side * side, max_gigapixels))


def middle_of(centres: SkyCoord) -> SkyCoord:
    """The centre whose median distance to all others is smallest: one wrong tile cannot move it."""
    if len(centres) > 500:
        centres = centres[:: len(centres) // 500 + 1]
    medians = [np.median(centre.separation(centres).deg) for centre in centres]
    return centres[int(np.argmin(medians))]


def too_large(tiles: Sequence[Tile], pixels: float, limit: float) -> str:
    """The sentence that refuses an absurdly large mosaic and names the tile farthest out."""
    centres = SkyCoord([tile_centre(tile) for tile in tiles])
    distance = centres.separation(middle_of(centres)).deg
    worst = int(np.argmax(distance))
    return (
        f"the mosaic would have {pixels / 1e9:.3g} gigapixels (max_output_gigapixels is {limit:g}), absurdly many: "
        f"{tiles[worst].name} lies {distance[worst]:.1f} degrees from the others; remove it, set a coarser "
        "global_wcs_res_override, or give the output in an output_wcs_file"
    )


def coordinate_mesh(tile: Tile, grid: OutputGrid, tolerance: float = MESH_TOLERANCE) -> CoordinateMesh | None:
    """The certified mesh of a tile, or None where the tile does not touch the output.

    Parameters
    ----------
    tolerance : float
        Largest accepted error in tile pixels.
    """
    rect = footprint_rect(tile, grid)
    if rect is None:
        return None
    step = MESH_STEP
    while step > 1:
        mesh = _sampled_mesh(tile, grid, rect, step)
        if mesh.error < tolerance:
            return mesh
        step //= 2
    return exact_mesh(tile, grid, rect)


def exact_mesh(tile: Tile, grid: OutputGrid, rect: tuple[int, int, int, int]) -> CoordinateMesh:
    """A mesh with a node on every output pixel of ``rect``."""
    nodes = _tile_pixels(tile, grid, np.arange(rect[0], rect[1]), np.arange(rect[2], rect[3]))
    return CoordinateMesh(nodes, rect[0], rect[2], 1, rect, 0.0)


def _sampled_mesh(tile: Tile, grid: OutputGrid, rect: tuple[int, int, int, int], step: int) -> CoordinateMesh:
    """Mesh of one step, its error measured against the exact transformation at four times the node density."""
    fine = max(step // 4, 1)
    y, x = ((rect[0] // step) - 1) * step, ((rect[2] // step) - 1) * step
    rows, columns = (rect[1] - 1 - y) // step + 3, (rect[3] - 1 - x) // step + 3
    exact = _tile_pixels(
        tile,
        grid,
        y + fine * np.arange((rows - 1) * (step // fine) + 1),
        x + fine * np.arange((columns - 1) * (step // fine) + 1),
    )
    nodes = np.ascontiguousarray(exact[:, :: step // fine, :: step // fine])
    mesh = CoordinateMesh(nodes, y, x, step, rect, 0.0)
    inner = exact[:, step // fine : -(step // fine), step // fine : -(step // fine)]
    guess = mesh_positions(
        mesh,
        y + step + fine * np.arange(inner.shape[1]),
        x + step + fine * np.arange(inner.shape[2]),
    )
    height, width = tile.shape
    matters = (inner[0] > -2) & (inner[0] < width + 1) & (inner[1] > -2) & (inner[1] < height + 1)
    if not matters.any():
        return mesh
    error = np.abs(guess - inner)[:, matters].max()
    return CoordinateMesh(nodes, y, x, step, rect, float(error) if np.isfinite(error) else np.inf)


def _linear_positions(mesh: CoordinateMesh, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """As :func:`mesh_positions`, interpolated linearly: as good as exact where a margin of pixels is added."""
    if mesh.step == 1:
        return mesh_positions(mesh, rows, columns)
    (j, fy), (i, fx) = (np.divmod((at - first) / mesh.step, 1.0) for at, first in ((rows, mesh.y), (columns, mesh.x)))
    j, i = j.astype(int), i.astype(int)
    near = mesh.nodes[:, j] * (1 - fy)[:, None] + mesh.nodes[:, j + 1] * fy[:, None]
    return near[:, :, i] * (1 - fx) + near[:, :, i + 1] * fx


def mesh_positions(mesh: CoordinateMesh, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Tile pixels (2, len(rows), len(columns)), x then y, of output rows and columns, interpolated as the kernels do."""
    if mesh.step == 1:
        return mesh.nodes[:, (rows - mesh.y)[:, None], (columns - mesh.x)[None, :]]
    wy = _lagrange_matrix(rows - mesh.y, mesh.step, mesh.nodes.shape[1])
    wx = _lagrange_matrix(columns - mesh.x, mesh.step, mesh.nodes.shape[2])
    return np.stack([wy @ axis @ wx.T for axis in mesh.nodes])


def _lagrange_matrix(positions: np.ndarray, step: int, nodes: int) -> np.ndarray:
    """Dense (n, nodes) matrix of cubic Lagrange weights."""
    from zemosaic_kernels import cubic_weights

    cell = np.minimum(positions // step, nodes - 3)
    matrix = np.zeros((len(positions), nodes))
    weights = cubic_weights((positions - cell * step) / step)
    for k, weight in enumerate(weights):
        matrix[np.arange(len(positions)), cell - 1 + k] = weight
    return matrix


def _tile_pixels(tile: Tile, grid: OutputGrid, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Exact tile pixels (2, len(rows), len(columns)) of output pixels; NaN where there is no such sky position.

    The distorted inverse (SIP, TPV) is iterative and can settle on a wrong position far outside the tile; a position
    that does not lead back to its output pixel is none.
    """
    x, y = np.meshgrid(columns.astype(float), rows.astype(float))
    tx, ty = transform(grid.wcs, tile.wcs, x, y)
    if tile.wcs.has_distortion:
        height, width = tile.shape
        matters = (np.abs(tx - width / 2) < width) & (np.abs(ty - height / 2) < height)
        bx, by = transform(tile.wcs, grid.wcs, tx[matters], ty[matters])
        bad = ~(np.hypot(bx - x[matters], by - y[matters]) < 0.5)
        tx[matters] = np.where(bad, np.nan, tx[matters])
        ty[matters] = np.where(bad, np.nan, ty[matters])
    return np.stack([tx, ty])


def transform(wcs_from: WCS, wcs_to: WCS, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of ``wcs_to`` at pixels of ``wcs_from``, celestial frames included; NaN where there is none."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # a diverging SIP inverse warns and returns its best guess, which the round trip then judges
        warnings.filterwarnings("ignore", message=".*WCS.all_world2pix.*")
        warnings.filterwarnings("ignore", message=".*failed to converge.*")
        tx, ty = pixel_to_pixel(wcs_from, wcs_to, x, y)
    return np.array(tx, dtype=float), np.array(ty, dtype=float)


def footprint_rect(tile: Tile, grid: OutputGrid) -> tuple[int, int, int, int] | None:
    """Bounding rectangle (y0, y1, x0, x1) of a tile on the output, two pixels wide of it; None where they are apart."""
    height, width = tile.shape
    ys = np.unique(np.append(np.arange(-0.5, height - 0.5, max(height / 24, 1.0)), height - 0.5))
    xs = np.unique(np.append(np.arange(-0.5, width - 0.5, max(width / 24, 1.0)), width - 0.5))
    x, y = transform(tile.wcs, grid.wcs, *np.meshgrid(xs, ys))
    seen = np.isfinite(x) & np.isfinite(y)
    if not seen.any():
        return None
    y0, y1 = np.floor(y[seen].min()) - 2, np.ceil(y[seen].max()) + 3
    x0, x1 = np.floor(x[seen].min()) - 2, np.ceil(x[seen].max()) + 3
    y0, x0 = max(y0, 0), max(x0, 0)
    y1, x1 = min(y1, grid.shape[0]), min(x1, grid.shape[1])
    if y0 >= y1 or x0 >= x1:
        return None
    return int(y0), int(y1), int(x0), int(x1)


def source_rows(
    mesh: CoordinateMesh, rect: tuple[int, int, int, int], tile_shape: tuple[int, int], margin: int = 4
) -> tuple[int, int] | None:
    """Tile rows (y0, y1) that the output rectangle ``rect`` needs; None where it does not touch the tile.

    The positions are sampled on the border of ``rect`` and as densely within as the mesh has nodes, between which they
    are as good as linear; ``margin`` covers what is left, and the reach of the kernel.
    """
    every = max(mesh.step, 8)
    rows = np.append(np.arange(rect[0], rect[1], every), rect[1] - 1)
    columns = np.append(np.arange(rect[2], rect[3], every), rect[3] - 1)
    x, y = _linear_positions(mesh, rows, columns)
    height, width = tile_shape
    reach = margin + every * mesh.magnification
    near = (x > -reach) & (x < width + reach) & (y > -reach) & (y < height + reach)
    if not near.any():
        return None
    y0 = max(int(np.floor(y[near].min() - margin)), 0)
    y1 = min(int(np.ceil(y[near].max() + margin)) + 1, height)
    return (y0, y1) if y0 < y1 else None
