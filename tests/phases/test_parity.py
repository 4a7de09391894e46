"""Phase 5 on the CPU and on a CUDA card must give the same mosaic; the card is that of fake_cuda.

The whole GPU branch runs: `open_cuda`, the backend, the kernels' own source. What the fake cannot show (that the real
compiler rounds alike, that the real libraries take the same calls) is in test_gpu.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

import zemosaic_photometry
from scenes.small_scene import OPTIONS
from stand_ins.fake_cuda import PACES, Card, CUDARuntimeError, OutOfMemoryError
from zemosaic_photometry import coverage_gain, coverage_scale, identity_solution
from zemosaic_pipeline.fits.tile import array_tile
from zemosaic_pipeline.pixels import backend_cuda
from zemosaic_pipeline.pixels.backend_base import DeviceFailure, TilePart
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.backend_switch import BackendSwitch
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd
from zemosaic_pipeline.resample.measure import measure_tile, overlap_counts
from zemosaic_pipeline.resample.mesh import exact_mesh
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import place_tiles
from zemosaic_pipeline.resample.survey import survey_tile
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, make_sky, mosaic_shape, write_panels
from zemosaic_worker import run_hierarchical_mosaic


@pytest.fixture
def card(monkeypatch):
    card = Card()
    card.install(monkeypatch)
    return card


def gpu_switch(said=None):
    """A switch whose GPU is open; messages go to the list."""
    switch = BackendSwitch("on", tell=lambda key, text: said.append((key, text)) if said is not None else None)
    switch.start()
    assert switch.name == "gpu", switch.reason
    return switch


@pytest.fixture(scope="module")
def on_cpu(phase5):
    """``on_cpu(scene, options)``: the CPU's result, computed once."""
    known = {}

    def run(scene, options=None):
        key = id(scene), options
        if key not in known:
            known[key] = phase5(BackendSwitch("off"), scene, options)
        return known[key]

    return run


# ------------------------------------------------------------------------------------------------------------ parity


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_whole_phase_5(card, scene, options, phase5, on_cpu, same):
    said = []
    gpu = phase5(gpu_switch(said), scene, options)
    assert not said and card.calls["launch"] > 10
    assert np.isfinite(gpu.image).mean() > 0.2 and np.ptp(gpu.coverage) > 0
    assert np.ptp(gpu.solution.gain) > 0.1, "a scene without gains shows little"
    same(gpu, on_cpu(scene, options))


def test_threshold_of_the_mission(card, scene, phase5, on_cpu):
    gpu, cpu = phase5(gpu_switch(), scene), on_cpu(scene)
    assert gpu.image.shape == cpu.image.shape
    assert np.allclose(gpu.image, cpu.image, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert np.allclose(gpu.coverage, cpu.coverage, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pace", PACES)
def test_no_buffer_is_used_again_before_its_time(monkeypatch, pace, scenes, phase5, on_cpu, same):
    monkeypatch.setattr(backend_cuda, "STAGED_BYTES", 0)
    monkeypatch.setattr(backend_cuda, "KEPT_BYTES", 0)
    Card(pace).install(monkeypatch)
    for options in (OPTIONS["mean"], OPTIONS["median"]):
        same(phase5(gpu_switch(), scenes["weights"], options), on_cpu(scenes["weights"], options))


def test_copies_run_ahead_of_kernels(monkeypatch, scenes, phase5):
    """With kernels that take for ever, the next tile's pixels arrive while those of the last are worked on."""
    card = Card("late kernels")
    card.install(monkeypatch)
    switch = gpu_switch()
    switch.gpu.upload(np.zeros(10))
    launched = card.default_stream._queue[0]
    kernels = len(card.default_stream._queue)
    switch.gpu.upload(np.arange(100_000.0))
    assert not card.streams[1]._queue, "the copy waits for a kernel"
    assert card.default_stream._queue[0] is launched and len(card.default_stream._queue) > kernels


def test_another_card_and_another_thread(monkeypatch, scenes, phase5, on_cpu, same):
    card = Card(names=("Toy 1000", "Toy 2000"))
    card.install(monkeypatch)
    switch = BackendSwitch("on", opener=lambda: backend_cuda.open_cuda(0, selector="toy 2"))
    switch.start()
    assert switch.reason == "Toy 2000"
    with ThreadPoolExecutor(1) as pool:
        same(pool.submit(phase5, switch, scenes["plain"]).result(), on_cpu(scenes["plain"]))
    assert card.devices_used == {1}


def test_long_launches_are_cut(monkeypatch, card, scenes, phase5, on_cpu, same):
    monkeypatch.setattr(backend_cuda, "MAX_LAUNCH_PIXELS", 600)
    for options in (OPTIONS["mean"], OPTIONS["winsorized"]):
        same(phase5(gpu_switch(), scenes["plain"], options), on_cpu(scenes["plain"], options))


def test_meshes_and_maps_are_uploaded_once(card, scenes, phase5):
    switch = gpu_switch()
    parts = []
    real = switch.gpu.resample
    switch.gpu.resample = lambda source, part, *rest: (parts.append(part), real(source, part, *rest))
    card.calls.clear()
    result = phase5(switch, scenes["plain"], block_bytes=60_000)
    meshes = {id(part.mesh[0]) for part in parts if part.mesh[3] > 1}
    assert len(parts) > 2 * len(result.placed) and len(meshes) == len(result.placed)
    # pixels of every part and of every measured tile with its mask; meshes, no alpha, no map
    assert card.calls["upload"] == len(parts) + 2 * len(result.placed) + len(meshes) + 2


def test_exact_meshes(card, scenes):
    """A node for every output pixel: blocks get the part that they need."""
    scene = scenes["sip, turned, borders"]
    store, results = PixelStore(10**8), []
    placed = [
        replace(item, mesh=exact_mesh(item.tile, scene.grid, item.rect))
        for item in place_tiles(scene.tiles, scene.grid)
    ]
    counts = overlap_counts(placed, scene.grid.shape, 4)
    for backend in (gpu_switch().gpu, CpuBackend()):
        image = np.zeros((3, *scene.grid.shape))

        def sink(block, values, weights, image=image):
            image[:, block[0] : block[1], block[2] : block[3]] = values

        coadd(CoaddPlan(placed, None, scene.grid, CoaddOptions(), store), backend, sink, 60_000)
        facts = survey_tile(placed[2].tile, store)
        results.append((image, measure_tile(placed[2], facts, counts, 4, store, backend).means))
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(*results, strict=True))
    assert np.isfinite(results[0][0]).any() and np.isfinite(results[0][1]).any()


def test_kernels_are_compiled_without_fused_multiply_add(card, scenes, phase5):
    phase5(gpu_switch(), scenes["plain"])
    assert len(card.compiled) >= 3
    assert all(options["fma"] == 0 and not options["lto"] and not options["fastmath"] for options in card.compiled)


def test_kernels_as_plain_python(monkeypatch, scenes, phase5, same):
    """The kernels' source down to the last pixel function, nothing compiled, on a strip of the mosaic."""
    Card(interpreted=True).install(monkeypatch)
    scene = scenes["weights"]
    scene = replace(scene, grid=replace(scene.grid, shape=(34, scene.grid.shape[1])))
    for options in (OPTIONS["lanczos"], OPTIONS["sigma_clip"]):
        store = PixelStore(10**8)
        placed = [p for p in place_tiles(scene.tiles, scene.grid) if p]
        found = []
        for backend in (gpu_switch().gpu, CpuBackend()):
            out = np.zeros((4, *scene.grid.shape), np.float32)

            def sink(block, values, weights, out=out):
                out[:3, block[0] : block[1], block[2] : block[3]] = values
                out[3, block[0] : block[1], block[2] : block[3]] = weights

            coadd(CoaddPlan(placed, None, scene.grid, options, store), backend, sink, 10**7)
            found.append(out)
        assert np.array_equal(*found, equal_nan=True) and np.isfinite(found[0][:3]).mean() > 0.1


def test_kernels_in_numbas_simulator():
    script = """
from types import SimpleNamespace
import numpy as np
from numba import cuda
from numba.cuda.simulator.kernel import _get_kernel_context
from zemosaic_pipeline.pixels.backend_base import trial
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.kernels import cuda_kernels

# the simulator gives a kernel its thread number through the kernel's globals; ours hold `cuda` in a closure
kernels = cuda_kernels(SimpleNamespace(jit=cuda.jit, grid=lambda n: _get_kernel_context().grid(n)))

class Simulated(CpuBackend):
    def resample(self, source, p, values, weights, add):
        kernels["resample"][(1, 1), (5, 5)](
            source, p.origin, p.shape, int(p.kernel), p.alpha, p.weight_map, p.spacing, p.feather, p.scale, *p.mesh, p.block,
            p.rect, values, weights, add)
    def measure(self, source, cells, sums, counts):
        kernels["measure"][(1, 1), (3, 3)](
            source, cells.origin, cells.shape, *cells.mesh, cells.cell_px, cells.every, cells.corner, cells.wanted, sums,
            counts)
    def combine(self, values, weights, method, limits, out):
        weights = np.repeat(weights[:, None], values.shape[1], axis=1)
        kernels["combine"][(1, 1), (5, 5)](values.copy(), weights, int(method), *limits, out)

for ours, expected in zip(trial(Simulated()), trial(CpuBackend(compiled=False)), strict=True):
    assert np.array_equal(ours, expected) and ours.any()
"""
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    root = Path(zemosaic_photometry.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------ each way in which the old branch went wrong


def test_b_background_is_matched_in_the_overlaps(card, scenes, phase5):
    """A nebula that fills the corner of tile 0 which no other tile sees moves no background in the overlaps."""
    scene = scenes["plain"]
    data = scene.tiles[0].read_rows(0, 64)
    data[:, :36, :44] += 2000
    bright = replace(scene, tiles=[array_tile(data, scene.tiles[0].wcs, "tile 0"), *scene.tiles[1:]])
    before, after = phase5(gpu_switch(), scene), phase5(gpu_switch(), bright)
    assert np.median(data) > np.median(scene.tiles[0].read_rows(0, 64)) + 100  # what the old branch went by
    overlaps = after.coverage > 1.5
    difference = (after.image - before.image)[:, overlaps]
    moved = np.abs(difference - np.median(difference, axis=1, keepdims=True))
    assert np.percentile(moved, 90) < 1


def test_c_a_solution_of_the_wrong_length_is_refused(card, scenes):
    scene = scenes["plain"]
    placed = place_tiles(scene.tiles, scene.grid)
    for backend in (gpu_switch().gpu, CpuBackend()):
        with pytest.raises((IndexError, ValueError)):
            coadd(
                CoaddPlan(placed, identity_solution(len(placed) - 1, 3), scene.grid, CoaddOptions(), PixelStore(10**8)),
                backend, lambda *block: None, 10**6,
            )  # fmt: skip


def test_d_coverage_is_the_sum_of_weights(card, scenes, phase5, on_cpu):
    gpu, cpu = phase5(gpu_switch(), scenes["weights"]), on_cpu(scenes["weights"])
    assert cpu.coverage.max() > 1.5  # not scaled to 0..1
    gains = []
    for result in (gpu, cpu):
        scale, smooth = coverage_scale(result.coverage, lambda image: image * np.float32(0.9) + np.float32(0.3))
        gains.append(coverage_gain(scale, smooth, result.coverage, result.coverage > 0, (0.1, 10)))
    assert gains[0] == gains[1] != 1


def test_f_weights_and_masks_count_once_and_empty_is_no_data(card, scenes, phase5, on_cpu):
    gpu, cpu = phase5(gpu_switch(), scenes["weights"]), on_cpu(scenes["weights"])
    equal = phase5(gpu_switch(), replace(scenes["weights"], weights=[1.0] * 4))
    assert np.nanmax(np.abs(gpu.image - equal.image)) > 1
    assert np.array_equal(gpu.coverage, cpu.coverage)
    # where one tile alone is seen, the coverage is its weight once: tile 1 weighs four times as much
    alone = (gpu.coverage > 0) & np.isclose(gpu.coverage, 4 * equal.coverage, rtol=1e-6)
    assert np.count_nonzero(alone) > 100
    assert np.array_equal(np.isnan(gpu.image[0]), gpu.coverage == 0) and (gpu.coverage == 0).any()


def test_g_coordinates_that_are_not_finite_sample_nothing(card, scenes):
    scene = scenes["plain"]
    item = place_tiles(scene.tiles, scene.grid)[0]
    for bad in (np.nan, np.inf, -np.inf, 1e300):
        mesh = replace(item.mesh, nodes=np.full_like(item.mesh.nodes, bad))
        height, width = item.rect[1] - item.rect[0], item.rect[3] - item.rect[2]
        for backend in (gpu_switch().gpu, CpuBackend()):
            part = TilePart(
                (0, 0), item.tile.shape, ResamplingKernel.BILINEAR, np.ones((1, 1, 1), np.float32), item.weight_map, 8.0,
                0.0, 1.0, mesh.arguments, (item.rect[0], item.rect[2]), item.rect,
            )  # fmt: skip
            values, weights = backend.zeros((3, height, width)), backend.zeros((height, width))
            backend.resample(backend.upload(item.tile.read_rows(0, 64)), part, values, weights, True)
            assert not backend.download(values).any() and not backend.download(weights).any()


def test_h_only_the_tiles_own_rectangle_is_computed(card, scenes, phase5):
    switch = gpu_switch()
    card.threads.clear()
    result = phase5(switch, scenes["plain"], block_bytes=10**8)
    rects = [item.rect for item in result.placed]
    rounded = sum((-(-(y1 - y0) // 8) * 8) * (-(-(x1 - x0) // 32) * 32) for y0, y1, x0, x1 in rects)
    assert card.threads["resample"] == rounded < 4 * np.prod(scenes["plain"].grid.shape)


# --------------------------------------------------------------------------------------------------------- whole runs

EVERYTHING = {
    "two_pass_coverage_renorm": True,
    "final_mosaic_rgb_equalize_enabled": True,
    "final_mosaic_black_point_equalize_enabled": True,
    "enable_resource_telemetry": False,
    "feather_px": 8,
}


@pytest.fixture(scope="module")
def panels(tmp_path_factory):
    """A folder of four panels with different gains, backgrounds and gradients."""
    layout = Layout(2, 2, (64, 80), overlap=0.4, noise=2.0, gain_sigma=0.3, plane=10.0, curvature=2.0)
    folder = tmp_path_factory.mktemp("panels")
    write_panels(make_panels(layout, make_sky(mosaic_shape(layout), stars=300)), folder)
    return folder


@pytest.fixture
def run(panels, tmp_path):
    """``run(gpu)``: a whole run; returns its images by name and the lines of its log."""

    def once(gpu, **settings):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        result = run_hierarchical_mosaic(panels, folder, gpu=gpu, **{**EVERYTHING, **settings})
        images = {name: fits.getdata(getattr(result, name)) for name in ("science", "aesthetic", "coverage")}
        return images, (folder / "zemosaic_worker.log").read_text().splitlines()

    return once


def test_gains_and_gradients_are_those_of_the_cpu_to_the_bit(card, panels, tmp_path):
    tiles = [
        run_hierarchical_mosaic(panels, tmp_path / gpu, gpu=gpu, **EVERYTHING).report["tiles"] for gpu in ("off", "on")
    ]
    assert card.threads["resample"]
    for one, other in zip(*tiles, strict=True):
        for key in ("gain", "level", "gradient"):
            assert np.array_equal(one[key], other[key]) and np.any(one["gradient"])


def test_a_second_pass_and_balance_start_from_normalised_tiles(card, run):
    cpu, gpu = run("off")[0], run("on")[0]
    assert card.threads["resample"] > 2 * cpu["coverage"].size
    assert np.array_equal(gpu["coverage"], cpu["coverage"])
    for name in ("science", "aesthetic"):
        assert gpu[name].shape == cpu[name].shape
        assert np.abs(gpu[name] - cpu[name]).max() <= 1e-5 * np.ptp(np.percentile(cpu[name], (0.1, 99.9)))
    # one factor and one black point a channel lead from one to the other, but for the coverage gains of a few percent
    seen = cpu["coverage"] > 0
    for science, aesthetic in zip(gpu["science"], gpu["aesthetic"], strict=True):
        slope, black = np.polyfit(science[seen], aesthetic[seen], 1)
        assert np.std(aesthetic[seen] - slope * science[seen] - black) < 0.05 * np.std(aesthetic[seen])


def test_a_level_sky_is_the_same_on_both(card, run):
    cpu, gpu = (run(gpu, level_sky=True)[0] for gpu in ("off", "on"))
    science, ours, theirs = cpu["science"], gpu["aesthetic"], cpu["aesthetic"]
    assert np.abs(ours - theirs).max() <= 1e-5 * np.ptp(np.percentile(science, (0.1, 99.9)))


@pytest.mark.parametrize("share", [0.4, 0.7, 0.95])
def test_e_a_mosaic_is_never_made_half_and_half(monkeypatch, card, run, share):
    cpu = run("off")[0]
    card.calls.clear()
    run("on")
    launches = card.calls["launch"]
    card.fail("launch", int(share * launches), OutOfMemoryError("out of memory"))
    images, log = run("on")
    assert card.failed_at and card.touched_after_failure == 0
    assert sum("the GPU is not used" in line for line in log) == 1
    for name, image in images.items():
        assert np.array_equal(image, cpu[name]), name


# ----------------------------------------------------------------------------------------------------------- failure

KINDS = (
    "count", "identify", "select", "stream", "allocate", "pin", "upload", "copy", "record", "wait", "query", "launch",
    "download", "synchronise", "memory", "any",
)  # fmt: skip


def identical(result, cpu):
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in [
            (result.image, cpu.image),
            (result.coverage, cpu.coverage),
            (result.solution.gain, cpu.solution.gain),
            (result.solution.level, cpu.solution.level),
            *((a.means, b.means) for a, b in zip(result.coarse, cpu.coarse, strict=True)),
        ]
    )


def run_with_fault(phase5, scene, options, said):
    """What a run does with its switch, from start to close."""
    switch = BackendSwitch("auto", tell=lambda key, text: said.append((key, text)))
    switch.start()
    switch.run(lambda backend: backend.free_bytes(0.5))
    result = phase5(switch, scene, options)
    name = switch.name
    switch.close()
    return result, name


@pytest.fixture(scope="module")
def calls_of_a_run(phase5, scenes):
    """How often a run without fault calls the device, by kind."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(backend_cuda, "STAGED_BYTES", 0)
        card = Card("late kernels")
        card.install(monkeypatch)
        run_with_fault(phase5, scenes["weights"], OPTIONS["median"], [])
        return dict(card.calls)


@pytest.mark.parametrize("where", ["first", "middle", "last but one"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_fault_at_any_call(monkeypatch, kind, where, calls_of_a_run, scenes, phase5, on_cpu):
    calls = calls_of_a_run[kind]
    n = {
        "first": 1,
        "middle": (calls + 1) // 2,
        "last but one": max(calls - 9, 1) if kind == "any" else max(calls - 2, 1),
    }
    monkeypatch.setattr(backend_cuda, "STAGED_BYTES", 0)
    card = Card("late kernels")
    card.install(monkeypatch)
    error = OutOfMemoryError("out of memory") if kind == "allocate" else CUDARuntimeError("cudaErrorLaunchFailure: no")
    card.fail(kind, n[where], error)
    said = []
    result, name = run_with_fault(phase5, scenes["weights"], OPTIONS["median"], said)
    assert card.failed_at, "the fault was never reached"
    assert card.touched_after_failure == 0
    assert name == "cpu"
    assert [key for key, _ in said] == ["phase5_gpu_fallback"]
    assert str(error) in said[0][1] and "\n" not in said[0][1]
    assert identical(result, on_cpu(scenes["weights"], OPTIONS["median"]))


def test_any_error_of_the_libraries_is_a_fault(card):
    """Also one that a step meets outside the backend's methods; and a failed device is not asked again."""
    said = []
    switch = gpu_switch(said)
    gpu = switch.gpu

    def step(backend):
        if backend is gpu:
            raise CUDARuntimeError("an array of cupy was used")
        return backend.name

    assert switch.run(step) == switch.run(step) == "cpu"
    assert len(said) == 1
    before = card.touched
    with pytest.raises(DeviceFailure, match="an array of cupy was used"):
        gpu.upload(np.ones(3))
    assert card.touched == before


def test_a_fault_while_the_device_is_released(card, scenes, phase5, on_cpu):
    said = []
    switch = gpu_switch(said)
    result = phase5(switch, scenes["plain"])
    card.fail("any", 1, CUDARuntimeError("gone"))
    switch.close()
    assert identical(result, on_cpu(scenes["plain"])) and "phase5_gpu_fallback" not in dict(said)


@pytest.mark.parametrize("error", [TypeError, ValueError, KeyError, MemoryError])
def test_programming_errors_surface(card, error):
    said = []
    switch = gpu_switch(said)

    def step(backend):
        backend.zeros((2, 2))
        raise error("a bug")

    with pytest.raises(error, match="a bug"):
        switch.run(step)
    with pytest.raises(TypeError, match="kernel"):
        switch.run(
            lambda backend: backend.combine(
                *[np.ones((1, 1, 4, 4))] * 2, CombineMethod.MEAN, (1.0,) * 4, np.ones((1, 4, 4))
            )
        )
    assert not said and switch.name == "gpu"


def test_strict_arrays_refuse_implicit_transfers(card):
    array = gpu_switch().gpu.upload(np.ones((2, 2), np.float32))
    for transfer in (np.asarray, float, bool, lambda a: np.add(a, 1), lambda a: np.ones((2, 2)) * a, list):
        with pytest.raises(TypeError, match="not allowed"):
            transfer(array)
