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
from small_scene import LAYOUT, LOG, digests, pixels, product, small_sky, write_scene

import zemosaic_backend
import zemosaic_peer
import zemosaic_reproject
import zemosaic_telemetry
import zemosaic_tiles
from zemosaic_demo import Layout, make_panels, tangent_wcs, write_panels
from zemosaic_settings import Settings
from zemosaic_utils import UsageError
from zemosaic_worker import MosaicResult, run_hierarchical_mosaic

# ------------------------------------------------------------------------------------------------------- the scenes


def edit(path: Path, **cards) -> None:
    with fits.open(path, mode="update") as hdul:
        hdul[0].header.update(cards)


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Folders of panels: ``four`` (one of them of 5 frames, and a fifth of a finer scale), ``turned``, ``bad``, ``stack``."""
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
    with pytest.raises(UsageError, match="raw subs"):
        run(use_existing_master_tiles=False)
    run(use_existing_master_tiles=True)


@check
def apply_master_tile_crop(run):
    whole, cut = run(), run(apply_master_tile_crop=True)
    assert cut.image().shape[2] < whole.image().shape[2]


@check
def master_tile_crop_percent(run):
    little, much = (run(apply_master_tile_crop=True, master_tile_crop_percent=p) for p in (1, 20))
    # a fifth of 96 and 128 pixels on both sides
    assert much.image().shape[1] < little.image().shape[1] - 30 and much.image().shape[2] < little.image().shape[2] - 40


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
    real = zemosaic_peer.coadd_with_reproject
    monkeypatch.setattr(zemosaic_peer, "coadd_with_reproject", lambda *a: calls.append(1) or real(*a))
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
        raise zemosaic_backend.NoGpuSupport("no card")

    monkeypatch.setattr(zemosaic_backend, "open_cuda", no_card)
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
    asked, planned = [], spy(monkeypatch, zemosaic_reproject, "plan_blocks")

    def free_bytes(self, fraction):
        asked.append(fraction)
        return int(fraction * 1e6)

    monkeypatch.setattr(zemosaic_backend.CpuBackend, "free_bytes", free_bytes)
    run(parallel_gpu_vram_fraction=0.5, num_processing_workers=1, gpu="off", fresh=True)
    assert asked == [0.5] and planned[0].args[3] == 500_000


@check
def memory_budget(run, monkeypatch):
    planned = spy(monkeypatch, zemosaic_reproject, "plan_blocks")
    kept = spy(monkeypatch, zemosaic_tiles.PixelStore, "__init__")
    one, two = (run(memory_budget=size, fresh=True) for size in ("100MB", "1GB"))
    assert planned[1].args[3] == pytest.approx(10 * planned[0].args[3], rel=1e-3)
    assert kept[1].args[1] == pytest.approx(10 * kept[0].args[1], rel=1e-3)
    assert not differ(one, two)


@check
def num_processing_workers(run, monkeypatch):
    threads = spy(monkeypatch, zemosaic_reproject, "ThreadPoolExecutor")
    run(num_processing_workers=3, gpu="off", fresh=True)
    assert threads and {call.args[0] for call in threads} == {3}


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
    monitors = spy(monkeypatch, zemosaic_telemetry, "ResourceMonitor")
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
