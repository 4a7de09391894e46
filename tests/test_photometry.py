"""The photometric model on synthetic coarse tiles, whose gains, offsets and noise are known."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from scenes.coarse_tiles import NOISE, coarse, given_pair, pair_of, sky_cells, tile_grid, transformed
from zemosaic_photometry import (
    PhotometryOptions,
    apply_photometric_normalization,
    black_point,
    compute_photometric_gains_and_offsets,
    coverage_gain,
    coverage_scale,
    identity_solution,
    relative_coverage_gains,
    rgb_balance_gains,
)
from zemosaic_pipeline.arrays import connected_groups
from zemosaic_pipeline.overlaps import gains
from zemosaic_pipeline.overlaps.errors_in_variables import fit_overlap
from zemosaic_pipeline.overlaps.overlap import clustered_deviation
from zemosaic_pipeline.overlaps.pairs import PairsInPassing, make_overlap, measure_pairs


def normalised(solution, tiles):
    """Every tile's cells in the common system."""
    return [apply_photometric_normalization(t.means.astype(float), *solution.row(k)) for k, t in enumerate(tiles)]


def gain_errors(solution, gain):
    """ln of the solved gains over the true ones, the mean over the tiles taken out."""
    error = np.log(solution.gain / gain)
    return error - error.mean(axis=0)


# --------------------------------------------------------------------------------------------------- one overlap


def test_two_tiles_of_noise_share_no_structure():
    relation = pair_of(np.full((3, 80, 80), 1000.0), 1.0)
    assert np.isinf(relation.log_ratio_se).all()
    assert relation.smooth_i[:, 0] == pytest.approx(relation.smooth_j[:, 0], abs=10 * NOISE)


def test_signal_to_noise_of_one():
    """A nebula as strong as the noise of a cell: least squares would find 0.6 of the ratio 1.2."""
    sky = sky_cells((100, 100), stars=0, nebula=20.0)
    pulls = []
    for seed in range(1, 9):
        relation = pair_of(sky, 1.2, seed=10 * seed, noise=20.0)
        pulls.append((relation.log_ratio - np.log(1.2)) / relation.log_ratio_se)
        assert relation.log_ratio_se.max() < 0.05
    assert abs(np.mean(pulls)) < 0.8
    assert 0.4 < np.sqrt(np.mean(np.square(pulls))) < 2


def test_seeing_is_no_gain():
    """The same stars 1.5 times as wide: a fit of the cells alone finds several percent less."""
    sharp, wide = (sky_cells((60, 60), nebula=0, width=w) for w in (0.8, 0.95))
    box = (0, 60, 0, 60)
    relation = measure_pairs([coarse(sharp, box, 1.3, seed=1), coarse(wide, box, 1.0, seed=2)])[0]
    error = relation.log_ratio - np.log(1.3)
    naive = np.log(np.std(sharp, axis=(1, 2)) / np.std(wide, axis=(1, 2)))
    assert naive.min() > 0.05
    assert np.abs(error).max() < 0.01
    assert np.ptp(error) < 0.005


def test_displacement_is_no_gain():
    sky = sky_cells((61, 61), nebula=0, width=0.8)
    moved = 0.9 * sky[:, 1:, 1:] + 0.1 * sky[:, :-1, :-1]
    box = (0, 60, 0, 60)
    relation = measure_pairs([coarse(sky[:, 1:, 1:], box, 1.3, seed=1), coarse(moved, box, 1.0, seed=2)])[0]
    assert relation.log_ratio == pytest.approx(np.log(1.3), abs=0.01)


def test_a_gradient_is_no_gain():
    """A nebula and a strong gradient along it: without a plane the gradient is taken for the nebula."""
    sky = sky_cells((60, 60), stars=0.02, nebula=50.0)
    box = (0, 60, 0, 60)
    a, b = coarse(sky, box, 1.2, seed=1), coarse(sky, box, 1.0, seed=2)
    ramp = np.linspace(-300, 300, 60, dtype=np.float32)
    relation = measure_pairs([replace(a, means=a.means + ramp), b])[0]
    assert relation.log_ratio == pytest.approx(np.log(1.2), abs=max(0.003, 4 * relation.log_ratio_se.max()))


def test_saturated_and_moved_sources_do_not_speak():
    sky = sky_cells((80, 80))
    box = (0, 80, 0, 80)
    a, b = coarse(sky, box, 1.2, seed=1), coarse(sky, box, 1.0, seed=2)
    means = np.minimum(a.means, np.quantile(a.means, 0.995))
    means[:, 20:23, 30:33] += 5000
    spoiled = measure_pairs([replace(a, means=means), b])[0]
    assert spoiled.log_ratio == pytest.approx(np.log(1.2), abs=0.004)


def test_thousands_of_cells_are_thinned_and_fast():
    sky = sky_cells((200, 200))
    box = (0, 200, 0, 200)
    a, b = coarse(sky, box, 1.2, seed=1), coarse(sky, box, seed=2)
    overlap = make_overlap(a, b, a.means, b.means, np.ones((200, 200), bool))
    assert 3000 < np.count_nonzero(overlap.used) <= 3500
    fit = fit_overlap(overlap)
    assert np.abs(np.log(fit.ratio * 1.2) / fit.error).max() < 5
    start = time.perf_counter()
    fit_overlap(overlap)
    assert time.perf_counter() - start < 0.5  # benchmarks: about 0.004


def test_neighbours_of_thinned_cells_are_counted_by_their_distance():
    """Against the sum over all pairs of cells."""
    sky = sky_cells((90, 130))
    sky[:, 40:50, 60:] = np.nan
    a, b = coarse(sky, (0, 90, 0, 130), seed=1), coarse(sky, (0, 90, 0, 130), seed=2)
    both = np.isfinite(a.means).all(axis=0)
    overlap = make_overlap(*(replace(t, sky=np.full(3, 1000.0)) for t in (a, b)), a.means, b.means, both)
    assert overlap.step == (2, 2)
    rows, columns = np.nonzero(overlap.used) * np.array([[2], [2]])
    assert both[rows, columns].all()
    taper = [np.maximum(1 - np.abs(t[:, None] - t) / 5, 0) for t in (rows, columns)]
    influence = np.random.default_rng(1).normal(size=(2, len(rows))) + 0.3
    expected = np.sqrt(np.einsum("ci,ij,cj->c", influence, taper[0] * taper[1], influence))
    assert clustered_deviation(influence, overlap) == pytest.approx(expected)


# --------------------------------------------------------------------------------------------------- the whole set


def test_standard_errors_are_honest():
    pulls, levels = [], []
    for seed in range(1, 7):
        tiles, gain, offset = tile_grid(seed)
        solution = compute_photometric_gains_and_offsets(tiles)
        pulls.append(gain_errors(solution, gain) / solution.gain_se)
        # what each tile makes of a sky of 1000
        level = (gain * 1000 + offset - solution.pivot) / solution.gain + solution.level
        levels.append(level - level.mean(axis=0))
        assert not solution.warnings
        assert solution.gain_se.max() < 0.003
    assert 0.5 < np.sqrt(np.mean(np.square(pulls))) < 2
    assert np.abs(levels).max() < NOISE


@settings(max_examples=8, deadline=None)
@given(
    factor=st.floats(0.1, 10),
    constant=st.floats(-500, 500),
    tile=st.integers(0, 3),
    order=st.permutations(range(4)),
    units=st.sampled_from([1000.0, 1 / 65535]),
)
def test_units_constants_factors_and_order_change_nothing(factor, constant, tile, order, units):
    """The mosaic changes by one scale and one offset a channel, which the gauge fixes."""
    tiles, *_ = tile_grid(1, 2, 2, size=40, step=28)
    plain = normalised(compute_photometric_gains_and_offsets(tiles), tiles)
    other = [transformed(t, factor, constant) if k == tile else t for k, t in enumerate(tiles)]
    other = [transformed(other[k], units) for k in order]
    solution = compute_photometric_gains_and_offsets(other)
    assert not solution.warnings
    found = normalised(solution, other)
    for c in range(3):
        x = np.concatenate([plain[k][c].ravel() for k in order])
        y = np.concatenate([t[c].ravel() for t in found])
        a, b = np.polyfit(x, y, 1)
        assert (y - b) / a == pytest.approx(x, abs=2e-4 * np.ptp(x))
        assert a / units == pytest.approx(factor**0.25, rel=1e-3)


def test_tiles_that_agree_stay_as_they_are():
    tiles, *_ = tile_grid(3, gain_sigma=0.0, offset_sigma=0.0)
    solution = compute_photometric_gains_and_offsets(tiles)
    assert (np.abs(np.log(solution.gain)) < 3.5 * solution.gain_se).all()
    assert np.sqrt(np.mean((np.log(solution.gain) / solution.gain_se) ** 2)) < 2
    for tile, cells in zip(tiles, normalised(solution, tiles), strict=True):
        assert cells == pytest.approx(tile.means, abs=1.0, rel=2e-3)


def test_a_nebula_that_fills_a_tile_keeps_brightness_and_colour():
    """Its own median would be taken for sky by a matching tile by tile."""
    sky = sky_cells((195, 195), nebula=20.0)
    sky[:, 45:105, 45:105] += np.array([400.0, 100.0, 50.0])[:, None, None]  # all of the middle tile
    sky = gaussian_filter(sky, (0, 2, 2)) + sky_cells((195, 195), seed=9, nebula=0) - 1000
    tiles, *_ = tile_grid(1, sky=sky)
    solution = compute_photometric_gains_and_offsets(tiles)
    cells = normalised(solution, tiles)
    step = [np.median(cells[4][c]) - np.median(cells[0][c, :40, :40]) for c in range(3)]
    truth = [np.median(sky[c, 45:105, 45:105]) - np.median(sky[c, :40, :40]) for c in range(3)]
    assert truth[0] > 300
    scale = np.polyfit(
        *(
            np.concatenate([t[0].ravel() for t in s])
            for s in ([sky[:, t.corner[0] : t.corner[0] + 60, t.corner[1] : t.corner[1] + 60] for t in tiles], cells)
        ),
        1,
    )[0]
    assert step[0] == pytest.approx(scale * truth[0], abs=2 * NOISE)
    assert step[1] / step[0] == pytest.approx(truth[1] / truth[0], abs=0.1)


def test_an_absurd_tile_is_named_and_spoils_nothing():
    tiles, gain, _ = tile_grid(2)
    tiles[4] = transformed(tiles[4], 1.0, 1e8)
    solution = compute_photometric_gains_and_offsets(tiles)
    assert np.flatnonzero(solution.excluded).tolist() == [4]
    assert [(w.kind, w.subject) for w in solution.warnings].count(("bad_tile", "tile4")) == 1
    rest = np.arange(9) != 4
    error = np.log(solution.gain / gain)[rest]
    assert np.abs(error - error.mean(axis=0)).max() < 0.01
    kept = compute_photometric_gains_and_offsets(tiles, PhotometryOptions(reject_bad_tiles=False))
    assert not kept.excluded.any()


def test_a_tile_of_another_sky_is_left_out():
    tiles, gain, _ = tile_grid(2)
    stranger = sky_cells((60, 60), seed=77, nebula=900.0)
    elsewhere = np.zeros((3, 195, 195))
    elsewhere[:, 45:105, 45:105] = stranger + np.linspace(0, 20000, 60)
    tiles[4] = coarse(elsewhere, (45, 105, 45, 105), seed=5, name="tile4")
    solution = compute_photometric_gains_and_offsets(tiles)
    rest = np.arange(9) != 4
    error = np.log(solution.gain / gain)[rest]
    assert np.abs(error - error.mean(axis=0)).max() < 0.02


def test_a_wrong_pair_that_others_contradict_is_overruled():
    tiles, gain, _ = tile_grid(2)
    pairs = measure_pairs(tiles)
    pairs[5] = replace(pairs[5], log_ratio=pairs[5].log_ratio + 0.5, smooth_i=pairs[5].smooth_i + 500)
    solution = compute_photometric_gains_and_offsets(tiles, pairs=pairs)
    assert np.abs(gain_errors(solution, gain)).max() < 0.02
    right = compute_photometric_gains_and_offsets(tiles)
    assert solution.level - solution.level[0] == pytest.approx(right.level - right.level[0], abs=NOISE)


def test_groups_that_do_not_touch_are_named_and_matched_by_their_sky():
    sky = sky_cells((60, 300), nebula=20.0)
    boxes = [(0, 60, 0, 60), (0, 60, 45, 105), (0, 60, 150, 210), (0, 60, 195, 255), (0, 60, 270, 300)]
    tiles = [coarse(sky, box, 1 + 0.1 * k, 100.0 * k, seed=k, name=f"tile{k}") for k, box in enumerate(boxes)]
    solution = compute_photometric_gains_and_offsets(tiles)
    assert solution.component.tolist() == [0, 0, 1, 1, 2]
    assert sum(w.kind == "second_island" and "tile2" in w.text for w in solution.warnings) == 1
    assert sum(w.kind == "no_overlap" and "tile4" in w.text for w in solution.warnings) == 1
    assert np.isfinite(solution.gain).all() and np.isfinite(solution.level).all()
    assert (solution.gain[4] == 1).all()
    middle = [np.median(cells) for cells in normalised(solution, tiles)]
    assert np.ptp(middle) < 60  # as they came: 500 apart


def test_a_starless_overlap_leaves_the_gain_and_matches_the_background():
    sky = np.full((3, 60, 100), 1000.0)
    sky[:, :, 70:] += sky_cells((60, 30), nebula=0) - 1000
    tiles = [
        coarse(sky, (0, 60, 0, 60), 1.3, 40.0, seed=1, name="left"),
        coarse(sky, (0, 60, 40, 100), seed=2, name="right"),
    ]
    solution = compute_photometric_gains_and_offsets(tiles)
    assert (solution.gain == 1).all() and np.isinf(solution.gain_se).all()
    assert {w.subject for w in solution.warnings if w.kind == "gain_undetermined"} == {"left", "right"}
    left, right = normalised(solution, tiles)
    assert np.median(left[:, :, 40:], axis=(1, 2)) == pytest.approx(np.median(right[:, :, :20], axis=(1, 2)), abs=1)
    assert np.abs(solution.step_after).max() < 0.1 < np.abs(solution.pairs[0].step_before).min()


def test_a_dark_channel_takes_the_gain_of_the_others_with_its_own_error():
    tiles, gain, _ = tile_grid(1, 1, 2)
    dark = [replace(t, means=np.concatenate([t.means[:2], np.full((1, 60, 60), 5.0, np.float32)])) for t in tiles]
    solution = compute_photometric_gains_and_offsets(dark)
    assert not solution.warnings
    assert np.abs(gain_errors(solution, gain)[:, :2]).max() < 0.01 and solution.gain_se[:, :2].max() < 0.01
    logs = np.log(solution.gain)
    assert (np.sort(logs, axis=1)[:, 1] == logs[:, 2]).all(), "between those of the others"
    assert (solution.gain_se[:, 2] > 0.1).all()


@pytest.mark.parametrize("value", [0.0, 5.0])
def test_a_constant_channel_beside_two_that_are_known(value):
    """A filter that shows nothing, or was never there: blue of panels taken in two colours."""
    tiles, gain, _ = tile_grid(1)
    blank = np.full((1, 60, 60), value, np.float32)
    still = np.array([1, 1, 0.0])
    tiles = [
        replace(
            t,
            means=np.concatenate([t.means[:2], blank]),
            noise=t.noise * still,
            pixel_noise=t.pixel_noise * still,
            sky=np.append(t.sky[:2], value),
        )
        for t in tiles
    ]
    for order in (0, 2):
        solution = compute_photometric_gains_and_offsets(tiles, PhotometryOptions(gradient_order=order))
        assert not solution.warnings
        assert np.abs(gain_errors(solution, gain)[:, :2]).max() < 0.01
        assert np.isfinite(solution.level).all() and np.isfinite(solution.gradient).all()


def test_tiles_that_are_all_but_free_of_noise_spoil_no_others():
    sky = sky_cells((195, 195))
    tiles, gain, offset = tile_grid(1, sky=sky)
    right = sky_error(compute_photometric_gains_and_offsets(tiles), tiles, sky, gain)
    for k in (0, 1):
        y, x = tiles[k].corner
        quiet = sky[:, y : y + 60, x : x + 60] * gain[k][:, None, None] + offset[k][:, None, None]
        tiles[k] = replace(
            tiles[k],
            means=quiet.astype(np.float32),
            noise=tiles[k].noise * 1e-4,
            pixel_noise=tiles[k].pixel_noise * 1e-4,
        )
    found = sky_error(compute_photometric_gains_and_offsets(tiles), tiles, sky, gain)
    assert np.median(found, axis=(2, 3)) == pytest.approx(np.median(right, axis=(2, 3)), abs=0.3)


def test_pairs_of_a_higher_order_serve_a_lower_one():
    tiles, *_ = tilted_grid()
    pairs = measure_pairs(tiles)
    flat = compute_photometric_gains_and_offsets(tiles, PhotometryOptions(gradient_order=0), pairs)
    assert not flat.gradient.any() and flat.has_gradients is None
    with pytest.raises(ValueError, match="lower order"):
        compute_photometric_gains_and_offsets(tiles, pairs=measure_pairs(tiles, order=0))


def test_gradients_far_beyond_the_noise_are_named():
    steep, *_ = tilted_grid(slope=3000.0)
    assert "steep_gradients" in [w.kind for w in compute_photometric_gains_and_offsets(steep).warnings]


def test_one_tile_and_none():
    tile = tile_grid(1)[0][0]
    solution = compute_photometric_gains_and_offsets([tile])
    assert normalised(solution, [tile])[0] == pytest.approx(tile.means)
    assert not solution.warnings and solution.has_gradients is None
    assert np.isnan(solution.sky_error).all() and np.isinf(solution.offset_se).all()
    with pytest.raises(ValueError, match="channels"):
        compute_photometric_gains_and_offsets([])


def test_constant_tiles_stay_constant():
    tiles = [replace(t, means=np.full_like(t.means, 500.0), sky=np.full(3, 500.0)) for t in tile_grid(1, 2, 2)[0]]
    solution = compute_photometric_gains_and_offsets(tiles)
    for cells in normalised(solution, tiles):
        assert cells == pytest.approx(np.full_like(cells, 500.0), rel=1e-6)


def tilted_grid(seed=1, slope=5.0, sky=None, **more):
    """As `tile_grid`, with planes (rise of ``slope`` times the noise of a pixel, rms) added, and these (K, C, 5)."""
    tiles, gain, offset = tile_grid(seed, sky=sky, **more)
    rng = np.random.default_rng(seed + 2000)
    planes = np.zeros((len(tiles), 3, 5))
    planes[:, :, :2] = rng.normal(0, slope * 4 * NOISE / 2, planes[:, :, :2].shape) / np.sqrt(2)
    u = (np.arange(60) - 29.5) / 30
    tilted = [
        replace(t, means=t.means + (p[:, 0, None, None] * u + p[:, 1, None, None] * u[:, None]).astype(np.float32))
        for t, p in zip(tiles, planes, strict=True)
    ]
    return tilted, gain, offset, planes


def sky_error(solution, tiles, sky, gain):
    """Normalised cells of all tiles less the sky in the mosaic's own scale, in the noise of a pixel: (K, C, h, w)."""
    scale = np.exp(np.log(gain / solution.gain).mean(axis=0))[:, None, None]
    size = tiles[0].means.shape[1:]
    error = [
        cells - scale * sky[:, t.corner[0] : t.corner[0] + size[0], t.corner[1] : t.corner[1] + size[1]]
        for t, cells in zip(tiles, normalised(solution, tiles), strict=True)
    ]
    error = np.array(error) / (4 * NOISE)
    return error - np.median(error, axis=(0, 2, 3))[:, None, None]


def without_quadratic(error, tiles):
    """Medians (C, 9 K) over ninths of the tiles, one quadratic over the whole mosaic taken out of each channel."""
    parts = error.reshape(*error.shape[:2], 3, 20, 3, 20)
    medians = np.median(parts, axis=(3, 5))
    y, x = (
        np.array([t.corner[axis] for t in tiles])[:, None, None] + 20 * np.arange(3).reshape((3, 1) if axis == 0 else 3)
        for axis in (0, 1)
    )
    y, x = ((at - 60) / 60 for at in np.broadcast_arrays(y, x))
    columns = np.stack([np.ones(y.shape), y, x, y * y, x * y, x * x], axis=-1).reshape(-1, 6)
    out = []
    for c in range(error.shape[1]):
        values = medians[:, c].reshape(-1)
        out.append(values - columns @ np.linalg.lstsq(columns, values, rcond=None)[0])
    return np.array(out)


@pytest.mark.parametrize("slope", [0.0, 1.0, 20.0])
def test_planes_in_the_tiles_leave_the_mosaic_but_for_a_quadratic_over_it(slope):
    sky = sky_cells((195, 195))
    tiles, gain, _, _ = tilted_grid(slope=slope, sky=sky)
    solution = compute_photometric_gains_and_offsets(tiles)
    assert np.abs(gain_errors(solution, gain)).max() < 0.005
    assert solution.has_gradients == (slope > 0)
    assert np.abs(without_quadratic(sky_error(solution, tiles, sky, gain), tiles)).max() < 0.15
    levels = compute_photometric_gains_and_offsets(tiles, PhotometryOptions(gradient_order=0))
    if slope:
        assert np.abs(without_quadratic(sky_error(levels, tiles, sky, gain), tiles)).max() > 0.3 * slope
    assert not levels.gradient.any()


def test_the_order_of_gradients_is_what_is_asked_for():
    tiles, _, _, planes = tilted_grid()
    one, two = (compute_photometric_gains_and_offsets(tiles, PhotometryOptions(gradient_order=n)) for n in (1, 2))
    assert one.gradient[:, :, :2].any() and not one.gradient[:, :, 2:].any() and len(one.gradient_sizes) == 1
    assert two.gradient[:, :, 2:].any() and len(two.gradient_sizes) == 3
    for found in (one, two):
        assert np.corrcoef(found.gradient[:, :, :2].ravel(), planes[:, :, :2].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("radius", [25, 60])
def test_a_nebula_is_no_gradient(radius):
    """A disc within a tile, or larger than one, that ends in the midst of others."""
    y, x = np.mgrid[:195, :195] - 75
    disc = gaussian_filter((np.hypot(y, x) < radius) * 20.0 * 4 * NOISE, 1)
    plain = sky_cells((195, 195), nebula=20.0)
    for slope in (0.0, 5.0):
        tiles, gain, _, _ = tilted_grid(slope=slope, sky=plain)
        bright, *_ = tilted_grid(slope=slope, sky=plain + disc)
        errors = [
            without_quadratic(sky_error(compute_photometric_gains_and_offsets(t), t, s, gain), t)
            for t, s in ((tiles, plain), (bright, plain + disc))
        ]
        assert np.sqrt(np.mean((errors[1] - errors[0]) ** 2)) < 0.02
        assert np.abs(errors[1] - errors[0]).max() < 0.1


def test_a_lone_tile_has_no_gradient():
    sky = sky_cells((60, 300))
    boxes = [(0, 60, 0, 60), (0, 60, 45, 105), (0, 60, 200, 260)]
    tiles = [coarse(sky, box, seed=k, name=f"tile{k}") for k, box in enumerate(boxes)]
    ramp = np.linspace(0, 300, 60, dtype=np.float32)
    tiles = [replace(t, means=t.means + (-1) ** k * ramp) for k, t in enumerate(tiles)]
    solution = compute_photometric_gains_and_offsets(tiles)
    assert solution.gradient[:2].any() and not solution.gradient[2].any()


def test_offsets_only():
    tiles, _, offset = tile_grid(1, gain_sigma=0.0)
    solution = compute_photometric_gains_and_offsets(tiles, PhotometryOptions(match_gain=False))
    assert (solution.gain == 1).all()
    error = solution.level - solution.pivot + offset
    assert error - error.mean(axis=0) == pytest.approx(0, abs=0.5)
    assert solution.offset == pytest.approx(solution.pivot - solution.level)


def test_many_pairs_solve_quickly_and_right():
    """200 tiles, 6,500 given pairs, one in fifty of them wrong."""
    rng = np.random.default_rng(1)
    truth = rng.normal(0, 0.15, (200, 3))
    blank = tile_grid(1, 1, 1)[0][0]
    pairs = []
    for n, (i, j) in enumerate(rng.permutation(np.stack(np.triu_indices(200, 1), axis=1))[:6500]):
        wrong = 1.0 if n % 50 == 0 else 0.0
        ratio = truth[i] - truth[j] + rng.normal(0, 0.005, 3) + wrong
        pairs.append(given_pair(int(i), int(j), ratio, np.full(3, 0.005)))
    start = time.perf_counter()
    solution = compute_photometric_gains_and_offsets([blank] * 200, PhotometryOptions(gradient_order=0), pairs)
    assert time.perf_counter() - start < 5  # benchmarks/photometry.py: 0.6
    error = np.log(solution.gain) - (truth - truth.mean(axis=0))
    assert np.sqrt(np.mean(error**2)) < 2 * 0.005 / np.sqrt(65)


def test_many_tiles_are_solved_as_few(monkeypatch):
    """The full and the sparse solver find the same."""
    tiles, *_ = tile_grid(2)
    full = compute_photometric_gains_and_offsets(tiles)
    monkeypatch.setattr(gains, "DENSE_TILES", 0)
    sparse = compute_photometric_gains_and_offsets(tiles)
    for name in ("gain", "gain_se", "level", "offset_se"):
        assert getattr(sparse, name) == pytest.approx(getattr(full, name), rel=1e-7, abs=1e-7)


@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=40))
def test_connected_groups_are_scipys(count, pairs):
    pairs = [(i % count, j % count) for i, j in pairs]
    graph = coo_array((np.ones(len(pairs)), np.array(pairs, int).reshape(-1, 2).T), shape=(count, count))
    expected = connected_components(graph, directed=False)[1]
    assert connected_groups(count, pairs).tolist() == expected.tolist()


def test_the_model_is_at_hand_without_scipy():
    """Which takes a fifth of a second to import."""
    code = "import sys, zemosaic_pipeline.phases.phase5_normalise; sys.exit(any(name.startswith('scipy') for name in sys.modules))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_identity_solution_changes_nothing():
    data = np.random.default_rng(1).normal(size=(3, 7, 5)).astype(np.float32)
    data[1, 2, 3] = np.nan
    same = identity_solution(1, 3)
    np.testing.assert_array_equal(
        apply_photometric_normalization(data, same.gain[0], same.pivot[0], same.level[0]), data
    )


@given(st.lists(st.floats(-50, 50), min_size=15, max_size=15), st.integers(1, 8), st.sampled_from([(9, 5), (6, 14)]))
def test_rows_of_a_tile_lose_the_gradient_of_the_whole(numbers, cut, shape):
    """Against the polynomial written out pixel by pixel; cut into rows as the whole."""
    gradient = np.reshape(numbers, (3, 5))
    data = np.zeros((3, *shape))
    half = max(shape) / 2
    for (c, y, x), _ in np.ndenumerate(data):
        u, v = (x - (shape[1] - 1) / 2) / half, (y - (shape[0] - 1) / 2) / half
        squares = u * u - (shape[1] / 2 / half) ** 2 / 3, v * v - (shape[0] / 2 / half) ** 2 / 3
        data[c, y, x] = np.dot(gradient[c], [u, v, squares[0], u * v, squares[1]])
    gain, zero = [2.0, 0.5, 1.0], [0.0] * 3
    whole = apply_photometric_normalization(data, gain, zero, [7.0] * 3, gradient)
    assert whole == pytest.approx(np.full_like(data, 7.0), abs=1e-9)
    cut = min(cut, shape[0] - 1)
    parts = [
        apply_photometric_normalization(data[:, a:b], gain, zero, [7.0] * 3, gradient, first_row=a, height=shape[0])
        for a, b in ((0, cut), (cut, shape[0]))
    ]
    assert np.concatenate(parts, axis=1) == pytest.approx(whole, abs=1e-12)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=3), st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_normalisation_is_the_stated_formula(gain, pivot, level):
    data = np.linspace(-100, 5000, 60).reshape(3, 4, 5)
    out = apply_photometric_normalization(data, gain, [pivot] * 3, [level] * 3)
    assert out == pytest.approx((data - pivot) / np.array(gain)[:, None, None] + level, rel=1e-9, abs=1e-6)


# ----------------------------------------------------------------------------------------------- for the eye


def test_coverage_scale_by_hand():
    coverage = np.array([[0.0, 1.0, 2.0, 8.0]])
    support = np.array([[0.5, 1.0, 1.0, 1.0]])

    def blur(a):
        return support if (a <= 1).all() else np.array([[1.0, 2.0, 3.0, 3.0]])

    scale, smooth = coverage_scale(coverage, blur)
    assert smooth.tolist() == [[2.0, 2.0, 3.0, 3.0]]
    assert scale.tolist() == [[1.0, 2.0, 1.5, 0.5]]  # nothing seen; 2/1; 3/2; 3/8 clipped


def test_coverage_gain_by_hand():
    scale = np.full((100, 100), 0.9)
    scale[:, :30] = 1.5
    smooth, coverage = np.full((100, 100), 3.0), np.ones((100, 100))
    footprint = np.ones((100, 100), bool)
    clip = (0.85, 1.18)
    assert coverage_gain(scale, smooth, coverage, footprint, clip) == 0.9
    assert coverage_gain(scale, smooth, coverage, footprint & (np.arange(100) < 30), clip) == 1.18
    assert coverage_gain(scale - 0.3, smooth, coverage, footprint, clip) == 0.85
    assert coverage_gain(scale, np.full((100, 100), 1.9), coverage, footprint, clip) == 1.0  # B < 2
    assert coverage_gain(scale, smooth, 0 * coverage, footprint, clip) == 1.0
    few = np.zeros((100, 100), bool)
    few[0, 30:94] = True
    assert coverage_gain(scale, smooth, coverage, few, clip) == 0.9  # 64 pixels qualify
    few[0, 93] = False
    assert coverage_gain(scale, smooth, coverage, few, clip) == 1.0  # 63 do not
    wide = np.ones((400, 400), bool)
    seen = np.zeros((400, 400))
    seen.flat[:159] = 1  # fewer than 0.1 % of 160,000
    assert coverage_gain(np.full((400, 400), 0.9), np.full((400, 400), 3.0), seen, wide, clip) == 1.0
    seen.flat[:160] = 1
    assert coverage_gain(np.full((400, 400), 0.9), np.full((400, 400), 3.0), seen, wide, clip) == 0.9


def test_coverage_gains_are_relative_to_their_median():
    assert relative_coverage_gains([0.85, 0.85, 0.85]).tolist() == [1, 1, 1]  # a perfect mosaic is not dimmed
    assert relative_coverage_gains([0.9, 1.0, 1.1]) == pytest.approx([0.9, 1.0, 1.1])
    assert relative_coverage_gains([]).size == 0


def test_rgb_balance_by_hand():
    assert rgb_balance_gains([100.0, 200.0, 400.0], (0.1, 10)) == pytest.approx([2.0, 1.0, 0.5])
    # 2 exceeds the clip: all are drawn to the power that makes it 1.5
    power = np.log(1.5) / np.log(2)
    assert rgb_balance_gains([100.0, 200.0, 400.0], (0.2, 1.5)) == pytest.approx([1.5, 1.0, 0.5**power])
    assert rgb_balance_gains([100.0, 200.0, 400.0], (0.8, 3)) == pytest.approx([1 / 0.8, 1.0, 0.8])
    assert rgb_balance_gains([100.0, -1.0, 400.0], (0.1, 10)).tolist() == [1, 1, 1]
    assert rgb_balance_gains([100.0, np.nan, 400.0], (0.1, 10)).tolist() == [1, 1, 1]
    assert rgb_balance_gains([7.0, 7.0, 7.0], (0.5, 2)) == pytest.approx([1, 1, 1])


@given(st.lists(st.floats(1, 1e4), min_size=3, max_size=3))
def test_rgb_balance_keeps_the_brightness_and_the_clip(sky):
    factors = rgb_balance_gains(np.array(sky), (0.5, 2.0))
    assert np.prod(factors) == pytest.approx(1)
    assert ((factors >= 0.5 - 1e-9) & (factors <= 2 + 1e-9)).all()


def test_black_point_by_hand():
    samples = np.append(np.arange(101.0), [np.nan, np.inf])
    assert black_point(samples, 5.0) == 5.0
    assert black_point(np.array([np.nan]), 5.0) == 0.0


# ---------------------------------------------------------------------------------------------- frames of one field


def solved_in_passing(tiles, hubs=()):
    with PairsInPassing(len(tiles), hubs) as pairs:
        for k in reversed(range(len(tiles))):
            pairs.add(k, tiles[k])
        return compute_photometric_gains_and_offsets(tiles, pairs=pairs.relations())


def test_pairs_in_passing_are_all_pairs():
    tiles, _, _ = tile_grid()
    passing, whole = solved_in_passing(tiles), compute_photometric_gains_and_offsets(tiles)
    assert len(passing.pairs) == len(whole.pairs) == 20
    assert np.array_equal(passing.gain, whole.gain) and np.array_equal(passing.level, whole.level)


def test_hubs_measure_few_pairs_and_find_the_same_gains():
    sky = sky_cells((80, 80), seed=4)
    rng = np.random.default_rng(8)
    gain = np.exp(rng.normal(0, 0.05, (12, 3)))
    tiles = [coarse(sky, (0, 80, 0, 80), gain[k], 10 * k, seed=k, name=f"f{k}") for k in range(12)]
    solution = solved_in_passing(tiles, hubs=[2, 5, 7])
    assert len(solution.pairs) == 9 * 3 + 3
    truth = np.log(gain) - np.log(gain).mean(axis=0)
    assert np.abs(np.log(solution.gain) - truth).max() < 0.005


def test_hubs_never_tear_the_graph_apart():
    """A chain of tiles, each of which meets its neighbours only."""
    tiles, _, _ = tile_grid(rows=1, columns=7)
    assert len(solved_in_passing(tiles, hubs=[0, 1]).pairs) == 6
