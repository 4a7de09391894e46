"""Fixtures shared by all tests: array namespaces, small scenes, the whole of Phase 5 in one call."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest

from zemosaic_photometry import compute_photometric_gains_and_offsets
from zemosaic_pipeline.fits.tile import Tile, array_tile
from zemosaic_pipeline.resample.coadd import coadd
from zemosaic_pipeline.resample.measure import measure_tile, overlap_counts
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import place_tiles, weighted
from zemosaic_pipeline.resample.survey import survey_tile
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, make_sky, mosaic_shape


@pytest.fixture(params=["numpy", "array_api_strict", "cupy"])
def xp(request):
    """An array namespace with ``to(array)`` (onto its device) and ``back(array)`` (explicitly to numpy).

    array-api-strict stands for a GPU: on its second device every implicit transfer raises.
    """
    if request.param == "numpy":
        return SimpleNamespace(name="numpy", module=np, to=np.asarray, back=np.asarray)
    if request.param == "array_api_strict":
        strict = pytest.importorskip("array_api_strict")
        device = strict.Device("device1")
        return SimpleNamespace(
            name="array_api_strict",
            module=strict,
            to=lambda array: strict.asarray(array, device=device),
            back=lambda array: np.asarray(array.to_device(strict.Device("CPU_DEVICE"))),
        )
    require_card()
    import cupy

    return SimpleNamespace(name="cupy", module=cupy, to=cupy.asarray, back=cupy.asnumpy)


def require_card():
    """Skip where there is no working CUDA card, and say why."""
    from zemosaic_pipeline.pixels.backend_base import DeviceFailure
    from zemosaic_pipeline.pixels.backend_cuda import open_cuda

    try:
        open_cuda().close()
    except DeviceFailure as failure:
        pytest.skip(f"no GPU: {failure}")


@pytest.fixture
def card_required():
    require_card()


# ------------------------------------------------------------------------------------------------------------ scenes


@dataclass(frozen=True)
class SmallScene:
    """Tiles of a small sky, the output they go to, and their weights."""

    tiles: list[Tile]
    grid: OutputGrid
    weights: list[float]
    radial: np.ndarray | None = None


LAYOUTS = {
    "plain": Layout(2, 2, (64, 80), overlap=0.4, noise=2.0),
    "sip, turned, borders": Layout(2, 2, (64, 80), overlap=0.45, noise=2.0, rotation_deg=15, sip=True, nan_border=3),
    "weights": Layout(2, 2, (64, 80), overlap=0.45, noise=2.0, nan_border=2),
}


def make_scene(name: str) -> SmallScene:
    layout = LAYOUTS[name]
    shape = mosaic_shape(layout)
    sky = make_sky(shape, stars=300)
    panels = make_panels(layout, sky)
    alphas, weights, radial = [None] * len(panels), [1.0] * len(panels), None
    if name == "weights":
        rng = np.random.default_rng(8)
        alphas = [rng.uniform(0.2, 1, p.data.shape[1:]).astype(np.float32) for p in panels]
        alphas[1][10:20, 15:30] = 0
        weights = [1.0, 4.0, 0.5, 2.0]
        radial = rng.uniform(0.3, 1, (8, 10)).astype(np.float32)
    tiles = [array_tile(p.data, p.wcs, f"tile {k}", weights=alphas[k]) for k, p in enumerate(panels)]
    return SmallScene(tiles, OutputGrid(sky.wcs, shape), weights, radial)


@pytest.fixture(scope="session")
def scenes():
    """Small scenes by name."""
    return {name: make_scene(name) for name in LAYOUTS}


@pytest.fixture(scope="session", params=LAYOUTS)
def scene(request, scenes):
    """Each of the small scenes."""
    return scenes[request.param]


@pytest.fixture(scope="session")
def phase5():
    """The function :func:`run_phase5`."""
    return run_phase5


def run_phase5(switch, scene: SmallScene, options: CoaddOptions | None = None, block_bytes: int = 120_000):
    """Place, survey, weigh, measure, solve, coadd, as a run does, each step as a whole on one backend.

    Returns a namespace: ``coarse`` (list of CoarseTile), ``solution``, ``image`` (C, H, W), ``coverage`` (H, W).
    """
    options = options or CoaddOptions()
    store = PixelStore(10**8)
    placed = place_tiles(scene.tiles, scene.grid)
    surveys = [survey_tile(tile, store) for tile in scene.tiles]
    placed = [
        weighted(item, facts, weight, 8.0, scene.radial)
        for item, facts, weight in zip(placed, surveys, scene.weights, strict=True)
    ]
    counts = overlap_counts(placed, scene.grid.shape, 2)

    def measure(backend):
        return [
            measure_tile(item, facts, counts, 2, store, backend) for item, facts in zip(placed, surveys, strict=True)
        ]

    coarse = switch.run(measure)
    solution = compute_photometric_gains_and_offsets(coarse)

    def step(backend):
        image = np.zeros((3, *scene.grid.shape), np.float32)
        coverage = np.zeros(scene.grid.shape, np.float32)

        def sink(block, values, weights):
            window = (slice(*block[:2]), slice(*block[2:]))
            image[(slice(None), *window)], coverage[window] = values, weights

        coadd(placed, solution, scene.grid.shape, options, store, backend, sink, block_bytes)
        return image, coverage

    image, coverage = switch.run(step)
    return SimpleNamespace(coarse=coarse, solution=solution, image=image, coverage=coverage, placed=placed)


def robust_range(image):
    """Distance of the 0.1 and 99.9 percentiles of the pixels with data."""
    low, high = np.nanpercentile(image, (0.1, 99.9))
    return high - low


def assert_parity(ours, cpu):
    """Equality asked between backends: all but the pixels bit by bit, the pixels to 1e-5 of the image's range."""
    for a, b in zip(ours.coarse, cpu.coarse, strict=True):
        assert a.corner == b.corner
        for name in ("means", "fraction", "noise", "pixel_noise", "sky"):
            assert np.array_equal(getattr(a, name), getattr(b, name), equal_nan=True), name
    for name in ("gain", "pivot", "level", "gain_se", "offset_se", "step_after"):
        assert np.array_equal(getattr(ours.solution, name), getattr(cpu.solution, name)), name
    assert ours.image.dtype == cpu.image.dtype == np.float32
    assert np.array_equal(ours.coverage, cpu.coverage)
    assert np.array_equal(np.isnan(ours.image), np.isnan(cpu.image))
    assert np.nanmax(np.abs(ours.image - cpu.image)) <= 1e-5 * robust_range(cpu.image)


@pytest.fixture(scope="session")
def same():
    """The function :func:`assert_parity`."""
    return assert_parity
