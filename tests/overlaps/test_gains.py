"""Gains of tiles: standard errors that hold, vague and weak evidence, tiles in other units."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from scenes.coarse_tiles import NOISE, coarse, given_pair, tile_grid, transformed
from scenes.small_scene import write_scene
from zemosaic_photometry import compute_photometric_gains_and_offsets
from zemosaic_pipeline.overlaps import gains
from zemosaic_pipeline.overlaps.errors_in_variables import NOISE_IN_STENCILS, make_design
from zemosaic_pipeline.overlaps.pairs import make_overlap, measure_pairs
from zemosaic_pipeline.overlaps.standard_errors import hills, scatter_of_stars
from zemosaic_pipeline.synthetic.panels import Layout
from zemosaic_worker import run_hierarchical_mosaic

RATIO = 1.2
#: Units of a camera's 0..1 beside 16 bits, and the reverse.
OTHER_UNITS = (1 / 65535, 65535.0)


def rms(values):
    return np.sqrt(np.mean(np.square(values)))


# ------------------------------------------------------------------------------------------------- stars that differ


def few_stars(number, seed, scatter=0.03, shape=(50, 66)):
    """Two tiles of the same stars, whose fluxes differ between them, independently in each channel."""
    rng = np.random.default_rng([seed, number])
    y, x = (rng.uniform(3, n - 3, number) for n in shape)
    down, across = (
        np.exp(-((np.arange(n)[:, None] - at) ** 2) / (2 * 0.7**2)) for n, at in zip(shape, (y, x), strict=True)
    )
    flux = rng.uniform(2e4, 1e5, number) / (2 * np.pi * 0.7**2)
    tiles = []
    for gain in (RATIO, 1.0):
        seen = flux * np.exp(rng.normal(0, scatter / np.sqrt(2), (3, number)))
        sky = np.einsum("ys,cs,xs->cyx", down, seen, across) + 1000
        tiles.append(coarse(sky, (0, shape[0], 0, shape[1]), gain, seed=rng.integers(1 << 30)))
    return tiles


def pulls(pairs):
    """Errors (P, C) of the log ratios in units of their standard errors, each pair being a run of its own."""
    found = [gains.log_ratios([pair], 3) for pair in pairs]
    return np.array([(ratio[0] - np.log(RATIO)) / error[0] for ratio, error in found])


@pytest.mark.parametrize(("number", "low"), [(1, 0.0), (3, 0.7), (10, 0.7), (30, 0.7), (100, 0.7)])
def test_errors_hold_where_few_stars_decide(number, low):
    found = pulls([measure_pairs(few_stars(number, seed))[0] for seed in range(25)])
    assert low < rms(found) < 1.3
    assert np.abs(found).max() < 5


def star_pair(i, j, number, scatter, error=0.001):
    pair = given_pair(i, j, np.zeros(3), np.full(3, error))
    one = np.ones(3)
    return replace(pair, stars=number * one, star_scatter=scatter * one, star_noise=0.002 * one)


def test_stars_that_agree_leave_the_errors_as_they_are():
    pairs = measure_pairs(tile_grid(2)[0])
    own = np.array([pair.log_ratio_se for pair in pairs])
    assert gains.star_errors(pairs, 3) == pytest.approx(0, abs=2e-4)
    assert gains.log_ratios(pairs, 3)[1] == pytest.approx(np.hypot(own, gains.LOG_RATIO_FLOOR), rel=0.05)


def test_a_single_star_scatters_as_those_of_the_other_pairs():
    """Where there are none as was expected."""
    pairs = [star_pair(k, k + 1, 50, 0.06) for k in range(10)] + [star_pair(10, 11, 1, 0.0)]
    error = gains.star_errors(pairs, 3)
    assert error[:10] == pytest.approx(0.06 / np.sqrt(50), rel=0.05)
    assert error[10] == pytest.approx(0.06, rel=0.05)
    assert gains.star_errors(pairs[10:], 3) == pytest.approx(gains.STAR_SCATTER, rel=0.05)


# ------------------------------------------------------------------------------------------ channels, weak and alone


def weak_nebula(seed, size=80, strength=(0.7, 0.85, 0.46)):
    """Two tiles of a nebula, in units of the noise of a smoothed cell."""
    rng = np.random.default_rng(seed)
    nebula = gaussian_filter(rng.normal(size=(size, size)), 3, mode="wrap")
    sky = 1000 + np.multiply.outer(np.array(strength) * NOISE * 6 / 16, nebula / nebula.std())
    return [coarse(sky, (0, size, 0, size), gain, seed=rng.integers(1 << 30)) for gain in (RATIO, 1.0)]


def correlations(tiles):
    overlap = make_overlap(*tiles, *(t.means for t in tiles), np.ones(tiles[0].fraction.shape, bool))
    return np.array([np.corrcoef(x, y)[0, 1] for x, y in zip(overlap.x, overlap.y, strict=True)])


def test_distortions_are_taken_from_the_noise_too():
    """How a smoothed cell's noise correlates with what they make of it."""
    box = (0, 300, 0, 300)
    tiles = [coarse(np.full((1, 300, 300), 1000.0), box, seed=seed) for seed in (1, 2)]
    overlap = make_overlap(*tiles, *(t.means for t in tiles), np.ones((300, 300), bool))
    same = replace(overlap, y=overlap.x, image_y=overlap.image_x)
    design = make_design(same, np.ones(1), np.zeros((0, overlap.x.shape[1])))[0]
    x = design[0] - design[0].mean()
    assert design[2:-1] @ x / (x @ x) == pytest.approx(NOISE_IN_STENCILS, rel=0.1, abs=0.05)


def cropped(tile, part):
    edge = round(part * len(tile.fraction))
    inner = (..., slice(edge, len(tile.fraction) - edge), slice(edge, tile.fraction.shape[1] - edge))
    return replace(tile, corner=(edge, edge), means=tile.means[inner], fraction=tile.fraction[inner])


def test_structure_below_the_noise_gives_ratios_whose_errors_hold():
    scenes = [weak_nebula(seed) for seed in range(25)]
    assert np.mean([correlations(tiles) for tiles in scenes], axis=0) == pytest.approx([0.34, 0.43, 0.18], abs=0.03)
    found = pulls([measure_pairs(tiles)[0] for tiles in scenes])
    assert 0.7 < rms(found) < 1.3
    assert np.abs(found.mean(axis=0)).max() < 0.6


@pytest.mark.parametrize("seed", range(4))
def test_cells_at_the_edge_decide_nothing(seed):
    tiles = weak_nebula(seed, size=100)
    for part in (0, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05):
        pair = measure_pairs([cropped(tile, part) for tile in tiles])[0]
        ratio, error = gains.log_ratios([pair], 3)
        assert (pair.log_ratio_se < 0.25).all() and (error < 0.2).all()
        assert (np.abs(ratio - np.log(RATIO)) < 4 * error).all()


def test_channels_that_disagree_keep_their_own_ratios():
    own = np.array([0.3, 0.0, -0.3])
    ratio, _ = gains.log_ratios([given_pair(0, 1, own, np.full(3, 0.01))], 3)
    assert ratio[0] == pytest.approx(own, abs=1e-3)


def test_a_channel_takes_nothing_from_itself():
    """Alone it keeps its ratio and error; unknown, it takes the ratio of the others."""
    ratio, error = gains.log_ratios([given_pair(0, 1, np.array([0.5]), np.array([0.25]))], 1)
    assert (ratio[0, 0], error[0, 0]) == pytest.approx((0.5, 0.25), rel=1e-4)
    ratio, error = gains.log_ratios([given_pair(0, 1, np.array([0.5, 9.0]), np.array([0.04, np.inf]))], 2)
    assert ratio[0] == pytest.approx(0.5) and error[0] == pytest.approx([0.04, np.hypot(0.3, 0.04)], rel=1e-3)
    ratio, error = gains.log_ratios([given_pair(0, 1, np.zeros(2), np.full(2, np.inf))], 2)
    assert np.isinf(error).all() and np.isfinite(ratio).all()


# -------------------------------------------------------------------------------------------------------- other units


@pytest.mark.parametrize("factor", OTHER_UNITS)
@pytest.mark.parametrize("odd", [0, 4])
def test_one_tile_in_other_units(factor, odd):
    tiles, gain, _ = tile_grid(2)
    tiles[odd], gain[odd] = transformed(tiles[odd], factor), factor * gain[odd]
    solution = compute_photometric_gains_and_offsets(tiles)
    assert not solution.warnings and not solution.excluded.any()
    rest = np.arange(9) != odd
    assert_gains(solution.gain, solution.gain_se, gain, rest)


def assert_gains(found, error, true, usual):
    """All within 3 standard errors, the usual ones about 1."""
    assert np.exp(np.log(found[usual]).mean(axis=0)) == pytest.approx(1, abs=0.01)
    wrong = np.log(found / true)
    assert (np.abs(wrong - wrong.mean(axis=0)) < 3 * error).all()


@pytest.mark.parametrize(("count", "odd"), [(2, [0]), (2, [1]), (4, [1, 2])])
def test_as_many_tiles_in_other_units(count, odd):
    """Those with the larger gains are the usual ones."""
    tiles, gain, _ = tile_grid(2, rows=count // 2, columns=2)
    for k in odd:
        tiles[k], gain[k] = transformed(tiles[k], OTHER_UNITS[0]), OTHER_UNITS[0] * gain[k]
    solution = compute_photometric_gains_and_offsets(tiles)
    assert not solution.warnings
    usual = np.delete(solution.pivot, odd, axis=0)
    assert np.median(solution.level, axis=0) == pytest.approx(np.median(usual, axis=0)), "their background is kept"
    assert_gains(solution.gain, solution.gain_se, gain, ~np.isin(np.arange(count), odd))


@pytest.mark.parametrize("units", [{3: 1 / 65535}, {k: 1 / 65535 for k in (0, 1, 2, 4, 5)}], ids=["one", "all but one"])
def test_panels_in_other_units_through_the_whole_worker(tmp_path, units):
    layout = Layout(rows=2, columns=3, shape=(96, 128), overlap=0.4, noise=2.0, rotation_deg=4.0, units=units)
    panels = write_scene(tmp_path / "in", layout=layout)
    report = run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out", gpu="off").report
    assert report["warnings"] == [] and report["set_aside"] == []
    found, error = (np.array([tile[key] for tile in report["tiles"]]) for key in ("gain", "ln_gain_se"))
    assert_gains(found, error, np.stack([panel.gain for panel in panels]), np.arange(6) != 3)


@given(
    st.lists(st.floats(-1.5, 1.5), min_size=3, max_size=20), st.lists(st.sampled_from([-22.0, -7.0, 9.0]), max_size=2)
)
def test_tiles_in_other_units_take_no_part_in_the_gauge(usual, far):
    x = np.array([*usual, *far])
    shifted = gains.gauged(np.append(x, 5.0), np.append(np.zeros(len(x), int), 1))
    assert shifted[: len(usual)].mean() == pytest.approx(0, abs=1e-9)
    assert np.ptp(shifted[:-1] - x) < 1e-9 and shifted[-1] == 0, "each group is shifted as a whole"


# ---------------------------------------------------------------------------------------------------------- vague tiles


def links(rows, columns):
    at = np.arange(rows * columns).reshape(rows, columns)
    ends = [(at[:, :-1], at[:, 1:]), (at[:-1], at[1:])]
    return [(int(i), int(j)) for one, other in ends for i, j in zip(one.ravel(), other.ravel(), strict=True)]


def vague_tiles(seed):
    """A grid of 6 by 10 tiles, the pairs of 20 of which say little."""
    vague = set(np.random.default_rng(seed).choice(60, 20, replace=False).tolist())
    return pairs_of(links(6, 10), [0.2 if vague & set(edge) else 0.004 for edge in links(6, 10)], seed)


def weak_link(seed):
    """A chain of 60 tiles that holds together by little in one place, and by very little near an end."""
    return pairs_of(links(1, 60), [{24 + seed: 0.2, 55: 0.3}.get(k, 0.004) for k in range(59)], seed)


def random_walk(seed):
    """A chain of 60 tiles, each a little vaguer than the last."""
    return pairs_of(links(1, 60), [0.03] * 59, seed)


def pairs_of(edges, errors, seed):
    """Pairs of tiles of known gains, whose errors scatter by a third."""
    rng = np.random.default_rng(seed)
    truth = rng.normal(0, 0.15, (1 + np.max(edges), 3))
    pairs = []
    for (i, j), error in zip(edges, errors, strict=True):
        own = error * rng.uniform(0.7, 1.3, 3)
        pairs.append(given_pair(i, j, truth[i] - truth[j] + rng.normal(0, own), own))
    return pairs


def one_at_a_time(pairs, count, limit):
    """Gains and errors of what remains as the worst tile is taken out until none is vague, and how many were."""
    for taken in range(count):
        ratio, error = gains.log_ratios(pairs, 3)
        found = gains.gains_of_linked(np.array([(p.i, p.j) for p in pairs]).reshape(-1, 2), ratio, error, count)
        score = np.nan_to_num(gains.pooled_error(found[1]), posinf=0.0)
        if score.max() <= limit:
            return *found, taken
        pairs = [p for p in pairs if int(np.argmax(score)) not in (p.i, p.j)]
    raise AssertionError("no end")


@pytest.mark.parametrize(("scene", "saved"), [(vague_tiles, 2), (weak_link, 1), (random_walk, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_vague_tiles_are_taken_out_together_as_one_at_a_time(monkeypatch, scene, saved, seed):
    pairs = scene(seed)
    gain, error, taken = one_at_a_time(pairs, 60, 0.05)
    solves, solve = [], gains.gains_of_linked
    monkeypatch.setattr(gains, "gains_of_linked", lambda *given: solves.append(1) or solve(*given))
    found, found_error = gains.solve_gains(pairs, 60, 3, 0.05)
    out = np.isinf(found_error)
    assert taken >= 15 and np.array_equal(out, np.isinf(error)) and (out.all(axis=1) == out.any(axis=1)).all()
    assert (found[out] == 0).all() and found == pytest.approx(gain, abs=1e-6)
    assert len(solves) <= 1 + taken / saved


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2), st.permutations(range(60)), st.randoms(use_true_random=False))
def test_numbers_order_and_direction_of_pairs_change_nothing(seed, number, random):
    pairs = vague_tiles(seed)
    found, error = gains.solve_gains(pairs, 60, 3, 0.05)
    other = [replace(p, i=number[p.i], j=number[p.j]) for p in pairs]
    other = [replace(p, i=p.j, j=p.i, log_ratio=-p.log_ratio) if random.random() < 0.5 else p for p in other]
    random.shuffle(other)
    again, again_error = gains.solve_gains(other, 60, 3, 0.05)
    assert again[number] == pytest.approx(found, abs=1e-6)
    assert again_error[number] == pytest.approx(error, rel=1e-6)


# ------------------------------------------------------------------------------------------------------ stars as hills


def test_hills_are_climbed_to_the_highest_neighbour():
    image = np.full((14, 17), -1.0)
    image[1:-1, 1:-1] = np.random.default_rng(3).uniform(size=(12, 15))

    def peak(y, x):
        block = image[y - 1 : y + 2, x - 1 : x + 2]
        down, across = np.unravel_index(np.argmax(block), block.shape)
        return y * 17 + x if (down, across) == (1, 1) else peak(y + down - 1, x + across - 1)

    expected = [[peak(y, x) for x in range(1, 16)] for y in range(1, 13)]
    assert hills(image)[1:-1, 1:-1].tolist() == expected


def test_two_stars_contradict_one_another():
    """One is brighter by 4 %, the other, four times as heavy, fainter by 1 %: the fit lies between, as they pull."""
    box = (0, 30, 0, 40)
    tiles = [coarse(np.full((2, 30, 40), 1000.0), box, seed=seed) for seed in (1, 2)]
    overlap = make_overlap(*tiles, *(t.means for t in tiles), np.ones((30, 40), bool))
    y, x = np.mgrid[:30, :40]
    blobs = [weight * np.exp(-((y - 14.6) ** 2 + (x - at) ** 2) / 4) for weight, at in ((1.0, 10.3), (4.0, 28.8))]
    information = np.stack([sum(blobs).ravel() * factor for factor in (1e4, 1e6)])
    deviation = np.where(x < 19, 0.04, -0.01).ravel()
    number, scatter, noise = scatter_of_stars(overlap, information, information * deviation)
    assert number == pytest.approx(25 / 17, rel=0.01)
    assert scatter == pytest.approx(np.sqrt((0.04**2 + (4 * 0.01) ** 2) / 17), rel=0.01)
    total = information.sum(axis=1)
    assert noise == pytest.approx(np.sqrt(number / total / (6 / 16) ** 2), rel=0.01)
