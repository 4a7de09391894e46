"""What is said of the files that Phase 6 writes."""

from __future__ import annotations

import numpy as np
from astropy.io import fits

from scenes.small_scene import write_scene
from zemosaic_worker import run_hierarchical_mosaic


def test_a_mosaic_that_whole_numbers_cannot_hold_is_warned_of(tmp_path):
    write_scene(tmp_path / "in")
    for path in (tmp_path / "in").iterdir():
        with fits.open(path, mode="update") as hdul:
            hdul[0].data /= np.float32(65536)
    result = run_hierarchical_mosaic(tmp_path / "in", tmp_path / "out", save_final_as_uint16=True)
    assert any("save_final_as_uint16" in text for text in result.report["warnings"])
