"""The photometry on small rendered scenes, measured, solved and coadded as the worker does it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from astropy.wcs import WCS

from scenes.places import benchmark
from zemosaic_photometry import compute_photometric_gains_and_offsets
from zemosaic_pipeline.synthetic.panels import Layout, tangent_wcs

SMALL = Layout(rows=2, columns=2, shape=(240, 320), overlap=0.25)


bench = benchmark("photometry")
scenes, judging = bench.scenes, bench.judging
#: Stars in the field of a panel: 500 in all.
STARS = 120


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"sip": True},
        {"rotation_deg": 15.0},
        {"nan_border": 12},
        {"noise_factor": {1: 2.0}},
        {"fwhm": (3.0, 4.5), "shape": (360, 480)},  # wide apertures want more stars
        {"gain_sigma": 0.45},
    ],
    ids=["base", "sip", "rotated", "nan", "noisy", "seeing", "gains"],
)
def test_close_to_the_true_gains_and_offsets(change):
    """A small scene has fewer stars than the benchmark's: its margins are three times as wide."""
    layout = replace(SMALL, **change)
    stars = STARS * np.prod(layout.shape) / np.prod(SMALL.shape)
    result = bench.run_case("small", scenes.Case(layout, stars=stars), seed=4)
    assert not result["warnings"]
    assert result["regions_with_stars"] >= 3
    for key, margin in scenes.MARGINS.items():
        assert result["excess"][key] <= 3 * margin, (key, result)
        assert result["strict"][key] <= 5 * margin, (key, result)


@pytest.fixture(scope="module")
def known():
    """A scene, its truth and the figures of its floor."""
    scene = scenes.make_scene(SMALL, seed=4, stars=500)
    truth = judging.true_sky(scene)
    return scene, truth, judging.judge(scenes.true_mosaic(scene)[0], truth, SMALL.noise).figures


def excess(known, number, **change):
    """By how much the figures exceed the floor's where something else is taken for true of one panel."""
    scene, truth, floor = known
    panels = list(scene.panels)
    panels[number] = replace(panels[number], **change)
    found = judging.judge(scenes.true_mosaic(scene, panels)[0], truth, SMALL.noise).figures
    return {key: found[key] - floor[key] for key in floor}


def test_the_judge_sees_a_wrong_gain_and_a_wrong_offset(known):
    """One panel of four with a gain 2 % off in one channel, then with an offset of half a sigma."""
    panel = known[0].panels[0]
    found = excess(known, 0, gain=panel.gain * [1, 1.02, 1])
    assert found["star"] > 0.5 and found["colour"] > 0.5
    panel = known[0].panels[3]
    found = excess(known, 3, offset=panel.offset - panel.gain * [0, 0, 0.5 * SMALL.noise])
    assert found["sky"] > 0.3
    assert found["low"] > 0.05 and found["seam"] > 0.1


def test_the_judge_sees_a_plane_that_was_left(known):
    """One panel of four with a plane that rises by one sigma from one side to the other."""
    panel = known[0].panels[0]
    plane = np.zeros((3, 5))
    plane[1, 0] = panel.gain[1] * SMALL.noise / 2
    found = excess(known, 0, polynomial=plane)
    assert found["low"] > 0.05 and found["low_q"] > 0.03
    assert found["star"] < 0.2


def test_the_judge_sees_no_constant_scale_or_quadratic_over_all(known):
    """Nobody can know the first two, and the last is no matter of one panel: only ``low`` tells of it."""
    scene, truth, floor = known
    values = scenes.true_mosaic(scene)[0]
    found = judging.judge(3 * values + 500, truth, SMALL.noise).figures
    assert found == pytest.approx(floor, abs=5e-3)
    u, v = np.linspace(-1, 1, values.shape[2]), np.linspace(-1, 1, values.shape[1])[:, None]
    found = judging.judge(values + 2 * SMALL.noise * (u * u - u * v), truth, SMALL.noise).figures
    assert found["low"] > floor["low"] + 0.3
    assert found["low_q"] == pytest.approx(floor["low_q"], abs=0.01)
    assert found["seam"] == pytest.approx(floor["seam"], abs=0.03)
    assert found["star"] == pytest.approx(floor["star"], abs=0.1)


def test_panels_that_agree_come_out_unchanged():
    scene = scenes.make_scene(replace(SMALL, gain_sigma=0.0, offset_sigma=0.0), seed=5, stars=1000)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert (np.abs(np.log(solution.gain)) < 3 * solution.gain_se).all()
    truth = judging.true_sky(scene)
    plain, matched = (
        judging.aperture_sums(scenes.mosaic(scene, s)[0] - truth.nebula, truth.stars, truth.radius)
        for s in (None, solution)
    )
    assert len(plain) > 20
    # the sum of all is the mosaic's photometric scale; one star's local background differs by what the levels do
    assert matched.sum(axis=0) / plain.sum(axis=0) == pytest.approx(1, abs=1e-3)
    assert np.median(matched / plain, axis=0) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("change", "low_q", "star"),
    [
        ({"plane": 5.0}, 0.15, 1.0),
        ({"plane": 3.0, "sip": True, "rotation_deg": 10.0, "nan_border": 8}, 0.15, 1.0),
        ({"plane": 3.0, "pixel_scales": (0.75, 1.5)}, 0.2, 1.5),
    ],
    ids=["planes", "distorted", "scales"],
)
def test_gradients_leave_the_mosaic(change, low_q, star):
    """A small scene has few stars; the benchmark's margins are those of nine larger panels."""
    case = scenes.Case(replace(SMALL, **change), stars=STARS)
    result = bench.run_case("small", case, seed=4)
    assert not result["warnings"]
    assert result["ours"]["low_q"] < low_q and result["excess"]["seam"] < 0.15
    assert result["excess"]["star"] < star
    assert result["ours"]["low"] < 2.5 * case.layout.plane * result["stated"] + 0.1


def test_two_islands_and_a_lone_panel():
    scene = scenes.make_scene(replace(SMALL, columns=3, rows=1, gap_after_column=1), seed=2, stars=800)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert solution.component.tolist() == [0, 0, 1]
    assert [w.text.split(":")[:2] for w in solution.warnings if w.kind == "no_overlap"] == [["panel_02", " no_overlap"]]
    values, coverage = scenes.mosaic(scene, solution)
    assert np.isfinite(values[:, coverage > 0]).all()
    scene = scenes.make_scene(replace(SMALL, columns=4, rows=1, gap_after_column=1), seed=2, stars=800)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert solution.component.tolist() == [0, 0, 1, 1]
    assert sum(w.kind == "second_island" and "panel_02" in w.text for w in solution.warnings) == 1
    assert np.abs(solution.step_after).max() < 0.5 < np.abs([p.step_before for p in solution.pairs]).max()


def test_a_sky_without_stars_or_nebula():
    """No overlap has structure: backgrounds agree, gains stay 1, and the report names every panel."""
    layout = replace(SMALL, gain_sigma=0.05)
    scene = scenes.make_scene(layout, seed=4, stars=0, nebula=0.0)
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    assert (solution.gain == 1).all()
    assert sum(w.kind == "gain_undetermined" for w in solution.warnings) == 4
    values = scenes.mosaic(scene, solution)[0]
    smooth = np.stack([v[20:-20, 20:-20] for v in values])
    regions = scenes.coverage_regions(scene, judging.MIN_PIXELS)[20:-20, 20:-20]
    medians = np.array([np.median(smooth[:, regions == n], axis=1) for n in np.unique(regions[regions >= 0])])
    assert np.ptp(medians, axis=0).max() < 0.1 * layout.noise


def test_a_constant_image_comes_out_constant():
    scene = scenes.make_scene(
        replace(SMALL, gain_sigma=0.0, offset_sigma=0.0, noise=0.0, rotation_deg=10.0), seed=4, stars=0, nebula=0.0
    )
    solution = compute_photometric_gains_and_offsets(scene.coarse)
    values, coverage = scenes.mosaic(scene, solution)
    for plane, level in zip(values, scene.sky.level, strict=True):
        assert plane[coverage > 0] == pytest.approx(level, rel=1e-6)


def test_stars_can_give_the_scale_where_a_program_takes_the_nebula_away(known):
    scene, truth, floor = known
    values = scenes.true_mosaic(scene)[0] - truth.nebula
    found = judging.judge(0.5 * (values + truth.nebula), truth, SMALL.noise, by_stars=True).figures
    assert found["low_q"] == pytest.approx(floor["low_q"], abs=0.01)
    found = judging.judge(0.5 * values, truth, SMALL.noise, by_stars=True).figures
    missing = judging.block_medians(truth.nebula / SMALL.noise, judging.BLOCK)
    assert found["low"] == pytest.approx(np.nanstd(missing, axis=(1, 2)).max(), rel=0.1)


def test_other_programs_are_given_the_same_wcs():
    peers = benchmark("gradient_peers")
    wcs = tangent_wcs((240, 320), (83.8, -5.4), 4.0, 7.5)
    header = peers.plain_header(wcs, (240, 320))
    x, y = np.array([0.0, 319.0, 17.5]), np.array([0.0, 5.0, 239.0])
    assert np.allclose(WCS(header).pixel_to_world_values(x, y), wcs.pixel_to_world_values(x, y), rtol=0, atol=1e-10)
