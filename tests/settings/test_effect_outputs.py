"""What the settings of the outputs do: files, preview, telemetry, log."""

from __future__ import annotations

import csv

import numpy as np
from PIL import Image

from scenes.outcomes import differ, night, spy
from scenes.small_scene import LOG, product
from zemosaic_pipeline.host import telemetry


def test_keep_master_tiles(run):
    assert [path.name for path in (night(run).folder / "master_tiles").iterdir()] == ["master_tile_001.fits"]
    gone = night(run, keep_master_tiles=False)
    assert not (gone.folder / "master_tiles").exists() and not differ(gone, night(run))


def test_save_final_as_uint16(run):
    asked = run(save_final_as_uint16=True)
    assert (asked.header()["BITPIX"], asked.header()["BZERO"]) == (16, 32768)
    np.testing.assert_allclose(asked.image(), np.rint(run().image()).clip(0, 65535), atol=1)


def test_legacy_rgb_cube(run):
    asked = run(legacy_rgb_cube=True)
    np.testing.assert_array_equal(np.moveaxis(asked.image(), 2, 0), run().image())


def preview(run, **settings) -> np.ndarray:
    return np.asarray(Image.open(product(run(**settings).folder, "preview"))).astype(int)


def test_preview_png_p_low(run):
    # more of the darkest pixels are shown black
    assert np.mean(preview(run, preview_png_p_low=40) < 2) > np.mean(preview(run) < 2)


def test_preview_png_p_high(run):
    assert (preview(run, preview_png_p_high=90) == 255).sum() > (preview(run) == 255).sum()


def test_preview_png_asinh_a(run):
    assert preview(run, preview_png_asinh_a=50).mean() > preview(run).mean() + 5


def test_preview_png_max_dim(run):
    assert 32 < max(preview(run, preview_png_max_dim=64).shape) <= 64 < max(preview(run).shape)


def test_enable_resource_telemetry(run):
    assert (run(enable_resource_telemetry=True).folder / "resource_telemetry.csv").is_file()
    assert not (run().folder / "resource_telemetry.csv").exists()


def test_resource_telemetry_interval_sec(run, monkeypatch):
    monitors = spy(monkeypatch, telemetry, "ResourceMonitor")
    run(enable_resource_telemetry=True, resource_telemetry_interval_sec=0.25, fresh=True)
    assert monitors[0].options["interval_sec"] == 0.25


def test_resource_telemetry_log_to_csv(run):
    silent = run(enable_resource_telemetry=True, resource_telemetry_log_to_csv=False)
    assert not (silent.folder / "resource_telemetry.csv").exists()
    assert list(csv.reader((run(enable_resource_telemetry=True).folder / "resource_telemetry.csv").open()))


def test_logging_level(run):
    assert " INFO " in (run().folder / LOG).read_text()
    assert " INFO " not in (run(logging_level="WARNING").folder / LOG).read_text()
