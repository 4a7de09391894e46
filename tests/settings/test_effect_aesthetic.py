"""What the settings of the aesthetic mosaic do."""

from __future__ import annotations

import numpy as np
import pytest

from scenes.outcomes import Outcome, differ


def test_two_pass_coverage_renorm(run):
    asked = run(two_pass_coverage_renorm=True)
    assert differ_from_science(asked) and not differ(run(), asked)
    assert not list(run().folder.glob("*aesthetic*"))


def differ_from_science(outcome: Outcome) -> bool:
    return bool(np.abs(outcome.image("aesthetic") - outcome.image()).max() > 0)


def coverage_gains(run, **settings) -> np.ndarray:
    return run(two_pass_coverage_renorm=True, **settings).per_tile("coverage_gain")


def test_two_pass_cov_sigma_px(run):
    assert np.abs(coverage_gains(run) - coverage_gains(run, two_pass_cov_sigma_px=8)).max() > 0.005


def test_two_pass_cov_gain_clip(run):
    wide = coverage_gains(run)
    narrow = coverage_gains(run, two_pass_cov_gain_clip=(0.999, 1.001))
    assert np.ptp(wide) > 0.01 and np.ptp(narrow) < 0.0021


def sky_of(image: np.ndarray) -> np.ndarray:
    return np.array([np.percentile(plane[plane != 0], 30) for plane in image])


def test_level_sky(run):
    asked = run(level_sky=True)
    assert not differ(run(), asked)
    seen = (asked.image() != 0).all(axis=0)
    y, x = np.nonzero(seen)
    basis = np.stack([np.ones(len(y)), y, x])
    for science, aesthetic, span in zip(
        asked.image(), asked.image("aesthetic"), asked.report["sky_plane"]["range"], strict=True
    ):
        taken = (science - aesthetic)[seen]
        plane = np.linalg.lstsq(basis.T, taken, rcond=None)[0] @ basis
        assert np.abs(taken - plane).max() < 0.01 < 0.5 * span < np.ptp(taken) < 1.5 * span


def test_final_mosaic_rgb_equalize_enabled(run):
    asked = run(final_mosaic_rgb_equalize_enabled=True)
    before, after = sky_of(asked.image()), sky_of(asked.image("aesthetic"))
    assert np.ptp(np.log(after)) < 0.02 < np.ptp(np.log(before))
    assert not differ(run(), asked)


def test_final_mosaic_rgb_equalize_gain_clip(run):
    asked = run(final_mosaic_rgb_equalize_enabled=True, final_mosaic_rgb_equalize_gain_clip="0.99,1.01")
    factors = sky_of(asked.image("aesthetic")) / sky_of(asked.image())
    assert factors.min() > 0.9899 and factors.max() < 1.0101 and np.ptp(factors) > 0.005


def black_of(run, **settings) -> float:
    """What was subtracted."""
    asked = run(final_mosaic_black_point_equalize_enabled=True, **settings)
    seen = asked.image() != 0
    return float(np.median((asked.image() - asked.image("aesthetic"))[seen]))


def test_final_mosaic_black_point_equalize_enabled(run):
    image = run().image()
    assert black_of(run) == pytest.approx(np.percentile(image[image != 0], 0.1), rel=0.01)


def test_final_mosaic_black_point_percentile(run):
    image = run().image()
    black = black_of(run, final_mosaic_black_point_percentile=40)
    assert black == pytest.approx(np.percentile(image[image != 0], 40), rel=0.01)
