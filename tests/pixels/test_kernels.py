"""The pixel functions against numpy, scipy and plain loops."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, special

from zemosaic_pipeline.pixels import cpu_loops as loops
from zemosaic_pipeline.pixels import kernels as k
from zemosaic_pipeline.pixels.backend_cpu import strided_line
from zemosaic_pipeline.pixels.combine import combine_pixel
from zemosaic_pipeline.pixels.cpu_combine import combine_layers
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.resample.options import CoaddOptions, winsorized_spread

NO_ALPHA = np.ones((1, 1, 1), np.float32)
NO_MAP = np.ones((1, 1), np.float32)
LIMITS = (3.0, 3.0, 0.05, 0.05)
BILINEAR, LANCZOS3 = ResamplingKernel


def sample(source, y, x, kernel=BILINEAR, *, feather=0.0, scale=1.0, alpha=NO_ALPHA, weight_map=NO_MAP, spacing=8.0):
    """Values (C, h, w) and weights (h, w) of a (C, H, W) source at positions ``y``, ``x`` (h, w); NaN: untouched."""
    nodes = np.stack([np.asarray(x, float), np.asarray(y, float)])
    values = np.full((source.shape[0], *nodes.shape[1:]), np.nan, np.float32)
    weights = np.zeros(nodes.shape[1:], np.float32)
    loops.resample_rows(
        *strided_line(source), (0, 0), source.shape[1:], int(kernel), alpha, weight_map, spacing, feather, scale, (nodes, 0, 0, 1), (0, 0),
        (0, nodes.shape[1], 0, nodes.shape[2]), values, weights, False,
    )  # fmt: skip
    return values, weights


def combine(values, weights, method, limits=LIMITS):
    """Combined values (C, h, w) and their weight (h, w) of layers (K, C, h, w) with weights (K, h, w)."""
    values = np.asarray(values, np.float32)
    ordered = np.stack([np.asarray(weights, np.float32)] * values.shape[1], axis=1)
    out = np.empty((values.shape[1] + 1, *values.shape[2:]), np.float32)
    combine_layers(values.copy(), ordered, int(method), *limits, out)
    return out[:-1], out[-1]


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def image(rng):
    return rng.normal(100, 20, (2, 23, 31)).astype(np.float32)


@pytest.fixture
def inner(rng):
    """Positions at least three pixels inside the image."""
    return rng.uniform(3, 18.9, (40, 50)), rng.uniform(3, 26.9, (40, 50))


# ------------------------------------------------------------------------------------------------------- resampling


@given(st.floats(0, 1, exclude_max=True).map(lambda f: np.floor(f * 2**20) / 2**20))
def test_lanczos_weights_are_normalised_windowed_sincs(f):
    d = f - np.arange(-2, 4)
    expected = np.sinc(d) * np.sinc(d / 3)
    assert np.allclose(k.lanczos_weights(f), expected / expected.sum(), rtol=0, atol=1e-12)


def test_bilinear_is_scipys_linear_interpolation(image, inner):
    values, weights = sample(image, *inner)
    for got, plane in zip(values, image, strict=True):
        expected = ndimage.map_coordinates(plane.astype(float), inner, order=1)
        # positions are rounded to 2**-20 pixel, values to float32
        assert np.allclose(got, expected, rtol=0, atol=2e-4)
    assert (weights == 1).all()


def test_lanczos_is_the_separable_sum_over_six_by_six_pixels(image, inner):
    got = sample(image, *inner, LANCZOS3)[0][0]
    for row, column in np.ndindex(got.shape):
        y, x = inner[0][row, column], inner[1][row, column]
        rows, columns = np.arange(np.floor(y) - 2, np.floor(y) + 4), np.arange(np.floor(x) - 2, np.floor(x) + 4)
        wy, wx = (np.sinc(d) * np.sinc(d / 3) for d in (y - rows, x - columns))
        window = image[0][np.ix_(rows.astype(int), columns.astype(int))].astype(float)
        assert got[row, column] == pytest.approx(wy @ window @ wx / (wy.sum() * wx.sum()), abs=5e-4)


def test_lanczos_gives_way_to_bilinear_where_its_support_is_cut(image):
    image[0, 10, 10] = np.nan
    y = np.array([[10.4, 1.5, 11.5, 17.5]])
    x = np.array([[12.5, 12.5, 8.5, 12.5]])  # NaN within reach, top edge, NaN within reach, inside
    sharp, soft = sample(image[:1], y, x, LANCZOS3)[0], sample(image[:1], y, x)[0]
    assert np.array_equal((sharp == soft)[0, 0], [True, True, True, False])
    assert np.isfinite(sharp).all()


@pytest.mark.parametrize("kernel", ResamplingKernel)
def test_edge_half_pixel_holds_the_edge_value_and_nothing_lies_beyond(image, kernel):
    y = np.array([[-0.5, -0.3, 22.5, 22.2, 5, 5, -0.501, 22.501, 5, 5]])
    x = np.array([[5, 5, 5, 5, -0.5, 30.5, 5, 5, -0.501, 30.501]])
    values, weights = sample(image, y, x, kernel)
    edge = image[0][[0, 0, 22, 22, 5, 5], [5, 5, 5, 5, 0, 30]]
    assert np.array_equal(values[0, 0, :6], edge)
    assert np.isnan(values[:, 0, 6:]).all() and (weights[0, 6:] == 0).all()


def test_positions_that_are_not_finite_sample_nothing(image):
    bad = np.array([[np.nan, np.inf, -np.inf, 5.0, 5.0, 5.0, 1e300]])
    values, weights = sample(image, bad, bad[:, ::-1])
    assert np.array_equal(np.isfinite(values[0, 0]), [False, False, False, True, False, False, False])
    assert weights.sum() == 1


def test_rounding_of_a_position_does_not_reach_for_a_masked_neighbour(image):
    image[:, 5, 8] = np.nan
    noise = np.array([[-4e-7, -1e-9, 0, 1e-9, 4e-7, 3e-6]])
    values, weights = sample(image, 5 + noise, 7 + noise)
    assert np.array_equal(values[0, 0, :5], np.full(5, image[0, 5, 7]))
    assert np.isnan(values[0, 0, 5]) and weights[0, 5] == 0


@pytest.mark.parametrize("kernel", ResamplingKernel)
def test_masked_pixels_never_bleed(rng, image, inner, kernel):
    """What stands in masked pixels does not matter, and exactly the positions that touch one have no data."""
    hole = rng.random(image.shape[1:]) < 0.05
    image[:, hole] = np.nan
    values, weights = sample(image, *inner, kernel)
    touched = ndimage.map_coordinates(hole.astype(float), inner, order=1) > 1e-5
    assert np.array_equal(np.isnan(values[0]), touched) and np.array_equal(weights == 0, touched)
    if kernel is BILINEAR:
        filled = np.where(hole, 1e30, image).astype(np.float32)
        assert np.array_equal(values[:, ~touched], sample(filled, *inner)[0][:, ~touched])


def test_adding_accumulates_weighted_values(image, inner):
    once, _ = sample(image, *inner)
    nodes = np.stack(inner[::-1])
    sums, weights = np.zeros_like(once), np.zeros(once.shape[1:], np.float32)
    for scale in (0.5, 2.0):
        loops.resample_rows(
            *strided_line(image), (0, 0), image.shape[1:], BILINEAR, NO_ALPHA, NO_MAP, 8.0, 0.0, scale, (nodes, 0, 0, 1), (0, 0),
            (0, 40, 0, 50), sums, weights, True,
        )  # fmt: skip
    assert np.allclose(sums, 2.5 * once, rtol=1e-6) and (weights == 2.5).all()


def test_mesh_is_cubic_and_blocks_and_strips_are_windows():
    """The image holds its own coordinates: what is read there is the position that was used."""
    rows, columns = np.mgrid[0:60, 0:70].astype(np.float32)
    source = np.stack([columns, rows])
    step, y0, x0 = 8, -8, -8
    j, i = np.mgrid[0:10, 0:11]
    oy, ox = y0 + j * step, x0 + i * step

    def curve(y, x):
        return 5 + 0.9 * x + 0.05 * y + 2e-5 * x**3, 4 - 0.04 * x + 0.8 * y + 3e-5 * y**2 * x

    nodes = np.stack(curve(oy, ox))
    values, weights = np.full((2, 20, 30), np.nan, np.float32), np.zeros((20, 30), np.float32)
    strip = np.ascontiguousarray(source[:, 10:55])
    loops.resample_rows(
        *strided_line(strip), (10, 0), (60, 70), BILINEAR, NO_ALPHA, NO_MAP, 8.0, 0.0, 1.0, (nodes, y0, x0, step), (15, 11),
        (17, 33, 13, 40), values, weights, False,
    )  # fmt: skip
    y, x = np.mgrid[17:33, 13:40].astype(float)
    assert np.allclose(values[:, 2:18, 2:29], curve(y, x), rtol=0, atol=1e-5)
    outside = np.ones((20, 30), bool)
    outside[2:18, 2:29] = False
    assert (weights[outside] == 0).all() and np.isnan(values[:, outside]).all()
    assert k.tile_position(nodes, y0, x0, step, 20, 30) == pytest.approx(curve(20, 30)[::-1], abs=1e-12)


# ---------------------------------------------------------------------------------------------------------- weights


def test_feather_ramps_from_zero_at_the_edge(image):
    x = np.linspace(-0.5, 30.5, 63)[None, :]
    weights = sample(image, np.full_like(x, 11.0), x, feather=8.0, scale=2.0)[1]
    expected = 2 * np.clip(np.minimum(x + 0.5, 30.5 - x) / 8, 0, 1)
    assert np.allclose(weights, expected, atol=1e-6)
    assert weights[0, 0] == 0 and weights[0, -1] == 0 and weights.max() == 2


def test_feather_takes_the_nearer_edge(image):
    weights = sample(image, np.array([[2.5, 19.5]]), np.array([[1.5, 25.5]]), feather=10.0)[1]
    assert np.allclose(weights, [[0.2, 0.3]], atol=1e-6)


def test_alpha_weighs_as_the_image_is_interpolated(rng, image, inner):
    alpha = rng.uniform(0.1, 1, (1, *image.shape[1:])).astype(np.float32)
    weights = sample(image, *inner, scale=3.0, alpha=alpha)[1]
    assert np.allclose(weights, 3 * ndimage.map_coordinates(alpha[0].astype(float), inner, order=1), atol=2e-5)


def test_weight_map_is_linear_between_cell_centres_and_constant_outside(rng, image):
    cells = rng.uniform(0.1, 1, (3, 4)).astype(np.float32)
    y, x = np.meshgrid(np.arange(23.0), np.arange(31.0), indexing="ij")
    weights = sample(image, y, x, weight_map=cells)[1]
    at = [(y + 0.5) / 8 - 0.5, (x + 0.5) / 8 - 0.5]
    assert np.allclose(weights, ndimage.map_coordinates(cells, at, order=1, mode="nearest"), atol=1e-6)


def test_pixel_of_weight_zero_is_no_data(image, inner):
    values, weights = sample(image, *inner, alpha=np.zeros((1, *image.shape[1:]), np.float32))
    assert np.isnan(values).all() and (weights == 0).all()


# ----------------------------------------------------------------------------------------------------- coarse cells


def test_measured_sums_are_those_of_quadratic_spline_samples(rng, image):
    image[:, 4:6, 7:9] = np.nan
    step, cell = 8, 4
    j, i = np.mgrid[0:7, 0:8]
    nodes = np.stack([0.7 * (i - 1) * step - 1.3, 0.6 * (j - 1) * step - 2.1]).astype(float)
    mesh = (nodes, -step, -step, step)
    y, x = np.mgrid[0:24, 0:32]
    ty, tx = 0.6 * y - 2.1, 0.7 * x - 1.3
    # scipy's quadratic B-spline without its prefilter; a NaN in the 3 x 3 support spreads there as it must here
    values = np.stack(
        [ndimage.map_coordinates(plane.astype(float), (ty, tx), order=2, prefilter=False) for plane in image]
    )
    whole = (ty >= 0.5) & (ty < 21.5) & (tx >= 0.5) & (tx < 29.5)
    seen = (whole & np.isfinite(values[0])).reshape(6, 4, 8, 4)
    wanted = (rng.random((6, 8)) < 0.8).astype(np.uint8)
    sums, counts = np.zeros((2, 6, 8)), np.zeros((6, 8))
    loops.measure_cells(*strided_line(image), (0, 0), (23, 31), mesh, cell, 1, (0, 0), wanted, sums, counts)
    expected = np.where(seen, values.reshape(2, 6, 4, 8, 4), 0).sum(axis=(2, 4))
    assert np.array_equal(counts, seen.sum(axis=(1, 3)) * wanted)
    assert np.allclose(sums, expected * wanted, rtol=1e-6)
    found = np.zeros((6, 8), np.uint8)
    loops.cells_inside(mesh, (23, 31), cell, (0, 0), found)
    on_tile = (0.6 * y - 2.1 >= -0.5) & (0.6 * y - 2.1 <= 22.5) & (0.7 * x - 1.3 >= -0.5) & (0.7 * x - 1.3 <= 30.5)
    assert np.array_equal(found > 0, on_tile.reshape(6, 4, 8, 4).any(axis=(1, 3)))


# -------------------------------------------------------------------------------------------------------- combining


@pytest.fixture
def layers(rng):
    """Seven layers of two channels with weights, a third of which is missing, somewhere all of them."""
    values = rng.normal(1000, 30, (7, 2, 12, 13)).astype(np.float32)
    weights = rng.uniform(0.2, 2, (7, 12, 13)).astype(np.float32)
    weights[rng.random(weights.shape) < 0.33] = 0
    weights[:, 0, 0] = 0
    values[np.broadcast_to((weights == 0)[:, None], values.shape)] = np.nan
    return values, weights


def clipped_at_quantiles(v, w, low, high):
    return np.average(np.clip(v, *np.quantile(v, [low, 1 - high])), weights=w)


REFERENCES = {
    CombineMethod.MEAN: lambda v, w: np.average(v, weights=w),
    CombineMethod.MEDIAN: lambda v, w: np.median(v),
    CombineMethod.MIN: lambda v, w: v.min(),
    CombineMethod.MAX: lambda v, w: v.max(),
    CombineMethod.FIRST: lambda v, w: v[0],
    CombineMethod.LAST: lambda v, w: v[-1],
    CombineMethod.WINSORIZED: lambda v, w: clipped_at_quantiles(v, w, 0.05, 0.05),
}
TAKEN = {
    CombineMethod.MIN: lambda v, w: w[v.argmin()],
    CombineMethod.MAX: lambda v, w: w[v.argmax()],
    CombineMethod.FIRST: lambda v, w: w[0],
    CombineMethod.LAST: lambda v, w: w[-1],
}


@pytest.mark.parametrize("method", REFERENCES)
def test_combining_is_numpys(layers, method):
    values, weights = layers
    got, weight = combine(values, weights, method)
    assert np.isnan(got[:, 0, 0]).all() and weight[0, 0] == 0
    for y, x in list(np.ndindex(12, 13))[1:]:
        seen = weights[:, y, x] > 0
        if not seen.any():
            continue
        w = weights[seen, y, x].astype(float)
        for channel in range(2):
            v = values[seen, channel, y, x].astype(float)
            assert got[channel, y, x] == pytest.approx(REFERENCES[method](v, w), rel=2e-7)
        first = values[seen, 0, y, x]
        assert weight[y, x] == pytest.approx(TAKEN.get(method, lambda v, w: w.sum())(first, w), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 13])
@pytest.mark.parametrize("method", [method for method in CombineMethod if method is not CombineMethod.SUM])
def test_pixels_side_by_side_are_pixels_one_by_one(rng, method, count):
    """To the last bit: rows that no number of lanes divides, outliers, layers that end within a row, and none at all.

    `combine_pixel` is what the GPU compiles; here it runs as plain Python.
    """
    values = rng.normal(1000, 10, (count, 2, 2, 150)).astype(np.float32)
    values += rng.choice([-300, 0, 0, 0, 0, 0, 0, 0, 0, 300], values.shape).astype(np.float32)
    weights = np.repeat(rng.uniform(0.5, 2, (count, 1, 2, 150)).astype(np.float32), 2, axis=1)
    for layer, edge in enumerate(rng.integers(0, 100, count)):
        weights[layer, :, 1, :edge] = 0
    weights[..., -3:] = 0
    values[weights == 0] = np.nan
    got, expected = np.empty((2, 3, 2, 150), np.float32)
    combine_layers(values.copy(), weights[:, :1].copy(), int(method), *LIMITS, got)
    for y, x in np.ndindex(2, 150):
        combine_pixel(values, weights, y, x, method, *LIMITS, expected)
    assert np.isnan(got[:2, 1, -1]).all() and got[2, 1, -1] == 0
    assert np.array_equal(got, expected, equal_nan=True)


@pytest.mark.parametrize("method", [CombineMethod.MIN, CombineMethod.MAX])
def test_of_equal_extremes_the_first_layer_counts(method):
    weights = np.array([0, 0.25, 0.5, 0.75], np.float32).reshape(4, 1, 1)
    assert combine(np.full((4, 1, 1, 1), 65535.0), weights, method)[1] == 0.25


def test_winsorized_limits_are_taken_from_each_side(rng):
    values = rng.normal(size=(9, 1, 1, 1))
    got = combine(values, np.ones((9, 1, 1)), CombineMethod.WINSORIZED, (3, 3, 0.1, 0.3))[0].item()
    assert got == pytest.approx(clipped_at_quantiles(values.ravel(), None, 0.1, 0.3), abs=1e-6)


@pytest.mark.parametrize(
    "method",
    [
        CombineMethod.WINSORIZED,
        CombineMethod.SIGMA_CLIP,
        CombineMethod.WINSORIZED_SIGMA_CLIP,
        CombineMethod.LINEAR_FIT_CLIP,
    ],
)
@pytest.mark.parametrize("count", [2, 3, 5, 8])
def test_robust_means_are_unbiased_for_few_layers(rng, method, count):
    values = rng.normal(0, 1, (count, 1, 150, 200))
    got = combine(values, np.ones((count, 150, 200)), method)[0]
    assert abs(got.mean()) < 4 * got.std() / np.sqrt(got.size)  # within its standard error, 0.006 or less
    if count == 2:
        assert np.allclose(got, values.mean(0), atol=1e-6)


@pytest.mark.parametrize("count", [4, 5, 8])
@pytest.mark.parametrize("outlier", [-300.0, 300.0])
@pytest.mark.parametrize("pedestal", [0.0, 1e6])
def test_sigma_clip_rejects_one_outlier(rng, count, outlier, pedestal):
    values = pedestal + rng.normal(0, 1, (count, 1, 60, 60))
    values[1] += outlier
    got = combine(values, np.ones((count, 60, 60)), CombineMethod.SIGMA_CLIP)[0]
    # kept, the outlier would move every pixel by 300 / count; a lucky spread may keep it in few
    assert np.mean(np.abs(got - pedestal) > 10) < 0.02


@pytest.mark.parametrize("method", [CombineMethod.SIGMA_CLIP, CombineMethod.WINSORIZED, CombineMethod.MEAN])
def test_noise_on_a_high_pedestal_is_kept(rng, method):
    values = np.round(rng.normal(0, 8, (6, 1, 40, 40)))
    low, high = (combine(values + pedestal, np.ones((6, 40, 40)), method)[0] for pedestal in (0.0, 1e6))
    assert np.allclose(high - 1e6, low, rtol=0, atol=0.07)  # one float32 step at 1e6 is 0.0625


SIGMA_CLIP, LINEAR_FIT = CombineMethod.SIGMA_CLIP, CombineMethod.LINEAR_FIT_CLIP
WINSORIZED_CLIP = CombineMethod.WINSORIZED_SIGMA_CLIP


@pytest.mark.parametrize("count", [16, 25])
@pytest.mark.parametrize(
    ("clip", "trails"),
    [(SIGMA_CLIP, 1), (WINSORIZED_CLIP, 1), (WINSORIZED_CLIP, 3), (LINEAR_FIT, 1), (LINEAR_FIT, 3)],
)
def test_trails_vanish_from_a_stack_and_the_noise_stays_that_of_the_mean(rng, clip, trails, count):
    limits = CoaddOptions(combine=clip).limits
    clean = rng.normal(1000, 10, (count, 1, 80, 100))
    crossed = clean.copy()
    crossed[3 : 3 + trails] += rng.uniform(150, 3000, (trails, 1, 80, 100))
    ones = np.ones((count, 80, 100))
    kept = combine(clean, ones, clip, limits)[0]
    got = combine(crossed, ones, clip, limits)[0]
    # what is left of a trail is nothing: the mean of the other frames, within the error of a mean
    others = np.delete(clean, np.s_[3 : 3 + trails], axis=0).mean(0)
    assert abs((got - others).mean()) < 0.15 * 10 / np.sqrt(count)
    assert np.std(kept - 1000) < 1.06 * 10 / np.sqrt(count)
    assert np.std(got - 1000) < 1.10 * 10 / np.sqrt(count - trails)


@pytest.mark.parametrize("fractions", [(0.0, 0.0), (0.05, 0.05), (0.1, 0.3)])
def test_winsorizing_narrows_a_gaussian_by_what_is_allowed_for(fractions):
    z = special.ndtri((np.arange(2_000_000) + 0.5) / 2_000_000)
    drawn = np.clip(z, special.ndtri(fractions[0]), special.ndtri(1 - fractions[1]))
    assert winsorized_spread(*fractions) == pytest.approx(np.sqrt(np.mean(drawn**2)), rel=1e-4)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("clip", [SIGMA_CLIP, WINSORIZED_CLIP, LINEAR_FIT])
def test_each_limit_of_a_stack_belongs_to_its_side(rng, clip, sign):
    values = rng.normal(0, 1, (12, 1, 30, 30))
    values[4] = sign * 8
    results = {}
    for low, high in ((3, 1e9), (1e9, 3)):
        limits = CoaddOptions(combine=clip, kappa_low=low, kappa_high=high).limits
        results[low] = abs(combine(values, np.ones((12, 30, 30)), clip, limits)[0].mean())
    inner, outer = (3, 1e9) if sign < 0 else (1e9, 3)
    assert results[inner] < 0.15 and results[outer] > 0.5


@pytest.mark.parametrize("sign", [-1, 1])
def test_sigma_clip_uses_the_limit_of_each_side(sign):
    values = sign * np.array([-1, -0.5, 0, 0.5, 1, 9]).reshape(6, 1, 1, 1)
    low, high = (3, 1e9) if sign < 0 else (1e9, 3)
    weights = np.ones((6, 1, 1))
    assert combine(values, weights, CombineMethod.SIGMA_CLIP, (low, high, 0, 0))[0] == pytest.approx(0)
    assert combine(values, weights, CombineMethod.SIGMA_CLIP, (high, low, 0, 0))[0] == pytest.approx(sign * 9 / 6)


def test_sigma_clip_looks_first_at_what_is_farther_beyond_its_own_limit():
    """9 is farther out than -8, but its limit is wider: with -8 still there it would pass, and with it -8."""
    values = np.array([-8, *np.linspace(-1, 1, 10), 9]).reshape(12, 1, 1, 1)
    got = combine(values, np.ones((12, 1, 1)), CombineMethod.SIGMA_CLIP, (2, 6, 0, 0))[0]
    assert got == pytest.approx(0, abs=1e-6)


ORDERLESS = (
    CombineMethod.MEAN,
    CombineMethod.MEDIAN,
    CombineMethod.SIGMA_CLIP,
    CombineMethod.WINSORIZED,
    CombineMethod.WINSORIZED_SIGMA_CLIP,
    CombineMethod.MIN,
    CombineMethod.MAX,
)
whole = st.integers(-1000, 1000)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(whole, st.sampled_from([0, 1, 2, 4])), min_size=1, max_size=9), st.randoms(), st.data())
@pytest.mark.parametrize("method", ORDERLESS)
def test_order_of_the_layers_does_not_matter_and_scaling_commutes(method, pixels, random, data):
    def of(samples, factor=1, shift=0):
        values = np.array([factor * v + shift for v, _ in samples], float).reshape(-1, 1, 1, 1)
        return combine(values, np.array([w for _, w in samples]).reshape(-1, 1, 1), method)[0].item()

    shuffled = list(pixels)
    random.shuffle(shuffled)
    expected = of(pixels)
    # equal values with different weights may change places, and a distance at the very limit its side
    distinct = len({v for v, _ in pixels}) == len(pixels)
    if method not in (CombineMethod.SIGMA_CLIP, CombineMethod.WINSORIZED_SIGMA_CLIP) or distinct:
        assert of(shuffled) == pytest.approx(expected, abs=1e-3, nan_ok=True)
    assert of(pixels, 4) == pytest.approx(4 * expected, abs=1e-3, nan_ok=True)
    assert of(pixels, 1, 512) == pytest.approx(expected + 512, abs=1e-3, nan_ok=True)


# -------------------------------------------------------------------------------------------------------- compiling


def test_code_kept_on_disk_is_forgotten_with_what_it_was_made_of(tmp_path):
    """numba alone would keep a loop whose own file has not changed."""
    definition = "from numba.extending import register_jitable\n@register_jitable\ndef value():\n    return {}\n"
    (tmp_path / "loop.py").write_text(
        "from definition import value\nfrom zemosaic_pipeline.pixels.numba_cache import compiled\n"
        "@compiled\ndef loop():\n    return value()\nprint(loop(), sum(loop.stats.cache_hits.values()))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(Path(k.__file__).parents[2])])}
    printed = []
    for value in ("1", "1", "22"):  # another length: Python's own cache looks at time and size
        (tmp_path / "definition.py").write_text(definition.format(value))
        if len(printed) == 1:
            os.utime(tmp_path / "definition.py", (0, 0))
        done = subprocess.run(
            [sys.executable, "loop.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        printed.append(done.stdout.split())
    assert printed == [["1", "0"], ["1", "1"], ["22", "0"]]
