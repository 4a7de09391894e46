"""What the settings of the input and of the output grid do."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.io import fits

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.synthetic.panels import tangent_wcs


def test_use_existing_master_tiles(run):
    assert len(run(use_existing_master_tiles=True).report["tiles"]) == 5
    # of the five files one does not say that it is a master tile
    (tile,) = run(use_existing_master_tiles=False).report["tiles"]
    assert tile["name"] == "master_tiles/master_tile_001.fits"
    with pytest.raises(UsageError, match="raw sub"):
        run("lights", use_existing_master_tiles=True)


def test_apply_master_tile_crop(run):
    whole, cut = run(), run(apply_master_tile_crop=True)
    assert cut.image().shape[2] < whole.image().shape[2]


def test_master_tile_crop_percent(run):
    little, much = (run(apply_master_tile_crop=True, master_tile_crop_percent=p) for p in (1, 20))
    # a fifth of 96 and 128 pixels on both sides
    assert much.image().shape[1] < little.image().shape[1] - 30 and much.image().shape[2] < little.image().shape[2] - 40


def test_global_wcs_pixelscale_mode(run):
    assert run().scale() == pytest.approx(4.0, rel=1e-3)
    assert run(global_wcs_pixelscale_mode="min").scale() == pytest.approx(3.0, rel=1e-3)


def test_global_wcs_res_override(run):
    assert run(global_wcs_res_override=7.5).scale() == pytest.approx(7.5)


def test_global_wcs_orientation(run):
    up, turned = run("turned"), run("turned", global_wcs_orientation="as_tiles")
    assert up.header().get("PC1_2", 0.0) == 0.0
    assert abs(turned.header()["PC1_2"]) == pytest.approx(np.sin(np.deg2rad(20)), abs=0.01)


def test_global_wcs_padding_percent(run):
    tight, wide = run(global_wcs_padding_percent=0), run(global_wcs_padding_percent=50)
    assert np.array(wide.image().shape[1:]) == pytest.approx(1.5 * np.array(tight.image().shape[1:]), abs=2)


def test_output_wcs_file(run, tmp_path):
    header = tangent_wcs((70, 90), (83.8, -5.4), 5.0).to_header()
    fits.PrimaryHDU(np.zeros((70, 90), "u1"), header).writeto(tmp_path / "wanted.fits")
    given = run(output_wcs_file=str(tmp_path / "wanted.fits"))
    assert given.image().shape == (3, 70, 90)
    assert given.header()["CRPIX1"] == 45.5 and given.scale() == pytest.approx(5.0)


def test_max_output_gigapixels(run):
    with pytest.raises(UsageError, match="gigapixels"):
        run(max_output_gigapixels=1e-6)
