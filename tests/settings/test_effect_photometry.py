"""What the settings of the photometric normalisation do."""

from __future__ import annotations

import numpy as np

from scenes.outcomes import differ


def test_intertile_photometric_match(run):
    matched, plain = run(), run(intertile_photometric_match=False)
    assert np.ptp(matched.per_tile("gain")) > 0.1
    assert (plain.per_tile("gain") == 1).all()
    assert differ(matched, plain, by=20)


def test_match_background_for_final(run):
    levelled = run(intertile_photometric_match=False)
    nothing = run(intertile_photometric_match=False, match_background_for_final=False)
    assert (nothing.per_tile("offset") == 0).all() and np.ptp(levelled.per_tile("offset")) > 50
    assert differ(levelled, nothing, by=20)


def test_photometry_cell_px(run):
    fine, coarse = ([p["cells"] for p in run(photometry_cell_px=n).report["pairs"]] for n in (4, 8))
    assert max(coarse) < max(fine) / 2


def test_gain_se_limit(run):
    strict = run(gain_se_limit=1e-4)
    assert (strict.per_tile("gain") == 1).all()
    assert any("gain_undetermined" in text for text in strict.report["warnings"])
    assert not any("gain_undetermined" in text for text in run().report["warnings"])


def test_gradient_order(run):
    none, planes, curved = (run(gradient_order=n).per_tile("gradient") for n in (0, 1, 2))
    assert not none.any()
    assert planes[:, :, :2].any() and not planes[:, :, 2:].any()
    assert curved[:, :, 2:].any()


def test_reject_bad_tiles(run):
    without, with_it = run("bad"), run("bad", reject_bad_tiles=False)
    assert len(without.report["tiles"]) == 3 and len(with_it.report["tiles"]) == 4
    assert any("panel_02.fits" in text for text in without.report["warnings"])
