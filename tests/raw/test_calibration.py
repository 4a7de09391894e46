"""Masters: combined, checked, and taken off so that what the sensor did to a known scene is undone."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.stats import sigma_clip

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.raw import calibration
from zemosaic_pipeline.raw.calibration import Calibration, combine, load_calibration
from zemosaic_pipeline.raw.frame import open_frame

SHAPE = (48, 64)


class Sensor:
    """A sensor without noise: bias, dark current per second, and a response with vignetting, dust and a colour cast."""

    def __init__(self):
        rng = np.random.default_rng(1)
        y, x = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
        self.bias = 300 + rng.normal(0, 20, SHAPE)
        self.current = rng.exponential(3, SHAPE)
        self.response = 1 - 0.4 * ((y - 24) ** 2 + (x - 32) ** 2) / 40**2 + rng.normal(0, 0.02, SHAPE)
        self.response[10:14, 20:24] *= 0.7

    def expose(self, light, seconds=0.0):
        return self.bias + seconds * self.current + light * self.response


@pytest.fixture
def sensor():
    return Sensor()


def save(path, data, **cards):
    path.parent.mkdir(exist_ok=True)
    header = fits.Header()
    header.update(cards)
    fits.PrimaryHDU(np.asarray(data, "f4"), header).writeto(path, overwrite=True)
    return str(path)


def load(tmp_path, warnings=None, **given):
    wanted = {"dark": "", "flat": "", "bias": "", "debayer_method": "bilinear", "bayer_pattern": "auto"}
    wanted |= {"hot_pixel_sigma": 0.0, **given}
    return load_calibration(SimpleNamespace(**wanted), tmp_path, ([] if warnings is None else warnings).append)


def calibrated(tmp_path, data, calibration, **cards):
    """Rows of a light frame, before debayering unless BAYERPAT is given."""
    save(tmp_path / "light.fits", data, **cards)
    frame = open_frame(tmp_path / "light.fits", "light.fits", calibration, tmp_path)
    return frame.pixels.image.read(0, frame.shape[0])


# ----------------------------------------------------------------------------------------------------- what is undone


def test_bias_dark_and_flat_give_back_the_scene(tmp_path, sensor):
    scene = np.random.default_rng(2).uniform(100, 5000, SHAPE)
    masters = {
        "bias": save(tmp_path / "m/bias.fits", sensor.bias),
        "dark": save(tmp_path / "m/dark.fits", sensor.expose(0, 30), EXPTIME=30.0),
        "flat": save(tmp_path / "m/flat.fits", sensor.expose(20000), BAYERPAT="RGGB"),
    }
    light = sensor.expose(scene, 10)
    result = calibrated(tmp_path, light, load(tmp_path, **masters), EXPTIME=10.0)[0]
    level = result / scene  # one factor for each colour of the flat
    for cells in ([(0, 0)], [(1, 1)], [(0, 1), (1, 0)]):
        factors = np.concatenate([level[y::2, x::2].ravel() for y, x in cells])
        response = np.concatenate([sensor.response[y::2, x::2].ravel() for y, x in cells])
        np.testing.assert_allclose(factors, np.median(response), rtol=2e-4)


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"bias"}, lambda s: s.expose(500, 10) - s.bias),
        ({"dark"}, lambda s: s.expose(500, 10) - s.expose(0, 30)),  # not scaled: its bias does not grow
        ({"dark", "bias"}, lambda s: 500 * s.response),
    ],
)
def test_each_master_takes_off_its_own(tmp_path, sensor, given, left):
    masters = {
        "bias": save(tmp_path / "m/bias.fits", sensor.bias),
        "dark": save(tmp_path / "m/dark.fits", sensor.expose(0, 30), EXPTIME=30.0),
    }
    calibration = load(tmp_path, **{kind: masters[kind] for kind in given})
    result = calibrated(tmp_path, sensor.expose(500, 10), calibration, EXPTIME=10.0)
    np.testing.assert_allclose(result[0], left(sensor), atol=2e-3)


def test_a_dark_without_its_bias_is_not_freed_of_it_twice(tmp_path, sensor):
    masters = {
        "bias": save(tmp_path / "m/bias.fits", sensor.bias),
        "dark": save(tmp_path / "m/dark.fits", 10 * sensor.current, EXPTIME=10.0, CALSTAT="B"),
    }
    result = calibrated(tmp_path, sensor.expose(500, 10), load(tmp_path, **masters), EXPTIME=10.0)
    np.testing.assert_allclose(result[0], 500 * sensor.response, atol=2e-3)


@pytest.mark.parametrize("pattern", ["GRBG", None])
def test_a_flat_s_own_colour_does_not_get_into_the_frames(tmp_path, sensor, pattern):
    y, x = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    cell = np.array([[1.0, 0.4], [0.3, 1.0]])[y % 2, x % 2]  # a lamp with little red and blue
    cards = {} if pattern is None else {"BAYERPAT": pattern}
    flat = save(tmp_path / "m/flat.fits", 20000 * cell * sensor.response, **cards)
    grey = calibrated(tmp_path, 1000 * sensor.response, load(tmp_path, flat=flat), BAYERPAT="GRBG")
    medians = np.median(grey, axis=(1, 2))
    np.testing.assert_allclose(medians / medians[1], 1, atol=0.01)
    assert np.ptp(grey, axis=(1, 2)).max() < 0.03 * 1000 < np.ptp(1000 * sensor.response)


def test_both_greens_of_a_flat_are_one_colour(tmp_path):
    y, x = np.mgrid[0 : SHAPE[0], 0 : SHAPE[1]]
    response = np.array([[1.04, 0.5], [0.6, 0.96]])[y % 2, x % 2]  # GRBG with unlike greens
    flat = save(tmp_path / "m/flat.fits", 20000 * response, BAYERPAT="GRBG")
    result = calibrated(tmp_path, 1000 * response, load(tmp_path, flat=flat))[0]
    np.testing.assert_allclose(result[::2, ::2], result[1::2, 1::2].mean(), rtol=1e-5)


def test_blind_pixels_of_a_flat_hold_no_data(tmp_path):
    flat = np.full(SHAPE, 1000.0)
    flat[5, 7], flat[9, 30], flat[12, 50] = 0, -3, np.nan
    flat[20:30, 20:30] = 0
    warnings = []
    calibration = load(tmp_path, warnings, flat=save(tmp_path / "m/flat.fits", flat))
    assert len(warnings) == 1 and "flat.fits has 103 pixels without light" in warnings[0]
    light = np.full(SHAPE, 700.0)
    result = calibrated(tmp_path, light, calibration, BAYERPAT="RGGB")
    missing = np.isnan(result).any(axis=0)
    assert missing[20:30, 20:30].all() and missing.sum() <= 12 * 12
    np.testing.assert_allclose(result[:, ~missing], 700, rtol=1e-6)


# ------------------------------------------------------------------------------------------------------- combining


def test_many_frames_are_clipped_as_astropy_clips_them():
    rng = np.random.default_rng(3)
    stack = rng.normal(500, 10, (15, 40, 50)).astype("f4")
    stack[3, 10, 10:20] += 5000  # a cosmic ray
    stack[4, 20] -= 400
    mad = np.median(np.abs(stack - np.median(stack, axis=0)), axis=0)
    sigma = 1.4826 * np.maximum(mad, np.median(mad, axis=1, keepdims=True))
    expected = sigma_clip(stack, sigma=3, cenfunc="median", stdfunc=lambda *a, **k: sigma, axis=0, maxiters=1)
    result = combine(stack.copy())
    np.testing.assert_allclose(result, expected.mean(axis=0), rtol=1e-6)
    assert abs(result[10, 10:20].mean() - 500) < 5
    assert result.std() < 1.1 * 10 / np.sqrt(15)  # the noise of a mean


def test_few_frames():
    stack = np.random.default_rng(4).normal(500, 10, (4, 6, 7)).astype("f4")
    np.testing.assert_array_equal(combine(stack[:1].copy()), stack[0])
    np.testing.assert_allclose(combine(stack[:2].copy()), stack[:2].mean(axis=0), rtol=1e-6)
    np.testing.assert_array_equal(combine(stack[:3].copy()), np.sort(stack[:3], axis=0)[1])
    np.testing.assert_allclose(combine(stack.copy()), np.sort(stack, axis=0)[1:3].mean(axis=0), rtol=1e-6)


def test_equal_values_and_nan_are_combined(tmp_path):
    stack = np.full((6, 2, 3), 7, "f4")
    stack[2, 0, 0], stack[3, 1, 1] = 900, np.nan
    np.testing.assert_array_equal(combine(stack), [[7, 7, 7], [7, np.nan, 7]])


def test_a_folder_is_combined_the_same_in_any_blocks(tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    for k in range(7):
        save(tmp_path / f"darks/d{k}.fits", rng.normal(200, 9, SHAPE), EXPTIME=10.0, **{"CCD-TEMP": 20.0 + k})
    (tmp_path / "darks/notes.fits").write_text("not a picture")
    warnings = []
    at_once = load(tmp_path, warnings, dark=str(tmp_path / "darks")).dark
    assert (at_once.exposure, at_once.temperature) == (10.0, 23.0) and at_once.data.dtype == np.float32
    assert len(warnings) == 1 and "notes.fits is left out" in warnings[0]
    frames = [fits.getdata(tmp_path / f"darks/d{k}.fits") for k in range(7)]
    assert np.abs(at_once.data - np.mean(frames, axis=0)).max() < 30
    monkeypatch.setattr(calibration, "_BLOCK_BYTES", 7 * 4 * SHAPE[1] * 5)
    in_blocks = load(tmp_path, dark=str(tmp_path / "darks")).dark
    np.testing.assert_array_equal(in_blocks.data, at_once.data)


def test_flats_of_unlike_brightness_are_scaled_before_they_are_combined(tmp_path, sensor):
    for k, light in enumerate((8000, 20000, 11000, 30000, 15000)):
        flat = sensor.expose(light)
        flat[3 * k, 5:9] *= 3  # stars in a sky flat
        save(tmp_path / f"flats/f{k}.fits", flat, BAYERPAT="RGGB")
    bias = save(tmp_path / "m/bias.fits", sensor.bias)
    flat = load(tmp_path, bias=bias, flat=str(tmp_path / "flats")).flat
    shape = flat.data * sensor.response
    np.testing.assert_allclose(shape[::2, ::2], np.median(sensor.response[::2, ::2]), rtol=1e-3)


# --------------------------------------------------------------------------------------------------------- refusals


def refuse(tmp_path, *words, **given):
    with pytest.raises(UsageError) as caught:
        load(tmp_path, **given)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")
    for word in words:
        assert word in text, text


def test_masters_that_cannot_be_used(tmp_path):
    refuse(tmp_path, "dark", "nowhere.fits", "does not exist", dark=str(tmp_path / "nowhere.fits"))
    (tmp_path / "none").mkdir()
    refuse(tmp_path, "none", "no FITS file", "bias", bias=str(tmp_path / "none"))
    refuse(tmp_path, "rgb.fits", "RGB", dark=save(tmp_path / "rgb.fits", np.ones((3, *SHAPE))))
    refuse(tmp_path, "black.fits", "0 or less", flat=save(tmp_path / "black.fits", np.zeros(SHAPE)))
    refuse(tmp_path, "odd.fits", "BAYERPAT", flat=save(tmp_path / "odd.fits", np.ones(SHAPE), BAYERPAT="XXXX"))
    (tmp_path / "text.fits").write_text("no picture")
    refuse(tmp_path, "text.fits", "not a FITS file", flat=str(tmp_path / "text.fits"))
    save(tmp_path / "mix/a.fits", np.ones(SHAPE), EXPTIME=10.0)
    save(tmp_path / "mix/b.fits", np.ones(SHAPE), EXPTIME=20.0)
    refuse(tmp_path, "mix", "10 s, 20 s", dark=str(tmp_path / "mix"))
    save(tmp_path / "sizes/a.fits", np.ones(SHAPE))
    save(tmp_path / "sizes/b.fits", np.ones((9, 9)))
    refuse(tmp_path, "a.fits", "b.fits", "size", bias=str(tmp_path / "sizes"))
    bias = save(tmp_path / "bias.fits", np.ones((9, 9)))
    for kind in ("dark", "flat"):
        refuse(
            tmp_path,
            f"{kind}.fits",
            "64 x 48",
            "9 x 9",
            **{kind: save(tmp_path / f"{kind}.fits", np.ones(SHAPE)), "bias": bias},
        )


def test_a_dark_of_another_size_is_named(tmp_path):
    calibration = load(tmp_path, dark=save(tmp_path / "m/dark.fits", np.ones((10, 12))))
    with pytest.raises(UsageError, match=r"dark .*dark\.fits is 12 x 10 .*light\.fits is 64 x 48"):
        calibrated(tmp_path, np.ones(SHAPE), calibration)


def test_another_exposure_or_temperature_is_told_once(tmp_path):
    warnings = []
    dark = save(tmp_path / "m/dark.fits", np.ones(SHAPE), EXPTIME=30.0, **{"CCD-TEMP": 10.0})
    calibration = load(tmp_path, warnings, dark=dark)
    calibrated(tmp_path, np.ones(SHAPE), calibration, EXPTIME=28.0, **{"CCD-TEMP": 14.0})
    calibrated(tmp_path, np.ones(SHAPE), calibration)  # nothing known
    assert warnings == []
    for _ in range(3):
        calibrated(tmp_path, np.ones(SHAPE), calibration, EXPTIME=10.0, **{"CCD-TEMP": 25.0})
    assert len(warnings) == 2
    assert "10.0 degrees" in warnings[0] and "25.0" in warnings[0] and "light.fits" in warnings[0]
    assert "30 s" in warnings[1] and "10 s" in warnings[1] and "dark.fits" in warnings[1]


def test_masters_do_not_go_to_rgb_files(tmp_path):
    warnings = []
    calibration = load(tmp_path, warnings, dark=save(tmp_path / "m/dark.fits", np.ones(SHAPE)))
    for _ in range(2):
        result = calibrated(tmp_path, np.full((3, *SHAPE), 5), calibration)
    assert (result == 5).all() and len(warnings) == 1 and "light.fits is RGB" in warnings[0]


def test_no_calibration_is_none(tmp_path):
    assert load(tmp_path).masters == () == Calibration().masters
    data = np.random.default_rng(6).normal(500, 9, SHAPE).astype("f4")
    np.testing.assert_array_equal(calibrated(tmp_path, data, load(tmp_path))[0], data)
