"""What only the real libraries can show: compiled code, and Phase 5 on a real card."""

from __future__ import annotations

import re
import warnings
from collections import Counter

import numpy as np
import pytest

from scenes.small_scene import OPTIONS
from zemosaic_pipeline.pixels.backend_cuda import open_cuda, trial, uncontracted
from zemosaic_pipeline.pixels.backend_switch import BackendSwitch


@pytest.fixture
def kernels(monkeypatch):
    """The kernels as Python functions, and numba's compiler for cards that need not be there."""
    pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")
    from numba import cuda
    from numba.cuda import dispatcher
    from numba.cuda.cudadrv import nvvm

    from zemosaic_pipeline.pixels import kernels

    try:
        nvvm.NVVM()
    except Exception as error:
        pytest.skip(f"no CUDA compiler: {error}")
    functions = {}
    monkeypatch.setattr(cuda, "jit", lambda **options: lambda f: functions.setdefault(f.__name__, f))
    kernels.cuda_kernels(cuda)
    monkeypatch.undo()
    # device functions are compiled for the card at hand; pretend that there is one
    monkeypatch.setattr(dispatcher, "get_current_device", lambda: type("Card", (), {"compute_capability": (7, 5)}))
    return cuda, functions


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_compiled_kernels_round_every_product_and_sum(kernels, capability):
    """PTX without fused multiply-add, and with every operation fixed to round to nearest: nobody may fuse it later."""
    from numba import types

    cuda, functions = kernels
    f4, f8, i8 = types.float32, types.float64, types.int64
    pair, rect = types.UniTuple(i8, 2), types.UniTuple(i8, 4)

    def array(dtype, ndim):
        return types.Array(dtype, ndim, "C")

    mesh = array(f8, 3), i8, i8, i8
    image, plane = array(f4, 3), array(f4, 2)
    signatures = {
        "resample": (
            image, pair, pair, i8, image, plane, f8, f8, f8, *mesh, pair, rect, image, plane, types.boolean,
        ),
        "measure": (
            image, pair, pair, *mesh, i8, i8, pair, array(types.uint8, 2), array(f8, 3), array(types.int32, 2),
        ),
        "combine": (array(f4, 4), array(f4, 4), i8, f8, f8, f8, f8, image),
    }  # fmt: skip
    for name, signature in signatures.items():
        with uncontracted(cuda), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ptx, _ = cuda.compile_ptx(functions[name], types.void(*signature), device=False, cc=capability, abi="numba")
        found = Counter(re.findall(r"\b(?:fma|mul|add|sub|div|sqrt)\.(?:[a-z]+\.)?f(?:32|64)\b", ptx))
        assert found["mul.rn.f64"] and found["add.rn.f64"], name
        assert not {"mul.f64", "add.f64", "sub.f64", "mul.f32", "add.f32"} & set(found), name
        # sine and cosine (Lanczos) are made of fused operations, which is why their last bit may differ
        assert name == "resample" or not any(key.startswith("fma") for key in found), name


@pytest.mark.gpu
@pytest.mark.usefixtures("card_required")
class TestRealCard:
    @pytest.fixture
    def switch(self):
        said = []
        switch = BackendSwitch("on", tell=lambda key, text: said.append(text))
        switch.start()
        assert switch.name == "gpu", switch.reason
        yield switch
        assert not said
        switch.close()

    @pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
    def test_whole_phase_5(self, switch, scene, options, phase5, same):
        same(phase5(switch, scene, options), phase5(BackendSwitch("off"), scene, options))

    def test_bit_by_bit_in_a_thread(self, switch):
        from concurrent.futures import ThreadPoolExecutor

        with ThreadPoolExecutor(1) as pool:
            there = pool.submit(trial, switch.gpu).result()
        for a, b in zip(there, trial(switch.cpu), strict=True):
            assert np.array_equal(a, b, equal_nan=True)

    def test_many_uploads_while_kernels_run(self, switch):
        """Buffers are used again only when they are free: 200 images pass through the staging memory."""
        rng = np.random.default_rng(1)
        images = [rng.normal(size=(3, 400, 500)).astype(np.float32) for _ in range(8)]
        there = [switch.gpu.upload(images[k % 8]) for k in range(200)]
        for k, array in enumerate(there):
            assert np.array_equal(switch.gpu.download(array), images[k % 8])

    def test_out_of_memory_falls_back(self):
        said = []
        switch = BackendSwitch("on", opener=open_cuda, tell=lambda key, text: said.append(key))
        switch.start()
        assert switch.run(lambda backend: backend.name if backend is switch.cpu else backend.zeros((1 << 50,))) == "cpu"
        assert said == ["phase5_gpu_fallback"]
