"""Phases 1 to 3 end to end on small synthetic nights: what comes out is the sky, and what goes wrong is named."""

from __future__ import annotations

import json
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.places import benchmark
from scenes.small_scene import LOG, digests, long_ago, pixels, product, run, write_scene
from zemosaic_pipeline.errors import Cancelled, UsageError
from zemosaic_pipeline.gui.plan import read_plan
from zemosaic_pipeline.phases.phase1_frames import FramePlan
from zemosaic_pipeline.platesolve.choose import choose_solver
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.night import Night, night_truth, write_calibration, write_night
from zemosaic_worker import run_hierarchical_mosaic

#: Two panels of six frames, a clouded and a trailed one among them, and two satellites.
NIGHT = Night(
    rows=1,
    columns=2,
    frames=6,
    shape=(320, 240),
    scale=6.0,
    faint_per_megapixel=4000,
    rotation_deg=3,
    drift_px=4,
    dither_px=3,
    hot=150,
    warm=150,
    trails=2,
    with_wcs=True,
    wcs_error_px=1.0,
)
#: One panel of four good frames.
SMALL = replace(NIGHT, columns=1, frames=4, shape=(200, 160), hot=20, warm=0, trails=0, bad_frames=False)


@pytest.fixture(scope="module")
def nights(tmp_path_factory) -> Callable[[Night], Path]:
    """The frames of a night, written once, as if an hour ago; never to be changed."""
    written: dict[Night, Path] = {}

    def lights(night: Night) -> Path:
        if night not in written:
            written[night], _ = write_night(tmp_path_factory.mktemp("night"), night)
            long_ago(written[night])
        return written[night]

    return lights


@pytest.fixture
def copy(nights, tmp_path) -> Callable[[Night], Path]:
    """The frames of a night, to be changed."""
    return lambda night: Path(shutil.copytree(nights(night), tmp_path / "lights"))


def stack(lights: Path, out: Path, **settings):
    """A run; a warning of a library is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return run_hierarchical_mosaic(lights, out, **settings)


def rows(report: dict, status: str) -> dict[str, dict]:
    """The report's frames of one status, by name."""
    return {row["name"]: row for row in report["frames"] if row["status"] == status}


def edit(path: Path, remove: tuple[str, ...] = (), **cards) -> None:
    with fits.open(path, mode="update") as hdul:
        for key in remove:
            hdul[0].header.remove(key, ignore_missing=True)
        hdul[0].header.update(cards)


# ------------------------------------------------------------------------------------------------- what comes out


@pytest.fixture(scope="module")
def done(nights, tmp_path_factory):
    """A finished run of `NIGHT`: input folder, output folder, report."""
    lights, out = nights(NIGHT), tmp_path_factory.mktemp("out")
    before = digests(lights)
    report = stack(lights, out).report
    assert digests(lights) == before
    return lights, out, report


def test_master_tiles_tell_what_they_are_made_of(done):
    _, out, report = done
    used = rows(report, "stacked")
    tiles = sorted((out / "master_tiles").iterdir())
    assert [tile.name for tile in tiles] == ["master_tile_001.fits", "master_tile_002.fits"]
    for number, tile in enumerate(tiles, 1):
        mine = [row for row in used.values() if row["panel"] == number]
        with fits.open(tile) as hdul:
            header, image, alpha = hdul[0].header, hdul[0].data, hdul["ALPHA"].data
            assert WCS(header, naxis=2, fix=False).is_celestial
            assert header["MT_NFRAMES"] == header["NCOMBINE"] == len(mine) == 5
            assert header["EXPTOTAL"] == 10 * len(mine)
            assert (header["DATE-OBS"], header["DATE-END"]) == (mine[0]["date"], mine[-1]["date"])
            assert image.shape == (3, *alpha.shape) and image.dtype == ">f4"
            assert ((alpha == 0) == (image == 0).all(axis=0)).all() and alpha.max() == 255
            weights = np.array([row["weight"] for row in mine])[:, None]
            noise = np.array([row["noise_normalised"] for row in mine])
            told = [header[f"MT_NOIS{c}"] for c in range(3)]
            np.testing.assert_allclose(told, np.sqrt((weights**2 * noise**2).sum(0)) / weights.sum(), rtol=1e-5)
    assert product(out, "science").name == "zemosaic_MT2_R10_science.fits"


def test_the_bad_frames_are_named(done):
    _, out, report = done
    truth = night_truth(NIGHT)
    bad = {frame.name: frame.kind for frame in truth.frames if frame.kind != "good"}
    aside = rows(report, "set aside")
    assert set(aside) == set(bad) and len(bad) == 2
    for name, kind in bad.items():
        assert {"cloudy": "clouded", "trailed": "trailed"}[kind] in aside[name]["reason"]
        assert name in (out / LOG).read_text()
    assert {item["name"] for item in report["set_aside"]} == set(bad)


def test_the_frames_lie_where_they_were_taken(done):
    night_judge = benchmark("night_judge")

    _, _, report = done
    truth = night_truth(NIGHT)
    for panel in range(2):
        used = {n: r for n, r in rows(report, "stacked").items() if truth.frame(n).panel == panel}
        off = []
        for name, row in used.items():
            wcs = WCS(fits.Header.fromstring(row["wcs"]))
            assert night_judge.solve_rms(truth.frame(name), wcs, NIGHT.shape) < 2.5  # what the headers share
            sky = wcs.pixel_to_world_values(120, 160)
            off.append(np.subtract(truth.frame(name).wcs.world_to_pixel_values(*sky), (120, 160)))
            assert row["rms_px"] < 0.3 and row["matched_stars"] >= 10 and row["solved_by"] == "header"
        assert np.std(off, axis=0).max() < 0.1  # the headers were off by a pixel each


@pytest.fixture(scope="module")
def judged(done):
    """The judges of the benchmark, the truth, and the matched master tiles with their rows of the report."""
    night_judge = benchmark("night_judge")

    _, out, report = done
    truth, tiles = night_truth(NIGHT), []
    for number, tile in enumerate(sorted((out / "master_tiles").iterdir()), 1):
        mine = {n: row for n, row in rows(report, "stacked").items() if row["panel"] == number}
        tiles.append((night_judge.match(night_judge.read_picture(tile), truth), mine))
    return night_judge, truth, tiles


def test_a_master_tile_is_the_sky(judged):
    """Trails and hot pixels are gone, and its noise is that of the frames' weighted mean."""
    judge, truth, tiles = judged
    for matched, mine in tiles:
        panel = truth.frame(next(iter(mine))).panel
        trails, hot = judge.judge_trails(matched, truth, panel), judge.judge_hot_pixels(matched, truth, panel)
        assert trails is not None and trails.value < 3, trails
        assert hot.value < 3, hot
        noise = judge.judge_noise(matched, truth, {name: row["weight"] for name, row in mine.items()})
        assert 0.85 < noise.value < 1.15, noise


def test_the_mosaic_is_the_sky(done, judged):
    """Its stars have their light, to the few percent that so few of them can tell; no step between the panels."""
    judge, truth, tiles = judged
    mosaic = judge.match(judge.read_picture(product(done[1], "science")), truth)
    stars = judge.star_fluxes(mosaic, truth)
    bright = stars.flux.min(axis=1) > 5e3
    assert bright.sum() > 20
    np.testing.assert_allclose(np.median(stars.ratio[bright], axis=0), 1, atol=0.03)
    regions = judge.regions(mosaic.picture, [matched.picture for matched, _ in tiles])
    step = judge.judge_sky_step(mosaic, regions, tiles[0][0].sigma)
    assert step.value < 0.4, step


# ---------------------------------------------------------------------------------------------------- plate solving


@pytest.fixture(scope="module")
def solver_required():
    said = []
    if choose_solver(Settings(), said.append) is None:
        pytest.skip(f"NO PLATE SOLVER: frames are not solved for real. {' '.join(said)}")


def test_frames_are_solved_for_real(solver_required, nights, tmp_path):
    night_judge = benchmark("night_judge")

    night = replace(SMALL, frames=3, shape=(640, 360), scale=7.2, faint_per_megapixel=500, with_wcs=False)
    report = stack(nights(night), tmp_path / "out").report
    truth, used = night_truth(night), rows(report, "stacked")
    assert len(used) == 3 and all(row["solved_by"] in ("astrometry.net", "ASTAP") for row in used.values())
    solutions = {name: WCS(fits.Header.fromstring(row["wcs"])) for name, row in used.items()}
    verdict = night_judge.judge_solving(truth, solutions)
    assert verdict.passed, verdict


def test_the_demonstration(solver_required, tmp_path, capsys):
    assert run("--demo-raw", tmp_path / "demo") == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "_science.fits" in said.out
    report = json.loads((tmp_path / "demo" / "output" / "run_report.json").read_text())
    assert len(report["tiles"]) == 4 and len(rows(report, "set aside")) == 2


def test_no_frame_can_be_solved(nights, tmp_path, capsys):
    lights = nights(replace(SMALL, with_wcs=False))
    assert run(lights, tmp_path / "out", "--set", "solver_method=none") == 2
    err = capsys.readouterr().err
    told = [line for line in err.splitlines() if line.startswith("zemosaic-worker: ")]
    assert len(told) == 1 and "no plate solver" in told[0] and "3 more" in told[0] and "Traceback" not in err


@pytest.mark.parametrize("pointing", ["true", "lying"])
def test_a_wcs_that_lies_by_a_degree_is_caught(copy, tmp_path, pointing):
    lights = copy(SMALL)
    name = sorted(path.name for path in lights.iterdir())[1]
    header = fits.getheader(lights / name)
    cards = {"CRVAL1": header["CRVAL1"] + 1.0, "CRVAL2": header["CRVAL2"] - 0.3}
    if pointing == "lying":
        cards |= {"RA": cards["CRVAL1"], "DEC": cards["CRVAL2"]}
    edit(lights / name, **cards)
    report = stack(lights, tmp_path / "out", solver_method="none").report
    assert len(report["tiles"]) == 1
    if pointing == "lying":
        reason = rows(report, "set aside")[name]["reason"]
        assert "has a WCS that is wrong by 1.0" in reason and "its stars are those of" in reason
    else:  # the mount says where it is, and the stars of the others say it exactly
        row = rows(report, "stacked")[name]
        wcs = WCS(fits.Header.fromstring(row["wcs"]))
        assert row["solved_by"].startswith("stars of ")
        sky = wcs.pixel_to_world_values(80, 100)
        off = np.subtract(night_truth(SMALL).frame(name).wcs.world_to_pixel_values(*sky), (80, 100))
        assert np.abs(off).max() < 2


def test_a_lying_wcs_among_frames_that_are_solved(solver_required, copy, tmp_path):
    """The only WCS in a header lies: the frames without one are solved, and then the liar is, too."""
    lights = copy(replace(SMALL, frames=3, shape=(640, 360), scale=7.2, faint_per_megapixel=500))
    liar, *others = sorted(lights.iterdir())
    for path in others:
        edit(path, remove=("CTYPE1", "CTYPE2", "CRVAL1", "CRVAL2"))
    edit(liar, CRVAL1=fits.getheader(liar)["CRVAL1"] + 1.5, RA=fits.getheader(liar)["CRVAL1"] + 1.5)
    report = stack(lights, tmp_path / "out").report
    assert len(report["tiles"]) == 1
    assert "header" not in {row["solved_by"] for row in rows(report, "stacked").values()}
    assert len(rows(report, "stacked")) == 3


def test_a_frame_apart_from_all_others_is_believed(copy, tmp_path):
    """Nobody can tell whether its WCS lies: its stars are those of no other frame."""
    lights = copy(SMALL)
    far = replace(NIGHT, columns=3, frames=1, shape=SMALL.shape, overlap=-1.5, trails=0, bad_frames=False)
    write_night(tmp_path, far, only=lambda frame: frame.panel == 2)
    report = stack(lights, tmp_path / "out").report
    assert len(report["tiles"]) == 2 and len(rows(report, "stacked")) == 5


# --------------------------------------------------------------------------------------------------- what goes wrong


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:20000])


def no_pattern(path: Path) -> None:
    edit(path, remove=("BAYERPAT",), INSTRUME="a camera", CREATOR="", TELESCOP="")


BAD_FRAMES = {
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "truncated": (truncated, "truncated"),
    "text": (lambda path: path.write_text("this is a letter\n" * 500), "not a FITS file"),
    "unknown BAYERPAT": (lambda path: edit(path, BAYERPAT="XYZW"), "unknown BAYERPAT of 'XYZW'"),
    "no BAYERPAT": (no_pattern, "is mono, unlike most frames"),
    "master tile": (lambda path: edit(path, **{"HIERARCH MT_NFRAMES": 3}), "is a master tile, not a frame"),
    "mosaic": (lambda path: edit(path, ZMPROD="science"), "is a mosaic of an earlier run"),
}


@pytest.mark.parametrize("kind", BAD_FRAMES)
def test_one_bad_frame_is_set_aside_by_name(kind, copy, tmp_path, capsys):
    make, reason = BAD_FRAMES[kind]
    lights, out = copy(SMALL), tmp_path / "out"
    path = sorted(lights.iterdir())[2]
    make(path)
    before = digests(lights)
    assert run(lights, out) == 0
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "1 warning" in said.out and reason in said.out
    report = json.loads((out / "run_report.json").read_text())
    assert len(rows(report, "stacked")) == 3
    assert path.name in rows(report, "set aside") and reason in rows(report, "set aside")[path.name]["reason"]
    assert digests(lights) == before


def test_a_frame_of_another_size_does_not_end_the_run(copy, tmp_path, capsys):
    lights = copy(SMALL)
    other = replace(SMALL, frames=1, shape=(150, 180), seed=1)
    write_night(tmp_path / "other", other)
    (odd,) = (tmp_path / "other" / "lights").iterdir()
    odd.rename(lights / "odd.fit")
    assert len(rows(stack(lights, tmp_path / "out").report, "stacked")) == 5
    # calibration frames fit the others: the odd one is left out, and the run goes on
    folders = write_calibration(tmp_path, SMALL, count=2)
    report = stack(lights, tmp_path / "calibrated", dark=str(folders["dark"])).report
    assert len(rows(report, "stacked")) == 4
    assert "cannot be calibrated (The dark" in rows(report, "set aside")["odd.fit"]["reason"]
    assert run(lights, tmp_path / "plan", "--dry-run", "--dark", folders["dark"]) == 0
    said = capsys.readouterr().out
    assert "frames     4," in said and "set aside  odd.fit cannot be calibrated" in said


def test_a_dark_of_another_size(nights, tmp_path, capsys):
    folders = write_calibration(tmp_path, replace(SMALL, shape=(100, 120)), count=2)
    assert run(nights(SMALL), tmp_path / "out", "--dark", folders["dark"]) == 2
    said = capsys.readouterr()
    (told,) = [line for line in said.err.splitlines() if line.startswith("zemosaic-worker: ")]
    assert "120 x 100" in told and "160 x 200" in told and str(folders["dark"]) in told
    assert "Traceback" not in said.err and "warning" not in said.out  # not one for each frame


def test_a_flat_with_zeros(nights, tmp_path):
    folders = write_calibration(tmp_path, SMALL, count=1)
    (flat,) = folders["flat"].iterdir()
    with fits.open(flat, mode="update") as hdul:
        hdul[0].data[50:60, 70:90] = 0
    result = stack(nights(SMALL), tmp_path / "out", flat=str(flat))
    assert len([text for text in result.report["warnings"] if "flat" in text]) == 1
    assert np.isfinite(pixels(tmp_path / "out")).all() and len(rows(result.report, "stacked")) == 4


def test_two_nights_with_a_meridian_flip(nights, tmp_path):
    report = stack(nights(replace(SMALL, flip=True, altaz=False)), tmp_path / "out").report
    assert len(rows(report, "stacked")) == 4 and len(report["tiles"]) == 1
    assert max(row["rms_px"] for row in rows(report, "stacked").values()) < 0.4


def test_panels_among_raw_frames_are_named(copy, tmp_path, capsys):
    lights = copy(SMALL)
    write_scene(lights / "panels")
    assert run(lights, tmp_path / "out") == 0
    said = capsys.readouterr().out
    assert "4 warnings" in said and said.count("give such a folder with --tiles") == 4


@pytest.mark.parametrize("place", ["lights", "lights/out", "."])
def test_the_output_may_lie_in_the_input_and_around_it(copy, tmp_path, place):
    lights = copy(SMALL)
    for _ in range(2):  # what the first made is no input of the second
        report = stack(lights, tmp_path / place).report
        assert len(rows(report, "stacked")) == 4
        assert not [item for item in report["set_aside"] if "master_tile" in item["name"]]


def test_the_warnings_of_a_panel_do_not_flood(nights, tmp_path):
    report = stack(nights(SMALL), tmp_path / "out", gain_se_limit=1e-4).report
    undetermined = [text for text in report["warnings"] if "gain_undetermined" in text]
    assert len([text for text in undetermined if text.startswith("panel 1:")]) == 1
    assert "more of this kind" in undetermined[0]
    assert (tmp_path / "out" / LOG).read_text().count("gain_undetermined") == 4


def test_a_missing_package_is_named(nights, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sep", None)
    assert run(nights(SMALL), tmp_path / "out") == 1
    err = capsys.readouterr().err
    assert "the Python package sep is missing: install" in err and "Traceback" not in err


# ------------------------------------------------------------------------------------------ what the user has chosen


@pytest.mark.parametrize("key", ["path", "raw_path", "path_raw", "file_path"])
@pytest.mark.parametrize(
    "group", [lambda items: items, lambda items: {"items": items, "name": "M 1"}, lambda items: {"frames": items}]
)
def test_the_filter_window_s_lists_are_understood(tmp_path, key, group):
    one, two = tmp_path / "a.fit", tmp_path / "b.fit"
    plan = read_plan({"preplan_master_groups": [group([{key: str(one)}]), group([str(two)])]}, [{key: one}, str(two)])
    assert plan.frames == {one, two} and plan.groups == ((one,), (two,))
    assert read_plan({}, None) == read_plan(None, []) == FramePlan()


@pytest.mark.parametrize(
    ("overrides", "items", "name"),
    [
        ("nonsense", None, "filter_overrides"),
        ({"preplan_master_groups": 7}, None, "filter_overrides"),
        ({"preplan_master_groups": [[{"ra": 3.0}]]}, None, "filter_overrides"),
        ({"preplan_master_groups": [7]}, None, "filter_overrides"),
        (None, 7, "filtered_header_items"),
        (None, "a.fit", "filtered_header_items"),
        (None, {"path": "a.fit"}, "filtered_header_items"),
        (None, [{"ra": 3.0}], "filtered_header_items"),
        (None, [""], "filtered_header_items"),
    ],
)
def test_garbage_of_the_filter_window_is_refused_by_name(overrides, items, name):
    with pytest.raises(UsageError, match=name):
        read_plan(overrides, items)


def test_the_run_follows_the_filter_window(nights, tmp_path):
    lights = nights(SMALL)
    files = sorted(lights.iterdir())
    groups = [[{"path": str(files[0])}, {"path": str(files[2])}], [{"path": str(files[1])}]]
    plan = read_plan({"preplan_master_groups": groups}, [{"path": str(path)} for path in files[:3]])
    report = stack(lights, tmp_path / "out", plan=plan).report
    panel = {row["name"]: row["panel"] for row in report["frames"]}
    assert panel == {files[0].name: 1, files[2].name: 1, files[1].name: 2}
    gone = read_plan(None, [str(files[0]), str(lights / "gone.fit")])
    report = stack(lights, tmp_path / "out", plan=gone).report
    assert any("gone.fit is set aside" in text for text in report["warnings"]) and len(report["frames"]) == 1


# -------------------------------------------------------------------------------------------------------- resume


def stopped_at(lights: Path, out: Path, stage: str, count: int) -> int:
    """A run that the user stops when a stage is seen to have come so far; how far it was (counts are thinned by time)."""
    stop = []

    def listen(key, progress, level, **fields):
        if key == "STAGE_PROGRESS" and progress == stage and level >= count:
            stop.append(level)

    with pytest.raises(Cancelled):
        stack(lights, out, progress_callback=listen, cancelled=lambda: bool(stop))
    assert not list(out.glob("*.fits")) and not list(out.glob(".*"))
    return stop[0]


@pytest.mark.parametrize(
    ("stage", "count", "used"),
    [
        ("phase1_scan", 3, {"frame": 1}),
        ("phase2_cluster", 1, {"frame": 12}),
        ("phase3_master_tiles", 1, {"frame": 12}),
        ("phase4_grid", 1, {"frame": 12, "stack": 2}),
    ],
)
def test_a_stopped_run_is_taken_up(done, tmp_path, stage, count, used):
    lights, whole, _ = done
    reached = stopped_at(lights, tmp_path, stage, count)
    report = stack(lights, tmp_path).report
    if stage == "phase3_master_tiles":
        used = used | {"stack": reached}
    for step, least in used.items():
        assert report["resume"]["used"].get(step, 0) >= least, report["resume"]
    assert report["resume"]["used"].get("stack", 0) == used.get("stack", 0)
    assert product(tmp_path, "science").read_bytes() == product(whole, "science").read_bytes()
    for tile in (whole / "master_tiles").iterdir():
        assert (tmp_path / "master_tiles" / tile.name).read_bytes() == tile.read_bytes()


def test_a_changed_frame_is_looked_at_again_and_its_panel_made_again(copy, tmp_path):
    lights, out = copy(NIGHT), tmp_path / "out"
    stopped_at(lights, out, "phase4_grid", 1)
    path = sorted(lights.iterdir())[0]
    with fits.open(path, mode="update") as hdul:
        hdul[0].data[100:110, 100:110] += 50
    report = stack(lights, out).report
    assert report["resume"]["used"]["frame"] == 11 and report["resume"]["used"]["stack"] == 1
    assert "stack" not in stack(lights, tmp_path / "fresh").report["resume"]["used"]
    assert product(out, "science").read_bytes() == product(tmp_path / "fresh", "science").read_bytes()


def test_other_calibration_makes_the_stacks_again(nights, tmp_path):
    """A panel of one frame: no WCS is refined, so that nothing but the pixels tells the difference."""
    lights, out = nights(replace(SMALL, frames=1)), tmp_path / "out"
    stopped_at(lights, out, "phase4_grid", 1)
    result = stack(lights, out, debayer_method="edge_aware")
    assert "stack" not in result.report["resume"]["used"]
    stack(lights, tmp_path / "fresh", debayer_method="edge_aware")
    np.testing.assert_array_equal(pixels(out), pixels(tmp_path / "fresh"))


# ---------------------------------------------------------------------------------------------------- what it would do


def test_the_plan_of_a_night(done, tmp_path, capsys):
    lights, out, _ = done
    assert run(lights, tmp_path / "out", "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    said = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert said["frames"].startswith("12, 0 of them without a WCS") and said["panels"] == "2, 6 to 6 frames each"
    height, width = pixels(out).shape[1:]
    told = [int(word) for word in said["grid"].split() if word.isdigit()][:2]
    np.testing.assert_allclose(told, (width, height), rtol=0.1)
    assert {"memory", "disk", "time"} <= said.keys()


def test_the_plan_of_frames_that_are_yet_to_be_solved(nights, tmp_path, capsys):
    lights = nights(replace(SMALL, with_wcs=False))
    assert run(lights, tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "frames     4, 4 of them without a WCS" in said and "panels     1, 4 to 4" in said
    assert not (tmp_path / "out").exists()


def test_the_plan_of_panels_and_of_nothing(tmp_path, capsys):
    write_scene(tmp_path / "in")
    assert run(tmp_path / "in", tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "panels     4" in said and "frames" not in said and not (tmp_path / "out").exists()
    (tmp_path / "empty").mkdir()
    assert run(tmp_path / "empty", tmp_path / "out", "--dry-run") == 2
    assert "no" in capsys.readouterr().err and not (tmp_path / "out").exists()
