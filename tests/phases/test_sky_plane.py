"""A level sky: the plane under a mosaic, found beside nebulae, and taken from what is looked at alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.small_scene import product
from zemosaic_pipeline.phases.phase5_sky_plane import sky_plane
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, make_sky, mosaic_shape, write_panels
from zemosaic_worker import run_hierarchical_mosaic

SHAPE = (300, 420)
Y, X = np.mgrid[: SHAPE[0], : SHAPE[1]] / np.array(SHAPE).reshape(2, 1, 1)
#: Per channel, of a sky of 1000.
TILT = np.stack([60 * Y + 80 * X, -50 * Y, 0 * X])


def sky(add=0.0, seed=1):
    """A noisy sky (3, H, W) with stars on a plane of its own in each channel, and something in front of it."""
    rng = np.random.default_rng(seed)
    image = 1000 + TILT + add + rng.normal(0, 6, (3, *SHAPE))
    at = rng.integers(0, SHAPE[0], 800), rng.integers(0, SHAPE[1], 800)
    image[:, at[0], at[1]] += rng.exponential(400, 800)
    return image.astype(np.float32)


def error(picture, factor=1):
    """How much the plane is wrong by, from one end of the picture to the other, for each channel."""
    plane = sky_plane(picture, factor)
    middle = (factor - 1) / 2
    wrong = plane.block(middle, middle, SHAPE, factor) - TILT
    return np.ptp(wrong, axis=(1, 2))


def blob(y, x, size, height):
    return height * np.exp(-((Y - y) ** 2 + (1.4 * (X - x)) ** 2) / (2 * size**2))


#: What may lie before the sky, and how far it may tilt the plane. The planes themselves rise by up to 140.
NEBULAE = {
    "none": (0.0, 1.0),
    "in the middle": (blob(0.5, 0.5, 0.15, 500), 1.0),
    "beside, with wide wings": (blob(0.3, 0.15, 0.25, 500), 4.0),
    "two": (blob(0.2, 0.2, 0.15, 300) + blob(0.7, 0.3, 0.2, 200), 4.0),
    "40 % of the field, on one side": (300.0 * (X < 0.4), 1.0),
    "40 % of the field, faint": (12.0 * (X < 0.4), 1.0),
    "40 % of the field, in clumps": ((X < 0.4) * (200 + 100 * np.sin(40 * X) * np.cos(30 * Y)), 1.0),
}


@pytest.mark.parametrize("name", NEBULAE)
@pytest.mark.parametrize("factor", [1, 4])
def test_a_nebula_moves_the_plane_little(name, factor):
    nebula, limit = NEBULAE[name]
    assert error(sky(nebula), factor).max() < limit


def test_a_mosaic_of_any_outline():
    picture = sky(blob(0.2, 0.2, 0.1, 200))
    picture[:, (X > 0.4) & (Y > 0.4)] = np.nan
    assert error(picture).max() < 3.0


def test_the_level_stays():
    """The mean of the plane over what is seen is 0, and its range is told."""
    picture = sky()
    picture[:, :, 300:] = np.nan
    plane = sky_plane(picture, 1)
    seen = plane.block(0, 0, SHAPE)[:, :, :300]
    assert np.abs(seen.mean(axis=(1, 2))).max() < 2.0  # of 140; the boxes at the edges are cut
    assert plane.span == pytest.approx(np.ptp(TILT[:, :, :300], axis=(1, 2)), rel=0.1, abs=1.0)


def test_a_pixel_of_the_plane_does_not_depend_on_the_block():
    plane = sky_plane(sky(), 3)
    whole = plane.block(0, 0, (90, 70))
    assert whole.dtype == np.float32
    assert np.array_equal(plane.block(37, 11, (20, 30)), whole[:, 37:57, 11:41])


@pytest.mark.parametrize(
    "picture", [np.full((1, 50, 60), np.nan), np.ones((1, 8, 9)), np.ones((3, 3, 400))], ids=["empty", "tiny", "line"]
)
def test_where_too_little_is_seen_there_is_no_plane(picture):
    assert sky_plane(picture.astype(np.float32), 1) is None


def test_a_constant_sky_is_level():
    plane = sky_plane(np.full((1, 100, 120), 7.0, np.float32), 1)
    assert np.abs(plane.block(0, 0, (100, 120))).max() < 1e-6


# -------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Six panels of stars on a tilted sky: the folders of a run with the defaults and of one with a level sky."""
    layout = Layout(rows=2, columns=3, shape=(120, 150), overlap=0.3, noise=3.0)
    field = make_sky(mosaic_shape(layout), seed=3, stars=500)
    field = replace(field, amplitudes=0 * field.amplitudes)
    panels = []
    for panel in make_panels(layout, field, seed=4):
        x, y = field.wcs.world_to_pixel_values(*panel.wcs.pixel_to_world_values(*np.meshgrid(range(150), range(120))))
        tilt = np.stack([0.3 * x + 0.2 * y, -0.2 * y, 0 * x])
        panels.append(replace(panel, data=(panel.data + panel.gain[:, None, None] * tilt).astype(np.float32)))
    root = tmp_path_factory.mktemp("tilted")
    write_panels(panels, root / "in")
    run_hierarchical_mosaic(root / "in", root / "plain", gpu="off")
    run_hierarchical_mosaic(root / "in", root / "level", gpu="off", level_sky=True)
    return root


def dark(image):
    """The sky of six parts of a mosaic, (C, 6)."""
    image = np.where(image == 0, np.nan, image)
    parts = [part for half in np.array_split(image, 2, axis=1) for part in np.array_split(half, 3, axis=2)]
    return np.stack([np.nanpercentile(part, 25, axis=(1, 2)) for part in parts], axis=1)


def test_a_tilted_mosaic_comes_out_level(runs):
    before, after = (dark(fits.getdata(product(runs / "level", kind))) for kind in ("science", "aesthetic"))
    assert (np.ptp(before, axis=1)[:2] > [60, 15]).all()
    assert np.ptp(after, axis=1).max() < 4
    assert after.mean(axis=1) == pytest.approx(before.mean(axis=1), abs=6)


def test_the_science_mosaic_keeps_its_sky(runs):
    assert not list((runs / "plain").glob("*aesthetic*"))
    for kind in ("science", "coverage"):
        assert product(runs / "plain", kind).read_bytes() == product(runs / "level", kind).read_bytes()
    assert product(runs / "plain", "preview").read_bytes() != product(runs / "level", "preview").read_bytes()


def test_file_and_report_say_by_how_much(runs):
    plain, level = (json.loads((runs / name / "run_report.json").read_text()) for name in ("plain", "level"))
    header = fits.getheader(product(runs / "level", "aesthetic"))
    span = level["sky_plane"]["range"]
    assert f"{span[0]:.4g}, {span[1]:.4g}, {span[2]:.4g}" in str(header["HISTORY"])
    assert plain["sky_plane"] is None
    wcs = WCS(header, naxis=2)
    assert span[0] == pytest.approx(0.3 * wcs.pixel_shape[0] + 0.2 * wcs.pixel_shape[1], rel=0.2)
    assert span[2] < 3
