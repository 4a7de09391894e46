"""zemosaic_pipeline.host.telemetry: the monitor, its CSV, the GPU through NVML, the account of the phases."""

from __future__ import annotations

import csv
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from zemosaic_pipeline.host import telemetry
from zemosaic_pipeline.host.progress import MASTER_TILES_GIVEN, TimeLeft
from zemosaic_pipeline.host.telemetry import PhaseClock, ResourceMonitor, peak_rss_bytes, telemetry_feed

MB = 2**20
HEADER = (
    "timestamp_iso,phase_index,phase_name,cpu_percent,ram_used_mb,ram_total_mb,ram_available_mb,gpu_used_mb,"
    "gpu_total_mb,gpu_free_mb,gpu_util_percent,gpu_mem_util_percent,gpu_name,gpu_backend,gpu_sample_source,"
    "files_done,files_total,tiles_done,tiles_total,eta_seconds,cpu_workers,rows_per_chunk,gpu_rows_per_chunk,"
    "max_chunk_bytes,gpu_max_chunk_bytes,use_gpu,use_gpu_phase5"
)


class FakeNvml:
    """What `pynvml` does, for a machine with two cards; `broken` names the functions that fail."""

    class NVMLError(Exception):
        pass

    def __init__(self, broken=(), name="Card"):
        self.broken, self.name, self.calls = set(broken), name, []
        self.loads = [30, 90, 60]

    def __getattr__(self, function):
        if not function.startswith("nvml"):
            raise AttributeError(function)

        def call(*args):
            self.calls.append(function)
            if function in self.broken:
                raise self.NVMLError(function)
            return getattr(self, "do_" + function, lambda *_: None)(*args)

        return call

    def do_nvmlDeviceGetHandleByIndex(self, index):
        if index > 1:
            raise self.NVMLError("no such card")
        return index

    def do_nvmlDeviceGetHandleByPciBusId(self, bus):
        return {b"0000:81:00.0": 1}[bus]

    def do_nvmlDeviceGetName(self, card):
        return f"{self.name} {card}".encode()

    def do_nvmlDeviceGetMemoryInfo(self, card):
        return SimpleNamespace(used=(card + 1) * 100 * MB, total=8000 * MB, free=(8000 - (card + 1) * 100) * MB)

    def do_nvmlDeviceGetUtilizationRates(self, card):
        return SimpleNamespace(gpu=self.loads[0] if len(self.loads) == 1 else self.loads.pop(0), memory=7)


def no_gpu():
    return FakeNvml({"nvmlInit"})


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as stream:
        return list(csv.DictReader(stream))


def our_threads():
    return [t for t in threading.enumerate() if t.name == "zemosaic-telemetry"]


def test_samples_go_to_the_csv_and_to_the_callback(tmp_path):
    path, seen = tmp_path / "resource_telemetry.csv", []
    with ResourceMonitor(path, 0.03, seen.append, nvml=no_gpu()) as monitor:
        time.sleep(0.15)
        monitor.update(phase_index=np.int64(5), phase_name="phase5_reproject", tiles_done=np.int32(2))
        monitor.update(tiles_total=9, eta_seconds=np.float32(12.5), use_gpu=False, max_chunk_bytes=64)
        [thread] = our_threads()
        assert thread.daemon
    assert not our_threads()
    assert path.read_text(encoding="utf-8").splitlines()[0] == HEADER
    rows = rows_of(path)
    assert len(rows) == len(seen) >= 3
    first, last = rows[0], rows[-1]
    assert (first["phase_index"], first["tiles_done"], first["eta_seconds"]) == ("0", "0", "")
    assert (last["phase_index"], last["phase_name"]) == ("5", "phase5_reproject")
    assert (last["tiles_done"], last["tiles_total"], last["eta_seconds"]) == ("2", "9", "12.5")
    assert (last["use_gpu"], last["max_chunk_bytes"], last["gpu_name"]) == ("False", "64", "")
    total = psutil.virtual_memory().total / MB
    assert float(last["ram_total_mb"]) == pytest.approx(total, abs=0.01)
    assert float(last["ram_used_mb"]) + float(last["ram_available_mb"]) == pytest.approx(total, abs=0.05)
    assert 0 <= float(last["cpu_percent"]) <= 100


def test_the_callback_gets_the_guis_fields_as_plain_numbers():
    seen = []
    with ResourceMonitor(None, 5, seen.append, gpu_index=1, nvml=FakeNvml()) as monitor:
        monitor.update(phase_index=np.float64(4.5), files_done=np.int64(3), eta_seconds=np.float64(2))
        time.sleep(0.11)
    [stats] = seen
    assert set(stats) == set(telemetry.STATS_FIELDS)
    assert {type(value) for value in stats.values()} <= {int, float, str}
    assert type(stats["phase_index"]) is int and stats["phase_index"] == 4
    assert (stats["gpu_used_mb"], stats["gpu_total_mb"], stats["gpu_util_percent"]) == (200, 8000, 30)


def test_the_csv_tells_the_time_left_once_it_is_known(tmp_path):
    """A quarter of Phase 6 in 100 s: 300 s for its rest, and half of its 400 s for Phase 7, whose share is half."""
    now = [0.0]
    with ResourceMonitor(tmp_path / "t.csv", 60, nvml=no_gpu()) as monitor:
        tell = telemetry_feed(monitor, TimeLeft(lambda: now[0]))
        tell(MASTER_TILES_GIVEN, None, "INFO", text="9 tiles", num_tiles=9)
        tell("STAGE_PROGRESS", "phase6", 0, total=4)
        monitor.sample()
        now[0] = 100.0
        tell("STAGE_PROGRESS", "phase6", 1, total=4)
        monitor.sample()
        now[0] = 110.0
    unknown, told, ten_seconds_later = (row["eta_seconds"] for row in rows_of(tmp_path / "t.csv"))
    assert (unknown, told) == ("", "500.0") and 480 < float(ten_seconds_later) < 500


def test_columns_without_a_meaning_here_are_empty(tmp_path):
    with ResourceMonitor(tmp_path / "t.csv", 60, nvml=FakeNvml()) as monitor:
        monitor.update(max_chunk_bytes=64)
        with pytest.raises(TypeError, match="rows_per_chunk"):
            monitor.update(rows_per_chunk=64)
    [row] = rows_of(tmp_path / "t.csv")
    assert {name: value for name, value in row.items() if "chunk" in name and value} == {"max_chunk_bytes": "64"}


def test_what_is_unknown_is_left_out_of_the_message():
    seen = []
    with ResourceMonitor(None, 5, seen.append, nvml=no_gpu()):
        pass
    assert not {"eta_seconds", "gpu_used_mb", "gpu_total_mb", "gpu_util_percent"} & set(seen[0])


def test_a_busy_process_shows_its_load():
    with ResourceMonitor(None, 5, nvml=no_gpu()) as monitor:
        end = time.process_time() + 0.15
        while time.process_time() < end:
            pass
        row = monitor.sample()
    assert 20 < row["process_cpu_percent"] < 130
    assert row["cpu_percent"] > 0
    rss = psutil.Process().memory_info().rss / MB
    assert row["process_rss_mb"] == pytest.approx(rss, rel=0.2)


def test_without_psutil_the_columns_are_empty(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "psutil", None)
    with ResourceMonitor(tmp_path / "t.csv", 5, nvml=FakeNvml()):
        pass
    [row] = rows_of(tmp_path / "t.csv")
    assert row["cpu_percent"] == row["ram_total_mb"] == "" and row["gpu_name"] == "Card 0"


# ------------------------------------------------------------------------------------------------------------ NVML


@pytest.mark.parametrize("index", [1, "0000:81:00.0"])
def test_the_card_that_was_asked_for_is_sampled(index):
    nvml = FakeNvml()
    with ResourceMonitor(gpu_index=index, nvml=nvml) as monitor:
        row = monitor.sample()
    assert (row["gpu_name"], row["gpu_sample_source"]) == ("Card 1", "nvml")
    assert (row["gpu_used_mb"], row["gpu_free_mb"], row["gpu_total_mb"]) == (200, 7800, 8000)
    assert (row["gpu_util_percent"], row["gpu_mem_util_percent"]) == (30, 7)
    assert nvml.calls[-1] == "nvmlShutdown"


@pytest.mark.parametrize(
    ("broken", "index"),
    [({"nvmlInit"}, 0), ({"nvmlDeviceGetName"}, 0), ((), 7)],
)
def test_without_a_driver_or_the_card_nvml_is_tried_once(broken, index):
    nvml = FakeNvml(broken)
    with ResourceMonitor(gpu_index=index, nvml=nvml) as monitor:
        rows = [monitor.sample() for _ in range(3)]
    assert nvml.calls.count("nvmlInit") == 1 and "nvmlDeviceGetMemoryInfo" not in nvml.calls
    assert not [key for row in rows for key in row if key.startswith("gpu_") and row[key] is not None]


def test_without_the_library_there_is_no_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with ResourceMonitor() as monitor:
        assert "gpu_name" not in monitor.sample()


def test_a_card_that_hides_its_load_still_tells_its_memory():
    with ResourceMonitor(nvml=FakeNvml({"nvmlDeviceGetUtilizationRates"})) as monitor:
        row = monitor.sample()
    assert row["gpu_used_mb"] == 100 and "gpu_util_percent" not in row


# ------------------------------------------------------------------------------------------------------- failures


def test_a_csv_that_cannot_be_opened_is_one_warning(tmp_path):
    warnings, seen = [], []
    path = tmp_path / "none" / "t.csv"
    with ResourceMonitor(path, 0.02, seen.append, warn=warnings.append, nvml=no_gpu()):
        time.sleep(0.1)
    assert len(warnings) == 1 and str(path) in warnings[0] and len(seen) > 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_one_warning():
    warnings, seen = [], []
    with ResourceMonitor("/dev/full", 0.02, seen.append, warn=warnings.append, nvml=no_gpu()):
        time.sleep(0.1)
    assert len(warnings) == 1 and "No space left" in warnings[0] and len(seen) > 1


def test_an_error_of_the_callback_surfaces_at_the_end_but_hides_no_other():
    def fails(stats):
        raise KeyError("wrong")

    with pytest.raises(KeyError, match="wrong"), ResourceMonitor(None, 0.02, fails, nvml=no_gpu()):
        time.sleep(0.1)
    with pytest.raises(OSError, match="the run"), ResourceMonitor(None, 0.02, fails, nvml=no_gpu()):
        time.sleep(0.1)
        raise OSError("the run")
    assert not our_threads()


def test_a_field_that_does_not_exist_is_refused():
    with pytest.raises(TypeError, match="tile_done"):
        ResourceMonitor().update(tile_done=3)
    with pytest.raises(ValueError, match="interval"):
        ResourceMonitor(interval_sec=0)


def test_a_driver_that_hangs_holds_up_neither_the_run_nor_the_process(monkeypatch):
    monkeypatch.setattr(telemetry, "_JOIN", 0.05)
    release, entered = threading.Event(), threading.Event()
    nvml, warnings = FakeNvml(), []

    def hangs(card):
        entered.set()
        release.wait(5)
        return SimpleNamespace(used=0, total=0, free=0)

    nvml.do_nvmlDeviceGetMemoryInfo = hangs
    began = time.monotonic()
    with ResourceMonitor(None, 0.01, nvml=nvml, warn=warnings.append) as monitor:
        assert entered.wait(2)
        monitor.update(tiles_done=1)
        assert monitor.sample() == {}
    assert time.monotonic() - began < 1.5 and len(warnings) == 1
    [thread] = our_threads()
    assert thread.daemon
    release.set()
    thread.join(2)


def test_importing_needs_the_standard_library_alone():
    code = "import sys; import zemosaic_pipeline.host.telemetry; print(sorted({'numpy', 'psutil', 'pynvml', 'cupy'} & set(sys.modules)))"
    folder = Path(telemetry.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --------------------------------------------------------------------------------------------------------- phases


def test_peak_memory_sees_what_was_freed():
    before = peak_rss_bytes()
    assert before >= 0.9 * psutil.Process().memory_info().rss
    block = bytearray(b"x" * (psutil.Process().memory_info().rss // 2 + 100 * MB))
    size = len(block)
    del block
    assert peak_rss_bytes() >= max(before, size)
    assert peak_rss_bytes() < before + 4 * size


def test_phases_are_accounted_for_one_by_one():
    with ResourceMonitor(None, 60, nvml=FakeNvml()) as monitor:
        clock = PhaseClock(monitor)
        with clock.phase("phase5_intertile"):
            end = time.process_time() + 0.1
            while time.process_time() < end:
                pass
        with clock.phase("phase5_reproject"):
            time.sleep(0.1)
            monitor.sample()
    with clock.phase("phase6"):
        pass
    with pytest.raises(OSError), clock.phase("phase5_reproject"):
        time.sleep(0.05)
        raise OSError
    report = clock.report()
    assert list(report) == ["phase5_intertile", "phase5_reproject", "phase6"]
    busy, idle, late = report.values()
    assert 0.1 <= busy["seconds"] < 1 and 0.15 <= idle["seconds"] < 1
    assert busy["cpu_percent_mean"] > 4 * idle["cpu_percent_mean"]
    assert (busy["gpu_util_percent_mean"], busy["gpu_util_percent_peak"]) == (30, 30)
    assert (idle["gpu_util_percent_mean"], idle["gpu_util_percent_peak"]) == (75, 90)
    assert idle["gpu_used_mb_peak"] == 100 and late["gpu_util_percent_mean"] is late["gpu_used_mb_peak"] is None
    assert idle["peak_rss_mb"] == pytest.approx(peak_rss_bytes() / MB, rel=0.1)


def test_nested_phases_and_no_monitor():
    clock = PhaseClock()
    with clock.phase("run"), clock.phase("phase4_grid"):
        time.sleep(0.02)
    report = clock.report()
    assert list(report) == ["run", "phase4_grid"]
    assert report["run"]["seconds"] >= report["phase4_grid"]["seconds"] >= 0.02
    assert report["run"]["gpu_util_percent_peak"] is None
