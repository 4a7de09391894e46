"""What the settings of Phases 2 and 3 do: the frames of a panel, and how they are stacked."""

from __future__ import annotations

import numpy as np

from scenes.outcomes import differ, frames, night, panels
from zemosaic_pipeline.phases import clustering


def test_cluster_panel_threshold(run):
    assert panels(night(run)) == 1
    # less than the frames were dithered by
    assert panels(night(run, cluster_panel_threshold=1e-4)) > 3


def test_cluster_target_groups(run):
    assert panels(night(run, cluster_panel_threshold=1e-4, cluster_target_groups=2)) <= 2


def test_cluster_orientation_split_deg(run):
    assert panels(night(run, cluster_orientation_split_deg=3)) > 1


def test_max_raw_per_master_tile(run):
    assert panels(night(run, max_raw_per_master_tile=2, reject_bad_frames=False)) == 3


def test_auto_limit_frames_per_master_tile(run, monkeypatch):
    monkeypatch.setattr(clustering, "AUTO_CAP", 3)
    assert panels(run("lights", fresh=True, reject_bad_frames=False)) == 2
    assert panels(run("lights", reject_bad_frames=False, auto_limit_frames_per_master_tile=False)) == 1


def test_stacking_normalize_method(run):
    fitted, sky, none = (night(run, stacking_normalize_method=m) for m in ("linear_fit", "sky_mean", "none"))
    assert np.ptp(frames(fitted, "gain")) > 0.02
    assert (frames(sky, "gain") == 1).all() and (frames(none, "gain") == 1).all()
    assert differ(sky, none, by=1) and differ(fitted, sky, by=1)


def test_stacking_weighting_method(run):
    variance, fwhm, none = (
        frames(night(run, stacking_weighting_method=m), "weight") for m in ("noise_variance", "noise_fwhm", "none")
    )
    assert (none == 1).all() and np.ptp(variance) > 0.02 and np.abs(variance - fwhm).max() > 0.02


def test_stacking_rejection_algorithm(run):
    names = ("none", "kappa_sigma", "winsorized_sigma_clip", "linear_fit_clip")
    # three sigma are never reached among six frames
    tight = {"stacking_kappa_low": 1.2, "stacking_kappa_high": 1.2, "reject_bad_frames": False}
    stacks = [night(run, stacking_rejection_algorithm=name, **tight) for name in names]
    for k, one in enumerate(stacks):
        assert all(differ(one, other) for other in stacks[:k])


def clipped(run, **kappa) -> float:
    return float(
        night(run, stacking_rejection_algorithm="kappa_sigma", reject_bad_frames=False, **kappa).image().mean()
    )


def test_stacking_kappa_low(run):
    assert clipped(run, stacking_kappa_low=0.8) > clipped(run, stacking_kappa_low=9) + 1


def test_stacking_kappa_high(run):
    assert clipped(run, stacking_kappa_high=0.8) < clipped(run, stacking_kappa_high=9) - 1


def test_stacking_winsor_limits(run):
    little, much = (night(run, stacking_winsor_limits=limits) for limits in ("0,0", "0.4,0.4"))
    assert differ(little, much, by=5)


def test_stacking_final_combine_method(run):
    assert differ(night(run), night(run, stacking_final_combine_method="median"), by=5)
