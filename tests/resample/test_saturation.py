"""Saturated stars: where a tile's ceiling lies, which cells they reach, and that they take no part in gains."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from scenes.fits_samples import celestial_header, save
from zemosaic_pipeline.fits.tile import array_tile, open_tile
from zemosaic_pipeline.overlaps.pairs import measure_pairs
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.resample.measure import coarse_window, measure_tile, overlap_counts
from zemosaic_pipeline.resample.mesh import mesh_positions
from zemosaic_pipeline.resample.output_grid import OutputGrid, choose_output_grid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import place_tiles
from zemosaic_pipeline.resample.survey import WEIGHT_CELL, survey_pixels, survey_tile
from zemosaic_pipeline.resume.pieces import packed_survey, unpacked_survey
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, make_sky, mosaic_shape, tangent_wcs

SHAPE = (700, 330)  # two strips, the second no multiple of a band


def star_field(stars, shape=SHAPE, sky=1000.0, noise=10.0, channels=3):
    """Stars, (row, column, peak) each, 3.5 pixels wide, over a noisy sky: float32 (C, H, W)."""
    points = np.zeros(shape)
    for row, column, peak in stars:
        points[row, column] = peak
    points = gaussian_filter(points, 1.5) * (2 * np.pi * 1.5**2)
    image = points + sky + np.random.default_rng(1).normal(0, noise, (channels, *shape))
    return image.astype(np.float32)


#: Bright ones in both strips, one at the end of the image; then two fainter.
BRIGHT = [(40, 50, 30000), (300, 200, 60000), (520, 100, 25000), (697, 300, 40000)]
STARS = [*BRIGHT, (200, 100, 8000), (600, 250, 7000)]


def clipped_cells(data, ceiling):
    """Cells with a pixel within 3 % of the ceiling, by brute force."""
    height, width = data.shape[1:]
    cells = np.zeros((-(-height // WEIGHT_CELL), -(-width // WEIGHT_CELL)), bool)
    rows, columns = np.nonzero((data >= 0.97 * np.reshape(ceiling, (-1, 1, 1))).any(axis=0))
    cells[rows // WEIGHT_CELL, columns // WEIGHT_CELL] = True
    return cells


# ------------------------------------------------------------------------------------------------------ the ceiling


def test_clipped_stars_pile_up():
    data = np.minimum(star_field(STARS), np.float32(12000))
    data[:, 290:310, 150:160] = np.nan
    saturated = survey_pixels(data).saturated
    assert np.array_equal(saturated, clipped_cells(data, 12000))
    assert saturated[300 // 8, 200 // 8] and not saturated[200 // 8, 100 // 8]


def test_each_channel_has_its_own_ceiling_and_speaks_for_all():
    """White balance has multiplied the channels; the red one alone is clipped in the faint star."""
    data = star_field(STARS)
    data[0] += 3 * (star_field([(200, 100, 8000)], noise=0)[0] - 1000)
    data = np.minimum(data, np.float32(12000)) * np.array([0.5, 1.0, 1.7], np.float32)[:, None, None]
    saturated = survey_pixels(data).saturated
    assert np.array_equal(saturated, clipped_cells(data, [6000, 12000, 20400]))
    assert saturated[200 // 8, 100 // 8] and not saturated[600 // 8, 250 // 8]


def test_stars_that_are_not_clipped_have_no_ceiling():
    assert not survey_pixels(star_field(STARS)).saturated.any()
    assert not survey_pixels(star_field([(300, 200, 60000)])).saturated.any()


def test_one_clipped_star_is_no_pile_up():
    """It may as well be the flat top of whatever lies there: three places are asked for."""
    data = np.minimum(star_field([(300, 200, 60000)]), np.float32(12000))
    assert np.count_nonzero(data[0] == 12000) > 5
    assert not survey_pixels(data).saturated.any()


@pytest.mark.parametrize("sky", [1000.0, 64000.0, -500.0])
@pytest.mark.parametrize("noise", [0.0, 1.0, 10.0])
def test_the_sky_has_no_ceiling(sky, noise):
    """Neither a constant image nor noise, be the sky the brightest there is."""
    assert not survey_pixels(star_field([], sky=sky, noise=noise), (65535.0,)).saturated.any()


def test_a_nebula_has_no_ceiling():
    """Its summit is wide, and noise breaks it into many places."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    hill = 5000 * np.exp(-((y - 300) ** 2 + (x - 150) ** 2) / (2 * 60**2))
    assert not survey_pixels(star_field([], noise=20.0) + hill.astype(np.float32)).saturated.any()


def test_a_ceiling_of_the_header_counts_where_the_data_reach_it():
    data = np.minimum(star_field([(300, 200, 60000)]), np.float32(12000))  # no pile-up
    expected = clipped_cells(data, 12000)
    assert np.array_equal(survey_pixels(data, (12000.0,)).saturated, expected)
    assert np.array_equal(survey_pixels(data, (12200.0, 65535.0)).saturated, clipped_cells(data, 12200))
    for units in ((65535.0,), (1.0,), (900.0,), (1.0, 65535.0), (-5.0,)):
        assert not survey_pixels(data, units).saturated.any(), units


def test_a_ceiling_in_the_midst_of_the_data_does_not_hide_the_pile_up():
    data = np.minimum(star_field(STARS), np.float32(12000))
    assert np.array_equal(survey_pixels(data, (1.0, 1000.0)).saturated, clipped_cells(data, 12000))


@pytest.mark.parametrize("dtype, cards, expected", [
    ("u2", {}, (65535.0,)),
    ("u1", {}, (255.0,)),
    ("i2", {"SATURATE": 30000}, (30000.0, 32767.0)),
    ("f4", {"DATAMAX": 0.9, "SATURATE": "60000."}, (0.9, 60000.0)),
    ("f4", {"SATURATE": "unknown", "DATAMAX": -1.0}, ()),
])  # fmt: skip
def test_what_the_header_says_of_a_ceiling(tmp_path, dtype, cards, expected):
    header = celestial_header()
    header.update(cards)
    path = save(tmp_path / "a.fits", np.zeros((20, 30), dtype), header)
    assert open_tile(path).ceilings == expected


def test_a_16_bit_file_is_clipped_at_its_largest_number(tmp_path):
    data = np.clip(star_field([(300, 200, 200000)], channels=1)[0], 0, 65535).astype(np.uint16)
    tile = open_tile(save(tmp_path / "a.fits", data, celestial_header()))
    saturated = survey_tile(tile, PixelStore(10**8)).saturated
    assert saturated.any() and np.array_equal(saturated, clipped_cells(data[None], 65535))


def test_a_survey_comes_back_from_its_bytes():
    facts = survey_pixels(np.minimum(star_field(STARS), np.float32(12000)))
    found = unpacked_survey(packed_survey(facts))
    assert np.array_equal(found.saturated, facts.saturated) and np.array_equal(found.valid, facts.valid)


# ----------------------------------------------------------------------------------------------------- the cells


@pytest.mark.parametrize("turn", [0.0, 30.0, 200.0])
@pytest.mark.parametrize("cell_px", [4, 8])
def test_cells_that_a_saturated_pixel_reaches(turn, cell_px):
    """Of a turned tile: those within a cell of it, and none much further than the survey's cells are wide."""
    grid = OutputGrid(tangent_wcs((800, 800), (83.8, -5.4)), (800, 800))
    data = np.minimum(star_field(STARS), np.float32(12000))
    tile = array_tile(data, tangent_wcs(SHAPE, (83.8, -5.4), 4.0, turn))
    (item,) = place_tiles([tile], grid)
    facts = survey_tile(tile, PixelStore(10**8))
    counts = 2 * overlap_counts([item], grid.shape, cell_px)
    coarse = measure_tile(item, facts, counts, cell_px, PixelStore(10**8), CpuBackend())
    found = coarse.saturated
    cy0, cy1, cx0, cx1 = coarse_window(item.rect, cell_px)
    x, y = mesh_positions(item.mesh, np.arange(cy0 * cell_px, cy1 * cell_px), np.arange(cx0 * cell_px, cx1 * cell_px))
    rows, columns = np.nonzero((data >= 0.97 * 12000).any(axis=0))
    nearest = np.min([np.hypot(y - row, x - column) for row, column in zip(rows, columns, strict=True)], axis=0)
    nearest = nearest.reshape(cy1 - cy0, cell_px, cx1 - cx0, cell_px).min(axis=(1, 3))
    assert found[(coarse.fraction > 0) & (nearest < 0.9 * cell_px)].all()
    assert not found[nearest > 1.5 * (1.5 * cell_px + WEIGHT_CELL)].any()
    assert 0 < found.mean() < 0.1


def test_a_tile_without_saturated_pixels_carries_no_map():
    tile = array_tile(star_field(STARS), tangent_wcs(SHAPE, (83.8, -5.4)))
    grid = OutputGrid(tile.wcs, SHAPE)
    (item,) = place_tiles([tile], grid)
    counts = overlap_counts([item], grid.shape, 4)
    assert (
        measure_tile(item, survey_tile(tile, PixelStore(0)), counts, 4, PixelStore(0), CpuBackend()).saturated is None
    )


# ------------------------------------------------------------------------------------------------------- the gain


@pytest.fixture(scope="module")
def clipped_pair():
    """Two panels of a rich field, one of twice the gain, both clipped at 12,000, as coarse tiles."""
    layout = Layout(rows=1, columns=2, shape=(360, 480), overlap=0.3, gain_sigma=0, rotation_deg=6)
    sky = make_sky(mosaic_shape(layout), seed=1, stars=2200)
    panels = make_panels(layout, replace(sky, amplitudes=0.1 * sky.amplitudes), seed=101)
    tiles = [
        array_tile(np.minimum(gain * panel.data, np.float32(12000)), panel.wcs)
        for gain, panel in zip((1, 2), panels, strict=True)
    ]
    grid = choose_output_grid(tiles, Settings())
    placed, store = place_tiles(tiles, grid), PixelStore(10**8)
    counts = overlap_counts(placed, grid.shape, 4)
    return [measure_tile(item, survey_tile(item.tile, store), counts, 4, store, CpuBackend()) for item in placed]


def test_saturated_stars_take_no_part_in_gains(clipped_pair):
    (fair,) = measure_pairs(clipped_pair)
    (naive,) = measure_pairs([replace(tile, saturated=None) for tile in clipped_pair])
    assert np.abs(naive.log_ratio - np.log(0.5)).min() > 0.01
    assert np.abs(fair.log_ratio - np.log(0.5)).max() < 0.002
    assert (fair.log_ratio_se < naive.log_ratio_se).all()


def test_where_nearly_all_cells_are_saturated_they_speak_all_the_same(clipped_pair):
    everywhere = [replace(tile, saturated=np.ones_like(tile.saturated)) for tile in clipped_pair]
    everywhere[0].saturated[:, -10:] = False
    (found,) = measure_pairs(everywhere)
    (naive,) = measure_pairs([replace(tile, saturated=None) for tile in clipped_pair])
    assert np.array_equal(found.log_ratio, naive.log_ratio)
