"""Scenes of a known sky that the photometry is judged on, and how well it must do on each.

A scene goes the worker's way: panels are placed, surveyed, measured and coadded by the same code. Its *floor* is the
same coadd of panels out of which the true offset, gradient, vignetting and gain were taken by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from zemosaic_photometry import PhotometricSolution
from zemosaic_pipeline.fits.tile import array_tile
from zemosaic_pipeline.overlaps.pairs import CoarseTile
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd, coadd_block
from zemosaic_pipeline.resample.measure import measure_tile, overlap_counts
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import OutputGrid, choose_output_grid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, place_tiles, with_weights
from zemosaic_pipeline.resample.survey import survey_tile
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.panels import Layout, Panel, Sky, make_panels, make_sky, mosaic_shape

CELL_PX = 4
#: Stars in the field of a panel of 480 x 640 pixels: as many as 4000 over the mosaic of `BASE`.
STARS_PER_PANEL = 515


@dataclass(frozen=True)
class Case:
    """A layout, its sky, and what the figures of its mosaic (`photometry_judge`) may be at most.

    ``most`` limits a figure, ``above`` its excess over the floor's; the star and colour figures are in percent, all
    others in sigma. ``stars`` in the field of a panel; None: 4000 in all. ``disc``: radius in pixels and brightness in
    sigma of a nebula in the middle.
    """

    layout: Layout
    most: Mapping[str, float] = field(default_factory=dict)
    above: Mapping[str, float] = field(default_factory=dict)
    stars: float | None = None
    nebula: float = 1.0
    disc: tuple[float, float] | None = None

    @property
    def star_count(self) -> int:
        """Stars of the whole sky."""
        if self.stars is None:
            return 4000
        height, width = mosaic_shape(self.layout)
        return round(self.stars * (height + 40) * (width + 40) / np.prod(self.layout.shape))


BASE = Layout()
#: Margins over the floor of a scene without gradients: sky in sigma, star flux and colour in percent.
MARGINS = {"sky": 0.06, "star": 0.2, "colour": 0.12}
#: Margins over the floor of a scene with gradients.
FLAT = {"seam": 0.1, "star": 0.2, "colour": 0.15}


def _flat(change: dict, low_q: float, above: Mapping[str, float] = FLAT, stars: float | None = None) -> Case:
    """A case with gradients, judged by what is left of them once a quadratic over the whole mosaic is out."""
    return Case(replace(BASE, **change), {"low_q": low_q}, above, stars)


def _hard(change: dict, stars: float | None = None) -> Case:
    """A case with gradients and something that makes them hard to find."""
    return _flat(change, 0.35, {"star": 0.4}, stars)


def _plain(change: dict, above: Mapping[str, float] = MARGINS) -> Case:
    """A case without gradients."""
    return Case(replace(BASE, **change), {}, above)


_SCALES = (0.75, 1.5)
CASES = {
    "base": _plain({}),
    "sip": _plain({"sip": True}),
    "rotated": _plain({"rotation_deg": 15.0}),
    "nan": _plain({"nan_border": 20}),
    "noisy": _plain({"noise_factor": {4: 2.0}}),
    "seeing": _plain({"fwhm": (3.0, 4.5)}),
    "gains": _plain({"gain_sigma": 0.45}),
    # many small panels
    "6x6": _plain({"rows": 6, "columns": 6, "shape": (240, 320)}, {k: 1.5 * m for k, m in MARGINS.items()}),
    "sip1": _plain({"sip": True, "sip_pixels": 1.0}, {"sky": 0.06, "star": 0.2}),
    "sip3": _plain({"sip": True, "sip_pixels": 3.0}, {"sky": 0.06, "star": 0.2}),
    "scales": _plain({"pixel_scales": _SCALES}, {"sky": 0.06, "star": 0.2}),
    "ceiling": _plain({"ceiling": 12000.0}, {"star": 0.2}),
    "exposures": _plain({"exposures": (1.0, 4.0), "ceiling": 65535.0}, {"star": 0.2}),
    "clipped": _plain({"exposures": (1.0, 4.0), "ceiling": 12000.0}, {"star": 0.5}),
    "units": _plain({"units": {4: 1 / 65535}}),
    "plane1": _flat({"plane": 1.0}, 0.1),
    "plane5": _flat({"plane": 5.0}, 0.1),
    "plane20": _flat({"plane": 20.0}, 0.1),
    # no more than the overlaps tell: with the priors' true sizes and the true gains low_q is 0.31 to 0.42 all the same
    "curved": _flat({"plane": 20.0, "curvature": 4.0}, 0.45, {"seam": 0.4, "star": 0.2, "colour": 0.3}),
    "equal": _flat({"plane": 10.0, "gain_sigma": 0.0}, 0.1),
    "sip3p3": _flat({"plane": 3.0, "sip": True, "sip_pixels": 3.0}, 0.1, {}),
    "scalesp3": _flat({"plane": 3.0, "pixel_scales": _SCALES}, 0.1, {}),
    "strip": _flat({"plane": 5.0, "rows": 1, "columns": 12}, 0.45, {}, STARS_PER_PANEL),
    "narrow": _flat({"plane": 5.0, "overlap": 0.05}, 0.5, {}),
    "two": _flat({"plane": 5.0, "rows": 1, "columns": 2}, 0.5, {}, STARS_PER_PANEL),
    "10x10": _hard({"plane": 5.0, "rows": 10, "columns": 10, "shape": (240, 320)}, STARS_PER_PANEL / 4),
    # no more than the overlaps tell: with the priors' true sizes and the true gains low_q is 0.26 to 0.54 all the same
    "clouds": _flat({"plane": 5.0, "curvature": 1.0, "clouds": (0.4, 1.0)}, 0.6, {"star": 0.4}),
    "sparse": _hard({"plane": 5.0}, 30),
    "turned": _hard({"plane": 5.0, "rotation_deg": 15.0}),
    "mono": _hard({"plane": 5.0, "channels": 1}),
    "bowl": Case(replace(BASE, plane=3.0, common_curvature=1.0), {"low": 1.9}),
    "vignette": Case(replace(BASE, plane=3.0, vignetting=0.04), {"low": 1.9}),
}
#: The eight without gradients that the README tells of, and all whose sky has gradients.
GROUPS = {
    "plain": ["base", "sip", "rotated", "nan", "noisy", "seeing", "gains", "6x6"],
    "gradients": [name for name, case in CASES.items() if case.layout.plane],
}


@dataclass(frozen=True)
class Scene:
    """A known sky, panels of it, and what Phase 5 measures on them."""

    layout: Layout
    sky: Sky
    panels: list[Panel]
    grid: OutputGrid
    placed: list[PlacedTile]
    store: PixelStore
    coarse: list[CoarseTile]


def make_scene(
    layout: Layout, seed: int, stars: int = 4000, nebula: float = 1.0, disc: tuple[float, float] | None = None
) -> Scene:
    """Panels of a seeded sky, placed and measured as the worker does it.

    ``nebula`` scales its brightness; ``disc`` is the radius (pixels) and the brightness (sigma) of another.
    """
    bright = None if disc is None else (disc[0], disc[1] * layout.noise)
    sky = make_sky(mosaic_shape(layout), seed, stars, channels=layout.channels, nebula=nebula, disc=bright)
    panels = make_panels(layout, sky, seed + 100)
    tiles = [array_tile(p.data, p.wcs, name=f"panel_{k:02d}") for k, p in enumerate(panels)]
    grid = choose_output_grid(tiles, Settings())
    store, backend = PixelStore(10**9), CpuBackend()
    surveys = [survey_tile(tile, store) for tile in tiles]
    meshed = zip(place_tiles(tiles, grid), surveys, strict=True)
    placed = [with_weights(item, facts, 1.0, 0.1 * min(item.tile.shape)) for item, facts in meshed if item is not None]
    counts = overlap_counts(placed, grid.shape, CELL_PX)
    coarse = [measure_tile(p, s, counts, CELL_PX, store, backend) for p, s in zip(placed, surveys, strict=True)]
    return Scene(layout, sky, panels, grid, placed, store, coarse)


def case_scene(case: Case, seed: int) -> Scene:
    """The scene of a case."""
    return make_scene(case.layout, seed, case.star_count, case.nebula, case.disc)


def mosaic(scene: Scene, solution: PhotometricSolution | None, only: Sequence[PlacedTile] | None = None):
    """Mean coadd: values (C, H, W), NaN where there are none, and coverage (H, W)."""
    placed = scene.placed if only is None else only
    values = np.full((scene.sky.channels, *scene.grid.shape), np.nan, np.float32)
    coverage = np.zeros(scene.grid.shape, np.float32)

    def sink(block, part, weight):
        values[:, block[0] : block[1], block[2] : block[3]] = part
        coverage[block[0] : block[1], block[2] : block[3]] = weight

    coadd(CoaddPlan(placed, solution, scene.grid, CoaddOptions(), scene.store), CpuBackend(), sink, 10**8, 2)
    return values, coverage


def true_mosaic(scene: Scene, panels: Sequence[Panel] | None = None):
    """Coadd of the panels (the scene's own, or others in their place) with all taken out that the instrument did."""
    pairs = zip(scene.placed, scene.panels if panels is None else panels, strict=True)
    placed = [replace(item, tile=array_tile(p.true_sky, p.wcs, name=item.tile.name)) for item, p in pairs]
    return mosaic(scene, None, placed)


def coverage_regions(scene: Scene, least: int) -> np.ndarray:
    """Number of the set of tiles that cover each pixel; -1 where there is none or its region has too few pixels."""
    # a random word for each tile: the sums of different sets differ
    words = np.random.default_rng(0).integers(1, 2**56, len(scene.placed))
    total = np.zeros(scene.grid.shape, np.int64)
    for word, item in zip(words, scene.placed, strict=True):
        y0, y1, x0, x1 = item.rect
        alone = CoaddPlan([item], None, scene.grid, CoaddOptions(), scene.store)
        total[y0:y1, x0:x1] += word * (coadd_block(alone, item.rect, CpuBackend())[1] > 0)
    sets, region, size = np.unique(total, return_inverse=True, return_counts=True)
    number = np.where((sets != 0) & (size >= least), np.arange(len(sets)), -1)
    return number[region.reshape(total.shape)]
