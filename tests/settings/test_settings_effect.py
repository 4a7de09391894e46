"""Every knob does something: each setting changes what its row in the table says, and a new one needs a test here."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales
from PIL import Image

from scenes.small_scene import LAYOUT, LOG, digests, pixels, product, small_sky, write_scene
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.host import telemetry, threads
from zemosaic_pipeline.phases import clustering, phase1_solve
from zemosaic_pipeline.phases.result import MosaicResult
from zemosaic_pipeline.pixels import backend_base, backend_cpu, backend_cuda
from zemosaic_pipeline.platesolve import choose
from zemosaic_pipeline.platesolve.base import SolveError, SolverMissing
from zemosaic_pipeline.reproject_compat import engine as reproject_engine
from zemosaic_pipeline.resample import coadd, pixel_store
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.night import Night, night_truth, panel_centre, write_calibration, write_night
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, tangent_wcs, write_panels
from zemosaic_worker import run_hierarchical_mosaic

# ------------------------------------------------------------------------------------------------------- the scenes

NIGHT = Night(
    rows=1,
    columns=1,
    frames=6,
    shape=(200, 160),
    scale=6.0,
    faint_per_megapixel=8000,
    rotation_deg=8,
    drift_px=4,
    dither_px=2,
    clouds=0.15,
    hot=120,
    warm=0,
    trails=1,
    vignetting=0.3,
    with_wcs=True,
    wcs_error_px=1.0,
)


def edit(path: Path, **cards) -> None:
    with fits.open(path, mode="update") as hdul:
        hdul[0].header.update(cards)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folders of panels: ``four`` (one of them of 5 frames, and a fifth of a finer scale), ``turned``, ``bad``, ``stack``.

    ``lights`` are raw frames of one panel, a clouded and a trailed one among them; ``darks``, ``flats``, ``biass``
    belong to them, and ``grid.fits`` is where their mosaics go.
    """
    root = tmp_path_factory.mktemp("scenes")
    panels = write_scene(root / "four")
    edit(root / "four" / "panel_03.fits", **{"HIERARCH MT_NFRAMES": 5})
    fine = tangent_wcs((96, 128), tuple(panels[0].wcs.wcs.crval), 3.0, 4.0)
    image = small_sky().image(fine, (96, 128)).astype("f4")
    fits.PrimaryHDU(image, fine.to_header()).writeto(root / "four" / "fine.fits")
    write_scene(root / "turned", layout=replace(LAYOUT, rows=1, rotation_deg=0))
    c, s = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    for path in (root / "turned").iterdir():
        edit(path, PC1_1=c, PC1_2=-s, PC2_1=s, PC2_2=c, CDELT1=-4 / 3600, CDELT2=4 / 3600)
    write_scene(root / "bad")
    with fits.open(root / "bad" / "panel_02.fits", mode="update") as hdul:
        hdul[0].data += np.float32(1e8)
    write_stack(root / "stack")
    write_night(root, NIGHT)
    write_calibration(root, NIGHT, count=3)
    grid = tangent_wcs((190, 150), panel_centre(NIGHT, 0), NIGHT.scale)
    fits.PrimaryHDU(np.zeros((190, 150), "u1"), grid.to_header()).writeto(root / "grid.fits")
    return root


def write_stack(folder: Path) -> None:
    """Seven takes of one field; every pixel of each is wrong, by much, in one take out of six."""
    layout = Layout(rows=1, columns=1, shape=(64, 80), gain_sigma=0, offset_sigma=0, noise=5.0)
    rng = np.random.default_rng(3)
    takes = []
    for seed in range(7):
        (panel,) = make_panels(layout, small_sky(), seed)
        hit = rng.uniform(size=panel.data.shape) < 1 / 6
        panel.data[hit] += rng.choice([-300, 200], hit.sum()).astype("f4")
        takes.append(panel)
    write_panels(takes, folder)


@dataclass
class Outcome:
    """A finished run: its folder, result, and what its listeners heard."""

    folder: Path
    result: MosaicResult
    heard: list[tuple]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "run_report.json").read_text())

    def image(self, kind: str = "science") -> np.ndarray:
        return pixels(self.folder, kind)

    def header(self) -> fits.Header:
        return fits.getheader(product(self.folder, "science"))

    def scale(self) -> float:
        """Arcseconds a pixel."""
        return 3600 * float(proj_plane_pixel_scales(WCS(self.header(), naxis=2))[0])

    def per_tile(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.report["tiles"]], float)


@pytest.fixture(scope="session")
def execute(scenes, tmp_path_factory) -> Callable[..., Outcome]:
    """``execute(scene, **settings)`` runs and remembers, ``fresh=True`` runs again."""
    done: dict[tuple, Outcome] = {}

    def run(scene: str = "four", fresh: bool = False, **settings: Any) -> Outcome:
        if scene == "lights":
            settings["output_wcs_file"] = str(scenes / "grid.fits")
        key = (scene, *sorted(settings.items()))
        if fresh or key not in done:
            folder, heard = tmp_path_factory.mktemp("out"), []

            def listen(*message, **more) -> None:
                heard.append((*message, more))

            result = run_hierarchical_mosaic(scenes / scene, folder, progress_callback=listen, **settings)
            done[key] = Outcome(folder, result, heard)
        return done[key]

    return run


def differ(a: Outcome, b: Outcome, kind: str = "science", by: float = 0.0) -> bool:
    """The pixels of two runs lie on the same grid and are not the same."""
    one, other = a.image(kind), b.image(kind)
    assert one.shape == other.shape
    return float(np.abs(one - other).max()) > by


# ------------------------------------------------------------------------------------------ one check for each field

CHECKS: dict[str, Callable[..., None]] = {}


def check(function: Callable[..., None]) -> Callable[..., None]:
    """Register the check of the setting whose name the function bears."""
    CHECKS[function.__name__] = function
    return function


@check
def use_existing_master_tiles(run):
    assert len(run(use_existing_master_tiles=True).report["tiles"]) == 5
    # of the five files one does not say that it is a master tile
    (tile,) = run(use_existing_master_tiles=False).report["tiles"]
    assert tile["name"] == "master_tiles/master_tile_001.fits"
    with pytest.raises(UsageError, match="raw sub"):
        run("lights", use_existing_master_tiles=True)


@check
def apply_master_tile_crop(run):
    whole, cut = run(), run(apply_master_tile_crop=True)
    assert cut.image().shape[2] < whole.image().shape[2]


@check
def master_tile_crop_percent(run):
    little, much = (run(apply_master_tile_crop=True, master_tile_crop_percent=p) for p in (1, 20))
    # a fifth of 96 and 128 pixels on both sides
    assert much.image().shape[1] < little.image().shape[1] - 30 and much.image().shape[2] < little.image().shape[2] - 40


# -- raw frames: Phases 1 to 3


def night(run, **settings) -> Outcome:
    """A run on the raw frames."""
    return run("lights", **settings)


def frames(outcome: Outcome, name: str) -> np.ndarray:
    """A number of the report of each stacked frame."""
    return np.array([row[name] for row in outcome.report["frames"] if row["status"] == "stacked"], float)


def panels(outcome: Outcome) -> int:
    return len(outcome.report["tiles"])


def level(outcome: Outcome) -> np.ndarray:
    image = outcome.image()
    return np.array([np.median(plane[plane != 0]) for plane in image])


@check
def dark(run, scenes):
    # the darks hold the bias (256) and what is left of the hot pixels; unrepaired ones pass for stars, by which other
    # frames are kept, so that the level is compared with repair
    np.testing.assert_allclose(level(night(run)) - level(night(run, dark=str(scenes / "darks"))), 256, atol=5)
    one = night(run, dark=str(scenes / "darks"), hot_pixel_sigma=0, stacking_rejection_algorithm="none")
    other = night(run, hot_pixel_sigma=0, stacking_rejection_algorithm="none")
    apart = other.image() - one.image()
    assert np.mean(apart[one.image() != 0] > 350) > 0.01


@check
def flat(run, scenes):
    def middle_over_corners(outcome: Outcome) -> float:
        image = outcome.image()[1]
        h, w = image.shape
        corners = [image[y : y + h // 6, x : x + w // 6] for y in (0, h - h // 6) for x in (0, w - w // 6)]
        sides = np.concatenate([c[c != 0] for c in corners])
        return float(np.median(image[h // 3 : -h // 3, w // 3 : -w // 3]) / np.median(sides))

    bias = str(scenes / "biass")
    plain, flattened = night(run, bias=bias), night(run, bias=bias, flat=str(scenes / "flats"))
    assert middle_over_corners(plain) > middle_over_corners(flattened) + 0.1


@check
def bias(run, scenes):
    np.testing.assert_allclose(level(night(run)) - level(night(run, bias=str(scenes / "biass"))), 256, atol=12)


@check
def bayer_pattern(run):
    right, wrong = level(night(run)), level(night(run, bayer_pattern="RGGB"))
    assert right.argmax() == 1  # the sky glows in green
    assert wrong[0] > right[0] + 10 and wrong[1] < right[1] - 10


@check
def debayer_method(run):
    assert differ(night(run), night(run, debayer_method="edge_aware"), by=1)


@check
def hot_pixel_sigma(run):
    options = {"stacking_rejection_algorithm": "none", "refine_wcs": False}
    repaired, left = night(run, **options), night(run, hot_pixel_sigma=0, **options)
    assert np.mean(left.image() - repaired.image() > 100) > 0.02


@check
def reject_bad_frames(run):
    assert len(frames(night(run), "weight")) == 4
    assert len(frames(night(run, reject_bad_frames=False), "weight")) == 6


@pytest.fixture
def solver(monkeypatch) -> list:
    """Hints that the plate solver got; it finds nothing."""
    asked = []

    def solve(image, stars, hints, scratch, cancelled):
        asked.append(hints)
        raise SolveError("Nothing was found.")

    monkeypatch.setattr(phase1_solve, "choose_solver", lambda settings, warn: SimpleNamespace(solve=solve))
    return asked


@check
def force_resolve_existing_wcs(run, solver):
    run("lights", fresh=True)
    assert solver == []
    with pytest.raises(UsageError, match="cannot be solved"):
        run("lights", force_resolve_existing_wcs=True)
    assert len(solver) == 6


@pytest.fixture
def looked_for(monkeypatch) -> list[tuple]:
    """Solvers that were looked for, with what the settings say of them; there is none."""
    calls = []

    def nothing(name: str):
        def find(*arguments):
            calls.append((name, *arguments))
            raise SolverMissing(f"No {name}.")

        return find

    for name in ("find_astap", "find_astrometry_net"):
        monkeypatch.setattr(choose, name, nothing(name))
    return calls


def unsolved(run, **settings) -> None:
    with pytest.raises(UsageError, match="no plate solver"):
        run("lights", force_resolve_existing_wcs=True, **settings)


@check
def solver_method(run, looked_for):
    for method, order in (("astap", "find_astap"), ("astrometry", "find_astrometry_net"), ("none", None)):
        looked_for.clear()
        unsolved(run, solver_method=method)
        assert (looked_for[0][0] if looked_for else None) == order


@check
def solver_timeout(run, looked_for):
    unsolved(run, solver_timeout=7)
    assert [call[-1] for call in looked_for] == [7, 7]


@check
def astap_executable_path(run, looked_for):
    unsolved(run, astap_executable_path="/opt/astap")
    assert looked_for[0][1] == "/opt/astap"


@check
def astap_data_directory_path(run, looked_for):
    unsolved(run, astap_data_directory_path="/opt/stars")
    assert looked_for[0][2] == "/opt/stars"


@check
def astap_default_search_radius(run, solver):
    with pytest.raises(UsageError):
        run("lights", force_resolve_existing_wcs=True, astap_default_search_radius=5.5)
    assert {hints.radius for hints in solver} == {5.5}


@check
def astap_default_downsample(run, looked_for):
    unsolved(run, astap_default_downsample=4)
    assert looked_for[0][3] == 4


@check
def astap_max_instances(run, looked_for):
    unsolved(run, astap_max_instances=3)
    assert looked_for[0][4] == 3


@check
def astrometry_local_path(run, looked_for):
    unsolved(run, astrometry_local_path="/opt/astrometry")
    assert looked_for[1][1] == "/opt/astrometry"


@check
def refine_wcs(run):
    def errors(outcome: Outcome) -> np.ndarray:
        """Where the frames are, beside the truth (pixels), without what they share."""
        truth = night_truth(NIGHT)
        used = [row for row in outcome.report["frames"] if row["status"] == "stacked"]
        off = []
        for row in used:
            sky = WCS(fits.Header.fromstring(row["wcs"])).pixel_to_world_values(80, 100)
            off.append(np.subtract(truth.frame(row["name"]).wcs.world_to_pixel_values(*sky), (80, 100)))
        return np.std(off, axis=0)

    assert errors(night(run)).max() < 0.2 < errors(night(run, refine_wcs=False)).min()


@check
def cluster_panel_threshold(run):
    assert panels(night(run)) == 1
    # less than the frames were dithered by
    assert panels(night(run, cluster_panel_threshold=1e-4)) > 3


@check
def cluster_target_groups(run):
    assert panels(night(run, cluster_panel_threshold=1e-4, cluster_target_groups=2)) <= 2


@check
def cluster_orientation_split_deg(run):
    assert panels(night(run, cluster_orientation_split_deg=3)) > 1


@check
def max_raw_per_master_tile(run):
    assert panels(night(run, max_raw_per_master_tile=2, reject_bad_frames=False)) == 3


@check
def auto_limit_frames_per_master_tile(run, monkeypatch):
    monkeypatch.setattr(clustering, "AUTO_CAP", 3)
    assert panels(run("lights", fresh=True, reject_bad_frames=False)) == 2
    assert panels(run("lights", reject_bad_frames=False, auto_limit_frames_per_master_tile=False)) == 1


@check
def stacking_normalize_method(run):
    fitted, sky, none = (night(run, stacking_normalize_method=m) for m in ("linear_fit", "sky_mean", "none"))
    assert np.ptp(frames(fitted, "gain")) > 0.02
    assert (frames(sky, "gain") == 1).all() and (frames(none, "gain") == 1).all()
    assert differ(sky, none, by=1) and differ(fitted, sky, by=1)


@check
def stacking_weighting_method(run):
    variance, fwhm, none = (
        frames(night(run, stacking_weighting_method=m), "weight") for m in ("noise_variance", "noise_fwhm", "none")
    )
    assert (none == 1).all() and np.ptp(variance) > 0.02 and np.abs(variance - fwhm).max() > 0.02


@check
def stacking_rejection_algorithm(run):
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


@check
def stacking_kappa_low(run):
    assert clipped(run, stacking_kappa_low=0.8) > clipped(run, stacking_kappa_low=9) + 1


@check
def stacking_kappa_high(run):
    assert clipped(run, stacking_kappa_high=0.8) < clipped(run, stacking_kappa_high=9) - 1


@check
def stacking_winsor_limits(run):
    little, much = (night(run, stacking_winsor_limits=limits) for limits in ("0,0", "0.4,0.4"))
    assert differ(little, much, by=5)


@check
def stacking_final_combine_method(run):
    assert differ(night(run), night(run, stacking_final_combine_method="median"), by=5)


# -- Phases 4 to 7


@check
def global_wcs_pixelscale_mode(run):
    assert run().scale() == pytest.approx(4.0, rel=1e-3)
    assert run(global_wcs_pixelscale_mode="min").scale() == pytest.approx(3.0, rel=1e-3)


@check
def global_wcs_res_override(run):
    assert run(global_wcs_res_override=7.5).scale() == pytest.approx(7.5)


@check
def global_wcs_orientation(run):
    up, turned = run("turned"), run("turned", global_wcs_orientation="as_tiles")
    assert up.header().get("PC1_2", 0.0) == 0.0
    assert abs(turned.header()["PC1_2"]) == pytest.approx(np.sin(np.deg2rad(20)), abs=0.01)


@check
def global_wcs_padding_percent(run):
    tight, wide = run(global_wcs_padding_percent=0), run(global_wcs_padding_percent=50)
    assert np.array(wide.image().shape[1:]) == pytest.approx(1.5 * np.array(tight.image().shape[1:]), abs=2)


@check
def output_wcs_file(run, tmp_path):
    header = tangent_wcs((70, 90), (83.8, -5.4), 5.0).to_header()
    fits.PrimaryHDU(np.zeros((70, 90), "u1"), header).writeto(tmp_path / "wanted.fits")
    given = run(output_wcs_file=str(tmp_path / "wanted.fits"))
    assert given.image().shape == (3, 70, 90)
    assert given.header()["CRPIX1"] == 45.5 and given.scale() == pytest.approx(5.0)


@check
def max_output_gigapixels(run):
    with pytest.raises(UsageError, match="gigapixels"):
        run(max_output_gigapixels=1e-6)


@check
def intertile_photometric_match(run):
    matched, plain = run(), run(intertile_photometric_match=False)
    assert np.ptp(matched.per_tile("gain")) > 0.1
    assert (plain.per_tile("gain") == 1).all()
    assert differ(matched, plain, by=20)


@check
def match_background_for_final(run):
    levelled = run(intertile_photometric_match=False)
    nothing = run(intertile_photometric_match=False, match_background_for_final=False)
    assert (nothing.per_tile("offset") == 0).all() and np.ptp(levelled.per_tile("offset")) > 50
    assert differ(levelled, nothing, by=20)


@check
def photometry_cell_px(run):
    fine, coarse = ([p["cells"] for p in run(photometry_cell_px=n).report["pairs"]] for n in (4, 8))
    assert max(coarse) < max(fine) / 2


@check
def gain_se_limit(run):
    strict = run(gain_se_limit=1e-4)
    assert (strict.per_tile("gain") == 1).all()
    assert any("gain_undetermined" in text for text in strict.report["warnings"])
    assert not any("gain_undetermined" in text for text in run().report["warnings"])


@check
def reject_bad_tiles(run):
    without, with_it = run("bad"), run("bad", reject_bad_tiles=False)
    assert len(without.report["tiles"]) == 3 and len(with_it.report["tiles"]) == 4
    assert any("panel_02.fits" in text for text in without.report["warnings"])


@check
def engine(run, monkeypatch):
    calls = []
    real = reproject_engine.coadd_with_reproject
    monkeypatch.setattr(reproject_engine, "coadd_with_reproject", lambda *a: calls.append(1) or real(*a))
    native, peer = run(feather_px=0), run(feather_px=0, engine="reproject", fresh=True)
    assert calls == [1] and "engine reproject" in str(peer.header()["HISTORY"])
    seen = native.image("coverage") > 0
    apart = np.abs(native.image() - peer.image())[:, seen].max()
    assert 0 < apart < 1e-4 * np.ptp(np.percentile(native.image()[:, seen], (1, 99)))


@check
def kernel(run):
    assert differ(run(), run(kernel="lanczos3"), by=1)


@check
def combine_method(run):
    means = [run("stack", combine_method=name) for name in ("mean", "median", "sigma_clip", "winsorized")]
    for k, one in enumerate(means):
        assert all(differ(one, other) for other in means[:k])


@check
def kappa_low(run):
    loose, tight = (run("stack", combine_method="sigma_clip", kappa_low=k) for k in (9, 1.0))
    assert tight.image().mean() > loose.image().mean() + 5  # more of what is too dark is left out


@check
def kappa_high(run):
    loose, tight = (run("stack", combine_method="sigma_clip", kappa_high=k) for k in (9, 1.0))
    assert tight.image().mean() < loose.image().mean() - 5


@check
def winsor_limits(run):
    little, much = (run("stack", combine_method="winsorized", winsor_limits=limits) for limits in ("0,0", "0.3,0.3"))
    assert differ(little, much, by=5)


@check
def feather_px(run):
    ramps, none = run(), run(feather_px=0)
    full = none.image("coverage")
    assert np.allclose(full, np.rint(full), atol=1e-4)
    edge = ramps.image("coverage")
    assert np.mean(np.abs(edge - np.rint(edge)) > 0.01) > 0.1


@check
def enable_tile_weighting(run):
    assert sorted(run().per_tile("weight")) == [1, 1, 1, 1, 5]
    assert (run(enable_tile_weighting=False).per_tile("weight") == 1).all()


@check
def tile_weight_mode(run):
    assert (run(tile_weight_mode="uniform").per_tile("weight") == 1).all()
    inverse = run(tile_weight_mode="inverse_variance")
    noise = inverse.per_tile("noise") / inverse.per_tile("gain")
    expected = np.mean(noise**-2.0, axis=1)
    np.testing.assert_allclose(inverse.per_tile("weight"), expected / np.median(expected), rtol=1e-6)


def radial(run, **settings) -> np.ndarray:
    """Coverage of the stack where all tiles weigh their centre more, 1 in the middle."""
    coverage = run("stack", apply_radial_weight=True, feather_px=0, **settings).image("coverage")
    return coverage / coverage.max()


@check
def apply_radial_weight(run):
    flat = run("stack", feather_px=0).image("coverage")
    assert flat.max() == pytest.approx(7) and np.median(flat[flat > 0]) == pytest.approx(7)
    assert 0 < np.quantile(radial(run), 0.2) < 0.5


@check
def radial_feather_fraction(run):
    assert radial(run, radial_feather_fraction=0.4).mean() < radial(run).mean() - 0.1


@check
def radial_shape_power(run):
    assert radial(run, radial_shape_power=6.0).mean() < radial(run).mean() - 0.1


@check
def min_radial_weight_floor(run):
    weights = radial(run, min_radial_weight_floor=0.6)
    assert weights[weights > 0].min() > 0.55 > radial(run)[radial(run) > 0].min()


@check
def two_pass_coverage_renorm(run):
    asked = run(two_pass_coverage_renorm=True)
    assert differ_from_science(asked) and not differ(run(), asked)
    assert not list(run().folder.glob("*aesthetic*"))


def differ_from_science(outcome: Outcome) -> bool:
    return bool(np.abs(outcome.image("aesthetic") - outcome.image()).max() > 0)


def coverage_gains(run, **settings) -> np.ndarray:
    return run(two_pass_coverage_renorm=True, **settings).per_tile("coverage_gain")


@check
def two_pass_cov_sigma_px(run):
    assert np.abs(coverage_gains(run) - coverage_gains(run, two_pass_cov_sigma_px=8)).max() > 0.005


@check
def two_pass_cov_gain_clip(run):
    wide = coverage_gains(run)
    narrow = coverage_gains(run, two_pass_cov_gain_clip=(0.999, 1.001))
    assert np.ptp(wide) > 0.01 and np.ptp(narrow) < 0.0021


def sky_of(image: np.ndarray) -> np.ndarray:
    return np.array([np.percentile(plane[plane != 0], 30) for plane in image])


@check
def final_mosaic_rgb_equalize_enabled(run):
    asked = run(final_mosaic_rgb_equalize_enabled=True)
    before, after = sky_of(asked.image()), sky_of(asked.image("aesthetic"))
    assert np.ptp(np.log(after)) < 0.02 < np.ptp(np.log(before))
    assert not differ(run(), asked)


@check
def final_mosaic_rgb_equalize_gain_clip(run):
    asked = run(final_mosaic_rgb_equalize_enabled=True, final_mosaic_rgb_equalize_gain_clip="0.99,1.01")
    factors = sky_of(asked.image("aesthetic")) / sky_of(asked.image())
    assert factors.min() > 0.9899 and factors.max() < 1.0101 and np.ptp(factors) > 0.005


def black_of(run, **settings) -> float:
    """What was subtracted."""
    asked = run(final_mosaic_black_point_equalize_enabled=True, **settings)
    seen = asked.image() != 0
    return float(np.median((asked.image() - asked.image("aesthetic"))[seen]))


@check
def final_mosaic_black_point_equalize_enabled(run):
    image = run().image()
    assert black_of(run) == pytest.approx(np.percentile(image[image != 0], 0.1), rel=0.01)


@check
def final_mosaic_black_point_percentile(run):
    image = run().image()
    black = black_of(run, final_mosaic_black_point_percentile=40)
    assert black == pytest.approx(np.percentile(image[image != 0], 40), rel=0.01)


@pytest.fixture
def opened(monkeypatch) -> list[tuple]:
    """Arguments with which a card was asked for; there is none."""
    calls = []

    def no_card(*arguments):
        calls.append(arguments)
        raise backend_base.NoGpuSupport("no card")

    monkeypatch.setattr(backend_cuda, "open_cuda", no_card)
    return calls


@check
def gpu(run, opened):
    said = {
        mode: [m[0] for m in run(gpu=mode, fresh=True).heard].count("phase5_gpu_fallback")
        for mode in ("off", "auto", "on")
    }
    assert said == {"off": 0, "auto": 0, "on": 1} and len(opened) == 2


@check
def gpu_id_phase5(run, opened):
    run(gpu="on", gpu_id_phase5=3, fresh=True)
    assert opened == [(3, "")]


@check
def gpu_selector(run, opened):
    run(gpu="on", gpu_selector="RTX", fresh=True)
    assert opened == [(0, "RTX")]


def spy(monkeypatch, place: Any, name: str) -> list[SimpleNamespace]:
    """Record the arguments of a function (or class) that still does its work."""
    calls, real = [], getattr(place, name)

    def recorded(*arguments, **options):
        calls.append(SimpleNamespace(args=arguments, options=options))
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, recorded)
    return calls


@check
def parallel_gpu_vram_fraction(run, monkeypatch):
    """The backend is asked for this share of its free memory, and its answer bounds the blocks."""
    asked, planned = [], spy(monkeypatch, coadd, "plan_blocks")

    def free_bytes(self, fraction):
        asked.append(fraction)
        return int(fraction * 1e6)

    monkeypatch.setattr(backend_cpu.CpuBackend, "free_bytes", free_bytes)
    run(parallel_gpu_vram_fraction=0.5, num_processing_workers=1, gpu="off", fresh=True)
    assert asked == [0.5] and planned[0].args[3] == 500_000


@check
def memory_budget(run, monkeypatch):
    planned = spy(monkeypatch, coadd, "plan_blocks")
    kept = spy(monkeypatch, pixel_store.PixelStore, "__init__")
    one, two = (run(memory_budget=size, fresh=True) for size in ("100MB", "1GB"))
    assert planned[1].args[3] == pytest.approx(10 * planned[0].args[3], rel=1e-3)
    assert kept[1].args[1] == pytest.approx(10 * kept[0].args[1], rel=1e-3)
    assert not differ(one, two)


@check
def num_processing_workers(run, monkeypatch):
    pools = spy(monkeypatch, threads, "ThreadPoolExecutor")
    run(num_processing_workers=3, gpu="off", fresh=True)
    assert pools and {call.args[0] for call in pools} == {3}


@check
def resume(run):
    assert (run(cache_retention="keep").folder / "zemosaic_resume").is_dir()
    assert not (run(cache_retention="keep", resume="off").folder / "zemosaic_resume").exists()


@check
def cache_retention(run):
    assert (run(cache_retention="keep").folder / "zemosaic_resume").is_dir()
    assert not (run().folder / "zemosaic_resume").exists()


@check
def coadd_memmap_dir(run, tmp_path):
    run(coadd_memmap_dir=str(tmp_path), cleanup_temp_artifacts=False)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(".zemosaic_tmp_")


@check
def cleanup_temp_artifacts(run):
    assert not list(run().folder.glob(".*"))
    (kept,) = run(cleanup_temp_artifacts=False).folder.glob(".*")
    assert kept.is_dir()


@check
def keep_master_tiles(run):
    assert [path.name for path in (night(run).folder / "master_tiles").iterdir()] == ["master_tile_001.fits"]
    gone = night(run, keep_master_tiles=False)
    assert not (gone.folder / "master_tiles").exists() and not differ(gone, night(run))


@check
def save_final_as_uint16(run):
    asked = run(save_final_as_uint16=True)
    assert (asked.header()["BITPIX"], asked.header()["BZERO"]) == (16, 32768)
    np.testing.assert_allclose(asked.image(), np.rint(run().image()).clip(0, 65535), atol=1)


@check
def legacy_rgb_cube(run):
    asked = run(legacy_rgb_cube=True)
    np.testing.assert_array_equal(np.moveaxis(asked.image(), 2, 0), run().image())


def preview(run, **settings) -> np.ndarray:
    return np.asarray(Image.open(product(run(**settings).folder, "preview"))).astype(int)


@check
def preview_png_p_low(run):
    # more of the darkest pixels are shown black
    assert np.mean(preview(run, preview_png_p_low=40) < 2) > np.mean(preview(run) < 2)


@check
def preview_png_p_high(run):
    assert (preview(run, preview_png_p_high=90) == 255).sum() > (preview(run) == 255).sum()


@check
def preview_png_asinh_a(run):
    assert preview(run, preview_png_asinh_a=50).mean() > preview(run).mean() + 5


@check
def preview_png_max_dim(run):
    assert 32 < max(preview(run, preview_png_max_dim=64).shape) <= 64 < max(preview(run).shape)


@check
def enable_resource_telemetry(run):
    assert (run(enable_resource_telemetry=True).folder / "resource_telemetry.csv").is_file()
    assert not (run().folder / "resource_telemetry.csv").exists()


@check
def resource_telemetry_interval_sec(run, monkeypatch):
    monitors = spy(monkeypatch, telemetry, "ResourceMonitor")
    run(enable_resource_telemetry=True, resource_telemetry_interval_sec=0.25, fresh=True)
    assert monitors[0].options["interval_sec"] == 0.25


@check
def resource_telemetry_log_to_csv(run):
    silent = run(enable_resource_telemetry=True, resource_telemetry_log_to_csv=False)
    assert not (silent.folder / "resource_telemetry.csv").exists()
    assert list(csv.reader((run(enable_resource_telemetry=True).folder / "resource_telemetry.csv").open()))


@check
def logging_level(run):
    assert " INFO " in (run().folder / LOG).read_text()
    assert " INFO " not in (run(logging_level="WARNING").folder / LOG).read_text()


def test_every_setting_has_its_check():
    assert list(CHECKS) == [field.name for field in fields(Settings)]


@pytest.mark.parametrize("name", CHECKS)
def test_the_setting_has_its_effect(name, execute, scenes, request):
    before = digests(scenes)
    function = CHECKS[name]
    wanted = function.__code__.co_varnames[1 : function.__code__.co_argcount]
    function(execute, **{fixture: request.getfixturevalue(fixture) for fixture in wanted})
    assert digests(scenes) == before


def test_a_mosaic_that_whole_numbers_cannot_hold_is_warned_of(scenes, tmp_path):
    for path in sorted((scenes / "four").glob("panel_*")):
        with fits.open(path) as hdul:
            hdul[0].data /= np.float32(65536)
            (tmp_path / "in").mkdir(exist_ok=True)
            hdul.writeto(tmp_path / "in" / path.name)
    result = run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out", save_final_as_uint16=True)
    assert any("save_final_as_uint16" in text for text in result.report["warnings"])
