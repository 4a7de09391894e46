"""The synthetic night against its own formula, and the judges of `benchmarks` on perfect and on spoiled pictures."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from scipy.ndimage import convolve

from scenes.places import benchmark
from zemosaic_pipeline.synthetic.night import (
    DEMO,
    Night,
    expected,
    night_truth,
    panel_centre,
    pattern_channels,
    render,
    seestar_header,
    write_calibration,
    write_night,
)
from zemosaic_pipeline.synthetic.night_stars import field_stars
from zemosaic_pipeline.synthetic.panels import tangent_wcs

SMALL = Night(
    rows=1, columns=2, frames=5, shape=(560, 400), scale=4.78, hot=300, warm=0, trails=2, bad_frames=False, clouds=0.02
)


nj = benchmark("night_judge")


# ---- the generator


def test_table_holds_the_stars_of_the_rosette():
    """Positions and V magnitudes of three stars as SIMBAD has them: 12 Mon, HD 46150, HD 46223."""
    table = field_stars()
    assert (np.diff(table[:, 2]) >= 0).all() and 400 < len(table) < 600
    for ra, dec, magnitude in ((98.0800, 4.8560, 5.85), (97.9813, 4.9428, 6.73), (98.0388, 4.8235, 7.28)):
        distance = np.hypot(table[:, 0] - ra, table[:, 1] - dec) * 3600
        assert distance.min() < 2
        assert abs(table[distance.argmin(), 2] - magnitude) < 0.15


def test_a_frame_depends_on_the_seed_and_its_number_alone(tmp_path):
    lights, truth = write_night(tmp_path, SMALL, only=lambda f: f.index in (3, 4))
    assert sorted(p.name for p in lights.iterdir()) == [truth.frames[3].name, truth.frames[4].name]
    again = night_truth(SMALL)
    written = fits.getdata(lights / truth.frames[4].name)
    assert written.dtype == np.uint16
    assert np.array_equal(written, render(again, again.frames[4]))
    other = night_truth(replace(SMALL, seed=2))
    assert not np.array_equal(written, render(other, other.frames[4]))


@pytest.mark.parametrize("sip", [0.0, 2.0])
def test_header_is_a_seestars_and_its_wcs_the_true_one_if_asked_for(sip):
    night = replace(SMALL, sip_px=sip)
    frame = night_truth(night).frames[1]
    header = seestar_header(night, frame)
    assert "CTYPE1" not in header and header["BAYERPAT"] == "GRBG" and header["EQMODE"] == 0
    centre = frame.wcs.pixel_to_world_values(199.5, 279.5)
    off = np.hypot(header["RA"] - centre[0], header["DEC"] - centre[1])
    assert 1 / 60 < off < 20 / 60
    assert 206.265 * header["XPIXSZ"] / header["FOCALLEN"] == pytest.approx(night.scale, rel=1e-3)
    wcs = WCS(seestar_header(replace(night, with_wcs=True), frame))
    xy = np.array([0.0, 100, 399]), np.array([0.0, 500, 559])
    assert np.allclose(frame.wcs.world_to_pixel_values(*wcs.pixel_to_world_values(*xy)), xy, atol=1e-5)


@pytest.mark.parametrize("pattern", ["GRBG", "RGGB", "BGGR", "GBRG"])
def test_stars_stand_where_the_wcs_says_in_their_colours(pattern):
    night = replace(SMALL, pattern=pattern, nebula=0.0, hot=0, trails=0)
    truth = night_truth(night)
    frame = truth.frames[0]
    light = expected(truth, frame)
    channel = np.tile(pattern_channels(pattern), (night.shape[0] // 2, night.shape[1] // 2))
    light -= frame.glow[channel]
    star = int(np.argmax(truth.flux[:, 1] * _far_inside(truth, frame)))
    x, y = frame.wcs.world_to_pixel_values(truth.ra[star], truth.dec[star])
    row, column = np.mgrid[: night.shape[0], : night.shape[1]]
    near = np.hypot(row - y, column - x) < 8
    for c, k in ((0, 4), (1, 2), (2, 4)):
        weights = np.where(near & (channel == c), light, 0)
        # 98.6 % of a Moffat star lies within 8 pixels; a sum over every k-th pixel is exact to a percent
        assert k * weights.sum() == pytest.approx(frame.transparency * truth.flux[star, c], rel=0.04)
        assert np.average(column, weights=weights) == pytest.approx(x, abs=0.1)
        assert np.average(row, weights=weights) == pytest.approx(y, abs=0.1)


def _far_inside(truth, frame):
    x, y = frame.wcs.world_to_pixel_values(truth.ra, truth.dec)
    return (x > 30) & (y > 30) & (x < 370) & (y < 530)


def test_stars_are_flat_fielded_as_the_nebula_is():
    """In the middle of a tangent plane: pixels of half the size hold four times the sum of a star."""
    truth = night_truth(SMALL)
    fine = tangent_wcs((1120, 800), panel_centre(SMALL, 0), SMALL.scale / 2)
    x, y, sums = truth.stars_on(fine, (1120, 800))
    middle = np.hypot(x - 399.5, y - 559.5) < 60
    ra, dec = fine.pixel_to_world_values(x[middle], y[middle])
    same = np.hypot(truth.ra - ra[:, None], truth.dec - dec[:, None]).argmin(axis=1)
    assert len(same) > 3 and np.allclose(sums[middle], 4 * truth.flux[same], rtol=1e-5)


def test_sky_is_nebula_through_the_air_plus_glow():
    night = replace(SMALL, faint_per_megapixel=0, hot=0, trails=0)
    truth = night_truth(night)
    frame = truth.frames[7]
    empty = replace(truth, flux=0 * truth.flux)
    light = expected(empty, frame)
    rows, columns = np.array([11, 300, 551]), np.array([390, 201, 8])
    sky = truth.sky(*frame.wcs.pixel_to_world_values(columns, rows))
    channel = pattern_channels(night.pattern)[rows % 2, columns % 2]
    wanted = frame.transparency * sky[channel, range(3)] + frame.glow[channel]
    assert np.allclose(light[rows, columns], wanted, rtol=1e-4)
    assert np.ptp(truth.nebula(frame.wcs, night.shape)[0]) > 20


def test_noise_is_that_of_photons_and_of_reading():
    truth = night_truth(SMALL)
    frame = truth.frames[2]
    light = expected(truth, frame)
    pull = (render(truth, frame) - SMALL.bias - light) / np.sqrt(light + SMALL.read_noise**2 + 1 / 12)
    assert np.std(pull[light < 6e4]) == pytest.approx(1, abs=0.01)
    assert abs(np.mean(pull[light < 6e4])) < 0.01


def test_bad_frames_satellites_and_hot_pixels():
    truth = night_truth(DEMO)
    kinds = [f.kind for f in truth.frames]
    assert kinds.count("cloudy") == kinds.count("trailed") == 1 and len(kinds) == 32
    assert sum(len(f.trails) for f in truth.frames if f.kind == "good") == DEMO.trails
    good = np.median([f.transparency for f in truth.frames])
    assert truth.frames[kinds.index("cloudy")].transparency < 0.35 * good
    assert np.hypot(*truth.frames[kinds.index("trailed")].streak) > 3 * DEMO.fwhm
    crossed = next(f for f in truth.frames if f.trails)
    line = crossed.trails[0]
    added = expected(truth, crossed) - expected(truth, replace(crossed, trails=()))
    middle = round((line.y0 + line.y1) / 2), round((line.x0 + line.x1) / 2)
    assert added[middle] > 0.7 * line.peak
    assert added.sum() == pytest.approx(
        line.peak * line.sigma * np.sqrt(2 * np.pi) * np.hypot(line.x1 - line.x0, line.y1 - line.y0), rel=0.05
    )
    hot = tuple(truth.hot[truth.hot_level > 3000].T)
    for index in (0, 20):
        assert (render(truth, truth.frames[index])[hot] > 2500).all()


def test_the_mount_turns_the_field_and_the_flip_turns_it_over():
    def angles(night):
        cd = np.array([f.wcs.wcs.cd[1] for f in night_truth(night).frames if f.panel == 0])
        return np.rad2deg(np.arctan2(cd[:, 0], cd[:, 1]))

    turned = angles(replace(SMALL, rotation_deg=4.0))
    assert np.ptp(turned) == pytest.approx(4.0, abs=1e-6)
    assert np.ptp(angles(replace(SMALL, altaz=False))) == 0
    flipped = night_truth(replace(SMALL, flip=True))
    assert abs(angles(replace(SMALL, flip=True, altaz=False))[-1]) == pytest.approx(179.6, abs=1e-6)
    assert (flipped.frames[4].date - flipped.frames[0].date).days == 1


def test_calibration_frames_hold_hot_pixels_and_vignetting(tmp_path):
    night = replace(SMALL, vignetting=0.3)
    folders = write_calibration(tmp_path, night, count=2)
    truth = night_truth(night)
    dark, flat, bias = (fits.getdata(sorted(folders[k].iterdir())[0]).astype(float) for k in ("dark", "flat", "bias"))
    assert np.median(bias) == night.bias and np.std(bias) == pytest.approx(night.read_noise, rel=0.03)
    assert np.allclose(np.median((dark - bias)[tuple(truth.hot.T)]), np.median(truth.hot_level), rtol=0.05)
    green = (flat - bias)[::2, ::2]
    assert green[:3, :3].mean() / green[135:145, 95:105].mean() == pytest.approx(0.7, abs=0.02)


# ---- the judges


@pytest.fixture(scope="module")
def truth():
    return night_truth(SMALL)


def perfect(truth, wcs, shape, smooth=False, seed=0):
    """A picture of the true sky with white (or smoothed) noise of the ideal level, in units of its own."""
    nebula = truth.nebula(wcs, shape)
    level = nj.ideal_level(truth, nj.best_weights(truth, 0), nebula)
    noise = np.random.default_rng(seed).standard_normal(nebula.shape) * np.sqrt(level)
    if smooth:
        kernel = np.outer([0.25, 0.5, 0.25], [0.25, 0.5, 0.25])
        noise = np.stack([convolve(n, kernel) for n in noise])
    image = nebula + truth.star_field(wcs, shape, 3.3)
    return nj.Picture(0.8 * (image + noise) + 1234, wcs, "perfect")


@pytest.fixture(scope="module")
def tile(truth):
    wcs = tangent_wcs((600, 440), panel_centre(SMALL, 0), SMALL.scale, -1.0)
    return nj.match(perfect(truth, wcs, (600, 440)), truth)


@pytest.fixture(scope="module")
def mosaic(truth):
    shape = (600, 800)
    wcs = tangent_wcs(shape, (98.0, 4.9), SMALL.scale)
    matched = nj.match(perfect(truth, wcs, shape), truth)
    tiles = []
    for panel in range(2):
        place = tangent_wcs((540, 390), panel_centre(SMALL, panel), SMALL.scale)
        tiles.append(nj.Picture(np.ones((3, 540, 390)), place))
    return matched, nj.regions(matched.picture, tiles)


def test_match_finds_scale_offset_and_width_of_the_stars(tile):
    assert tile.fwhm == pytest.approx(3.3, abs=0.05)
    assert np.abs(np.nanmean(tile.residual, axis=(1, 2)) / tile.sigma).max() < 0.02
    bright = tile.image > tile.nebula + 5000
    assert np.median(tile.values[bright] / tile.image[bright]) == pytest.approx(1, abs=0.003)


def test_solving_is_judged_by_the_worst_good_frame(truth):
    right = {f.name: f.wcs for f in truth.frames}
    assert nj.judge_solving(truth, right).value < 1e-6
    wrong = truth.frames[3].wcs.deepcopy()
    wrong.wcs.crpix = wrong.wcs.crpix + np.array([0.3, 0.4])
    assert nj.judge_solving(truth, right | {truth.frames[3].name: wrong}).value == pytest.approx(0.5, abs=1e-3)
    del right[truth.frames[3].name]
    assert not nj.judge_solving(truth, right).passed


def test_trails_left_in_a_tile_are_seen(truth, tile):
    clean = nj.judge_trails(tile, truth, 0)
    assert clean.passed and clean.value < 1
    assert nj.judge_trails(tile, replace(truth, frames=()), 0) is None
    frame = next(f for f in truth.frames if f.trails and f.panel == 0)
    light = np.exp(-(_line_distance(tile, frame) ** 2) / 4)
    found = nj.judge_trails(replace(tile, values=tile.values + 3 * tile.sigma[:, None, None] * light), truth, 0)
    assert not found.passed and 2 < found.value < 4


def _line_distance(tile, frame):
    """Distance of every pixel of a tile from the trail of a frame, in pixels of the frame."""
    y, x = np.mgrid[: tile.picture.shape[0], : tile.picture.shape[1]]
    fx, fy = frame.wcs.world_to_pixel_values(*tile.picture.wcs.pixel_to_world_values(x, y))
    line = frame.trails[0]
    dx, dy = line.x1 - line.x0, line.y1 - line.y0
    return (dy * (fx - line.x0) - dx * (fy - line.y0)) / np.hypot(dx, dy)


def test_hot_pixels_left_in_a_tile_are_seen(truth, tile):
    assert nj.judge_hot_pixels(tile, truth, 0).passed
    values = tile.values.copy()
    for frame in truth.frames[:5]:
        row, column = truth.hot[5]
        x, y = tile.picture.wcs.world_to_pixel_values(*frame.wcs.pixel_to_world_values(column, row))
        values[0, round(float(y)), round(float(x))] += 5 * tile.sigma[0]
    spoiled = replace(tile, values=values, star_free=np.ones_like(tile.star_free))
    assert nj.judge_hot_pixels(spoiled, truth, 0).value > 2


def test_noise_is_judged_by_what_no_smoothing_changes(truth, tile):
    weights = nj.best_weights(truth, 0)
    assert nj.judge_noise(tile, truth, weights).value == pytest.approx(1, abs=0.05)
    smooth = nj.match(perfect(truth, tile.picture.wcs, tile.picture.shape, smooth=True, seed=1), truth)
    assert (smooth.sigma < 0.5 * tile.sigma).all()
    assert nj.judge_noise(smooth, truth, weights).value == pytest.approx(1, abs=0.05)
    noisy = replace(tile, values=tile.image + 1.25 * (tile.values - tile.image))
    assert not nj.judge_noise(noisy, truth, weights).passed


def test_ideal_noise_is_that_of_a_weighted_mean_of_samples(truth):
    """One frame in its own colour's samples: variance of a block's mean, by brute force on the raw pixels."""
    frame = truth.frames[0]
    raw = render(truth, frame) - expected(truth, frame) - SMALL.bias
    level = nj.ideal_level(truth, {frame.name: 2.0}, truth.nebula(frame.wcs, SMALL.shape))[0].mean()
    red = np.clip(raw[::2, 1::2], -200, 200) / frame.transparency
    blocks = red.reshape(280 // 8, 8, 200 // 8, 8).mean(axis=(1, 3))
    assert nj.mad_sigma(blocks) * 16 == pytest.approx(np.sqrt(level), rel=0.06)


def test_a_step_of_the_sky_is_seen(mosaic):
    matched, region = mosaic
    assert len(np.unique(region[region >= 0])) == 3
    clean = nj.judge_sky_step(matched, region, matched.sigma)
    assert clean.value < 0.08
    step = np.where(region == region.max(), 0.4, 0)[None] * matched.sigma[:, None, None]
    found = nj.judge_sky_step(replace(matched, values=matched.values + step), region, matched.sigma)
    assert found.value == pytest.approx(0.4, abs=0.08) and not found.passed


def test_star_fluxes_of_a_perfect_mosaic_are_true_within_their_errors(truth, mosaic):
    stars = nj.star_fluxes(mosaic[0], truth)
    pull = (stars.ratio - 1) / stars.error
    assert len(stars.at) > 150
    assert 0.7 < nj.mad_sigma(pull) < 1.3 and np.abs(np.median(pull)) < 0.3
    # white noise: the error is that of the pixels in the aperture, and a little for the sky
    white = np.sqrt(np.pi) * 1.7 * mosaic[0].fwhm * mosaic[0].sigma.mean()
    assert np.median(stars.error * stars.flux) == pytest.approx(white, rel=0.3)


def test_colour_of_one_panel_is_seen(truth, mosaic):
    matched, region = mosaic
    stars = nj.star_fluxes(replace(matched, values=matched.image), truth)
    assert nj.judge_colour(stars, region).value < 0.01
    ratio = stars.ratio.copy()
    ratio[region[tuple(stars.at.T)] == region[region >= 0].min(), 2] *= 1.006
    found = nj.judge_colour(replace(stars, ratio=ratio), region)
    assert found.value == pytest.approx(0.6, abs=0.05) and not found.passed


def synthetic_fluxes(power=0.0, bend=0.0):
    """3000 stars over three decades whose ratio follows a power of the flux, or falls by ``bend`` in the top bin."""
    rng = np.random.default_rng(3)
    flux = nj.BRIGHTEST * 10 ** rng.uniform(-3, 0, (3000, 3))
    error = 40 / flux
    ratio = (flux / nj.BRIGHTEST) ** power * np.where(flux > nj.BRIGHTEST / 10**0.5, 1 - bend, 1)
    return nj.StarFluxes(np.zeros((3000, 2), int), flux, ratio + error * rng.standard_normal(flux.shape), error)


def test_linearity_is_judged_by_trend_and_by_bend():
    assert nj.judge_linearity(synthetic_fluxes()).value < 0.25
    trend = nj.judge_linearity(synthetic_fluxes(power=0.0015))
    assert trend.value == pytest.approx(100 * 3 * 0.0015 * np.log(10), abs=0.3) and not trend.passed
    assert not nj.judge_linearity(synthetic_fluxes(bend=0.02)).passed
