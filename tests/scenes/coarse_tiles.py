"""Synthetic coarse tiles, whose sky, gains, offsets and noise are known, and pairs of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from scipy.ndimage import gaussian_filter

from zemosaic_pipeline.overlaps.pairs import CoarseTile, PairRelation, measure_pairs

NOISE = 3.0


def sky_cells(shape, seed=1, stars=0.03, nebula=200.0, channels=3, level=1000.0, width=0.55):
    """A sky on coarse cells, (C, h, w): stars (``stars`` a cell, power-law fluxes) over a smooth nebula."""
    rng = np.random.default_rng(seed)
    points = np.zeros((channels, *shape))
    count = int(stars * shape[0] * shape[1])
    at = rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)
    flux = 300 * rng.uniform(size=count) ** (-1 / 0.9)
    np.add.at(points, (slice(None), *at), np.minimum(flux, 3e4) * rng.uniform(0.5, 2, (channels, count)))
    smooth = gaussian_filter(rng.normal(size=(channels, *shape)), (0, 12, 12), mode="wrap")
    smooth *= nebula / max(smooth.std(), 1e-9)
    return gaussian_filter(points, (0, width, width)) + smooth + level


def coarse(sky, box, gain=1.0, offset=0.0, noise=NOISE, seed=0, name="t"):
    """The tile that sees rows and columns ``box`` = (y0, y1, x0, x1) of the sky."""
    y0, y1, x0, x1 = box
    channels = len(sky)
    gain, offset = (np.broadcast_to(np.asarray(v, float), channels) for v in (gain, offset))
    means = sky[:, y0:y1, x0:x1] * gain[:, None, None] + offset[:, None, None]
    means = (means + np.random.default_rng(seed).normal(0, noise, means.shape)).astype(np.float32)
    return CoarseTile(
        name=name,
        corner=(y0, x0),
        means=means,
        fraction=np.ones(means.shape[1:], np.float32),
        noise=np.full(channels, float(noise)),
        pixel_noise=np.full(channels, 4.0 * noise),
        sky=np.percentile(means, 30, axis=(1, 2)).astype(float),
    )


def transformed(tile, factor=1.0, constant=0.0):
    """The tile in other units."""
    return replace(
        tile,
        means=(tile.means.astype(float) * factor + constant).astype(np.float32),
        noise=tile.noise * factor,
        pixel_noise=tile.pixel_noise * factor,
        sky=tile.sky * factor + constant,
    )


def tile_grid(seed=1, rows=3, columns=3, size=60, step=45, gain_sigma=0.15, offset_sigma=120.0, sky=None):
    """Tiles of one sky, their true gains (K, C) and offsets (K, C)."""
    rng = np.random.default_rng(seed + 1000)
    sky = sky_cells((rows * step + size, columns * step + size), seed) if sky is None else sky
    gain = np.exp(rng.normal(0, gain_sigma, (rows * columns, len(sky))))
    offset = rng.normal(0, offset_sigma, gain.shape)
    tiles = []
    for k in range(rows * columns):
        y, x = (k // columns) * step, (k % columns) * step
        tiles.append(coarse(sky, (y, y + size, x, x + size), gain[k], offset[k], seed=100 * seed + k, name=f"tile{k}"))
    return tiles, gain, offset


def pair_of(sky, ratio, seed=1, **more):
    """The only relation of two tiles that see all of the sky with gains ``ratio`` and 1."""
    box = (0, sky.shape[1], 0, sky.shape[2])
    return measure_pairs(
        [coarse(sky, box, ratio, 50.0, seed=seed, **more), coarse(sky, box, 1.0, seed=seed + 1, **more)]
    )[0]


def given_pair(i, j, log_ratio, error, mean_i=0.0, mean_j=0.0):
    """A relation of two tiles that many stars determine, whose backgrounds are compared by their means alone."""
    one = np.ones(len(log_ratio))
    return PairRelation(
        i,
        j,
        log_ratio=log_ratio,
        log_ratio_se=error,
        stars=1e4 * one,
        star_scatter=0.01 * one,
        star_noise=0 * one,
        scatter=one,
        samples=900,
        smooth_i=mean_i * one[:, None],
        smooth_j=mean_j * one[:, None],
        smooth_se=one,
        modes_i=np.ones((1, 1)),
        modes_j=np.ones((1, 1)),
        step_before=0 * one,
    )
