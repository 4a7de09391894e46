"""The photometry on small rendered scenes, measured, solved and coadded as the worker does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from scenes.places import benchmark
from zemosaic_photometry import compute_photometric_gains_and_offsets
from zemosaic_pipeline.synthetic.panels import Layout

SMALL = Layout(rows=2, columns=2, shape=(240, 320), overlap=0.25)


bench = benchmark("photometry")


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sip": True},
        {"rotation_deg": 15.0},
        {"nan_border": 12},
        {"noise_factor": {1: 2.0}},
        {"fwhm": (3.0, 4.5)},
        {"gain_sigma": 0.45},
    ],
    ids=["base", "sip", "rotated", "nan", "noisy", "seeing", "gains"],
)
def test_close_to_the_true_gains_and_offsets(change):
    """A small scene has fewer stars than the benchmark's: its margins are three times as wide."""
    result = bench.run_case("small", replace(SMALL, **change), seed=4, stars=500)
    assert not result["warnings"]
    assert result["regions_with_stars"] >= 3
    for key, margin in bench.MARGINS.items():
        assert result["excess"][key] <= 3 * margin, (key, result)
        assert result["strict"][key] <= 5 * margin, (key, result)


def test_the_judge_sees_a_wrong_gain_and_a_wrong_offset():
    """One panel of four with a gain 2 % off in one channel, then with an offset of half a sigma."""
    scene = bench.make_scene(SMALL, seed=4, stars=500)
    truth, right = bench.true_sky(scene), bench.true_solution(scene.panels)
    floor = bench.figures(bench.judge(bench.mosaic(scene, right)[0], truth, SMALL.noise))
    gain, level = right.gain.copy(), right.level.copy()
    gain[0, 1] *= 1.02
    level[3, 2] += 0.5 * SMALL.noise
    found = bench.figures(bench.judge(bench.mosaic(scene, replace(right, gain=gain))[0], truth, SMALL.noise))
    assert found["star"] - floor["star"] > 0.5 and found["colour"] - floor["colour"] > 0.5
    found = bench.figures(bench.judge(bench.mosaic(scene, replace(right, level=level))[0], truth, SMALL.noise))
    assert found["sky"] - floor["sky"] > 0.3


def test_panels_that_agree_come_out_unchanged():
    scene = bench.make_scene(replace(SMALL, gain_sigma=0.0, offset_sigma=0.0), seed=5, stars=1000)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert (np.abs(np.log(solution.gain)) < 3 * solution.gain_se).all()
    truth = bench.true_sky(scene)
    plain, matched = (
        bench.aperture_sums(bench.mosaic(scene, s)[0] - truth.nebula, truth.stars, truth.radius)
        for s in (None, solution)
    )
    assert len(plain) > 20
    # the sum of all is the mosaic's photometric scale; one star's local background differs by what the levels do
    assert matched.sum(axis=0) / plain.sum(axis=0) == pytest.approx(1, abs=1e-3)
    assert np.median(matched / plain, axis=0) == pytest.approx(1, abs=1e-3)


def test_two_islands_and_a_lone_panel():
    scene = bench.make_scene(replace(SMALL, columns=3, rows=1, gap_after_column=1), seed=2, stars=800)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert solution.component.tolist() == [0, 0, 1]
    assert [w.text.split(":")[:2] for w in solution.warnings if w.kind == "no_overlap"] == [["panel_02", " no_overlap"]]
    values, coverage = bench.mosaic(scene, solution)
    assert np.isfinite(values[:, coverage > 0]).all()
    scene = bench.make_scene(replace(SMALL, columns=4, rows=1, gap_after_column=1), seed=2, stars=800)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert solution.component.tolist() == [0, 0, 1, 1]
    assert sum(w.kind == "second_island" and "panel_02" in w.text for w in solution.warnings) == 1
    assert np.abs(solution.step_after).max() < 0.5 < np.abs([p.step_before for p in solution.pairs]).max()


def test_a_sky_without_stars_or_nebula():
    """No overlap has structure: backgrounds agree, gains stay 1, and the report names every panel."""
    layout = replace(SMALL, gain_sigma=0.05)
    scene = bench.make_scene(layout, seed=4, stars=0, nebula=0.0)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert (solution.gain == 1).all()
    assert sum(w.kind == "gain_undetermined" for w in solution.warnings) == 4
    values = bench.mosaic(scene, solution)[0]
    smooth = np.stack([v[20:-20, 20:-20] for v in values])
    regions = bench.coverage_regions(scene)[20:-20, 20:-20]
    medians = np.array([np.median(smooth[:, regions == n], axis=1) for n in np.unique(regions[regions >= 0])])
    assert np.ptp(medians, axis=0).max() < 0.1 * layout.noise


def test_a_constant_image_comes_out_constant():
    scene = bench.make_scene(
        replace(SMALL, gain_sigma=0.0, offset_sigma=0.0, noise=0.0, rotation_deg=10.0), seed=4, stars=0, nebula=0.0
    )
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    values, coverage = bench.mosaic(scene, solution)
    for plane, level in zip(values, scene.sky.level, strict=True):
        assert plane[coverage > 0] == pytest.approx(level, rel=1e-6)
