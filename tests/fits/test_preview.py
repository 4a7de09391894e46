"""zemosaic_pipeline.fits.preview: binning in blocks, the stretch, the PNG."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from zemosaic_pipeline.errors import RunError
from zemosaic_pipeline.fits import preview


def brute_force(mosaic, factor):
    """Mean of the pixels with data in each square, one square at a time, in float64."""
    channels, height, width = mosaic.shape
    out = np.full((channels, -(-height // factor), -(-width // factor)), np.nan)
    for c, y, x in np.ndindex(out.shape):
        square = mosaic[c, y * factor : (y + 1) * factor, x * factor : (x + 1) * factor].astype(float)
        seen = square[~np.isnan(square)]
        if seen.size:
            out[c, y, x] = seen.mean()
    return out


def cut(shape, ys, xs):
    """Windows of an image that is cut at these rows and columns."""
    for (y0, y1), (x0, x1) in itertools.product(
        itertools.pairwise([0, *ys, shape[0]]), itertools.pairwise([0, *xs, shape[1]])
    ):
        yield y0, y1, x0, x1


@pytest.fixture
def mosaic():
    rng = np.random.default_rng(5)
    data = rng.normal(1000, 30, (3, 67, 101)).astype(np.float32)
    data[:, :13, :29] = np.nan  # a corner that no panel covers
    data[:, rng.random(data.shape[1:]) < 0.02] = np.nan
    data[1, 40:44, 50:57] = np.nan  # one channel alone
    return data


@pytest.mark.parametrize(("max_dim", "factor"), [(200, 1), (51, 2), (40, 3), (14, 8), (5, 21)])
def test_blocks_in_any_order_and_from_several_threads_give_the_mean_of_each_square(mosaic, max_dim, factor):
    picture = preview.PreviewAccumulator(mosaic.shape[1:], 3, max_dim)
    assert picture.factor == factor
    windows = list(cut(mosaic.shape[1:], [1, 2, 19, 40, 60], [7, 8, 50, 99]))
    np.random.default_rng(1).shuffle(windows)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda w: picture.add(w[0], w[2], mosaic[:, w[0] : w[1], w[2] : w[3]]), windows))
    image = picture.image()
    assert image.dtype == np.float32 and max(image.shape) <= max_dim
    np.testing.assert_allclose(image, brute_force(mosaic, factor), rtol=2e-6)


def test_what_was_not_added_is_no_data(mosaic):
    picture = preview.PreviewAccumulator(mosaic.shape[1:], 3, 51)
    picture.add(20, 30, mosaic[:, 20:30, 30:40])
    seen = np.isfinite(picture.image())
    assert seen[:, 10:15, 15:20].all() and seen.sum() == 3 * 25


@pytest.mark.parametrize(
    ("y0", "x0", "shape"), [(60, 0, (3, 8, 4)), (0, 98, (3, 4, 4)), (-1, 0, (3, 4, 4)), (0, 0, (1, 4, 4))]
)
def test_a_block_that_does_not_fit_is_refused(y0, x0, shape):
    with pytest.raises(ValueError, match="does not fit"):
        preview.PreviewAccumulator((67, 101), 3, 50).add(y0, x0, np.zeros(shape, np.float32))


# ------------------------------------------------------------------------------------------------- the stretch


def scene(noise=(10.0, 25.0, 15.0), level=(1000.0, 400.0, 5000.0), size=300):
    """Sky with noise, and a bright red, a bright blue and a white star, all 3 channels in units of their noise."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:size, :size]
    image = rng.normal(size=(3, size, size))
    spots = {
        (60, 60): (900, 300, 150),
        (60, 200): (150, 300, 900),
        (200, 60): (600, 600, 600),
        (200, 200): (25, 8, 8),
    }
    for (j, i), amplitudes in spots.items():
        profile = np.exp(-((y - j) ** 2 + (x - i) ** 2) / (2 * 3.0**2))
        image += np.array(amplitudes)[:, None, None] * profile
    return (image * np.array(noise)[:, None, None] + np.array(level)[:, None, None]).astype(np.float32)


def test_the_background_is_a_dark_neutral_grey_that_is_not_clipped():
    sky = preview.stretch(scene())[100:160, 100:160].astype(float)
    medians = np.median(sky, axis=(0, 1))
    assert np.ptp(medians) <= 3 and 15 < medians.mean() < 80
    assert (sky == 0).mean() < 0.001


def test_stars_and_nebulae_keep_their_colour_and_are_not_burnt():
    picture = preview.stretch(scene()).astype(int)
    red, blue, white, nebula = (picture[p] for p in ((60, 60), (60, 200), (200, 60), (200, 200)))
    assert red[0] > red[1] + 15 > red[2] + 20 and blue[2] > blue[1] + 15 > blue[0] + 20
    assert np.ptp(white) <= 6 and white.min() > 200
    assert nebula[0] > nebula[1] + 30 and abs(nebula[1] - nebula[2]) < 25
    assert (picture == 255).any(axis=-1).mean() < 0.002


def test_a_nebula_that_fills_most_of_the_image_keeps_its_colour():
    image = scene()
    image[:, 60:] += 30 * np.array([10.0, 5.0, 5.0], np.float32)[:, None, None]
    picture = preview.stretch(image)
    sky, nebula = (np.median(picture[rows, 100:160], axis=(0, 1)) for rows in (np.s_[:40], np.s_[100:160]))
    assert np.ptp(sky) <= 4
    assert nebula[0] > nebula[2] + 15 and nebula[0] > nebula[1] + 15
    assert nebula.min() > sky.max()


@pytest.mark.parametrize("factor", [1e-30, 1e-3, 1e3, 1e25])
def test_the_scale_of_the_data_does_not_matter(factor):
    reference = preview.stretch(scene())
    scaled = preview.stretch(scene() * np.float32(factor))
    assert np.abs(scaled.astype(int) - reference).max() <= 1


def test_no_data_is_black_and_does_not_change_the_rest():
    image = scene()
    reference = preview.stretch(image)
    image[:, :40] = np.nan
    image[:, 250, 250], image[:, 250, 251], image[:, 250, 252] = np.inf, -np.inf, 1e38
    picture = preview.stretch(image)
    assert not picture[:40].any() and not picture[250, 250:252].any() and (picture[250, 252] == 255).all()
    assert np.median(np.abs(picture[40:].astype(int) - reference[40:])) <= 2


@pytest.mark.parametrize("value", [0.0, 7.0, -1e20, np.nan])
@pytest.mark.parametrize("shape", [(3, 50, 60), (1, 50, 60), (50, 60), (3, 1, 1), (3, 1, 9), (3, 0, 5)])
@pytest.mark.filterwarnings("error")
def test_an_image_without_content_is_one_shade(value, shape):
    picture = preview.stretch(np.full(shape, value, np.float32))
    assert picture.shape == ((*shape[1:], 3) if shape[0] == 3 else shape[-2:]) and picture.dtype == np.uint8
    assert np.unique(picture).size <= 1
    assert not (np.isnan(value) and picture.any())


def test_a_channel_without_noise_and_a_few_seen_pixels_are_no_trouble():
    image = scene()
    image[2] = 0
    assert np.median(preview.stretch(image)[..., 0]) > 15
    few = np.full((3, 300, 300), np.nan, np.float32)
    few[:, 150, 100:200:7] = scene()[:, 150, 100:200:7]
    assert (preview.stretch(few).any(axis=-1) == np.isfinite(few[0])).mean() > 0.999


def test_each_knob_does_what_it_says():
    image = scene()
    image[:, 200:, 100:] += np.linspace(0, 20000, 200, dtype=np.float32)  # enough bright pixels for p_high
    reference = preview.stretch(image)
    assert np.median(preview.stretch(image, asinh_a=50)) > np.median(reference) + 10
    assert (preview.stretch(image, p_high=90) == 255).mean() > (reference == 255).mean() + 0.02
    image[:, :, :12] -= np.float32(500)  # some columns far below the sky, as a badly calibrated panel has them
    assert (preview.stretch(image, p_low=30)[:, :12] == 0).mean() > 0.99
    assert (preview.stretch(image, p_low=1)[:, :12] == 0).mean() < 0.9


@pytest.mark.parametrize(
    ("shape", "knobs"), [((2, 9, 9), {}), ((3, 9, 9), {"p_low": 99.95}), ((3, 9, 9), {"asinh_a": 0})]
)
def test_what_cannot_be_shown_is_refused(shape, knobs):
    with pytest.raises(ValueError):
        preview.stretch(np.zeros(shape, np.float32), **knobs)


# ------------------------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("shape", [(20, 30, 3), (20, 30)])
def test_the_png_has_the_first_row_at_the_bottom(tmp_path, shape):
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    preview.save_png(picture, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as read:
        assert read.format == "PNG"
        np.testing.assert_array_equal(np.asarray(read), np.flipud(picture))
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_a_folder_that_is_not_there_is_one_sentence(tmp_path):
    with pytest.raises(RunError, match=r"p\.png cannot be written"):
        preview.save_png(np.zeros((4, 4), np.uint8), tmp_path / "none" / "p.png")
