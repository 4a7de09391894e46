"""Stars found and measured, against painted frames whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import erf

from scenes.star_fields import NOISE
from zemosaic_pipeline.stars.detection import find_stars, position_error


def paint(shape, x, y, flux, fwhm, noise=NOISE, sky=1000.0, stretch=1.0, seed=0):
    """Gaussian stars integrated over the pixels, longer along x by `stretch`."""
    image = np.zeros(shape)
    s, t = fwhm / 2.3548, fwhm / 2.3548 * stretch
    for a, b, f in zip(x, y, flux, strict=True):
        columns, rows = np.arange(shape[1]) - a, np.arange(shape[0]) - b
        gx = (erf((columns + 0.5) / t / 2**0.5) - erf((columns - 0.5) / t / 2**0.5)) / 2
        gy = (erf((rows + 0.5) / s / 2**0.5) - erf((rows - 0.5) / s / 2**0.5)) / 2
        image += f * gy[:, None] * gx
    return (image + sky + np.random.default_rng(seed).normal(0, noise, shape)).astype(np.float32)


@pytest.fixture(scope="module")
def lattice():
    """Stars on a wide lattice, each somewhere within its pixel."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[20:390:30, 20:590:30].astype(float)
    x, y = (c.ravel() + rng.uniform(-0.5, 0.5, c.size) for c in (x, y))
    return x, y, 10 ** rng.uniform(3.5, 5, x.size)


def matched(stars, x, y):
    """For each true star the found one within a pixel."""
    distance = np.hypot(stars.x[None] - x[:, None], stars.y[None] - y[:, None])
    nearest = distance.argmin(axis=1)
    found = distance[np.arange(len(x)), nearest] < 1
    return np.flatnonzero(found), nearest[found]


@pytest.mark.parametrize("fwhm", [2.0, 3.0, 5.0])
def test_positions_are_as_good_as_the_noise_allows(lattice, fwhm):
    x, y, flux = lattice
    stars = find_stars(paint((400, 600), x, y, flux, fwhm))
    k, j = matched(stars, x, y)
    assert len(k) >= 0.97 * len(x)
    assert len(stars) <= len(x) + 1, "nothing else is found"
    off = np.hypot(stars.x[j] - x[k], stars.y[j] - y[k])
    bound = np.sqrt(8 * np.pi) * (fwhm / 2.3548) ** 2 * NOISE / flux[k]
    assert np.sqrt(np.mean((off / np.hypot(bound, 0.005)) ** 2) / 2) < 1.35
    # the errors that the alignment weighs them with
    assert 0.3 < np.sqrt(np.mean((off / position_error(stars)[j]) ** 2) / 2) < 1.35


def test_what_is_measured(lattice):
    x, y, flux = lattice
    stars = find_stars(paint((400, 600), x, y, flux, 3.5))
    k, j = matched(stars, x, y)
    bright = flux[k] > 2e4
    assert np.median(stars.fwhm[j][bright]) == pytest.approx(np.hypot(3.5, 2.3548 / 12**0.5), rel=0.03)
    assert np.median(stars.elongation[j][bright]) == pytest.approx(1, abs=0.03)
    # a circle of 1.5 FWHM holds all but 2 thousandths of a Gaussian
    assert np.median(stars.flux[j][bright] / flux[k][bright]) == pytest.approx(1, abs=0.01)
    assert stars.background == pytest.approx(1000, abs=1)
    assert stars.noise == pytest.approx(NOISE, rel=0.03)
    assert (np.diff(stars.flux) <= 0).all()
    assert len(find_stars(paint((400, 600), x, y, flux, 3.5), limit=10)) == 10
    long = find_stars(paint((400, 600), x, y, flux, 3.0, stretch=2.0))
    assert 1.7 < np.median(long.elongation[:50]) < 2.0, "what is below the threshold is not seen"


def test_missing_pixels_edges_and_byte_order(lattice):
    x, y, flux = lattice
    image = paint((400, 600), x, y, flux, 3.0)
    whole = find_stars(image)
    assert np.array_equal(find_stars(image.astype(">f4")).x, whole.x)
    image[:, 300:] = np.nan
    image[:, :3] = np.nan
    half = find_stars(image)
    assert np.isfinite([half.background, half.noise]).all()
    assert half.x.max() < 297
    k, _ = matched(half, x, y)
    assert len(k) >= 0.95 * (x < 295).sum()
    cut = find_stars(paint((400, 600), np.r_[x, 0.0, 599.0], np.r_[y, 200, 200.0], np.r_[flux, 1e6, 1e6], 3.0))
    assert cut.x.min() > 4 and cut.x.max() < 595, "stars cut by the edge are left out"


def test_hot_pixels_and_trails_are_no_stars(lattice):
    x, y, flux = lattice
    image = paint((400, 600), x, y, flux, 3.0)
    rng = np.random.default_rng(2)
    hot = rng.integers(5, 395, 200), rng.integers(5, 595, 200)
    image[hot] += 20_000
    rows, columns = np.mgrid[:400, :600]
    image += 3000 * np.exp(-(((columns - 1.3 * rows - 31.5) / 3) ** 2)).astype(np.float32)
    stars = find_stars(image)
    _, j = matched(stars, x, y)
    assert len(stars) - len(j) <= 5


def test_saturated_stars_are_told(lattice):
    x, y, flux = lattice
    image = paint((400, 600), np.r_[x, 155.2], np.r_[y, 155.3], np.r_[flux, 3e6], 4.0)
    stars = find_stars(np.minimum(image, 65535))
    assert stars.saturated[0] and not stars.saturated[1:].any()
    assert (stars.x[0], stars.y[0]) == pytest.approx((155.2, 155.3), abs=0.05)


@pytest.mark.parametrize("value", [np.nan, 0.0, 500.0])
def test_an_image_of_nothing_has_no_stars(value):
    for shape in ((300, 400), (1, 1), (3, 400)):
        assert len(find_stars(np.full(shape, value, np.float32))) == 0


def test_noise_has_no_stars_and_a_frame_full_of_light_does_not_fail():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 30, (600, 600)).astype(np.float32)
    assert len(find_stars(noise)) <= 1
    # the Bayer pattern left in, as in a luminance of neighbouring pixels: noise that is not white
    assert len(find_stars((noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3)) <= 20
    crowded = rng.exponential(1, (600, 600)).astype(np.float32) ** 4
    assert len(find_stars(crowded, limit=50)) <= 50
    with pytest.raises(ValueError, match="shape"):
        find_stars(np.zeros((3, 50, 50), np.float32))
