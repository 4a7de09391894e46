"""The backend: array helpers under every namespace, which backend a run gets, and why."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from stand_ins.fake_cuda import Card, CUDARuntimeError
from zemosaic_photometry import apply_photometric_normalization, coverage_scale
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.pixels.backend_base import DeviceFailure, NoGpuSupport
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.pixels.backend_cuda import is_device_error, open_cuda, slabs
from zemosaic_pipeline.pixels.backend_switch import BackendSwitch
from zemosaic_pipeline.pixels.methods import CombineMethod

# ------------------------------------------------------------------------------- helpers stay where their input is


def assert_same_home(result, array, dtype):
    assert type(result) is type(array)
    assert result.dtype == dtype
    assert getattr(result, "device", None) == getattr(array, "device", None)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalisation_stays_in_its_namespace(xp, dtype):
    rng = np.random.default_rng(3)
    data = rng.normal(1200, 40, (3, 17, 11)).astype(dtype)
    data[1, 4:6, 2:5] = np.nan
    gain, pivot, level = np.array([0.8, 1.3, 2.0]), np.array([1190.0, 1210.0, 1e3]), np.array([900.0, 950.0, -7.0])
    array = xp.to(data)
    result = apply_photometric_normalization(array, gain, pivot, level)
    assert_same_home(result, array, array.dtype)
    expected = (data.astype(np.float64) - pivot[:, None, None]) / gain[:, None, None] + level[:, None, None]
    assert np.allclose(xp.back(result), expected, rtol=4 * np.finfo(dtype).eps, atol=0, equal_nan=True)
    assert np.array_equal(xp.back(array), data, equal_nan=True), "the input was changed"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_normalisation_with_a_gradient_is_the_same_in_every_namespace(xp, dtype):
    rng = np.random.default_rng(5)
    data = rng.normal(1200, 40, (3, 17, 11)).astype(dtype)
    gradient = rng.normal(0, 30, (3, 5))
    row = ([0.8, 1.3, 2.0], [1190.0, 1210.0, 1e3], [900.0, 950.0, -7.0], gradient)
    array = xp.to(data)
    result = apply_photometric_normalization(array, *row, first_row=4, height=40)
    assert_same_home(result, array, array.dtype)
    expected = apply_photometric_normalization(data, *row, first_row=4, height=40)
    assert np.array_equal(xp.back(result), expected)
    assert np.abs(expected - apply_photometric_normalization(data, *row[:3])).max() > 5


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_coverage_scale_stays_in_its_namespace(xp, dtype):
    rng = np.random.default_rng(4)
    coverage = np.clip(rng.integers(-2, 6, (20, 14)), 0, None).astype(dtype)

    def mean_of_nine(image):
        shifts = [xp.module.roll(image, (dy, dx), axis=(0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
        return sum(shifts[1:], shifts[0]) / 9.0

    array = xp.to(coverage)
    scale, smooth = coverage_scale(array, mean_of_nine)
    assert_same_home(scale, array, array.dtype)
    assert_same_home(smooth, array, array.dtype)

    def brute(image):
        return np.mean([np.roll(image, (dy, dx), axis=(0, 1)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)], axis=0)

    exact = coverage.astype(np.float64)
    support = brute((exact > 0).astype(float))
    expected = brute(exact) / np.where(support > 0, support, 1)
    ratio = np.divide(expected, exact, out=np.ones_like(exact), where=exact > 0)
    assert np.allclose(xp.back(smooth), expected, rtol=1e-5)
    assert np.allclose(xp.back(scale), np.where(exact > 0, np.clip(ratio, 0.5, 2), 1), rtol=1e-5)
    assert {0.5, 2.0} <= set(np.unique(xp.back(scale)).tolist()), "both limits should be met"


# --------------------------------------------------------------------------------------------- which backend is used


def switch_with(opener, mode="auto"):
    said = []
    switch = BackendSwitch(mode, opener=opener, tell=lambda key, text: said.append((key, text)))
    switch.start()
    return switch, said


def failing(error):
    def opener():
        raise error

    return opener


def test_off_never_looks_for_a_card():
    switch, said = switch_with(failing(AssertionError("it looked")), "off")
    assert switch.name == "cpu" and not said
    assert switch.run(lambda backend: backend) is switch.cpu
    switch.close()


@pytest.mark.parametrize(
    ("mode", "error", "lines"),
    [
        ("auto", NoGpuSupport("cupy is not installed"), 0),
        ("on", NoGpuSupport("cupy is not installed"), 1),
        ("auto", DeviceFailure("no driver"), 1),
        ("on", DeviceFailure("no driver"), 1),
    ],
)
def test_without_a_card_the_cpu_does_it(mode, error, lines):
    switch, said = switch_with(failing(error), mode)
    assert switch.name == "cpu" and switch.reason == str(error)
    assert [key for key, _ in said] == ["phase5_gpu_fallback"] * lines
    assert all(str(error) in text for _, text in said)
    switch.start()  # as a run on raw frames does before it stacks and before Phase 5
    assert len(said) == lines, "a card is looked for once a run"
    assert switch.run(lambda backend: backend.name) == "cpu"
    switch.close()


def test_an_unknown_mode_is_refused():
    with pytest.raises(UsageError, match="auto, on or off"):
        switch_with(open_cuda, "maybe")


def test_programming_errors_while_opening_surface():
    with pytest.raises(TypeError):
        switch_with(failing(TypeError("a bug")))


# ---------------------------------------------------------------------------------------------------- opening a card


def test_cupy_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(NoGpuSupport, match="cupy is not installed"):
        open_cuda()


def test_cupy_is_broken(monkeypatch, tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.12:\\n  cannot open shared object file')")
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    switch, said = switch_with(open_cuda)
    assert switch.name == "cpu"
    assert len(said) == 1 and "libcudart.so.12: cannot open" in said[0][1]


def test_a_card_by_number_and_by_name(monkeypatch):
    Card(names=("Small GT 710", "Big RTX 4090", "Big RTX 4090")).install(monkeypatch)
    assert [open_cuda(k).description for k in (0, 1)] == ["Small GT 710", "Big RTX 4090"]
    assert open_cuda(0, "rtx").device_id == 1
    assert open_cuda(2, "rtx").device_id == 1
    assert open_cuda(2, "titan").device_id == 2
    with pytest.raises(DeviceFailure, match="no card number 3: 3 found"):
        open_cuda(3)


def test_no_card_at_all(monkeypatch):
    Card(names=()).install(monkeypatch)
    with pytest.raises(DeviceFailure, match="no card number 0: 0 found"):
        open_cuda()


@pytest.mark.parametrize(
    "error",
    [
        CUDARuntimeError("cudaErrorNoKernelImageForDevice"),
        ImportError("libnvvm.so cannot be found"),
        RuntimeError("CuPy failed to load libnvrtc.so.12"),
        OSError("libdevice.10.bc"),
    ],
)
def test_kernels_that_do_not_compile_are_no_gpu(monkeypatch, error):
    card = Card()
    card.install(monkeypatch)
    monkeypatch.setattr(card.cuda.cudadrv.nvvm, "compile_ir", failing_call(error))
    switch, said = switch_with(open_cuda)
    assert switch.name == "cpu"
    assert len(said) == 1 and str(error) in said[0][1]


def failing_call(error):
    def call(*args, **kwargs):
        raise error

    return call


def test_a_numba_that_cannot_round_as_the_cpu_does(monkeypatch):
    card = Card()
    card.install(monkeypatch)
    del card.cuda.cudadrv.nvvm.compile_ir
    with pytest.raises(DeviceFailure, match="fused multiply-add"):
        open_cuda()


def test_a_card_that_computes_wrong_is_not_used(monkeypatch):
    card = Card()
    card.install(monkeypatch)
    honest = card.cupy.asnumpy

    def one_bit_off(array):
        values = honest(array)
        return np.nextafter(values, np.inf) if values.dtype == np.float64 else values

    monkeypatch.setattr(card.cupy, "asnumpy", one_bit_off)
    with pytest.raises(DeviceFailure, match="does not compute what the CPU does"):
        open_cuda()


# ---------------------------------------------------------------------------------------------------- single methods


def test_free_memory_is_what_blocks_are_planned_with(monkeypatch):
    Card().install(monkeypatch)
    assert open_cuda().free_bytes(0.25) == (1 << 30) // 4
    assert CpuBackend().free_bytes(0.25) is None


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        np.arange(240.0).reshape(4, 6, 10)[:, 2:5, ::3],
        np.zeros((3, 0, 4)),
        np.arange(7, dtype=np.uint8),
    ],
    ids=["contiguous", "strided", "empty", "bytes"],
)
def test_arrays_come_back_as_they_went(monkeypatch, array):
    Card("late kernels").install(monkeypatch)
    gpu = open_cuda()
    there = gpu.upload(array)
    array = array.copy()
    assert np.array_equal(gpu.download(there), array) and gpu.download(there).dtype == array.dtype


def test_what_was_uploaded_may_be_overwritten(monkeypatch):
    """The tile store may drop or reuse the host's pixels as soon as `upload` is back."""
    Card("late copies").install(monkeypatch)
    gpu = open_cuda()
    array = np.ones(1000)
    there = gpu.upload(array)
    array[:] = 7
    assert np.all(gpu.download(there) == 1)


def test_slabs_cover_every_row_once():
    assert list(slabs(3, 10, 1 << 22)) == [(3, 7), (7, 10)]
    assert list(slabs(0, 3, 1 << 30)) == [(0, 1), (1, 2), (2, 3)]
    assert list(slabs(5, 5, 0)) == []


def test_weights_of_all_channels_alike(monkeypatch):
    Card().install(monkeypatch)
    rng = np.random.default_rng(0)
    values = rng.normal(size=(3, 2, 5, 6)).astype(np.float32)
    weights = rng.uniform(size=(3, 5, 6)).astype(np.float32)
    means = []
    for backend in (open_cuda(), CpuBackend()):
        for given in (weights, np.repeat(weights[:, None], 2, axis=1)):
            out = backend.zeros((2, 5, 6))
            there = backend.upload(given.copy())
            backend.combine(backend.upload(values.copy()), there, CombineMethod.MEAN, (3.0, 3.0, 0.0, 0.0), out)
            means.append(backend.download(out))
            if given is weights:
                assert np.array_equal(backend.download(there), weights)
    assert np.allclose(means[0], np.average(values, axis=0, weights=np.repeat(weights[:, None], 2, axis=1)), rtol=1e-5)
    assert all(np.array_equal(means[0], other) for other in means[1:])


def test_errors_are_told_by_their_package():
    assert is_device_error(CUDARuntimeError("lost"))
    assert not any(is_device_error(error("bug")) for error in (TypeError, MemoryError, RuntimeError, ImportError))


def test_with_the_real_cupy():
    """Where cupy is installed: its errors are known, and without a driver the run goes on, on the CPU."""
    cupy = pytest.importorskip("cupy")
    for name in (
        "runtime.CUDARuntimeError",
        "driver.CUDADriverError",
        "memory.OutOfMemoryError",
        "compiler.CompileException",
    ):
        module, cls = name.split(".")
        error = getattr(getattr(cupy.cuda, module), cls)
        assert is_device_error(error.__new__(error)), name
    switch, said = switch_with(open_cuda)
    if switch.name == "gpu":
        assert not said
        switch.close()
        pytest.skip("there is a working card: nothing to fall back from")
    assert [key for key, _ in said] == ["phase5_gpu_fallback"]
    assert switch.run(lambda backend: backend.name) == "cpu"
