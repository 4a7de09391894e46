"""The whole worker on a small scene: what it writes, says and reports."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import os
import shutil
import subprocess
import sys
import tomllib
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from PIL import Image

import zemosaic_worker
from scenes.small_scene import LAYOUT, LOG, digests, pixels, product, run, small_sky, write_scene
from zemosaic_pipeline import errors
from zemosaic_pipeline.cli.listeners import TerminalBar
from zemosaic_pipeline.host.progress import STAGES, Reporter
from zemosaic_pipeline.pixels import backend_cpu
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.panels import Sky, make_panels, tangent_wcs, write_panels
from zemosaic_worker import run_hierarchical_mosaic

ROOT = Path(zemosaic_worker.__file__).parent
AESTHETIC = {"two_pass_coverage_renorm": True, "level_sky": True, "final_mosaic_rgb_equalize_enabled": True}


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> SimpleNamespace:
    """Four panels: their folder and what is true of them."""
    folder = tmp_path_factory.mktemp("scene") / "panels"
    return SimpleNamespace(panels=write_scene(folder), folder=folder, sky=small_sky())


@pytest.fixture(scope="session")
def done(scene, tmp_path_factory) -> SimpleNamespace:
    """A run with everything switched on, its listener's messages and its folder."""
    heard, folder = [], tmp_path_factory.mktemp("done") / "deep" / "er"
    before = digests(scene.folder)
    result = run_hierarchical_mosaic(
        scene.folder,
        folder,
        progress_callback=lambda *message, **more: heard.append((*message, more)),
        enable_resource_telemetry=True,
        gpu="off",
        **AESTHETIC,
    )
    assert digests(scene.folder) == before
    return SimpleNamespace(folder=folder, heard=heard, result=result, report=result.report)


@pytest.fixture(scope="session")
def plain(scene, tmp_path_factory) -> Path:
    """The same run with the defaults."""
    folder = tmp_path_factory.mktemp("plain")
    run_hierarchical_mosaic(scene.folder, folder, gpu="off")
    return folder


# -------------------------------------------------------------------------------------------------------- outputs


def test_all_outputs_are_there_and_nothing_else(done, plain):
    names = {f"zemosaic_MT4_R4_{n}" for n in ("science.fits", "coverage.fits", "preview.png")}
    assert {p.name for p in plain.iterdir()} == names | {"run_report.json", LOG}
    more = {"zemosaic_MT4_R4_aesthetic.fits", "resource_telemetry.csv"}
    assert {p.name for p in done.folder.iterdir()} == names | more | {"run_report.json", LOG}
    assert (done.result.science, done.result.aesthetic) == tuple(
        product(done.folder, kind) for kind in ("science", "aesthetic")
    )


@pytest.mark.parametrize("kind", ["science", "aesthetic", "coverage"])
def test_fits_files_are_valid(done, kind):
    path = product(done.folder, kind)
    with fits.open(path) as hdul:
        hdul.verify("exception")
        header, data = hdul[0].header, hdul[0].data
        assert data.dtype == ">f4" and data.ndim == (2 if kind == "coverage" else 3)
        assert path.stat().st_size % 2880 == 0
        assert [h.name for h in hdul[1:]] == ([] if kind == "coverage" else ["ALPHA"])
    assert WCS(header, naxis=2).is_celestial
    assert header["NTILES"] == 4 and header["NCOMBINE"] == 4 and header["ZMPROD"] == kind
    assert header["CREATOR"].startswith("zemosaic-worker ")
    told = "\n".join(header["HISTORY"])
    for word in ("gain and offset of 6 overlaps", "bilinear", "mean", "native", "n_frames", "run_report.json"):
        assert word in told


@pytest.mark.skipif(shutil.which("fitsverify") is None, reason="fitsverify is not installed")
@pytest.mark.parametrize("options", [{}, {"save_final_as_uint16": True, "legacy_rgb_cube": True}])
def test_fitsverify_has_no_warning(scene, tmp_path, options):
    run_hierarchical_mosaic(scene.folder, tmp_path, **AESTHETIC, **options)
    files = sorted(tmp_path.glob("*.fits"))
    assert len(files) == 3
    for path in files:
        told = subprocess.run(["fitsverify", path], capture_output=True, text=True, check=False).stdout
        assert "0 warning(s) and 0 error(s)" in told, told


def test_stars_lie_where_the_sky_has_them(tmp_path):
    """A sky of six stars: their centres of light in the mosaic, by its WCS, against the catalogue."""
    crowded = small_sky()
    stars = np.array([[60.0, 50], [100, 55], [150, 45], [65, 120], [110, 125], [155, 115]])
    nothing = np.zeros((0, 3))
    sky = Sky(crowded.wcs, stars, np.full((6, 3), 2e5), nothing, nothing, crowded.level)
    write_panels(make_panels(LAYOUT, sky), tmp_path / "in")
    result = run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out")
    image = pixels(tmp_path / "out")[1].astype(float)
    wcs = WCS(fits.getheader(result.science), naxis=2)
    positions = wcs.world_to_pixel_values(*sky.wcs.pixel_to_world_values(*stars.T))
    for x, y in zip(*positions, strict=True):
        i, j = round(float(x)), round(float(y))
        box = image[j - 7 : j + 8, i - 7 : i + 8]
        light = box - np.median(box)
        centre = [np.sum(light * axis) / light.sum() for axis in np.mgrid[-7:8, -7:8]]
        np.testing.assert_allclose([j + centre[0], i + centre[1]], [y, x], atol=0.1)


def test_nothing_seen_is_zero_everywhere(done):
    image, coverage = pixels(done.folder), pixels(done.folder, "coverage")
    alpha = fits.getdata(product(done.folder, "science"), "ALPHA")
    assert (coverage == 0).any()
    np.testing.assert_array_equal((image != 0).any(axis=0), coverage > 0)
    np.testing.assert_array_equal(alpha > 0, coverage > 0)
    assert alpha.max() == 255 and (alpha[coverage >= 1] == 255).all()
    assert np.isfinite(image).all() and np.isfinite(coverage).all()


def test_coverage_is_the_sum_of_weights(scene, tmp_path):
    """Frames as weights, no feather: 1 for each panel, 7 for the one of 7 frames; footprints by astropy."""
    panels = Path(shutil.copytree(scene.folder, tmp_path / "in"))
    with fits.open(panels / "panel_02.fits", mode="update") as hdul:
        hdul[0].header["HIERARCH MT_NFRAMES"] = 7
    result = run_hierarchical_mosaic(panels, tmp_path / "out", feather_px=0)
    assert result.science.name == "zemosaic_MT4_R10_science.fits"
    coverage = pixels(tmp_path / "out", "coverage")
    wcs = WCS(fits.getheader(result.science), naxis=2)
    rows, columns = np.indices(coverage.shape)
    expected, near_edge = np.zeros(coverage.shape), np.zeros(coverage.shape, bool)
    for panel, weight in zip(scene.panels, (1, 1, 7, 1), strict=True):
        x, y = panel.wcs.world_to_pixel_values(*wcs.pixel_to_world_values(columns, rows))
        margin = np.minimum.reduce([x + 0.5, y + 0.5, 127.5 - x, 95.5 - y])
        expected += weight * (margin >= 0)
        near_edge |= np.abs(margin) < 0.01
    np.testing.assert_allclose(coverage[~near_edge], expected[~near_edge], rtol=1e-6)
    assert run_hierarchical_mosaic(panels, tmp_path / "out").report["tiles"][2]["weight"] == 7


def test_the_mosaic_is_the_sky(done, scene):
    """Up to the average gain and background of the panels, the science image is the noiseless sky."""
    image, coverage = pixels(done.folder), pixels(done.folder, "coverage")
    wcs = WCS(fits.getheader(product(done.folder, "science")), naxis=2)
    truth = scene.sky.nebula(wcs, coverage.shape)
    light = truth + scene.sky.star_field(wcs, coverage.shape, 3.0)
    for c in range(3):
        dark = (coverage > 0.5) & (light[c] - truth[c] < 1)
        slope, level = np.polyfit(truth[c][dark], image[c][dark], 1)
        scatter = image[c][dark] - slope * truth[c][dark] - level
        gain = np.exp(np.mean([np.log(panel.gain[c]) for panel in scene.panels]))
        assert slope == pytest.approx(gain, rel=0.01)
        assert 1.4826 * np.median(np.abs(scatter)) < 1.2 * LAYOUT.noise


def test_preview_fits_its_limit_and_stands_upright(done, scene, tmp_path):
    whole = np.asarray(Image.open(done.result.preview)).astype(int)
    assert whole.shape == (*pixels(done.folder).shape[1:], 3)
    alpha = fits.getdata(product(done.folder, "aesthetic"), "ALPHA")[::-1]
    assert (whole[alpha == 0] == 0).all() and 20 < np.median(whole[alpha == 255]) < 200
    run_hierarchical_mosaic(scene.folder, tmp_path, preview_png_max_dim=80)
    assert 40 < max(Image.open(product(tmp_path, "preview")).size) <= 80


# --------------------------------------------------------------------------------------------------------- report


def test_the_report_holds_what_was_found(done, scene):
    report = json.loads((done.folder / "run_report.json").read_text())
    assert report == done.report
    assert [row["name"] for row in report["tiles"]] == [f"panel_0{k}.fits" for k in range(4)]
    gains = np.array([row["gain"] for row in report["tiles"]])
    truth = np.array([panel.gain for panel in scene.panels])
    truth /= np.exp(np.log(truth).mean(axis=0))
    errors = np.array([row["ln_gain_se"] for row in report["tiles"]])
    np.testing.assert_allclose(gains, truth, rtol=0.01)
    assert (errors > 0).all() and (errors < 0.01).all()
    offsets = np.array([[row["offset"], row["offset_se"], row["pivot"], row["level"]] for row in report["tiles"]])
    assert offsets.shape == (4, 4, 3) and np.isfinite(offsets).all()
    np.testing.assert_allclose(offsets[:, 0], offsets[:, 2] - gains * offsets[:, 3], rtol=1e-6, atol=1e-6)


def test_the_report_tells_of_the_pairs(done):
    pairs = done.report["pairs"]
    assert {tuple(pair["tiles"]) for pair in pairs} == {
        (f"panel_0{i}.fits", f"panel_0{j}.fits") for i in range(4) for j in range(i + 1, 4)
    }
    before, after = (np.abs([pair[f"step_{when}_sigma"] for pair in pairs]) for when in ("before", "after"))
    assert before.max() > 20 and after.max() < 1
    assert done.report["islands"] == 1


def test_the_report_tells_how_and_at_what_cost(done):
    report = done.report
    assert report["backend"] == {"used": "cpu", "reason": "the GPU was not asked for", "fell_back": False}
    assert report["settings"] | AESTHETIC == report["settings"] and report["settings"]["kernel"] == "bilinear"
    assert {"python", "numpy", "astropy", "reproject", "numba"} <= report["versions"].keys()
    phases = ["phase1_scan", "phase4_grid", "phase5_intertile", "phase5_reproject", "phase5_aesthetic", "phase6"]
    assert list(report["phases"]) == phases
    assert all(cost["seconds"] >= 0 and 20 < cost["peak_rss_mb"] < 8000 for cost in report["phases"].values())
    assert sum(cost["seconds"] for cost in report["phases"].values()) <= report["seconds"] + 0.1
    for name in report["outputs"].values():
        assert (done.folder / name).is_file()
    assert report["set_aside"] == [] and report["warnings"] == []
    assert report["grid"]["shape"] == list(pixels(done.folder).shape[1:])


def test_telemetry(done):
    with (done.folder / "resource_telemetry.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    # the columns of GUI_CONTRACT.md stand, letter for letter, in test_telemetry.py
    assert {row["phase_name"] for row in rows} >= {"phase1_scan", "phase4_grid", "phase5_reproject", "phase6"}
    for row in rows:
        assert float(row["ram_used_mb"]) > 10 and int(row["phase_index"]) == STAGES[row["phase_name"]][0]
        assert int(row["cpu_workers"]) >= 1
    assert (rows[-1]["files_done"], rows[-1]["files_total"]) == ("4", "4")
    assert (rows[-1]["tiles_done"], rows[-1]["tiles_total"]) == ("4", "4")
    assert rows[-1]["use_gpu_phase5"] == "False"


def test_the_log_tells_what_ran(done, scene):
    log = (done.folder / LOG).read_text()
    for words in (
        f"input {scene.folder}",
        "setting two_pass_coverage_renorm = True",
        "4 plate-solved tiles",
        "done in",
    ):
        assert words in log


# ------------------------------------------------------------------------------------- aesthetic, and nothing moved


def test_science_is_bit_identical_with_and_without_the_aesthetic_mosaic(done, plain):
    def content(folder: Path, kind: str) -> bytes:
        return product(folder, kind).read_bytes()

    for kind in ("science", "coverage"):
        assert content(done.folder, kind) == content(plain, kind)
    assert content(done.folder, "aesthetic") != content(done.folder, "science")


def test_two_passes_do_not_dim_a_perfect_mosaic(tmp_path):
    """Panels that agree, no noise: the old worker dims such a mosaic by 15 %."""
    panels = write_scene(tmp_path / "in")
    for k, panel in enumerate(panels):
        image = small_sky().nebula(panel.wcs, LAYOUT.shape).astype("f4")
        fits.PrimaryHDU(image, panel.wcs.to_header()).writeto(tmp_path / f"in/panel_0{k}.fits", overwrite=True)
    result = run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out", two_pass_coverage_renorm=True)
    science, aesthetic = pixels(tmp_path / "out"), pixels(tmp_path / "out", "aesthetic")
    seen = pixels(tmp_path / "out", "coverage") > 0.5
    wcs = WCS(fits.getheader(result.science), naxis=2)
    truth = small_sky().nebula(wcs, seen.shape)
    assert np.median(science[:, seen] / truth[:, seen]) == pytest.approx(1, abs=1e-3)
    assert np.median(aesthetic[:, seen] / science[:, seen]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "options", [{"num_processing_workers": 1}, {"num_processing_workers": 2}, {"memory_budget": "64MB"}]
)
def test_threads_and_memory_change_nothing(scene, plain, tmp_path, options):
    run_hierarchical_mosaic(scene.folder, tmp_path, gpu="off", **options)
    for kind in ("science", "coverage"):
        assert product(tmp_path, kind).read_bytes() == product(plain, kind).read_bytes()


def test_small_blocks_change_nothing(scene, plain, tmp_path, monkeypatch):
    """As if memory were for blocks of a few thousand pixels only."""
    monkeypatch.setattr(backend_cpu.CpuBackend, "free_bytes", lambda self, fraction: 300_000)
    run_hierarchical_mosaic(scene.folder, tmp_path, gpu="off")
    np.testing.assert_array_equal(pixels(tmp_path, "coverage"), pixels(plain, "coverage"))
    np.testing.assert_array_equal(pixels(tmp_path), pixels(plain))


# ----------------------------------------------------------------------------------------------------- other inputs


def rewrite(source: Path, target: Path, kind: str) -> None:
    """The same panels in another form."""
    target.mkdir()
    for path in sorted(source.glob("*.fits")):
        data, header = fits.getdata(path, header=True)
        if kind == "gz":
            (target / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes(), 1))
        elif kind == "fz":
            options = {"compression_type": "GZIP_1", "quantize_level": 0}
            fits.CompImageHDU(data, header, **options).writeto(target / f"{path.stem}.fz")
        elif kind == "interleaved":
            fits.PrimaryHDU(np.moveaxis(data, 0, 2).copy(), header).writeto(target / f"{path.stem}.FTS")
        elif kind == "float64":
            fits.PrimaryHDU(data.astype("f8"), header).writeto(target / f"{path.stem}.fit")
        elif kind == "extension":
            fits.HDUList([fits.PrimaryHDU(), fits.ImageHDU(data, header)]).writeto(target / path.name)
        elif kind == "CD matrix":
            matrix = WCS(header, naxis=2).pixel_scale_matrix
            for key in [k for k in header if k.startswith(("PC", "CDELT"))]:
                del header[key]
            header.update({f"CD{i + 1}_{j + 1}": matrix[i, j] for i in range(2) for j in range(2)})
            fits.PrimaryHDU(data, header).writeto(target / path.name)
        elif kind == "below":
            (target / path.stem).mkdir()
            shutil.copy(path, target / path.stem / "panel.Fits")


@pytest.mark.parametrize("kind", ["gz", "fz", "interleaved", "float64", "extension", "CD matrix", "below"])
def test_the_same_panels_in_another_form_make_the_same_mosaic(scene, plain, tmp_path, kind):
    rewrite(scene.folder, tmp_path / "in", kind)
    before = digests(tmp_path / "in")
    run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out", gpu="off")
    # a CD matrix is the product of PC and CDELT, rounded once more
    tolerance = {"rtol": 1e-5} if kind == "CD matrix" else {"rtol": 0}
    np.testing.assert_allclose(pixels(tmp_path / "out"), pixels(plain), **tolerance)
    assert digests(tmp_path / "in") == before
    assert not list((tmp_path / "out").glob(".*"))


def test_uint16_panels(scene, plain, tmp_path):
    write_scene(tmp_path / "in", dtype="uint16")
    assert fits.getheader(tmp_path / "in/panel_00.fits")["BZERO"] == 32768
    run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out")
    seen = pixels(plain, "coverage") > 0.5
    assert np.abs(pixels(tmp_path / "out") - pixels(plain))[:, seen].max() < 5  # half a count, and the solution's


def eight_bits(data: np.ndarray) -> np.ndarray:
    return (data / 40).clip(0, 255).astype("u1")


def rounded(data: np.ndarray) -> np.ndarray:
    return np.round(data / 40) * 40


def without_blue(data: np.ndarray) -> np.ndarray:
    return data * np.array([1, 1, 0], "f4")[:, None, None]


@pytest.mark.parametrize("change", [eight_bits, rounded, without_blue])
@pytest.mark.parametrize("tiles", ["one", "all"])
def test_panels_whose_noise_cannot_be_measured(scene, tmp_path, change, tiles):
    """Most of their pixels equal their neighbours: the solver must not divide by nothing."""
    panels = Path(shutil.copytree(scene.folder, tmp_path / "in"))
    for path in sorted(panels.iterdir())[: 1 if tiles == "one" else None]:
        data, header = fits.getdata(path, header=True)
        fits.writeto(path, change(data), header, overwrite=True)
    result = run_hierarchical_mosaic(panels, tmp_path / "out")
    assert np.isfinite(np.array([row["gain"] for row in result.report["tiles"]])).all()
    if change is rounded:
        truth = np.array([panel.gain for panel in scene.panels])
        gains = np.array([row["gain"] for row in result.report["tiles"]])
        np.testing.assert_allclose(gains, truth / np.exp(np.log(truth).mean(axis=0)), rtol=0.03)


def test_mono_panels(tmp_path):
    panels = write_scene(tmp_path / "in", channels=1)
    result = run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out", **AESTHETIC)
    with fits.open(result.science) as hdul:
        assert hdul[0].data.ndim == 2 and hdul["ALPHA"].data.shape == hdul[0].data.shape
    assert Image.open(result.preview).mode == "L"
    truth = np.array([panel.gain[0] for panel in panels])
    gains = np.array([row["gain"][0] for row in result.report["tiles"]])
    np.testing.assert_allclose(gains, truth / np.exp(np.log(truth).mean()), rtol=0.02)


def test_alpha_and_nan_are_no_data(scene, tmp_path):
    """The same hole, once as NaN and once in the ALPHA extension."""
    for kind in ("nan", "alpha"):
        panels = Path(shutil.copytree(scene.folder, tmp_path / kind))
        with fits.open(panels / "panel_00.fits", mode="update") as hdul:
            if kind == "nan":
                hdul[0].data[:, :40, :40] = np.nan
            else:
                alpha = np.full(LAYOUT.shape, 255, "u1")
                alpha[:40, :40] = 0
                hdul[0].data[:, :40, :40] = 1e6
                hdul.append(fits.ImageHDU(alpha, name="ALPHA"))
        run_hierarchical_mosaic(panels, tmp_path / f"{kind}_out", feather_px=0)
    np.testing.assert_allclose(pixels(tmp_path / "nan_out"), pixels(tmp_path / "alpha_out"), rtol=1e-5)


def test_a_tile_on_the_other_side_of_the_sky_is_named(scene, tmp_path, capsys):
    panels = Path(shutil.copytree(scene.folder, tmp_path / "in"))
    data = fits.getdata(panels / "panel_01.fits")
    fits.PrimaryHDU(data, tangent_wcs(LAYOUT.shape, (250.0, 40.0)).to_header()).writeto(panels / "lost.fits")
    assert run(panels, tmp_path / "out") == 2
    told = capsys.readouterr().err
    assert "lost.fits" in told and "gigapixels" in told


def test_settings_may_be_loosely_typed_in_python_too(scene, tmp_path):
    result = run_hierarchical_mosaic(
        str(scene.folder), str(tmp_path), settings=Settings(kernel="lanczos3"), memory_budget="1GB", gpu="off"
    )
    assert result.report["settings"]["memory_budget"] == 10**9 and result.report["settings"]["kernel"] == "lanczos3"
    with pytest.raises(errors.UsageError, match="kernel"):
        run_hierarchical_mosaic(scene.folder, tmp_path, kernel="cubic")


# ---------------------------------------------------------------------------------------------------- what it says


def plain_values(value: object) -> bool:
    """Only Python's own types, as the queue of another process needs them."""
    if isinstance(value, (list, tuple)):
        return all(plain_values(item) for item in value)
    return type(value) in (int, float, str, bool, type(None))


def test_messages_are_as_the_gui_expects(done):
    for key, progress, level, fields in done.heard:
        assert type(key) is str and key and plain_values([progress, level, *fields.values()])
        assert not {"key", "default_text", "self"} & set(fields)
        if key == "STAGE_PROGRESS":
            assert progress in STAGES and type(level) is int and type(fields["total"]) is int
        else:
            assert progress is None and level in ("INFO", "WARN", "ERROR", "SUCCESS") and fields["text"]
    keys = [message[0] for message in done.heard if message[0] != "STAGE_PROGRESS"]
    assert keys == [
        "run_info_existing_master_tiles_mode",
        "run_info_phase4_finished",
        "phase5_using_cpu",
        "assemble_info_intertile_photometric_applied",
        "run_info_phase5_started_reproject_coadd",
        "run_info_phase6_started",
        "run_success_mosaic_saved",
        "run_success_processing_completed",
    ]
    said = {message[0]: message[3] for message in done.heard}
    assert said["run_info_existing_master_tiles_mode"]["num_tiles"] == 4
    assert {"shape", "crval"} <= said["run_info_phase4_finished"].keys()
    assert said["run_success_mosaic_saved"]["filename"] == done.result.science.name
    assert said["run_success_processing_completed"]["duration"] > 0


def counts_of(messages) -> dict[str, list[tuple[int, int]]]:
    counts: dict[str, list[tuple[int, int]]] = {}
    for stage, current, total in messages:
        counts.setdefault(stage, []).append((current, total))
    return counts


def check_counts(counts: dict[str, list[tuple[int, int]]]) -> None:
    """Every stage begins at 0, rises, ends at its total."""
    assert list(counts) == [s for s in STAGES if s not in ("phase2_cluster", "phase3_master_tiles")]
    for pairs in counts.values():
        done, totals = zip(*pairs, strict=True)
        assert done[0] == 0 and done[-1] == totals[-1] and len(set(totals)) == 1
        assert all(b > a for a, b in pairwise(done))


def test_counts_only_rise(done):
    check_counts(counts_of((m[1], m[2], m[3]["total"]) for m in done.heard if m[0] == "STAGE_PROGRESS"))


def test_counts_come_at_most_ten_times_a_second_and_never_fall():
    heard = []
    reporter = Reporter(logging.getLogger("test"), lambda *message, **more: heard.append(message[2]))
    for _ in range(2):  # the second time as after a fallback
        for n in range(1001):
            reporter.stage("phase5_reproject", n, 1000)
    assert heard[0] == 0 and heard[-1] == 1000 and len(heard) < 5


def test_json_progress(scene, tmp_path, capsys):
    assert run(scene.folder, tmp_path, "--json-progress", "--set", "two_pass_coverage_renorm=on") == 0
    out, err = capsys.readouterr()
    messages = [json.loads(line) for line in out.splitlines()]
    check_counts(counts_of((m["stage"], m["current"], m["total"]) for m in messages if "stage" in m))
    assert messages[-1]["key"] == "run_success_processing_completed" and err == ""


def test_json_progress_tells_of_a_failure(tmp_path, capsys):
    assert run(tmp_path / "none", tmp_path / "out", "--json-progress") == 2
    (message,) = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert message["level"] == "ERROR" and "does not exist" in message["text"]


def test_quiet_says_nothing(scene, tmp_path, capfd):
    assert run(scene.folder, tmp_path, "--quiet") == 0
    assert capfd.readouterr() == ("", "")


def test_plain_lines_say_where_the_results_are(scene, tmp_path, capsys):
    assert run(scene.folder, tmp_path) == 0
    out, err = capsys.readouterr()
    for kind in ("science", "coverage", "preview"):
        assert str(product(tmp_path, kind)) in out
    assert "run_report.json" in out and "[5/7] resampling and coadding" in err and "\r" not in err


def test_a_terminal_gets_a_bar_with_phase_rate_and_time_left():
    written = []
    stream = SimpleNamespace(isatty=lambda: True, write=written.append, flush=lambda: None)
    bar = TerminalBar(stream)
    bar("STAGE_PROGRESS", "phase5_intertile", 0, total=20)
    bar("STAGE_PROGRESS", "phase5_intertile", 10, total=20)
    bar("name", None, "WARN", text="look out")
    bar("STAGE_PROGRESS", "phase5_intertile", 20, total=20)
    bar.close()
    shown = "".join(written)
    assert "[5/7] comparing the overlaps" in shown and " 50%" in shown and "tile/s" in shown
    assert "look out" not in shown  # warnings are listed once, at the end


# --------------------------------------------------------------------------------------------- program and package


def python(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, check=False, cwd=ROOT, **options
    )


def test_importing_is_light_and_does_nothing(tmp_path):
    code = (
        "import sys, logging, signal; before = logging.root.handlers[:], signal.getsignal(signal.SIGTERM);"
        "import zemosaic_worker;"
        "heavy = {'numba', 'reproject', 'PIL', 'psutil', 'pynvml', 'cupy', 'tqdm', 'matplotlib'} & set(sys.modules);"
        "assert not heavy, heavy;"
        "assert before == (logging.root.handlers[:], signal.getsignal(signal.SIGTERM))"
    )
    done = python("-W", "error", "-c", code, env={**os.environ, "HOME": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_the_demo(tmp_path):
    done = python("zemosaic_worker.py", "--demo", tmp_path / "demo")
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "demo" / "panels").iterdir())) == 9
    for kind in ("science", "preview"):
        assert str(product(tmp_path / "demo" / "mosaic", kind)) in done.stdout
    assert "Warning" not in done.stderr and "warning" not in done.stdout


def test_the_output_may_be_piped_into_a_program_that_stops_reading(scene, tmp_path):
    command = [sys.executable, "zemosaic_worker.py", scene.folder, tmp_path, "--json-progress"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 1 and err.count("\n") == 1 and "standard output" in err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no file names that are no text")
def test_file_names_in_any_alphabet(scene, tmp_path):
    for number, name in enumerate((b"\xe6\x97\xa5\xe6\x9c\xac.fits", b"caf\xe9.fits", b"two words;.fit")):
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(scene.folder / f"panel_0{number}.fits", os.fsdecode(os.fsencode(tmp_path / "in") + b"/" + name))
    (tmp_path / "in" / os.fsdecode(b"\xff.fits")).touch()
    done = python(
        "zemosaic_worker.py", tmp_path / "in", tmp_path / "out", env={**os.environ, "PYTHONIOENCODING": "ascii"}
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "run_report.json").read_text())
    assert {os.fsencode(row["name"]) for row in report["tiles"]} >= {b"caf\xe9.fits", b"two words;.fit"}


def test_the_console_script_and_every_module_are_packaged():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    module, _, function = project["project"]["scripts"]["zemosaic-worker"].partition(":")
    assert getattr(sys.modules[module], function) is zemosaic_worker.command_line
    assert sorted(project["tool"]["setuptools"]["py-modules"]) == sorted(p.stem for p in ROOT.glob("zemosaic_*.py"))


def test_version_and_help(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as end:
            run(option)
        assert end.value.code == 0 and "zemosaic-worker" in capsys.readouterr().out
