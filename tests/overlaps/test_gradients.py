"""Gradients of the tiles: their polynomials, the modes of an overlap, and the joint solve, on known differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scenes.places import benchmark
from zemosaic_pipeline.overlaps import backgrounds, factorised
from zemosaic_pipeline.overlaps.backgrounds import Measured, System, evidence, pair_residuals, sky_errors
from zemosaic_pipeline.overlaps.gradients import orthonormal, polynomial_terms, square_coordinates

ERROR = 0.02
modes_of_squares = benchmark("photometry").modes_of_squares


def measured_grid(
    rows=3, columns=3, overlap=0.2, slope=1.5, curvature=0.0, common=0.0, error=ERROR, channels=3, seed=1
):
    """Square tiles of one camera in a grid, the polynomials (K, C, 6) that they have, and what their overlaps show."""
    rng = np.random.default_rng(seed)
    count = rows * columns
    place = 2 * (1 - overlap) * np.stack(np.divmod(np.arange(count), columns), axis=1)
    sizes = [10.0, slope, slope, curvature, curvature, curvature]
    polynomials = rng.normal(0, sizes, (count, channels, 6)) + common * np.array([0, 0, 0, 1, 0, 1])
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count) if (np.abs(place[i] - place[j]) < 2).all()]
    modes = np.array([modes_of_squares(place[j] - place[i]) for i, j in pairs])
    i, j = np.array(pairs).T
    difference = polynomials[i] @ np.swapaxes(modes[:, 0], 1, 2) - polynomials[j] @ np.swapaxes(modes[:, 1], 1, 2)
    difference = difference + rng.normal(0, error, difference.shape)
    weight = np.full(len(i), error**-2.0)
    return Measured(i, j, difference, weight, modes[:, 0], modes[:, 1], np.zeros(count, int)), polynomials, place


def terms_at(y, x):
    return polynomial_terms(x, y, (1.0, 1.0), 2)


def sky_samples(place, count=6):
    """Places (n, 2) on the mosaic and the terms (n, K, 6) of the tiles there, mean over those that cover them."""
    at = np.linspace(-0.95, 0.95, count)
    spots = np.concatenate([p + np.stack(np.meshgrid(at, at, indexing="ij"), -1).reshape(-1, 2) for p in place])
    fields = np.zeros((len(spots), len(place), 6))
    for k, middle in enumerate(place):
        y, x = (spots - middle).T
        inside = (np.abs(y) <= 1) & (np.abs(x) <= 1)
        fields[inside, k] = terms_at(y[inside], x[inside]).T
    return spots, fields / np.count_nonzero(fields[:, :, 0], axis=1)[:, None, None]


def left_over(error, spots):
    """Rms over places and channels of a field (n, C): a constant, a plane, a quadratic over the mosaic taken out."""
    y, x = ((spots - spots.mean(axis=0)) / np.ptp(spots, axis=0).max()).T
    columns = np.stack([np.ones_like(x), x, y, x * x, x * y, y * y], axis=1)
    out = []
    for taken in (1, 3, 6):
        fit = columns[:, :taken] @ np.linalg.lstsq(columns[:, :taken], error, rcond=1e-9)[0]
        out.append(np.sqrt(np.mean((error - fit) ** 2)))
    return np.array(out)


# ------------------------------------------------------------------------------------------- polynomials and modes


@given(st.integers(5, 40), st.integers(5, 40))
def test_the_terms_of_a_tile_but_the_first_have_no_mean(height, width):
    place = square_coordinates((height, width))
    rows, columns = (at.ravel() for at in np.mgrid[0:height, 0:width])
    u, v = place.at(rows, columns)
    assert max(np.abs(u).max(), np.abs(v).max()) == pytest.approx(1 - 1 / max(height, width))
    means = polynomial_terms(u, v, place.half, 2).mean(axis=1)
    assert means == pytest.approx([1, 0, 0, 0, 0, 0], abs=0.5 / min(height, width))


def test_modes_are_orthonormal_and_what_an_overlap_cannot_show_is_none():
    rng = np.random.default_rng(1)
    y, x = rng.uniform(-1, 1, (2, 300))
    weight = rng.uniform(size=300)
    weight /= weight.sum()
    modes = orthonormal(terms_at(y, x), weight)
    assert (modes * weight) @ modes.T == pytest.approx(np.eye(6), abs=1e-9)
    one_row = orthonormal(terms_at(np.full(300, 0.9), x), weight)
    seen = np.diag((one_row * weight) @ one_row.T)
    assert seen == pytest.approx([1, 1, 0, 1, 0, 0], abs=1e-6)  # 1, u and u^2


# ------------------------------------------------------------------------------------------------- equations


@pytest.mark.parametrize("limits", [(400, 1800), (0, 1800), (0, 0)], ids=["numpy", "lapack", "sparse"])
def test_systems_are_solved_as_numpy_solves_them(monkeypatch, limits):
    monkeypatch.setattr(factorised, "SMALL", limits[0])
    monkeypatch.setattr(factorised, "FULL", limits[1])
    rng = np.random.default_rng(2)
    half = rng.normal(size=(12, 12))
    matrix = half @ half.T + np.eye(12)
    rows, columns = np.indices(matrix.shape).reshape(2, -1)
    # every entry in two parts, which are added up
    solve = factorised.Factorised(np.tile(rows, 2), np.tile(columns, 2), np.tile(matrix.ravel() / 2, 2), 12)
    right = rng.normal(size=(12, 3))
    assert solve(right) == pytest.approx(np.linalg.solve(matrix, right))
    assert solve.log_determinant == pytest.approx(np.linalg.slogdet(matrix)[1])


def test_the_normal_equations_are_those_of_one_large_least_squares():
    """Against the design of all differences and all priors, written out."""
    measured, _, _ = measured_grid(2, 2, curvature=0.3)
    sizes = np.array([1.2, 0.4, 0.7])
    system = System(measured, measured.weight, sizes)
    found = system.polynomials(system.solve(system.right))
    design = np.zeros((len(measured.i), 6, 4, 6))
    for p, (i, j) in enumerate(zip(measured.i, measured.j, strict=True)):
        design[p, :, i], design[p, :, j] = measured.modes_i[p], -measured.modes_j[p]
    root = np.sqrt(measured.weight[0])
    design = root * design.reshape(-1, 24)
    bowl = np.tile([0, 0, 0, 1.0, 0, 1.0], 4)[:, None]
    slopes, curves = (np.kron(np.eye(4), np.diag(kind)) for kind in ([0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]))
    priors = np.block(
        [
            [slopes / sizes[0] + curves / sizes[1], np.zeros((24, 1))],
            [np.zeros((1, 24)), np.full((1, 1), 1 / sizes[2])],
        ]
    )
    everything = np.concatenate([np.concatenate([design, design @ bowl], axis=1), priors])
    for c in range(3):
        right = np.concatenate([root * measured.difference[:, c].ravel(), np.zeros(25)])
        x = np.linalg.lstsq(everything, right, rcond=1e-12)[0]
        expected = (x[:24] + x[24] * bowl[:, 0]).reshape(4, 6)
        expected[:, 0] -= expected[:, 0].mean()
        level = found[:, c, 0] - found[:, c, 0].mean()
        assert np.column_stack([level, found[:, c, 1:]]) == pytest.approx(expected, abs=1e-4)  # the ridge


def test_the_sizes_have_the_greatest_marginal_likelihood():
    measured, _, _ = measured_grid(4, 4, slope=2.0, curvature=0.5, common=1.0)
    found = backgrounds.solve_backgrounds(measured)

    def likelihood(sizes):
        system = System(measured, measured.weight, sizes)
        z = system.solve(system.right)
        return evidence(system, z, pair_residuals(measured, system.polynomials(z)), np.ones(len(measured.i)))

    best = likelihood(found.sizes)
    for kind in range(3):
        for factor in (0.8, 1.25):
            assert likelihood(found.sizes * np.where(np.arange(3) == kind, factor, 1.0)) < best
    assert found.sizes[:2] == pytest.approx([2.0, 0.5], rel=0.4)


def test_many_unknowns_are_estimated_as_few(monkeypatch):
    measured, _, _ = measured_grid(4, 5, curvature=0.3)
    exact = backgrounds.solve_backgrounds(measured)
    monkeypatch.setattr(backgrounds, "EXACT_UNKNOWNS", 0)
    estimated = backgrounds.solve_backgrounds(measured)
    assert estimated.sizes[:2] == pytest.approx(exact.sizes[:2], rel=0.1)
    assert estimated.polynomials[:, :, 1:] == pytest.approx(exact.polynomials[:, :, 1:], abs=0.05)


# ---------------------------------------------------------------------------------------------------- the solution


@pytest.mark.parametrize(
    ("scene", "bound"),
    [
        ({}, 0.05),
        ({"slope": 20.0}, 0.1),
        ({"rows": 1, "columns": 12}, 0.5),
        ({"rows": 1, "columns": 2}, 0.05),
        ({"overlap": 0.05}, 0.5),
        ({"curvature": 0.3}, 0.3),
        ({"common": 1.0}, 0.2),
    ],
    ids=["planes", "steep", "strip", "two", "narrow", "curved", "bowl"],
)
def test_the_sky_is_as_good_as_it_is_said_to_be(scene, bound):
    """The rms over some seeds is what the run states, within a factor of 2, before and after a plane and a quadratic."""
    true, stated = [], []
    for seed in range(1, 11):
        measured, polynomials, place = measured_grid(seed=seed, **scene)
        found = backgrounds.solve_backgrounds(measured)
        spots, fields = sky_samples(place)
        error = np.einsum("nkm,kcm->nc", fields, found.polynomials - polynomials)
        true.append(left_over(error, spots) ** 2)
        stated.append(sky_errors(found.system, fields, spots) ** 2)
    true, stated = (np.sqrt(np.mean(v, axis=0)) for v in (true, stated))
    assert true[2] < bound
    assert (true < 2 * stated).all() and (stated < 2 * true).all(), (true, stated)


def test_tiles_without_gradients_get_none():
    measured, polynomials, _ = measured_grid(slope=0.0)
    found = backgrounds.solve_backgrounds(measured)
    assert found.sizes.max() < 0.05
    assert np.abs(found.polynomials[:, :, 1:]).max() < 0.1
    level = found.polynomials[:, :, 0] - polynomials[:, :, 0]
    assert level - level.mean(axis=0) == pytest.approx(0, abs=0.05)


def test_a_curvature_common_to_all_tiles_is_no_fan_of_slopes(monkeypatch):
    """Without its own prior the mosaic of 6 x 6 becomes a bowl, deeper than if no gradient were taken out at all."""
    measured, polynomials, place = measured_grid(6, 6, slope=1.5, common=1.0)
    spots, fields = sky_samples(place)

    def depth(measured):
        found = backgrounds.solve_backgrounds(measured).polynomials
        found = np.pad(found, ((0, 0), (0, 0), (0, 6 - measured.terms)))
        return left_over(np.einsum("nkm,kcm->nc", fields, found - polynomials), spots)[0]

    levels = replace(
        measured,
        difference=measured.difference[:, :, :1],
        modes_i=measured.modes_i[:, :1, :1],
        modes_j=measured.modes_j[:, :1, :1],
    )
    ours, unmatched = depth(measured), depth(levels)
    monkeypatch.setattr(backgrounds, "common_columns", lambda camera: np.zeros((6 * len(camera), 1)))
    fan = depth(measured)
    assert 1.2 * ours < unmatched < fan / 3


def test_a_wrong_pair_that_the_others_contradict_is_overruled():
    measured, _, _ = measured_grid(slope=0.5)
    difference = measured.difference.copy()
    difference[4] += np.random.default_rng(3).normal(0, 5.0, difference[4].shape)
    right, wrong = (backgrounds.solve_backgrounds(m) for m in (measured, replace(measured, difference=difference)))
    assert wrong.polynomials == pytest.approx(right.polynomials, abs=0.3)
    assert wrong.sizes[0] == pytest.approx(right.sizes[0], rel=0.3)


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(9)), st.integers(0, 20))
def test_order_and_direction_of_tiles_and_pairs_change_nothing(order, turned):
    measured, _, _ = measured_grid(curvature=0.2)
    plain = backgrounds.solve_backgrounds(measured).polynomials
    number = np.argsort(order)
    turn = np.arange(len(measured.i)) < turned
    ends = (number[measured.i], number[measured.j])
    modes = (measured.modes_i, measured.modes_j)
    i, j = (np.where(turn, ends[1 - s], ends[s]) for s in (0, 1))
    modes_i, modes_j = (np.where(turn[:, None, None], modes[1 - s], modes[s]) for s in (0, 1))
    difference = np.where(turn[:, None, None], -1, 1) * measured.difference
    other = replace(measured, i=i, j=j, modes_i=modes_i, modes_j=modes_j, difference=difference)
    found = backgrounds.solve_backgrounds(other).polynomials[number]
    assert found[:, :, 1:] == pytest.approx(plain[:, :, 1:], abs=1e-6)
    assert found[:, :, 0] - found[:1, :, 0] == pytest.approx(plain[:, :, 0] - plain[:1, :, 0], abs=1e-5)


def test_tiles_that_overlap_nothing_keep_their_sky():
    measured, _, _ = measured_grid(1, 2, curvature=1.0)
    lone = replace(measured, camera=np.zeros(3, int))
    found = backgrounds.solve_backgrounds(lone)
    assert not found.polynomials[2].any()
    none = Measured(
        np.zeros(0, int), np.zeros(0, int), np.zeros((0, 3, 1)), np.zeros(0), *np.zeros((2, 0, 1, 1)), np.zeros(2, int)
    )
    assert not backgrounds.solve_backgrounds(none).polynomials.any()
