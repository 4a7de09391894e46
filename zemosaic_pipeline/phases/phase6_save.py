"""Phase 6: names and headers of the outputs, and the preview."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.fits.preview import save_png, stretch
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.run import Run
from zemosaic_pipeline.resample.output_grid import grid_header
from zemosaic_pipeline.settings.settings import Settings

# --------------------------------------------------------------------------------------------------------- Phase 6


def output_paths(folder: Path, tiles: int, frames: int, aesthetic: bool) -> dict[str, Path]:
    """Final names of all outputs of a run."""
    stem = f"zemosaic_MT{tiles}_R{frames}"
    images = ("science", "aesthetic", "coverage") if aesthetic else ("science", "coverage")
    return {
        **{name: folder / f"{stem}_{name}.fits" for name in images},
        "preview": folder / f"{stem}_preview.png",
        "report": folder / "run_report.json",
    }


def product_header(scene: Scene, product: str, history: Sequence[str], version: str) -> fits.Header:
    """Header of an output: WCS, how many tiles and frames, and HISTORY."""
    header = grid_header(scene.grid)
    header["ZMPROD"] = (product, "product of the mosaic worker")
    header["CREATOR"] = (f"zemosaic-worker {version}", "program that made this file")
    header["NTILES"] = (len(scene.placed), "number of tiles")
    header["NCOMBINE"] = (scene.frames, "number of raw frames in the tiles")
    for line in history:
        header["HISTORY"] = line
    return header


def warn_of_rounding(run: Run, image: np.ndarray) -> None:
    """Say so where whole numbers from 0 to 65535 cannot hold the mosaic."""
    if not run.settings.save_final_as_uint16 or not np.isfinite(image).any():
        return
    low, middle, high = np.nanpercentile(image, (0.1, 50, 99.9))
    if low < 0 or high > 65535 or high - middle < 64:
        run.reporter.warn(
            "",
            f"save_final_as_uint16: whole numbers from 0 to 65535 hold this mosaic badly, most of whose values lie "
            f"between {low:.4g} and {high:.4g}; leave it off to keep them all",
        )


def save_preview(settings: Settings, image: np.ndarray, path: Path) -> None:
    """Auto-stretched PNG of the mosaic."""
    picture = stretch(image, settings.preview_png_p_low, settings.preview_png_p_high, settings.preview_png_asinh_a)
    save_png(picture, path)
