"""Phase 6: names and headers of the outputs, the preview, and the end of a run that has made its mosaic."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.fits.preview import save_png, stretch
from zemosaic_pipeline.host.folders import program_version
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.run import Run
from zemosaic_pipeline.resample.output_grid import grid_header
from zemosaic_pipeline.settings.settings import Settings


@dataclass(frozen=True)
class Outputs:
    """Final names of all outputs of a run; ``aesthetic`` only where a step of the aesthetic mosaic is on."""

    science: Path
    aesthetic: Path | None
    coverage: Path
    preview: Path
    report: Path

    def named(self) -> dict[str, Path]:
        """The paths by the names of what they hold."""
        return {name: path for name, path in vars(self).items() if path is not None}


def outputs_of(run: Run, scene: Scene) -> Outputs:
    """Where the outputs go."""
    stem = f"zemosaic_MT{len(scene.placed)}_R{scene.frames}"
    return Outputs(
        science=run.output / f"{stem}_science.fits",
        aesthetic=run.output / f"{stem}_aesthetic.fits" if wants_aesthetic(run.settings) else None,
        coverage=run.output / f"{stem}_coverage.fits",
        preview=run.output / f"{stem}_preview.png",
        report=run.output / "run_report.json",
    )


def wants_aesthetic(settings: Settings) -> bool:
    """Whether any step that changes flux for the eye's sake is on."""
    return (
        settings.two_pass_coverage_renorm
        or settings.level_sky
        or settings.final_mosaic_rgb_equalize_enabled
        or settings.final_mosaic_black_point_equalize_enabled
    )


def product_header(run: Run, scene: Scene, product: str) -> fits.Header:
    """Header of an output: WCS, how many tiles and frames, and HISTORY."""
    header = grid_header(scene.grid)
    header["ZMPROD"] = (product, "product of the mosaic worker")
    header["CREATOR"] = (f"zemosaic-worker {program_version()}", "program that made this file")
    header["NTILES"] = (len(scene.placed), "number of tiles")
    header["NCOMBINE"] = (scene.frames, "number of raw frames in the tiles")
    for line in history_lines(run.settings, len(scene.solution.pairs)):
        header["HISTORY"] = line
    return header


def history_lines(settings: Settings, overlaps: int) -> list[str]:
    """HISTORY of an output: how it was made, in a few lines."""
    match = "off"
    if settings.intertile_photometric_match:
        match = f"gain and offset of {overlaps} overlaps"
    elif settings.match_background_for_final:
        match = f"offset of {overlaps} overlaps"
    return [
        f"photometric match: {match}",
        f"resampled with {settings.kernel}, combined by {settings.combine_method}, engine {settings.engine}",
        f"tile weights: {settings.tile_weight_mode if settings.enable_tile_weighting else 'uniform'}",
        "0 where nothing was seen; ALPHA tells; details in run_report.json",
    ]


def finish_outputs(run: Run, preview: np.ndarray) -> None:
    """What is left to do once the files stand: say so where whole numbers cannot hold the mosaic."""
    run.reporter.stage("phase6", 0, 2)
    run.reporter.info("run_info_phase6_started", "saving")
    if run.settings.save_final_as_uint16 and np.isfinite(preview).any():
        low, middle, high = np.nanpercentile(preview, (0.1, 50, 99.9))
        if low < 0 or high > 65535 or high - middle < 64:
            run.reporter.warn(
                "",
                f"save_final_as_uint16: whole numbers from 0 to 65535 hold this mosaic badly, most of whose values lie "
                f"between {low:.4g} and {high:.4g}; leave it off to keep them all",
            )
    run.reporter.stage("phase6", 1, 2)


def save_preview(settings: Settings, image: np.ndarray, path: Path) -> None:
    """Auto-stretched PNG of the mosaic."""
    picture = stretch(image, settings.preview_png_p_low, settings.preview_png_p_high, settings.preview_png_asinh_a)
    save_png(picture, path)
