"""What the phases of a run share: the tools for work on pixels, the reporter, the account of what was used."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from threadpoolctl import threadpool_limits

from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.fits.find import SetAside
from zemosaic_pipeline.fits.headers import quiet
from zemosaic_pipeline.host import telemetry
from zemosaic_pipeline.host.folders import log_file, log_start, scratch_folder
from zemosaic_pipeline.host.progress import Listener, Reporter
from zemosaic_pipeline.host.telemetry import PhaseClock, ResourceMonitor, telemetry_feed
from zemosaic_pipeline.host.threads import worker_count
from zemosaic_pipeline.phases.frame_plan import FramePlan
from zemosaic_pipeline.pixels import backend_cuda
from zemosaic_pipeline.pixels.backend_switch import BackendSwitch
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resume.checkpoints import NothingKept, checkpoints
from zemosaic_pipeline.settings.settings import Settings

#: Shares of the memory budget: for tiles kept in memory, for the blocks under way, and for coarse tiles.
STORE_SHARE, BLOCK_SHARE, COARSE_SHARE = 0.35, 0.35, 0.15
#: Share of the memory budget for frames kept in memory: the blocks of a panel are small.
FRAME_SHARE = 0.65


@dataclass(frozen=True)
class Tools:
    """What the work on pixels needs: settings, a backend, threads, and how it is stopped, kept and counted.

    ``count(stage, done, total)`` hears of progress. ``hubs`` is the number of tiles with which all others are compared
    (0: every overlapping pair is).
    """

    settings: Settings
    switch: BackendSwitch
    jobs: int
    cancelled: Callable[[], bool] = lambda: False
    kept: NothingKept = field(default_factory=NothingKept)
    count: Callable[[str, int, int], object] = lambda stage, done, total: None
    hubs: int = 0

    def check(self) -> None:
        """Raise :class:`Cancelled` where the user has stopped the run."""
        if self.cancelled():
            raise Cancelled

    def block_bytes(self, limit: int | None) -> int:
        """Memory for the blocks under way; ``limit`` is what the backend has, None for no limit of its own."""
        share = int(BLOCK_SHARE * self.settings.memory_budget)
        return share if limit is None else min(limit, 4 * share)


@dataclass
class Run:
    """One run: its folders, its tools, what it says, and what becomes of every input.

    ``plan`` holds the frames that the user has chosen; ``frames`` are the rows of the report on raw frames, by name.
    ``release()`` lets go of the card and of the monitor, whose last words belong into the report.
    """

    source: Path
    output: Path
    scratch: Path
    plan: FramePlan | None
    tools: Tools
    reporter: Reporter
    clock: PhaseClock
    monitor: ResourceMonitor | None = None
    release: Callable[[], object] = lambda: None
    began: float = field(default_factory=time.monotonic)
    aside: list[SetAside] = field(default_factory=list)
    frames: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def settings(self) -> Settings:
        return self.tools.settings

    @property
    def kept(self) -> NothingKept:
        return self.tools.kept

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Account for what happens within to a phase; a name that comes again is added to."""
        return self.clock.phase(name)

    def frame_store(self) -> PixelStore:
        """Where the pixels of frames that Phase 1 has read wait for Phase 3."""
        return PixelStore(int(FRAME_SHARE * self.settings.memory_budget))

    def tile_store(self) -> PixelStore:
        """Where the pixels of tiles are kept from step to step, as far as the memory goes."""
        return PixelStore(int(STORE_SHARE * self.settings.memory_budget))

    def set_aside(self, name: str, reason: str) -> None:
        """One input less, with its named warning; ``reason`` is what is true of it ("is empty")."""
        self.aside.append(SetAside(name, reason))
        self.reporter.warn("", f"{name} is set aside: it {reason}", kind="set_aside", subject=name)

    def set_frame_aside(self, name: str, reason: str) -> None:
        """One frame less, with its warning and its line in the report."""
        self.set_aside(name, reason)
        self.frames[name] |= {"status": "set aside", "reason": reason}

    def choose_backend(self) -> None:
        """Open the GPU where it is wanted and there, and say what Phase 5 uses."""
        switch = self.tools.switch
        switch.start()
        on_gpu = switch.name == "gpu"
        if self.monitor is not None:
            self.monitor.update(use_gpu=on_gpu, use_gpu_phase5=on_gpu, gpu_backend="cuda" if on_gpu else None)
        backend = f"the GPU ({switch.reason})" if on_gpu else "the CPU"
        self.reporter.info(f"phase5_using_{switch.name}", f"Phase 5 uses {backend}")


def nothing_usable(aside: Sequence[SetAside], where: str = "", what: str = "tile") -> str:
    """The sentence that refuses an input without a usable tile (or frame)."""
    more = f", and {len(aside) - 1} more (see the warnings)" if len(aside) > 1 else ""
    return f"There is no usable {what}{where}: {aside[0].name} {aside[0].reason}{more}."


@contextmanager
def open_run(
    source: Path,
    output: Path,
    settings: Settings,
    *,
    plan: FramePlan | None = None,
    listeners: Sequence[Listener] = (),
    notes: Sequence[str] = (),
    cancelled: Callable[[], bool] = lambda: False,
) -> Iterator[Run]:
    """A run in folders that exist: log and lock, scratch folder, checkpoints, backend, telemetry, from begin to end.

    Raises
    ------
    UsageError
        Another run is at work in the output folder, or the scratch folder cannot be made.
    RunError
        The log cannot be written.
    """
    began = time.monotonic()
    with log_file(output / "zemosaic_worker.log", settings.logging_level) as logger:
        reporter = Reporter(logger, *listeners)
        log_start(logger, source, output, settings)
        for note in notes:
            reporter.warn("", note)
        with (
            scratch_folder(output, settings) as scratch,
            checkpoints(output, settings, lambda level, text: reporter.say(level, "", text)) as kept,
        ):
            with ExitStack() as stack:
                # our own threads use the cores; the linear algebra of small systems must not compete with them
                stack.enter_context(threadpool_limits(1))
                stack.enter_context(quiet())
                jobs = worker_count(settings)
                monitor = stack.enter_context(load_monitor(settings, output, reporter, jobs))
                switch = backend_switch(settings, reporter)
                stack.callback(switch.close)
                tools = Tools(settings, switch, jobs, cancelled, kept, reporter.stage)
                clock = PhaseClock(monitor)
                yield Run(source, output, scratch, plan, tools, reporter, clock, monitor, stack.close, began)
            reporter.stage("phase7", 0, 1)
        reporter.stage("phase7", 1, 1)
        duration = round(time.monotonic() - began, 1)
        reporter.say("SUCCESS", "run_success_processing_completed", f"done in {duration} s", duration=duration)


def backend_switch(settings: Settings, reporter: Reporter) -> BackendSwitch:
    """The switch between CPU and GPU that the settings ask for; a fallback is one warning."""
    switch = BackendSwitch(
        settings.gpu,
        lambda: backend_cuda.open_cuda(settings.gpu_id_phase5, settings.gpu_selector),
        lambda key, text: reporter.warn(key, text, reason=switch.reason),
    )
    return switch


@contextmanager
def load_monitor(settings: Settings, output: Path, reporter: Reporter, jobs: int) -> Iterator[ResourceMonitor | None]:
    """The monitor of the machine's load, which hears where the run stands; None where it is not asked for."""
    if not settings.enable_resource_telemetry:
        yield None
        return
    csv = output / "resource_telemetry.csv"
    with telemetry.ResourceMonitor(
        csv if settings.resource_telemetry_log_to_csv else None,
        interval_sec=settings.resource_telemetry_interval_sec,
        gpu_index=settings.gpu_id_phase5,
        warn=lambda text: reporter.warn("", text),
    ) as monitor:
        reporter.callbacks.append(telemetry_feed(monitor))
        monitor.update(cpu_workers=jobs, max_chunk_bytes=settings.memory_budget)
        yield monitor
