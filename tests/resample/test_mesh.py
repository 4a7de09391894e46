"""The output grid and the coordinate meshes against astropy's own transformation."""

from __future__ import annotations

import numpy as np
import pytest
from astropy import units
from astropy.io import fits
from astropy.wcs import WCS, DistortionLookupTable
from astropy.wcs.utils import pixel_to_pixel, proj_plane_pixel_scales
from reproject.mosaicking import find_optimal_celestial_wcs

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.fits.tile import array_tile
from zemosaic_pipeline.resample.mesh import (
    MESH_STEP,
    MESH_TOLERANCE,
    coordinate_mesh,
    footprint_rect,
    mesh_positions,
    source_rows,
)
from zemosaic_pipeline.resample.output_grid import OutputGrid, choose_output_grid
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.panels import add_sip, tangent_wcs

SHAPE = (240, 320)
CENTRE = (83.8, -5.4)
#: A north-up plane of 4"/pixel, in the middle of which the tiles lie.
GRID = OutputGrid(tangent_wcs((600, 700), CENTRE), (600, 700))


def wcs_of(ctype=("RA---TAN", "DEC--TAN"), crval=CENTRE, *, turn=0.0, mirror=1, scale=4.0, **cards) -> WCS:
    header = tangent_wcs(SHAPE, crval, scale, turn).to_header()
    header["CTYPE1"], header["CTYPE2"] = ctype
    for key in ("PC1_1", "PC2_1"):
        header[key] = header.get(key, float(key == "PC1_1")) * mirror
    for key, value in cards.items():
        header[key] = value
    return WCS(header)


def tile_of(wcs: WCS, shape: tuple[int, int] = SHAPE, name: str = "tile.fits"):
    return array_tile(np.zeros(shape, np.float32), wcs, name)


def lumpy_wcs(shape: tuple[int, int] = SHAPE, amplitude: float = 0.5, cell: int = 16) -> WCS:
    """Distorted by a table of random shifts, which is not smooth at its cells: no cubic can follow it."""
    wcs = wcs_of()
    rng = np.random.default_rng(3)
    for axis in (1, 2):
        table = rng.uniform(-amplitude, amplitude, (shape[0] // cell + 2, shape[1] // cell + 2)).astype(np.float32)
        setattr(wcs, f"cpdis{axis}", DistortionLookupTable(table, (1, 1), (1, 1), (cell, cell)))
    return wcs


GALACTIC = {"crval": (209.1, -19.6), "ctype": ("GLON-TAN", "GLAT-TAN")}
TPV = {"PV1_0": 0.0, "PV1_1": 1.0, "PV1_4": 0.02, "PV1_7": 0.4, "PV2_1": 1.0, "PV2_4": -0.01, "PV2_7": 0.3}
CASES = {
    "tan": wcs_of(),
    "rotated": wcs_of(turn=121),
    "mirrored": wcs_of(turn=-40, mirror=-1),
    "finer": wcs_of(scale=1.3, turn=15),
    "coarser": wcs_of(scale=9.0, turn=70),
    "sip": add_sip(wcs_of(turn=15), SHAPE, pixels=5),
    "tpv": wcs_of(("RA---TPV", "DEC--TPV"), scale=12.0, turn=20, **TPV),
    "car": wcs_of(("RA---CAR", "DEC--CAR"), (83.8, 0.0), mirror=-1, CRPIX2=4980.5),
    "zea": wcs_of(("RA---ZEA", "DEC--ZEA"), turn=200, scale=6.0),
    "fk5 of 1975": wcs_of(crval=(83.49, -5.42), RADESYS="FK5", EQUINOX=1975.0),
    "galactic": wcs_of(turn=33, **GALACTIC),
}


def exact(tile, rows, columns):
    x, y = np.meshgrid(columns.astype(float), rows.astype(float))
    return np.array(pixel_to_pixel(GRID.wcs, tile.wcs, x, y))


def on_tile(tile, positions, margin=0.5):
    height, width = tile.shape
    x, y = positions
    return (x >= -margin) & (x <= width - 1 + margin) & (y >= -margin) & (y <= height - 1 + margin)


# ------------------------------------------------------------------------------------------------------- the meshes


@pytest.mark.parametrize("case", CASES)
def test_mesh_is_astropys_transformation_and_its_error_is_honest(case):
    tile = tile_of(CASES[case])
    mesh = coordinate_mesh(tile, GRID)
    rng = np.random.default_rng(5)
    rows = np.sort(rng.integers(mesh.rect[0], mesh.rect[1], 70))
    columns = np.sort(rng.integers(mesh.rect[2], mesh.rect[3], 90))
    truth = exact(tile, rows, columns)
    inside = on_tile(tile, truth)
    assert inside.sum() > 500
    error = np.abs(mesh_positions(mesh, rows, columns) - truth)[:, inside].max()
    assert error < MESH_TOLERANCE
    assert error <= 1.2 * mesh.error + 1e-6  # the inverse of a distortion is good to 1e-6
    assert mesh.step > 1


@pytest.mark.filterwarnings("ignore:.*WCS.all_world2pix")  # far outside the tile a SIP has no inverse
@pytest.mark.parametrize("case", CASES)
def test_rectangle_holds_every_pixel_that_the_tile_touches_and_little_more(case):
    tile = tile_of(CASES[case])
    rows, columns = (np.flatnonzero(axis) for axis in _touched(tile))
    y0, y1, x0, x1 = coordinate_mesh(tile, GRID).rect
    assert y0 <= rows[0] and rows[-1] < y1 and x0 <= columns[0] and columns[-1] < x1
    assert rows[0] - y0 <= 4 and y1 - rows[-1] <= 5 and columns[0] - x0 <= 4 and x1 - columns[-1] <= 5


def _touched(tile):
    seen = on_tile(tile, exact(tile, np.arange(GRID.shape[0]), np.arange(GRID.shape[1])))
    return seen.any(axis=1), seen.any(axis=0)


def test_sip_is_not_dropped():
    curved, undistorted = (coordinate_mesh(tile_of(wcs), GRID) for wcs in (CASES["sip"], wcs_of(turn=15)))
    rows, columns = np.arange(200, 400, 20), np.arange(200, 500, 20)
    shift = mesh_positions(curved, rows, columns) - mesh_positions(undistorted, rows, columns)
    assert 0.5 < np.abs(shift).max() < 10


def test_strong_distortion_gets_a_finer_mesh():
    tile = tile_of(CASES["tpv"])
    coarse = coordinate_mesh(tile, GRID, tolerance=1.0)
    assert coarse.step == MESH_STEP and coarse.error > MESH_TOLERANCE
    mesh = coordinate_mesh(tile, GRID)
    assert 1 < mesh.step < MESH_STEP and mesh.error < MESH_TOLERANCE


def test_distortion_that_no_mesh_follows_gets_the_exact_transformation():
    tile = tile_of(lumpy_wcs())
    mesh = coordinate_mesh(tile, GRID)
    assert (mesh.step, mesh.error) == (1, 0.0)
    rows, columns = np.arange(200, 390, 7), np.arange(230, 480, 9)
    assert np.allclose(mesh_positions(mesh, rows, columns), exact(tile, rows, columns), rtol=0, atol=1e-3)


def test_tile_beside_the_output_has_no_mesh():
    assert coordinate_mesh(tile_of(wcs_of(crval=(90.0, -5.4))), GRID) is None
    assert coordinate_mesh(tile_of(wcs_of(crval=(263.8, 5.4))), GRID) is None  # the other side of the sky


def test_tile_that_hangs_over_the_edge_is_cut():
    tile = tile_of(wcs_of(crval=(CENTRE[0] + 0.38, CENTRE[1] + 0.3)))
    y0, y1, x0, x1 = footprint_rect(tile, GRID)
    assert (y1, x0) == (600, 0) and 0 < y0 < 600 and 0 < x1 < 700


@pytest.mark.parametrize("case", ["rotated", "finer", "coarser", "sip", "galactic"])
@pytest.mark.parametrize("size", [(37, 53), (150, 700), (16, 16)])
def test_source_rows_hold_all_rows_that_a_block_needs(case, size):
    tile = tile_of(CASES[case])
    mesh = coordinate_mesh(tile, GRID)
    spare = []
    for y in range(mesh.rect[0], mesh.rect[1], size[0]):
        for x in range(mesh.rect[2], mesh.rect[3], size[1]):
            rect = (y, min(y + size[0], mesh.rect[1]), x, min(x + size[1], mesh.rect[3]))
            positions = exact(tile, np.arange(*rect[:2]), np.arange(*rect[2:]))
            inside = on_tile(tile, positions)
            if not inside.any():
                continue
            # Lanczos-3 reaches from two rows before to three rows after
            needed = np.floor(positions[1][inside])
            first, last = max(needed.min() - 2, 0), min(needed.max() + 3, SHAPE[0] - 1)
            rows = source_rows(mesh, rect, tile.shape)
            assert rows[0] <= first and last < rows[1]
            spare.append((rows[1] - rows[0]) - (last - first))
    assert np.mean(spare) < 80 and 0 <= rows[0] < rows[1] <= SHAPE[0]


def test_block_beside_the_tile_needs_no_rows():
    mesh = coordinate_mesh(tile_of(wcs_of(turn=45)), GRID)
    y0, _, x0, _ = mesh.rect
    assert source_rows(mesh, (y0, y0 + 16, x0, x0 + 16), SHAPE) is None


# --------------------------------------------------------------------------------------------------- the output grid


@pytest.fixture
def tiles():
    """Four tiles turned by 30 degrees, one of them finer."""
    places = [(0.0, 0.0, 4.0), (0.25, 0.0, 4.0), (0.0, 0.2, 4.0), (0.25, 0.2, 3.0)]
    return [
        tile_of(wcs_of(crval=(CENTRE[0] + a, CENTRE[1] + d), turn=30, scale=s), name=f"tile{k}.fits")
        for k, (a, d, s) in enumerate(places)
    ]


def scale_of(grid):
    return 3600 * proj_plane_pixel_scales(grid.wcs)


def test_grid_holds_all_tiles(tiles):
    grid = choose_output_grid(tiles, Settings())
    for tile in tiles:
        height, width = tile.shape
        corners = np.array([[0, width - 1, 0, width - 1], [0, 0, height - 1, height - 1]], float)
        x, y = pixel_to_pixel(tile.wcs, grid.wcs, *corners)
        assert min(x) > -0.5 and min(y) > -0.5 and max(x) < grid.shape[1] and max(y) < grid.shape[0]
    assert np.allclose(scale_of(grid), 4.0, rtol=1e-6)


@pytest.mark.parametrize(
    "kinds", [CASES, ["tan"], ["tan", "sip", "rotated"], ["tpv"], ["galactic"], ["fk5 of 1975"], ["car", "zea"]]
)
@pytest.mark.parametrize("orientation", ["north_up", "as_tiles"])
def test_grid_is_that_of_reproject(kinds, orientation):
    tiles = [tile_of(CASES[kind]) for kind in kinds]
    wanted = {"global_wcs_res_override": 5.0, "global_wcs_pixelscale_mode": "given", "global_wcs_padding_percent": 0}
    grid = choose_output_grid(tiles, Settings(**wanted, global_wcs_orientation=orientation))
    wcs, shape = find_optimal_celestial_wcs(
        [(t.shape, t.wcs) for t in tiles], resolution=5 * units.arcsec, auto_rotate=orientation == "as_tiles"
    )
    assert grid.shape == shape
    assert list(grid.wcs.wcs.ctype) == list(wcs.wcs.ctype) and grid.wcs.wcs.radesys == wcs.wcs.radesys
    corners = np.array([[0, 0], [shape[1], 0], [0, shape[0]], shape[::-1]], float)
    moved = grid.wcs.wcs_world2pix(wcs.wcs_pix2world(corners, 0), 0)
    np.testing.assert_allclose(moved, corners, atol=1e-6)


def test_pixel_scale_settings(tiles):
    median, finest, given = (
        choose_output_grid(tiles, settings)
        for settings in (
            Settings(),
            Settings(global_wcs_pixelscale_mode="min"),
            Settings(global_wcs_pixelscale_mode="given", global_wcs_res_override=8.0),
        )
    )
    assert np.allclose([scale_of(median), scale_of(finest), scale_of(given)], [[4, 4], [3, 3], [8, 8]], rtol=1e-6)
    assert finest.shape[0] == pytest.approx(median.shape[0] * 4 / 3, rel=0.01)
    assert given.shape[0] == pytest.approx(median.shape[0] / 2, rel=0.01)


def test_orientation_setting(tiles):
    north_up, turned = (
        choose_output_grid(tiles[:1], Settings(global_wcs_orientation=way)) for way in ("north_up", "as_tiles")
    )
    matrix = north_up.wcs.pixel_scale_matrix
    assert np.allclose(matrix, np.diag([-4, 4]) / 3600, atol=1e-9)
    # a tile's own frame holds it without corners to spare
    assert turned.shape[0] * turned.shape[1] < 1.15 * SHAPE[0] * SHAPE[1] < north_up.shape[0] * north_up.shape[1]
    angle = np.rad2deg(np.arctan2(turned.wcs.pixel_scale_matrix[0, 1], turned.wcs.pixel_scale_matrix[1, 1]))
    assert abs(angle) % 90 == pytest.approx(30, abs=0.5) or abs(angle) % 90 == pytest.approx(60, abs=0.5)


def test_padding_setting_is_an_even_margin(tiles):
    bare, padded = (choose_output_grid(tiles, Settings(global_wcs_padding_percent=percent)) for percent in (0.0, 10.0))
    for n, m in zip(bare.shape, padded.shape, strict=True):
        assert m == pytest.approx(1.1 * n, abs=2)
    sky = bare.wcs.pixel_to_world((bare.shape[1] - 1) / 2, (bare.shape[0] - 1) / 2)
    x, y = padded.wcs.world_to_pixel(sky)
    assert (float(x), float(y)) == pytest.approx(((padded.shape[1] - 1) / 2, (padded.shape[0] - 1) / 2), abs=1e-6)


def test_output_wcs_file_is_taken_as_it_is(tiles, tmp_path):
    header = wcs_of(turn=77, scale=5.5).to_header(relax=True)
    path = tmp_path / "mosaic.fits"
    fits.PrimaryHDU(np.zeros((50, 60), np.uint8), header).writeto(path)
    grid = choose_output_grid(tiles, Settings(output_wcs_file=str(path)))
    assert grid.shape == (50, 60)
    assert np.allclose(grid.wcs.pixel_to_world_values(7, 8), WCS(header).pixel_to_world_values(7, 8), atol=1e-10)


def test_output_wcs_file_without_size_is_refused(tiles, tmp_path):
    path = tmp_path / "bare.hdr"
    path.write_text(wcs_of().to_header().tostring(sep="\n") + "\n")
    with pytest.raises(UsageError, match=r"bare\.hdr.*NAXIS1"):
        choose_output_grid(tiles, Settings(output_wcs_file=str(path)))


@pytest.mark.parametrize(("away", "limit"), [((263.8, 5.4), 4.0), ((83.8, 80.0), 4.0), ((123.8, 40.0), 1.0)])
def test_tile_solved_far_away_is_refused_by_name(tiles, away, limit):
    stray = tile_of(wcs_of(crval=away), name="night2/stray.fits")
    with pytest.raises(UsageError, match=r"night2/stray\.fits lies \d+\.\d degrees"):
        choose_output_grid([tiles[0], stray, *tiles[1:]], Settings(max_output_gigapixels=limit))


def test_mosaic_above_the_limit_is_refused(tiles):
    pixels = np.prod(choose_output_grid(tiles, Settings()).shape) / 1e9
    assert choose_output_grid(tiles, Settings(max_output_gigapixels=1.01 * pixels))
    with pytest.raises(UsageError, match=r"the mosaic would have .* gigapixels .*max_output_gigapixels"):
        choose_output_grid(tiles, Settings(max_output_gigapixels=0.99 * pixels))
