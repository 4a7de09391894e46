"""What a run costs: processor, memory and GPU load, sampled while it goes on, and the account of its phases.

`ResourceMonitor` samples in a thread of its own, for the GUI's status line and ``resource_telemetry.csv``;
`PhaseClock` sums up by phase for ``run_report.json``. Megabytes are 2**20 bytes, as the GUI shows them. What cannot be
measured is left empty and never ends a run: without psutil the processor and memory columns, without NVIDIA's
management library (NVML) the GPU's. NVML needs the driver alone, no CUDA context.

Three columns that the GUI's program defines are empty on purpose, since nothing in this worker has their meaning:
``rows_per_chunk`` and ``gpu_rows_per_chunk`` (blocks are rectangles, cut to the tiles that they see, not strips of so
many rows) and ``gpu_max_chunk_bytes`` (what a block may take of the card follows from the memory that is free on it
when a step begins). ``max_chunk_bytes`` is the memory budget.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from zemosaic_pipeline.host.progress import STAGES, Listener, TimeLeft, stage_count

CSV_COLUMNS: tuple[str, ...] = (
    "timestamp_iso",
    "phase_index",
    "phase_name",
    "cpu_percent",
    "ram_used_mb",
    "ram_total_mb",
    "ram_available_mb",
    "gpu_used_mb",
    "gpu_total_mb",
    "gpu_free_mb",
    "gpu_util_percent",
    "gpu_mem_util_percent",
    "gpu_name",
    "gpu_backend",
    "gpu_sample_source",
    "files_done",
    "files_total",
    "tiles_done",
    "tiles_total",
    "eta_seconds",
    "cpu_workers",
    "rows_per_chunk",
    "gpu_rows_per_chunk",
    "max_chunk_bytes",
    "gpu_max_chunk_bytes",
    "use_gpu",
    "use_gpu_phase5",
)
"""Columns of ``resource_telemetry.csv``."""
STATS_FIELDS: tuple[str, ...] = (
    "phase_index",
    "phase_name",
    "files_done",
    "files_total",
    "tiles_done",
    "tiles_total",
    "eta_seconds",
    "cpu_percent",
    "ram_used_mb",
    "ram_total_mb",
    "gpu_used_mb",
    "gpu_total_mb",
    "gpu_util_percent",
)
"""Fields of the GUI's ``STATS_UPDATE`` message."""
_MB = 2**20
_FIRST_SAMPLE = 0.5  # seconds: the GUI shows something soon, however long the interval
_SHORTEST_LOAD = 0.1  # seconds below which a processor load is noise
_JOIN = 2.0  # seconds that a sample in progress is waited for at the end
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunState:
    """What the run tells the monitor about itself; None is unknown."""

    phase_index: int = 0
    phase_name: str = ""
    files_done: int = 0
    files_total: int = 0
    tiles_done: int = 0
    tiles_total: int = 0
    eta_seconds: float | None = None
    gpu_backend: str | None = None
    cpu_workers: int | None = None
    max_chunk_bytes: int | None = None
    use_gpu: bool | None = None
    use_gpu_phase5: bool | None = None


def peak_rss_bytes() -> int:
    """Return the most physical memory that this process has held so far, in bytes."""
    if sys.platform == "win32":
        import psutil

        return int(psutil.Process().memory_info().peak_wset)
    with contextlib.suppress(OSError):  # Linux; getrusage would count what the parent held before it started us
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit


# ------------------------------------------------------------------------------------------------------ probes


class _HostProbe:
    """Processor and memory, through psutil; loads are means since the last call."""

    def __init__(self) -> None:
        self._psutil: ModuleType | None = None
        try:
            import psutil
        except ImportError:  # beside an older program it may be missing; the run does not need it
            return
        self._psutil = psutil
        self._process = psutil.Process()
        self._last: tuple[float, ...] | None = None
        self._loads: dict[str, float] = {}
        self.sample()  # the loads count from here

    @staticmethod
    def _clocks(psutil: ModuleType) -> tuple[float, float, float, float]:
        """Return seconds on the wall, of this process, of the machine busy and in all."""
        times = psutil.cpu_times()
        guests = getattr(times, "guest", 0) + getattr(times, "guest_nice", 0)  # Linux counts them as user's too
        total = sum(times) - guests
        busy = total - times.idle - getattr(times, "iowait", 0)
        return time.monotonic(), time.process_time(), busy, total

    def _measure_loads(self, psutil: ModuleType) -> None:
        now = self._clocks(psutil)
        wall, process, busy, total = (b - a for a, b in zip(self._last or now, now, strict=True))
        if wall >= _SHORTEST_LOAD and total > 0:
            machine = min(max(100 * busy / total, 0.0), 100.0)
            self._loads = {"cpu_percent": machine, "process_cpu_percent": 100 * process / wall}
        elif self._last is not None:
            return
        self._last = now

    def sample(self) -> dict[str, float]:
        if self._psutil is None:
            return {}
        try:
            self._measure_loads(self._psutil)
            memory = self._psutil.virtual_memory()
            rss = self._process.memory_info().rss
        except (self._psutil.Error, OSError):  # a locked-down system hides its counters
            return {}
        return self._loads | {
            "ram_used_mb": (memory.total - memory.available) / _MB,
            "ram_total_mb": memory.total / _MB,
            "ram_available_mb": memory.available / _MB,
            "process_rss_mb": rss / _MB,
        }


class _GpuProbe:
    """One card through NVML; no card, no driver or no library: empty samples, and no second try."""

    def __init__(self, index: int | str, nvml: ModuleType | None = None) -> None:
        self._nvml: ModuleType | None = None
        if nvml is None:
            try:
                nvml = import_module("pynvml")
            except ImportError:
                return
        try:
            nvml.nvmlInit()
        except nvml.NVMLError:
            return
        self._nvml = nvml
        try:
            if isinstance(index, str):
                self._card = nvml.nvmlDeviceGetHandleByPciBusId(index.encode())
            else:
                self._card = nvml.nvmlDeviceGetHandleByIndex(index)
            name = nvml.nvmlDeviceGetName(self._card)
        except nvml.NVMLError:
            self.close()
            return
        self._name = name.decode() if isinstance(name, bytes) else str(name)

    def sample(self) -> dict[str, Any]:
        if self._nvml is None:
            return {}
        found: dict[str, Any] = {"gpu_name": self._name, "gpu_sample_source": "nvml"}
        with contextlib.suppress(self._nvml.NVMLError):
            memory = self._nvml.nvmlDeviceGetMemoryInfo(self._card)
            found |= {f"gpu_{key}_mb": getattr(memory, key) / _MB for key in ("used", "total", "free")}
        with contextlib.suppress(self._nvml.NVMLError):  # a part of a card (MIG) tells its memory but no load
            load = self._nvml.nvmlDeviceGetUtilizationRates(self._card)
            found |= {"gpu_util_percent": float(load.gpu), "gpu_mem_util_percent": float(load.memory)}
        return found

    def close(self) -> None:
        if self._nvml is not None:
            with contextlib.suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()
            self._nvml = None


class _CsvLog:
    """The CSV file; the first failure to write is one warning, and the last attempt."""

    def __init__(self, path: Path | str | None, warn: Callable[[str], object]) -> None:
        self._path = None if path is None else Path(path)
        self._warn = warn
        self._file = None
        if self._path is not None:
            with self._guard():
                self._file = self._path.open("w", newline="", encoding="utf-8")
                csv.writer(self._file).writerow(CSV_COLUMNS)
                self._file.flush()

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            self._warn(f"{self._path} cannot be written ({reason}); the run goes on without this log.")
            self._abandon()

    def _abandon(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):  # closing tries once more to write what could not be written
                file.close()

    def write(self, row: dict[str, Any]) -> None:
        if self._file is None:
            return
        cells = [row.get(column) for column in CSV_COLUMNS]
        with self._guard():
            csv.writer(self._file).writerow([round(c, 2) if isinstance(c, float) else c for c in cells])
            self._file.flush()  # so that the rows outlive a run that is killed

    def close(self) -> None:
        if self._file is not None:
            with self._guard():
                self._file.close()


# ----------------------------------------------------------------------------------------------------- monitor


def _plain(value: Any) -> Any:
    """Turn a numpy scalar into Python's own."""
    return value.item() if hasattr(value, "item") else value


class ResourceMonitor:
    """Context manager whose thread samples the load of the machine, this process and one GPU.

    It samples half a second after the start (or one interval, if that is shorter), then at every interval, and once
    more at the end. The thread is a daemon and ends with the context.

    Parameters
    ----------
    csv_path : Path or str, optional
        Where to write the samples (`CSV_COLUMNS`), replacing an older file; None writes none. A file that cannot be
        written is one warning.
    interval_sec : float
        Seconds between samples, above 0.
    on_sample : callable, optional
        Called with a dict for each sample: the `STATS_FIELDS` that are known, plain ``int``, ``float`` and ``str``.
        It may be called from the monitor's thread. What it raises there ends the sampling and is raised again at the
        end of the context, unless the run itself failed.
    gpu_index : int or str
        The card: NVML's number, or its PCI bus id (which, unlike CUDA's numbers, no environment variable changes).
    warn : callable, optional
        Called with one sentence where something cannot be done; default: a warning of this module's logger.
    nvml : module, optional
        Stands in for ``pynvml``.

    Raises
    ------
    ValueError
        The interval is not above 0.
    """

    def __init__(
        self,
        csv_path: Path | str | None = None,
        interval_sec: float = 1.5,
        on_sample: Callable[[dict[str, Any]], object] | None = None,
        *,
        gpu_index: int | str = 0,
        warn: Callable[[str], object] | None = None,
        nvml: ModuleType | None = None,
    ) -> None:
        if not interval_sec > 0:
            raise ValueError(f"a sampling interval of {interval_sec} s is not above 0")
        self._csv_path = csv_path
        self._interval = float(interval_sec)
        self._on_sample = on_sample
        self._gpu_index = gpu_index
        self._warn = warn or _log.warning
        self._nvml = nvml
        self._state = RunState()
        self._sources: list[Callable[[], dict[str, Any]]] = []
        self._observers: list[Callable[[dict[str, Any]], object]] = []
        self._lock = threading.Lock()  # of the state and the observers; never held while something is measured
        self._sampling = threading.Lock()
        self._stop = threading.Event()
        self._error: Exception | None = None
        self._running = False

    def __enter__(self) -> ResourceMonitor:
        self._csv = _CsvLog(self._csv_path, self._warn)
        self._host = _HostProbe()
        self._gpu = _GpuProbe(self._gpu_index, self._nvml)
        self._running = True
        self._thread = threading.Thread(target=self._run, name="zemosaic-telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        self._stop.set()
        self._thread.join(_JOIN)
        if self._thread.is_alive():  # stuck in a driver; being a daemon, it cannot hold up the process
            self._warn("The telemetry thread does not answer; the run ends without it.")
            return
        try:
            if self._error is None:
                self.sample()
        finally:
            self._running = False
            self._gpu.close()
            self._csv.close()
        if self._error is not None and exc_type is None:
            raise self._error

    def update(self, **fields: Any) -> None:
        """Tell the monitor where the run stands; the fields are those of `RunState`, numpy scalars are welcome.

        ``phase_index`` is a whole number to the GUI: 4.5 becomes 4.

        Raises
        ------
        TypeError
            There is no such field.
        """
        with self._lock:
            state = replace(self._state, **{name: _plain(value) for name, value in fields.items()})
            self._state = replace(state, phase_index=int(state.phase_index))

    def add_source(self, source: Callable[[], dict[str, Any]]) -> None:
        """Have `source` asked before every sample for fields of `update` that change by themselves."""
        with self._lock:
            self._sources.append(source)

    def add_observer(self, observer: Callable[[dict[str, Any]], object]) -> None:
        """Have `observer` called with every full sample: the CSV's row, ``process_cpu_percent``, ``process_rss_mb``."""
        with self._lock:
            self._observers.append(observer)

    def sample(self) -> dict[str, Any]:
        """Take a sample now, write and report it, and return it in full; ``{}`` outside the context."""
        if not self._sampling.acquire(timeout=_JOIN):  # a sample that is stuck in a driver must not stop the run
            return {}
        try:
            return self._sample() if self._running else {}
        finally:
            self._sampling.release()

    def _sample(self) -> dict[str, Any]:
        with self._lock:
            sources, observers = tuple(self._sources), tuple(self._observers)
        for source in sources:
            self.update(**source())
        with self._lock:
            state = self._state
        row = {"timestamp_iso": datetime.now(UTC).isoformat(timespec="milliseconds")}
        row |= asdict(state) | self._host.sample() | self._gpu.sample()
        self._csv.write(row)
        for observer in observers:
            observer(row)
        if self._on_sample is not None:
            self._on_sample({name: row[name] for name in STATS_FIELDS if row.get(name) is not None})
        return row

    def _run(self) -> None:
        wait = min(self._interval, _FIRST_SAMPLE)
        while not self._stop.wait(wait):
            try:
                self.sample()
            except Exception as error:  # raised again where the context ends: nothing can catch it here
                self._error = error
                return
            wait = self._interval


def telemetry_feed(monitor: ResourceMonitor, time_left: TimeLeft | None = None) -> Listener:
    """A listener that tells the monitor where the run stands, and how long it will take."""
    time_left = time_left or TimeLeft()
    monitor.add_source(lambda: {"eta_seconds": time_left.seconds()})
    counted = {"phase1_scan": "files", "phase5_intertile": "tiles"}

    def listen(key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        time_left(key, progress, level, **fields)
        if count := stage_count(key, progress, level, fields):
            monitor.update(phase_index=STAGES[count.stage][0], phase_name=count.stage)
            if kind := counted.get(count.stage):
                monitor.update(**{f"{kind}_done": count.current, f"{kind}_total": count.total})

    return listen


# ------------------------------------------------------------------------------------------------------- phases


@dataclass
class _Account:
    """One phase: what it has used in all, and its GPU samples."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_rss: int = 0
    gpu_load: float = 0.0  # sum over the samples
    gpu_loads: int = 0
    gpu_load_peak: float | None = None
    gpu_used_mb_peak: float | None = None

    def report(self) -> dict[str, float | None]:
        return {
            "seconds": self.seconds,
            "peak_rss_mb": self.peak_rss / _MB,
            "cpu_percent_mean": 100 * self.cpu_seconds / self.seconds if self.seconds > 0 else None,
            "gpu_util_percent_mean": self.gpu_load / self.gpu_loads if self.gpu_loads else None,
            "gpu_util_percent_peak": self.gpu_load_peak,
            "gpu_used_mb_peak": self.gpu_used_mb_peak,
        }


class PhaseClock:
    """Accounts for the phases of a run: time, memory, processor and GPU load.

    Parameters
    ----------
    monitor : ResourceMonitor, optional
        Where GPU loads come from, while its context lasts. At the end of each phase one more sample is taken, so
        that a phase shorter than the interval has one too.

    Examples
    --------
    >>> clock = PhaseClock()
    >>> with clock.phase("phase4_grid"):
    ...     pass
    >>> list(clock.report())
    ['phase4_grid']
    """

    def __init__(self, monitor: ResourceMonitor | None = None) -> None:
        self._monitor = monitor
        self._accounts: dict[str, _Account] = {}
        self._open: list[_Account] = []
        self._lock = threading.Lock()
        if monitor is not None:
            monitor.add_observer(self._observe)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Account for what happens inside; a name that comes again is added to, and phases may nest."""
        with self._lock:
            account = self._accounts.setdefault(name, _Account())
            self._open.append(account)
        wall, cpu = time.perf_counter(), time.process_time()
        try:
            yield
        finally:
            account.seconds += time.perf_counter() - wall
            account.cpu_seconds += time.process_time() - cpu
            account.peak_rss = peak_rss_bytes()
            try:
                if self._monitor is not None:
                    self._monitor.sample()
            finally:
                with self._lock:
                    self._open.remove(account)

    def _observe(self, row: dict[str, Any]) -> None:
        load, used = row.get("gpu_util_percent"), row.get("gpu_used_mb")
        with self._lock:
            for account in self._open:
                if load is not None:
                    account.gpu_load += load
                    account.gpu_loads += 1
                    account.gpu_load_peak = max(load, account.gpu_load_peak or 0.0)
                if used is not None:
                    account.gpu_used_mb_peak = max(used, account.gpu_used_mb_peak or 0.0)

    def report(self) -> dict[str, dict[str, float | None]]:
        """Return the account of every phase, in the order in which they began.

        Returns
        -------
        dict
            By phase: ``seconds``; ``peak_rss_mb``, the most memory that the process had held by the phase's end;
            ``cpu_percent_mean`` of this process, 100 for one core kept busy; ``gpu_util_percent_mean``,
            ``gpu_util_percent_peak`` and ``gpu_used_mb_peak`` of the whole card, None where no GPU was sampled.
        """
        with self._lock:
            return {name: account.report() for name, account in self._accounts.items()}
