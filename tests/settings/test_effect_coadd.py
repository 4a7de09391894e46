"""What the settings of resampling, combination and weights do."""

from __future__ import annotations

import numpy as np
import pytest

from scenes.outcomes import differ
from zemosaic_pipeline.reproject_compat import engine as reproject_engine


def test_engine(run, monkeypatch):
    calls = []
    real = reproject_engine.coadd_with_reproject
    monkeypatch.setattr(reproject_engine, "coadd_with_reproject", lambda *a: calls.append(1) or real(*a))
    native, peer = run(feather_px=0), run(feather_px=0, engine="reproject", fresh=True)
    assert calls == [1] and "engine reproject" in str(peer.header()["HISTORY"])
    seen = native.image("coverage") > 0
    apart = np.abs(native.image() - peer.image())[:, seen].max()
    assert 0 < apart < 1e-4 * np.ptp(np.percentile(native.image()[:, seen], (1, 99)))


def test_kernel(run):
    assert differ(run(), run(kernel="lanczos3"), by=1)


def test_combine_method(run):
    means = [run("stack", combine_method=name) for name in ("mean", "median", "sigma_clip", "winsorized")]
    for k, one in enumerate(means):
        assert all(differ(one, other) for other in means[:k])


def test_kappa_low(run):
    loose, tight = (run("stack", combine_method="sigma_clip", kappa_low=k) for k in (9, 1.0))
    assert tight.image().mean() > loose.image().mean() + 5  # more of what is too dark is left out


def test_kappa_high(run):
    loose, tight = (run("stack", combine_method="sigma_clip", kappa_high=k) for k in (9, 1.0))
    assert tight.image().mean() < loose.image().mean() - 5


def test_winsor_limits(run):
    little, much = (run("stack", combine_method="winsorized", winsor_limits=limits) for limits in ("0,0", "0.3,0.3"))
    assert differ(little, much, by=5)


def test_feather_px(run):
    ramps, none = run(), run(feather_px=0)
    full = none.image("coverage")
    assert np.allclose(full, np.rint(full), atol=1e-4)
    edge = ramps.image("coverage")
    assert np.mean(np.abs(edge - np.rint(edge)) > 0.01) > 0.1


def test_enable_tile_weighting(run):
    assert sorted(run().per_tile("weight")) == [1, 1, 1, 1, 5]
    assert (run(enable_tile_weighting=False).per_tile("weight") == 1).all()


def test_tile_weight_mode(run):
    assert (run(tile_weight_mode="uniform").per_tile("weight") == 1).all()
    inverse = run(tile_weight_mode="inverse_variance")
    noise = inverse.per_tile("noise") / inverse.per_tile("gain")
    expected = np.mean(noise**-2.0, axis=1)
    np.testing.assert_allclose(inverse.per_tile("weight"), expected / np.median(expected), rtol=1e-6)


def radial(run, **settings) -> np.ndarray:
    """Coverage of the stack where all tiles weigh their centre more, 1 in the middle."""
    coverage = run("stack", apply_radial_weight=True, feather_px=0, **settings).image("coverage")
    return coverage / coverage.max()


def test_apply_radial_weight(run):
    flat = run("stack", feather_px=0).image("coverage")
    assert flat.max() == pytest.approx(7) and np.median(flat[flat > 0]) == pytest.approx(7)
    assert 0 < np.quantile(radial(run), 0.2) < 0.5


def test_radial_feather_fraction(run):
    assert radial(run, radial_feather_fraction=0.4).mean() < radial(run).mean() - 0.1


def test_radial_shape_power(run):
    assert radial(run, radial_shape_power=6.0).mean() < radial(run).mean() - 0.1


def test_min_radial_weight_floor(run):
    weights = radial(run, min_radial_weight_floor=0.6)
    assert weights[weights > 0].min() > 0.55 > radial(run)[radial(run) > 0].min()
