"""What the settings of the machine do: card, memory, threads, folders."""

from __future__ import annotations

import pytest

from scenes.outcomes import differ, spy
from zemosaic_pipeline.host import threads
from zemosaic_pipeline.pixels import backend_base, backend_cpu, backend_cuda
from zemosaic_pipeline.resample import coadd, pixel_store


@pytest.fixture
def opened(monkeypatch) -> list[tuple]:
    """Arguments with which a card was asked for; there is none."""
    calls = []

    def no_card(*arguments):
        calls.append(arguments)
        raise backend_base.NoGpuSupport("no card")

    monkeypatch.setattr(backend_cuda, "open_cuda", no_card)
    return calls


def test_gpu(run, opened):
    said = {
        mode: [m[0] for m in run(gpu=mode, fresh=True).heard].count("phase5_gpu_fallback")
        for mode in ("off", "auto", "on")
    }
    assert said == {"off": 0, "auto": 0, "on": 1} and len(opened) == 2


def test_gpu_id_phase5(run, opened):
    run(gpu="on", gpu_id_phase5=3, fresh=True)
    assert opened == [(3, "")]


def test_gpu_selector(run, opened):
    run(gpu="on", gpu_selector="RTX", fresh=True)
    assert opened == [(0, "RTX")]


def test_parallel_gpu_vram_fraction(run, monkeypatch):
    """The backend is asked for this share of its free memory, and its answer bounds the blocks."""
    asked, planned = [], spy(monkeypatch, coadd, "plan_blocks")

    def free_bytes(self, fraction):
        asked.append(fraction)
        return int(fraction * 1e6)

    monkeypatch.setattr(backend_cpu.CpuBackend, "free_bytes", free_bytes)
    run(parallel_gpu_vram_fraction=0.5, num_processing_workers=1, gpu="off", fresh=True)
    assert asked == [0.5] and planned[0].args[3] == 500_000


def test_memory_budget(run, monkeypatch):
    planned = spy(monkeypatch, coadd, "plan_blocks")
    kept = spy(monkeypatch, pixel_store.PixelStore, "__init__")
    one, two = (run(memory_budget=size, fresh=True) for size in ("100MB", "1GB"))
    assert planned[1].args[3] == pytest.approx(10 * planned[0].args[3], rel=1e-3)
    assert kept[1].args[1] == pytest.approx(10 * kept[0].args[1], rel=1e-3)
    assert not differ(one, two)


def test_num_processing_workers(run, monkeypatch):
    pools = spy(monkeypatch, threads, "ThreadPoolExecutor")
    run(num_processing_workers=3, gpu="off", fresh=True)
    assert pools and {call.args[0] for call in pools} == {3}


def test_resume(run):
    assert (run(cache_retention="keep").folder / "zemosaic_resume").is_dir()
    assert not (run(cache_retention="keep", resume="off").folder / "zemosaic_resume").exists()


def test_cache_retention(run):
    assert (run(cache_retention="keep").folder / "zemosaic_resume").is_dir()
    assert not (run().folder / "zemosaic_resume").exists()


def test_coadd_memmap_dir(run, tmp_path):
    run(coadd_memmap_dir=str(tmp_path), cleanup_temp_artifacts=False)
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith(".zemosaic_tmp_")


def test_cleanup_temp_artifacts(run):
    assert not list(run().folder.glob(".*"))
    (kept,) = run(cleanup_temp_artifacts=False).folder.glob(".*")
    assert kept.is_dir()
