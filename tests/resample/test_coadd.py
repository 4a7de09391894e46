"""The coadd against reproject and against float64 brute force; the call-compatible `reproject_and_coadd`."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import pixel_to_pixel
from reproject import reproject_interp
from reproject.mosaicking import reproject_and_coadd as reference_coadd
from scipy import ndimage

from zemosaic_photometry import identity_solution
from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.fits.tile import Tile, array_tile, open_tile
from zemosaic_pipeline.host.threads import run_parallel
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.reproject_compat.drop_in import reproject_and_coadd
from zemosaic_pipeline.reproject_compat.engine import coadd_with_reproject
from zemosaic_pipeline.resample.blocks import block_bytes, plan_blocks
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import OutputGrid
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import place_tiles
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, make_sky, mosaic_shape, tangent_wcs

LAYOUTS = {
    "plain": Layout(rows=2, columns=2, shape=(90, 120), overlap=0.25),
    "sip, turned": Layout(rows=2, columns=2, shape=(90, 120), overlap=0.3, rotation_deg=15, sip=True),
    "borders": Layout(rows=2, columns=2, shape=(90, 120), overlap=0.35, rotation_deg=4, nan_border=9),
}


def make_scene(layout, channels=3):
    """Panels of a small sky, and an output grid that holds them."""
    shape = mosaic_shape(layout)
    sky = make_sky(shape, stars=120, channels=channels)
    return make_panels(layout, sky), OutputGrid(sky.wcs, shape)


#: Far outside a tile a SIP has no inverse; astropy says so in the reference computations.
pytestmark = pytest.mark.filterwarnings("ignore:.*WCS.all_world2pix")


@pytest.fixture(scope="module", params=LAYOUTS)
def scene(request):
    return make_scene(LAYOUTS[request.param])


@pytest.fixture(scope="module")
def borders():
    return make_scene(LAYOUTS["borders"])


def place(panels, grid, weights=None, feather=0.0):
    tiles = [array_tile(panel.data, panel.wcs, f"panel {k}") for k, panel in enumerate(panels)]
    weights = weights or [1.0] * len(tiles)
    placed = zip(place_tiles(tiles, grid), weights, strict=True)
    return [replace(item, weight=weight, feather=feather) for item, weight in placed]


def mosaic(placed, grid, solution=None, *, memory=1 << 28, jobs=1, store=1 << 26, **options):
    """Image (C, H, W) and coverage (H, W) of the engine."""
    image = np.zeros((placed[0].tile.channels, *grid.shape), np.float32)
    coverage = np.full(grid.shape, -1, np.float32)

    def sink(block, values, weights):
        window = np.s_[..., block[0] : block[1], block[2] : block[3]]
        assert (coverage[window] == -1).all()
        image[window], coverage[window] = values, weights

    plan = CoaddPlan(placed, solution, grid, CoaddOptions(**options), PixelStore(store))
    coadd(plan, CpuBackend(), sink, memory, jobs)
    return image, coverage


def robust_range(image):
    return np.ptp(np.nanpercentile(image, [1, 99]))


def away_from_edges(panels, grid, pixels):
    """Where no footprint has its edge within ``pixels``."""
    away = np.ones(grid.shape, bool)
    for panel in panels:
        x, y = pixel_to_pixel(grid.wcs, panel.wcs, *np.meshgrid(*(np.arange(float(n)) for n in grid.shape[::-1])))
        height, width = panel.data.shape[1:]
        on = (x >= -0.5) & (x <= width - 0.5) & (y >= -0.5) & (y <= height - 0.5)
        hole = ndimage.map_coordinates(np.isnan(panel.data[0]).astype(float), [y, x], order=1, mode="nearest") > 0
        on &= ~hole
        away &= ndimage.binary_erosion(on, iterations=pixels) | ~ndimage.binary_dilation(on, iterations=pixels)
    return away


# ------------------------------------------------------------------------------------------- against other programs


def test_mean_is_that_of_reproject(scene):
    panels, grid = scene
    image, coverage = mosaic(place(panels, grid), grid)
    inside, inner = away_from_edges(panels, grid, 1), away_from_edges(panels, grid, 2)
    for channel in range(3):
        expected, footprint = reference_coadd(
            [(panel.data[channel].astype(float), panel.wcs) for panel in panels],
            grid.wcs,
            shape_out=grid.shape,
            reproject_function=reproject_interp,
        )
        assert np.array_equal(coverage[inside], footprint[inside])
        there = inner & (footprint > 0)
        assert there.sum() > 0.6 * (footprint > 0).sum()
        assert np.abs(image[channel] - expected)[there].max() <= 1e-4 * robust_range(expected[there])
        assert np.isnan(image[channel][coverage == 0]).all()


def brute_force(panels, grid, solution, weights, feather, kernel):
    """The weighted mean in float64 from astropy's exact positions: image (C, H, W), coverage (H, W)."""
    sums, norm = np.zeros((panels[0].data.shape[0], *grid.shape)), np.zeros(grid.shape)
    columns, rows = np.meshgrid(*(np.arange(float(n)) for n in grid.shape[::-1]))
    for k, panel in enumerate(panels):
        x, y = pixel_to_pixel(grid.wcs, panel.wcs, columns, rows)
        height, width = panel.data.shape[1:]
        on = (x > -0.5) & (x < width - 0.5) & (y > -0.5) & (y < height - 0.5)
        gain, pivot, level = (term[k][:, None] for term in (solution.gain, solution.pivot, solution.level))
        values = (kernel(panel.data.astype(float), y[on], x[on]) - pivot) / gain + level
        edge = np.minimum.reduce([x[on] + 0.5, width - 0.5 - x[on], y[on] + 0.5, height - 0.5 - y[on]])
        weight = weights[k] * (np.minimum(edge / feather, 1) if feather else 1.0) * np.isfinite(values[0])
        sums[:, on] += weight * np.nan_to_num(values)
        norm[on] += weight
    with np.errstate(invalid="ignore"):
        return sums / norm, norm


def bilinear(data, y, x):
    height, width = data.shape[1:]
    j, i = np.floor(y).astype(int), np.floor(x).astype(int)
    total = np.zeros((len(data), y.size))
    for dj in (0, 1):
        for di in (0, 1):
            weight = np.abs(1 - dj - (y - j)) * np.abs(1 - di - (x - i))
            total += weight * data[:, np.clip(j + dj, 0, height - 1), np.clip(i + di, 0, width - 1)]
    return total


def lanczos(data, y, x):
    """Lanczos-3 with normalised weights; bilinear where the 6 x 6 pixels are not all there."""
    height, width = data.shape[1:]
    j, i = np.floor(y).astype(int), np.floor(x).astype(int)
    total, norm = np.zeros((len(data), y.size)), np.zeros(y.size)
    for row in range(-2, 4):
        for column in range(-2, 4):
            d, e = y - (j + row), x - (i + column)
            weight = np.sinc(d) * np.sinc(d / 3) * np.sinc(e) * np.sinc(e / 3)
            total += weight * data[:, np.clip(j + row, 0, height - 1), np.clip(i + column, 0, width - 1)]
            norm += weight
    cut = (j < 2) | (i < 2) | (j + 3 >= height) | (i + 3 >= width) | np.isnan(total[0])
    return np.where(cut, bilinear(data, y, x), total / norm)


@pytest.mark.parametrize(
    ("kernel", "function"), [(ResamplingKernel.BILINEAR, bilinear), (ResamplingKernel.LANCZOS3, lanczos)]
)
@pytest.mark.parametrize("feather", [0.0, 12.0])
def test_cpu_baseline_is_float64_brute_force(scene, kernel, function, feather):
    """Gains, offsets, weights, feather, NaN: an independent computation that no change may move away from."""
    panels, grid = scene
    weights = [1.0, 0.25, 3.0, 1.7]
    solution = identity_solution(4, 3)
    rng = np.random.default_rng(11)
    solution.gain[:], solution.pivot[:] = rng.uniform(0.7, 1.4, (4, 3)), rng.normal(1000, 100, (4, 3))
    solution.level[:] = rng.normal(1000, 50, (4, 3))
    image, coverage = mosaic(place(panels, grid, weights, feather), grid, solution, kernel=kernel)
    expected, norm = brute_force(panels, grid, solution, weights, feather, function)
    # where a position lies within rounding of a footprint's edge, the pixel may be in or out
    inside = away_from_edges(panels, grid, 1) & (norm > 0)
    # two pixels of distortion on a panel this small leave the mesh 1e-5 pixel, which shows beside a bright star
    tolerance = 5e-5 if panels[0].wcs.sip else 1e-5
    assert np.abs(image - expected)[:, inside].max() <= tolerance * robust_range(expected[:, inside])
    assert np.allclose(coverage[inside], norm[inside], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------- what must hold


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kernel": ResamplingKernel.LANCZOS3},
        {"combine": CombineMethod.SIGMA_CLIP},
        {"combine": CombineMethod.WINSORIZED},
    ],
)
def test_blocks_jobs_and_strips_change_no_bit(borders, options):
    panels, grid = borders
    placed = place(panels, grid, feather=10.0)
    whole = mosaic(placed, grid, **options)
    for memory, jobs, store in ((300_000, 1, 1 << 26), (90_000, 2, 1 << 26), (300_000, 2, 0)):
        parts = mosaic(placed, grid, memory=memory, jobs=jobs, store=store, **options)
        assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(parts, whole, strict=True))


@pytest.mark.parametrize("combine", [CombineMethod.MEAN, CombineMethod.MEDIAN])
@pytest.mark.parametrize("memory", [100_000, 1_000_000, 1 << 30])
def test_blocks_tile_the_output_within_their_memory(borders, combine, memory):
    panels, grid = borders
    placed, options = place(panels, grid), CoaddOptions(combine=combine)
    blocks = plan_blocks(grid.shape, placed, options, memory)
    count = np.zeros(grid.shape, int)
    for y0, y1, x0, x1 in blocks:
        count[y0:y1, x0:x1] += 1
        assert block_bytes((y0, y1, x0, x1), placed, options) <= memory or max(y1 - y0, x1 - x0) <= 16
    assert (count == 1).all()
    assert len(blocks) > 4 if memory == 100_000 else len(blocks) >= 1


@pytest.mark.parametrize("combine", [m for m in CombineMethod if m not in (CombineMethod.FIRST, CombineMethod.LAST)])
def test_order_of_the_tiles_does_not_matter(borders, combine):
    panels, grid = borders
    placed = place(panels, grid, [1.0, 2.0, 0.5, 1.5], feather=10.0)
    image, coverage = mosaic(placed, grid, combine=combine)
    turned, turned_coverage = mosaic(placed[::-1], grid, combine=combine)
    # an unweighted median or a clip takes the order for nothing; sums round
    assert np.allclose(image, turned, rtol=1e-6, atol=0, equal_nan=True)
    assert np.allclose(coverage, turned_coverage, rtol=1e-6)


def test_first_and_last_change_places_with_the_order(borders):
    panels, grid = borders
    placed = place(panels, grid)
    first, last = (
        mosaic(tiles, grid, combine=c)[0]
        for tiles, c in ((placed, CombineMethod.FIRST), (placed[::-1], CombineMethod.LAST))
    )
    assert np.array_equal(first, last, equal_nan=True)
    assert not np.array_equal(first, mosaic(placed, grid, combine=CombineMethod.LAST)[0], equal_nan=True)


def test_sum_is_mean_times_coverage(borders):
    panels, grid = borders
    placed = place(panels, grid, [1.0, 2.0, 0.5, 1.5])
    (total, coverage), (mean, _) = (mosaic(placed, grid, combine=c) for c in (CombineMethod.SUM, CombineMethod.MEAN))
    assert np.allclose(total, mean * coverage, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("options", [{"combine": m} for m in CombineMethod] + [{"kernel": ResamplingKernel.LANCZOS3}])
def test_tile_on_its_own_grid_comes_out_unchanged(borders, options):
    panel = borders[0][1]
    grid = OutputGrid(panel.wcs, panel.data.shape[1:])
    image, coverage = mosaic(place([panel], grid), grid, **options)
    assert np.array_equal(image, panel.data, equal_nan=True)
    assert np.array_equal(coverage, np.isfinite(panel.data[0]))


@pytest.mark.parametrize(
    "options",
    [{"combine": m} for m in CombineMethod if m is not CombineMethod.SUM] + [{"kernel": ResamplingKernel.LANCZOS3}],
)
def test_constant_stays_constant(scene, options):
    panels, grid = scene
    flat = [replace(panel, data=np.where(np.isnan(panel.data), np.nan, np.float32(1234.5))) for panel in panels]
    image, coverage = mosaic(place(flat, grid, [1.0, 0.3, 2.0, 1.1], feather=15.0), grid, **options)
    assert np.abs(image[:, coverage > 0] / 1234.5 - 1).max() < 1e-6
    assert np.isnan(image[:, coverage == 0]).all() and (coverage == 0).any()


def test_feather_leaves_no_edge(borders):
    """A tile that is 1000 brighter fades out: neighbouring pixels differ by no more than the ramp's slope."""
    panels, grid = borders
    data = [np.full(panel.data.shape, 1000.0 * k, np.float32) for k, panel in enumerate(panels[:2])]
    pair = [replace(panel, data=d) for panel, d in zip(panels, data, strict=False)]
    steps = {}
    for feather in (0.0, 20.0):
        image, coverage = mosaic(place(pair, grid, feather=feather), grid)
        both = ndimage.binary_erosion(coverage > 0.5, iterations=2)  # not where two edges cross
        steps[feather] = max(
            np.abs(np.diff(image[0], axis=a))[both.take(range(1, both.shape[a]), a)].max() for a in (0, 1)
        )
    assert steps[0.0] > 499 and steps[20.0] < 100


def test_store_reads_a_plain_file_again_unless_a_pass_would_read_it_often(borders, tmp_path, monkeypatch):
    panel = borders[0][0]
    fits.writeto(tmp_path / "plain.fits", panel.data, panel.wcs.to_header())
    plain, other = open_tile(tmp_path / "plain.fits"), array_tile(panel.data, panel.wcs)
    asked = []
    read = Tile.read_rows
    monkeypatch.setattr(Tile, "read_rows", lambda *a: asked.append(a[1:]) or read(*a))
    for tile, readings, reads in ((plain, 1.0, 2), (plain, 9.0, 1), (other, 1.0, 1)):
        store = PixelStore(10**8)
        asked.clear()
        first, second = (store.rows(tile, 5, 20, readings=readings) for _ in range(2))
        assert len(asked) == reads
        assert np.array_equal(first, panel.data[:, 5:20], equal_nan=True) and np.array_equal(
            first, second, equal_nan=True
        )


class OneBlockAtATime(CpuBackend):
    """Blocks come in order from one thread, as on a card."""

    parallel_blocks = False


@pytest.mark.parametrize("backend", [CpuBackend(), OneBlockAtATime()])
def test_cancelled_coadd_stops_between_blocks(borders, backend):
    panels, grid = borders
    done = []
    plan = CoaddPlan(place(panels, grid), None, grid, CoaddOptions(), PixelStore(0))
    with pytest.raises(Cancelled):
        coadd(plan, backend, lambda block, *_: done.append(block), 100_000, 1, lambda: len(done) >= 1)
    assert 1 <= len(done) < len(plan_blocks(grid.shape, plan.placed, plan.options, 100_000))


def test_cancelled_reproject_leaves_nothing(borders):
    panels, grid = borders
    done = []
    plan = CoaddPlan(place(panels, grid), None, grid, CoaddOptions(), PixelStore(1 << 26))
    with pytest.raises(Cancelled):
        coadd_with_reproject(plan, lambda *block: done.append(block), lambda: True)
    assert not done


def test_error_in_a_block_surfaces():
    def work(item):
        if item == 3:
            raise ZeroDivisionError("block 3")
        return item

    assert run_parallel(work, [0, 1, 2], 2) == [0, 1, 2]
    with pytest.raises(ZeroDivisionError, match="block 3"):
        run_parallel(work, range(6), 2)


# ------------------------------------------------------------------------------------- in the place of reproject's

SAME = ("mean", "sum", "min", "max", "first", "last")


@pytest.fixture(scope="module")
def inputs():
    """Four overlapping mono images with a hole, weights with a hole of their own, and the output."""
    panels, grid = make_scene(Layout(rows=2, columns=2, shape=(60, 80), overlap=0.3, rotation_deg=10), channels=1)
    images = [(panel.data[0].astype(float), panel.wcs) for panel in panels]
    images[0][0][30:40, 50:55] = np.nan
    rng = np.random.default_rng(4)
    weights = [rng.uniform(0.1, 2, image.shape) for image, _ in images]
    weights[1][20:30, :40] = 0
    weights[2][5, 5] = np.nan
    return images, weights, grid


def compare(result, expected, where=None, atol=0.0):
    (array, footprint), (want, want_footprint) = result, expected
    assert array.shape == want.shape and footprint.shape == want.shape
    assert array.dtype == want.dtype and footprint.dtype == want_footprint.dtype
    where = np.ones(want.shape, bool) if where is None else where
    assert np.array_equal(footprint[where] > 0, want_footprint[where] > 0)
    assert np.allclose(footprint[where], want_footprint[where], rtol=1e-6, atol=5e-6)
    seen = where & (want_footprint > 0)
    assert np.abs(array - want)[seen].max() <= 1e-6 * np.ptp(want[seen]) + atol
    assert np.array_equal(array[where & ~seen], want[where & ~seen], equal_nan=True)


def both(data, *args, **kwargs):
    """What we answer and what reproject answers."""
    ours = reproject_and_coadd(data, *args, backend="cpu", **kwargs)
    return ours, reference_coadd(data, *args, reproject_function=reproject_interp, **kwargs)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("match", [False, True], ids=["", "matched"])
@pytest.mark.parametrize("combine", SAME)
def test_dropin_answers_as_reproject(inputs, combine, match, weighted):
    images, weights, grid = inputs
    kwargs = {"input_weights": weights} if weighted else {}
    compare(*both(images, grid.wcs, grid.shape, combine_function=combine, match_background=match, **kwargs))


def test_dropin_median_is_that_of_the_reprojected_images(inputs):
    images, _, grid = inputs
    layers = [reproject_interp(image, grid.wcs, grid.shape)[0] for image in images]
    array, footprint = reproject_and_coadd(images, grid.wcs, grid.shape, combine_function="median", backend="cpu")
    seen = np.isfinite(layers).any(axis=0)
    expected = np.nanmedian(np.array(layers)[:, seen], axis=0)
    assert np.abs(array[seen] - expected).max() < 1e-6 * np.ptp(expected) and (array[~seen] == 0).all()
    assert np.array_equal(footprint, np.isfinite(layers).sum(axis=0))


@pytest.mark.parametrize("reference", [1, 3])
def test_dropin_background_reference_keeps_its_level(inputs, reference):
    images, _, grid = inputs
    compare(*both(images, grid.wcs, grid.shape, match_background=True, background_reference=reference))


def test_dropin_first_image_can_be_the_reference(inputs):
    """reproject 0.21 takes 0 for "none"."""
    images, _, grid = inputs
    array, _ = reproject_and_coadd(
        images, grid.wcs, grid.shape, match_background=True, background_reference=0, combine_function="first"
    )
    alone, there = reference_coadd(images[:1], grid.wcs, grid.shape, reproject_function=reproject_interp)
    assert np.allclose(array[there > 0], alone[there > 0], rtol=1e-6)


def test_dropin_keeps_an_image_without_overlap_when_matching(inputs):
    images, _, grid = inputs
    apart = [images[0], images[3]]  # diagonal neighbours, cut so that they do not meet
    apart = [(np.where(np.isfinite(a), a, np.nan)[:40, :50], w) for a, w in apart]
    plain, matched = (reproject_and_coadd(apart, grid.wcs, grid.shape, match_background=m) for m in (False, True))
    assert plain[1].max() == 1
    assert np.array_equal(plain[0], matched[0])


def test_dropin_blank_value_and_given_arrays(inputs):
    images, _, grid = inputs
    array, footprint = np.full(grid.shape, 7.0, np.float32), np.full(grid.shape, 7.0, np.float32)
    got = reproject_and_coadd(
        images, grid.wcs, output_array=array, output_footprint=footprint, shape_out=grid.shape, blank_pixel_value=-5.0
    )
    assert got[0] is array and got[1] is footprint
    want, _ = reference_coadd(
        images, grid.wcs, shape_out=grid.shape, reproject_function=reproject_interp, blank_pixel_value=-5.0
    )
    assert np.allclose(array, want, rtol=1e-6) and (array == -5).any()
    with pytest.raises(ValueError, match="must have a shape matching"):
        reproject_and_coadd(images, grid.wcs, grid.shape, output_array=np.zeros((3, 3)))


def test_dropin_nothing_of_the_output_is_covered(inputs):
    images, _, _ = inputs
    away = tangent_wcs((30, 40), (200.0, 50.0))
    for match in (False, True):
        array, footprint = reproject_and_coadd(images, away, (30, 40), blank_pixel_value=np.nan, match_background=match)
        assert np.isnan(array).all() and (footprint == 0).all()


def test_dropin_reads_files_hdus_and_headers(inputs, tmp_path):
    images, weights, grid = inputs
    hdus = [fits.ImageHDU(image.astype(np.float32), wcs.to_header(relax=True)) for image, wcs in images]
    for k, (hdu, weight) in enumerate(zip(hdus, weights, strict=True)):
        fits.HDUList([fits.PrimaryHDU(), hdu, fits.ImageHDU(weight)]).writeto(tmp_path / f"{k}.fits")
    names = [str(tmp_path / f"{k}.fits") for k in range(4)]
    header = grid.wcs.to_header()
    header["NAXIS"], header["NAXIS1"], header["NAXIS2"] = 2, grid.shape[1], grid.shape[0]
    compare(*both(hdus, header))
    compare(*both(names, header, input_weights=names, hdu_in=1, hdu_weights=2))
    compare(*both([(hdu.data, hdu.header) for hdu in hdus], grid.wcs, grid.shape))


def test_dropin_weights_with_a_wcs_of_their_own(inputs):
    """A coarse weight image on another grid, as a survey's coverage map."""
    images, _, grid = inputs
    coarse = tangent_wcs((40, 50), tuple(images[0][1].wcs.crval), 12.0)
    smooth = 1 + 0.5 * np.sin(np.arange(40)[:, None] / 15) * np.cos(np.arange(50) / 15)
    (array, footprint), (want, want_footprint) = both(
        images[:1], grid.wcs, grid.shape, input_weights=[fits.ImageHDU(smooth, coarse.to_header())]
    )
    inner = ndimage.binary_erosion(want_footprint > 0, iterations=2)
    assert np.allclose(footprint[inner], want_footprint[inner], rtol=0.01)
    assert np.allclose(array[inner], want[inner], rtol=1e-6)


@pytest.mark.parametrize("dtype", [">i2", ">f4", np.uint8])
def test_dropin_takes_any_number_type(inputs, dtype):
    images, _, grid = inputs
    whole = [
        (np.clip(np.nan_to_num(image), 0, 200 if dtype == np.uint8 else 30000).astype(dtype), w) for image, w in images
    ]
    compare(*both(whole, grid.wcs, grid.shape), atol=1e-4)


def test_dropin_cubes_have_a_footprint_of_their_own_for_every_plane(inputs):
    images, weights, grid = inputs
    cubes = [(np.stack([image, 2 * image[::-1], image**2]), wcs) for image, wcs in images]
    shape = (3, *grid.shape)
    for match in (False, True):
        compare(*both(cubes, grid.wcs, shape, match_background=match))
    compare(*both(cubes, grid.wcs, shape, input_weights=[np.stack([w, w, w / 2]) for w in weights]))
    flat = reproject_and_coadd(cubes, grid.wcs, shape, input_weights=weights)
    assert np.array_equal(flat[0][0], reproject_and_coadd(images, grid.wcs, grid.shape, input_weights=weights)[0])
    with pytest.raises(ValueError, match="does not fit an output"):
        reproject_and_coadd(cubes, grid.wcs, grid.shape)


def test_dropin_header_of_an_rgb_file(inputs):
    """A third axis without a meaning: WCS and header have three axes."""
    images, _, grid = inputs
    hdus = [fits.PrimaryHDU(np.stack([image] * 3), wcs.to_header()) for image, wcs in images]
    assert WCS(hdus[0].header).naxis == 3
    want = reproject_and_coadd(images, grid.wcs, grid.shape)
    got = reproject_and_coadd(hdus, grid.wcs, (3, *grid.shape))
    # the header has fewer digits than the WCS
    assert all(np.allclose(plane, want[0], rtol=1e-4) for plane in got[0])


def test_dropin_missing_pixels_do_not_bleed_into_exact_neighbours():
    """On an image's own grid only its own NaN is missing; reproject loses neighbours to rounding of coordinates."""
    wcs = tangent_wcs((30, 40), (83.8, -5.4))
    image = np.random.default_rng(1).normal(size=(30, 40)).astype(np.float32)
    image[7, 9] = np.nan
    array, footprint = reproject_and_coadd([(image, wcs)], wcs, (30, 40))
    assert np.array_equal(footprint, np.isfinite(image)) and np.array_equal(array, np.nan_to_num(image))


def test_dropin_accepts_what_changes_nothing(inputs):
    images, _, grid = inputs
    seen = []

    def progress(items):
        for item in items:
            seen.append(item)
            yield item

    plain = reproject_and_coadd(images, grid.wcs, grid.shape)
    got = reproject_and_coadd(
        images, grid.wcs, grid.shape, reproject_function=reproject_interp, order="bilinear", parallel=2,
        roundtrip_coords=False, block_sizes=(20, 20), intermediate_memmap=True, progress_bar=progress,
    )  # fmt: skip
    assert seen == [0, 1, 2, 3]
    assert all(np.array_equal(a, b) for a, b in zip(got, plain, strict=True))


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"order": "bicubic"}, ValueError, "order can only be 'bilinear'"),
        ({"reproject_function": np.add}, ValueError, "can only be reproject_interp"),
        ({"combine_function": "mode"}, ValueError, "one of mean/sum/first/last/min/max/median"),
        ({"kernel_width": 3}, TypeError, "unexpected keyword argument 'kernel_width'"),
        ({"backend": "tpu"}, ValueError, "one of auto/cpu/gpu"),
    ],
)
def test_dropin_refuses_what_only_reproject_can_do(inputs, wrong, error, sentence):
    images, _, grid = inputs
    with pytest.raises(error, match=sentence):
        reproject_and_coadd(images, grid.wcs, grid.shape, **wrong)


def test_dropin_on_a_gpu_or_told_that_there_is_none(inputs, caplog):
    images, _, grid = inputs
    cpu = reproject_and_coadd(images, grid.wcs, grid.shape, backend="cpu")
    with caplog.at_level(logging.WARNING):
        gpu = reproject_and_coadd(images, grid.wcs, grid.shape, backend="gpu")
    assert np.array_equal(gpu[1], cpu[1])
    assert np.abs(gpu[0] - cpu[0]).max() <= 1e-5 * robust_range(cpu[0])
    told = [record for record in caplog.records if "the GPU is not used" in record.getMessage()]
    assert len(told) <= 1
    if told:
        assert np.array_equal(gpu[0], cpu[0])
