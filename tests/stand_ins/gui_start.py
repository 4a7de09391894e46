"""Starting the worker as its graphical interface does, listening to it, and what it may say."""

from __future__ import annotations

import json
import logging
import multiprocessing
import queue as queues
import re
import subprocess
import sys
import time
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from zemosaic_pipeline.files import atomic_path
from zemosaic_pipeline.gui import messages
from zemosaic_pipeline.gui.line_limit import LineLimit
from zemosaic_pipeline.gui.process import serve
from zemosaic_pipeline.host import progress
from zemosaic_pipeline.host.folders import scratch_folder
from zemosaic_pipeline.host.progress import STAGES, Reporter
from zemosaic_worker import run_hierarchical_mosaic_process

RECORDED = json.loads((Path(__file__).parent / "data/gui_kwargs.json").read_text(encoding="utf-8"))
SPAWN = multiprocessing.get_context("spawn")
STATE = "worker_last_state.json"
LEVELS = ("INFO", "WARN", "ERROR", "SUCCESS", "ETA_LEVEL", "CHRONO_LEVEL")
CANCELLED = "log_key_processing_cancelled"
CONTROL = re.compile(
    r"PHASE_UPDATE:[1-7]|ETA_UPDATE:\d{2,}:[0-5]\d:[0-5]\d|(RAW_FILE|MASTER_TILE)_COUNT_UPDATE:\d+/\d+"
    r"|CHRONO_(START|STOP)_REQUEST|STATS_UPDATE|STAGE_PROGRESS|PROCESS_(ERROR|DONE)"
)
WHOLE_NUMBERS = ("phase_index", "files_done", "files_total", "tiles_done", "tiles_total")


def snapshot(source: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """The keyword arguments of the recorded start, for other folders."""
    solver = RECORDED["solver_settings_dict"]
    folders = {"input_dir": str(source), "output_dir": str(output)}
    return RECORDED["kwargs"] | {"solver_settings_dict": solver} | folders | changes


@dataclass
class GuiProcess:
    """A started worker, its queue, and what was heard: messages, and when they came."""

    process: Any
    queue: Any
    messages: list[tuple] = field(default_factory=list)
    times: list[float] = field(default_factory=list)

    def listen(self, seconds: float) -> bool:
        """Take one message if it comes in time."""
        try:
            self.messages.append(self.queue.get(timeout=seconds))
        except queues.Empty:
            return False
        self.times.append(time.monotonic())
        return True

    def listen_to_the_end(self, seconds: float = 60.0) -> GuiProcess:
        """Read until the process is gone, as the window does."""
        limit = time.monotonic() + seconds
        while self.process.is_alive():
            assert time.monotonic() < limit, f"still alive; last heard: {self.messages[-3:]}"
            self.listen(0.05)
        self.process.join()
        while self.listen(0.05):
            pass
        return self

    def heard(self, key: str) -> list[tuple]:
        return [message for message in self.messages if message[0] == key]

    @property
    def error(self) -> str:
        """The sentence of PROCESS_ERROR."""
        ((_, _, _, fields),) = self.heard("PROCESS_ERROR")
        return fields["error"]


def start(target: Any = run_hierarchical_mosaic_process, queue: Any = None, **kwargs: Any) -> GuiProcess:
    """Start a daemonic, spawned process with a queue."""
    queue = queue or SPAWN.Queue()
    process = SPAWN.Process(target=target, args=(queue,), kwargs=kwargs, daemon=True, name="worker")
    process.start()
    return GuiProcess(process, queue)


def is_plain(value: Any) -> bool:
    """Only Python's own types, finite numbers."""
    if isinstance(value, dict):
        return all(type(key) is str for key in value) and all(is_plain(item) for item in value.values())
    if isinstance(value, list):
        return all(is_plain(item) for item in value)
    return value is None or type(value) in (int, str, bool) or (type(value) is float and abs(value) < 1e300)


def check_form(messages: list[tuple]) -> None:
    """Every message is a tuple of four, plain, and of a kind that the window knows."""
    for message in messages:
        assert type(message) is tuple and len(message) == 4, message
        key, progress, level, fields = message
        assert type(key) is str and key and type(fields) is dict and is_plain([progress, level, fields]), message
        assert not {"key", "default_text", "self"} & set(fields), message
        assert key == "STAGE_PROGRESS" or (progress is None and level in LEVELS), message
        is_control = level in ("ETA_LEVEL", "CHRONO_LEVEL") or re.match(r"[A-Z_]{5,}:", key)
        assert not is_control or CONTROL.fullmatch(key), message


def check_protocol(messages: list[tuple], end: str) -> None:
    """Check what was heard of a run as a state machine; ``end`` is done, error or cancelled."""
    check_form(messages)
    keys = [message[0] for message in messages]
    assert keys[0] == "CHRONO_START_REQUEST" and keys[-2:] == ["CHRONO_STOP_REQUEST", "PROCESS_DONE"], keys[-5:]
    for key in ("CHRONO_START_REQUEST", "CHRONO_STOP_REQUEST", "PROCESS_DONE"):
        assert keys.count(key) == 1, key
    assert keys.count("PROCESS_ERROR") == (end == "error") and keys.count(CANCELLED) == (end == "cancelled")
    assert ("run_success_processing_completed" in keys) == (end == "done")
    for message in messages:
        if message[0] == "PROCESS_ERROR":
            assert message[2] == "ERROR" and message[3]["error"]
        if message[0] == CANCELLED:
            assert message[2] == "WARN" and message[3]["reason"]
        if message[0] == "STATS_UPDATE":
            assert all(type(message[3][name]) is int for name in WHOLE_NUMBERS)
    check_stages(messages, complete=end == "done")


def check_stages(messages: list[tuple], complete: bool) -> None:
    """Stages come in order, each begins at 0, only rises, and ends at its total before the next begins."""
    phase, stages = 0, {}
    for key, stage, current, fields in messages:
        if key.startswith("PHASE_UPDATE:"):
            assert int(key[13:]) > phase
            phase = int(key[13:])
        if key == "STAGE_PROGRESS":
            assert set(fields) == {"total"} and type(current) is type(fields["total"]) is int
            assert STAGES[stage][0] == phase, "the phase is told before its stage"
            assert stage in stages or all(counts[-1] == total for counts, total in stages.values())
            counts, total = stages.setdefault(stage, ([], fields["total"]))
            assert fields["total"] == total
            counts.append(current)
    assert list(stages) == [name for name in STAGES if name in stages]
    for counts, total in stages.values():
        assert counts[0] == 0 and counts[-1] <= total and all(b > a for a, b in pairwise(counts))
        assert counts[-1] == total or not complete


def longest_silence(messages: list[tuple], times: list[float], key: str) -> float:
    """Most seconds between two messages of a kind, or between one and the begin or the end."""
    heard = [times[0], *(when for when, message in zip(times, messages, strict=True) if message[0] == key), times[-1]]
    return max(b - a for a, b in pairwise(heard))


def leftovers(folder: Path) -> list[str]:
    """Temporary files in an output folder."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


# ------------------------------------------------------------------------- processes with an engine of the test's own


def chatty_engine(source: Path, output: Path, *, progress_callback: Any, cancelled: Any, **more: Any) -> None:
    """Say as much as a run with a hundred thousand files would, as fast as it can."""
    reporter = Reporter(logging.Logger("chatty", logging.CRITICAL), progress_callback)
    total = 25_000
    for number in range(total + 1):
        reporter.stage("phase1_scan", number, total)
        if number % 5 == 0:
            reporter.warn("", f"sub_{number:05d}.fit is set aside: its header has no date")
        else:
            reporter.info("", f"sub_{number:05d}.fit is solved")


def chatty(queue: Any, output_dir: str, limited: bool) -> None:
    """A process that chats, with the limits of a run or without any."""
    if not limited:
        progress.SECONDS_BETWEEN_COUNTS = 0
        messages.LineLimit = lambda: LineLimit(burst=10**9)
    serve(chatty_engine, queue, (), {"input_dir": output_dir, "output_dir": output_dir})


def deaf_engine(source: Path, output: Path, *, progress_callback: Any, settings: Any, **more: Any) -> None:
    """Never ask whether to stop: one long step, with unfinished files open and a program started."""
    progress_callback("STAGE_PROGRESS", "phase1_scan", 0, total=3)
    with scratch_folder(output, settings) as scratch, atomic_path(output / "mosaic.fits") as part:
        part.write_bytes(b"half")
        (scratch / "pixels").write_bytes(b"half")
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        progress_callback(f"child {child.pid}", None, "INFO", text=f"child {child.pid}")
        time.sleep(60)


def deaf(queue: Any, output_dir: str) -> None:
    """A process with that engine."""
    serve(deaf_engine, queue, (), {"input_dir": output_dir, "output_dir": output_dir})


def broken_engine(source: Path, output: Path, *, progress_callback: Any, **more: Any) -> None:
    """Fail as a mistake in the program does."""
    progress_callback("STAGE_PROGRESS", "phase1_scan", 1, total=3)
    raise ZeroDivisionError("a mistake")


def broken(queue: Any, output_dir: str) -> None:
    """A process with that engine."""
    serve(broken_engine, queue, (), {"input_dir": output_dir, "output_dir": output_dir})
