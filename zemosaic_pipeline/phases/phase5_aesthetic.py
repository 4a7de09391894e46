"""Steps 4 and 5 of Phase 5: what makes the aesthetic mosaic, from what the first pass left in memory.

Coverage renormalisation, a level sky, RGB balance and black point change flux for the eye's sake. They are the same for
both backends, and the science mosaic is on disk before they begin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from zemosaic_photometry import (
    PhotometricSolution,
    black_point,
    coverage_gain,
    coverage_scale,
    relative_coverage_gains,
    rgb_balance_gains,
)
from zemosaic_pipeline.phases.phase5_canvas import ColourAdjustment, Coverage, Product
from zemosaic_pipeline.phases.phase5_coadd import Mosaic, coadd_to_disk
from zemosaic_pipeline.phases.phase5_normalise import Scene
from zemosaic_pipeline.phases.phase5_sky_plane import SkyPlane, sky_plane
from zemosaic_pipeline.phases.phase6_save import Outputs, product_header
from zemosaic_pipeline.phases.run import Run
from zemosaic_pipeline.resample.measure import cells_touched, coarse_window
from zemosaic_pipeline.settings.settings import Settings


@dataclass(frozen=True)
class Aesthetics:
    """What makes the aesthetic mosaic: factors per tile from the coverage and per channel from the balance, the black
    point, and the plane under the sky, which is subtracted first."""

    coverage_gain: np.ndarray
    rgb_gain: np.ndarray
    black: float
    plane: SkyPlane | None = None


def coadd_aesthetic(run: Run, scene: Scene, science: Mosaic, outputs: Outputs) -> tuple[Mosaic, Aesthetics | None]:
    """The aesthetic mosaic and its factors; the science mosaic and None where no step of it is on."""
    if outputs.aesthetic is None:
        return science, None
    with run.phase("phase5_aesthetic"):
        factors = aesthetic_factors(run.settings, scene, science)
        header = product_header(run, scene, "aesthetic")
        if factors.plane is not None:
            spans = ", ".join(f"{span:.4g}" for span in factors.plane.span)
            header["HISTORY"] = f"sky levelled by a plane of this range: {spans}"
        product = Product(
            "aesthetic",
            aesthetic_solution(scene.solution, factors),
            outputs.aesthetic,
            header,
            preview=outputs.preview,
            adjust=colour_adjustment(factors),
        )
        return coadd_to_disk(run, scene, product), factors


def aesthetic_factors(settings: Settings, scene: Scene, science: Mosaic) -> Aesthetics:
    """Steps 4 and 5 of Phase 5, from what the first pass left in memory; the same for both backends."""
    gains = np.ones(len(scene.placed))
    if science.coverage is not None:
        gains = coverage_gains(scene, science.coverage, settings)
    image = science.preview
    plane = sky_plane(image, science.bin) if settings.level_sky else None
    if plane is not None:
        middle = (science.bin - 1) / 2
        image = image - plane.block(middle, middle, image.shape[1:], science.bin)
    rgb = np.ones(scene.channels)
    if settings.final_mosaic_rgb_equalize_enabled and scene.channels > 1:
        sky = np.array([np.nanpercentile(plane, 30) for plane in image])
        rgb = rgb_balance_gains(sky, settings.final_mosaic_rgb_equalize_gain_clip)
    black = 0.0
    if settings.final_mosaic_black_point_equalize_enabled:
        black = black_point(image * rgb[:, None, None], settings.final_mosaic_black_point_percentile)
    return Aesthetics(gains, rgb, black, plane)


def coverage_gains(scene: Scene, coverage: Coverage, settings: Settings) -> np.ndarray:
    """Relative gain of every tile from the coverage of the first pass (cells instead of pixels, sigma to match)."""
    from scipy.ndimage import gaussian_filter

    sigma = settings.two_pass_cov_sigma_px / coverage.bin
    mean = np.nan_to_num(coverage.mean)
    scale, smooth = coverage_scale(mean, lambda image: gaussian_filter(image, sigma))
    gains = []
    for item in scene.placed:
        cy0, cy1, cx0, cx1 = coarse_window(item.rect, coverage.bin)
        window = np.s_[cy0:cy1, cx0:cx1]
        gains.append(
            coverage_gain(
                scale[window],
                smooth[window],
                mean[window],
                cells_touched(item, coverage.bin).astype(bool),
                settings.two_pass_cov_gain_clip,
                pixels_per_cell=coverage.bin**2,
            )
        )
    return relative_coverage_gains(np.array(gains))


def aesthetic_solution(solution: PhotometricSolution, factors: Aesthetics) -> PhotometricSolution:
    """The solution with every tile's flux multiplied by its coverage gain, about the mosaic's zero."""
    gain = factors.coverage_gain[:, None]
    return replace(solution, gain=solution.gain / gain, level=solution.level * gain)


def colour_adjustment(factors: Aesthetics) -> ColourAdjustment:
    """What turns a science block (C, h, w) into an aesthetic one."""
    gain = factors.rgb_gain.astype(np.float32)[:, None, None]
    return ColourAdjustment(gain, np.float32(factors.black), factors.plane)
