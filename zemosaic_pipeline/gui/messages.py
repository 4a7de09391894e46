"""The window's language: what the graphical interface hears of a run, and the state file that it may find.

Every message is a tuple ``(key, progress, level, fields)`` of plain values in a queue:

- `Channel` is the queue: what happens to it, or to the window behind it, never harms the run;
- `Herald` hears the run (it is a `host.progress.Listener`) and sends what the window understands;
- `LastState` keeps ``worker_last_state.json``, for a window that wants to know where a process died.
"""

from __future__ import annotations

import json
import logging
import math
import os
import queue as queues
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from zemosaic_pipeline.gui.line_limit import LineLimit
from zemosaic_pipeline.host.progress import (
    MASTER_TILES_GIVEN,
    STAGES,
    TimeLeft,
    clock_text,
    stage_count,
)

BEAT = 1.0
"""Seconds between two STATS_UPDATE, and at least between two writings of the state file."""
LOCALISED = frozenset(
    {
        "assemble_info_intertile_photometric_applied",
        "assemble_warn_intertile_photometric_failed",
        "phase5_using_cpu",
        "phase5_using_gpu",
        MASTER_TILES_GIVEN,
        "run_info_phase1_finished",
        "run_info_phase1_started_cache",
        "run_info_phase2_finished",
        "run_info_phase2_started",
        "run_info_phase3_finished",
        "run_info_phase3_started",
        "run_info_phase4_finished",
        "run_info_phase5_started_reproject_coadd",
        "run_info_phase6_started",
        "run_success_mosaic_saved",
        "run_success_processing_completed",
    }
)
"""Keys that the window translates; a message with another key is sent as its text."""
FORBIDDEN_FIELDS = frozenset({"key", "default_text", "self"})
#: Key or text, stage, level or count, fields.
Message = tuple[str, Any, Any, Mapping[str, Any]]
LONGEST_TEXT = 2000
"""Characters of one text; below a system's limit for writes that come through whole or not at all."""
_log = logging.getLogger(__name__)


def plain(value: Any) -> Any:
    """Return `value` as a message may hold it: int, float, bool, str, None, lists and dicts of them.

    Numpy's scalars become Python's, NaN and infinity None, everything else its text.
    """
    if hasattr(value, "tolist"):
        value = value.tolist()
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_text(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return _text(value)


def _text(value: Any) -> str:
    """Text that every program can take: no lone surrogates (of file names that are no text), not endless."""
    text = str(value).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= LONGEST_TEXT else text[: LONGEST_TEXT - 1] + "…"


# --------------------------------------------------------------------------------------------------------- channel


class MessageQueue(Protocol):
    """What is asked of the window's queue (of `queue`, `multiprocessing` or a manager)."""

    def put(self, message: Message, block: bool, timeout: float, /) -> object: ...


@runtime_checkable
class ProcessQueue(MessageQueue, Protocol):
    """A queue of `multiprocessing`: a thread of this process empties it."""

    def close(self) -> None: ...
    def join_thread(self) -> None: ...
    def cancel_join_thread(self) -> None: ...


class Channel:
    """The window's queue, from any thread. No method raises, and none waits long."""

    def __init__(self, queue: MessageQueue) -> None:
        self._queue = queue
        self._lock = threading.Lock()
        self._open = True
        self._full = False

    def send(self, key: str, progress: Any, level: Any, fields: Mapping[str, Any] | None = None) -> None:
        """Send one message; after `close` nothing is sent any more."""
        message = _message(key, progress, level, fields or {})
        with self._lock:
            if self._open:
                self._put(message)

    def close(self, *last: Message) -> None:
        """Send the last messages (each the arguments of `send`) and nothing after them."""
        held = self._lock.acquire(timeout=0.2)  # a thread that is stuck in the queue must not keep the end back
        try:
            for message in last:
                if self._open:
                    self._put(_message(*message))
            self._open = False
        finally:
            if held:
                self._lock.release()

    def abandon(self) -> None:
        """Send nothing any more: nobody is there."""
        self._open = False

    def _put(self, message: Message) -> None:
        try:
            # a bounded queue that nobody reads is waited for once
            self._queue.put(message, True, 0.0 if self._full else 0.5)
            self._full = False
        except queues.Full:
            self._full = True
        except Exception as error:  # closed, broken, its server gone: whatever it is, the run does not need it
            self._open = False
            _log.warning("the queue takes no messages any more (%s: %s)", type(error).__name__, error)

    def flush(self, seconds: float) -> None:
        """Let the messages leave this process, for at most so long; the queue cannot be used after it.

        The thread behind a queue of `multiprocessing` waits for ever where nobody reads, and so would the process.
        """
        if not isinstance(self._queue, ProcessQueue):
            return
        with suppress(OSError, ValueError):
            self._queue.close()
            waiter = threading.Thread(target=self._queue.join_thread, name="flush", daemon=True)
            waiter.start()
            waiter.join(seconds)
            if waiter.is_alive():
                self._queue.cancel_join_thread()


def _message(key: str, progress: Any, level: Any, fields: Mapping[str, Any]) -> Message:
    """A message of plain values."""
    kept = {_text(name): plain(value) for name, value in fields.items() if name not in FORBIDDEN_FIELDS}
    return _text(key), plain(progress), plain(level), kept


# ------------------------------------------------------------------------------------------------------ state file


class LastState:
    """``worker_last_state.json`` in the output folder: where the run is, for whoever finds the process dead.

    It holds ``event`` (WORKER_STARTED, PHASE_STARTED, PROGRESS, WORKER_DONE, WORKER_ERROR, WORKER_CANCELLED),
    ``phase`` (name of the stage), ``phase_index``, ``operation`` (what is done in it), ``tile_id`` (how many tiles are
    done, in phases that count tiles), ``current`` and ``total``, ``error``, ``pid`` and ``time`` (s since 1970).
    """

    NAME = "worker_last_state.json"

    def __init__(self) -> None:
        self.folder: Path | None = None
        self._facts: dict[str, Any] = dict.fromkeys(("event", "phase", "phase_index", "operation", "tile_id"))
        self._written = -math.inf
        self._lock = threading.Lock()

    def note(self, event: str, **facts: Any) -> None:
        """Take down what happened; PROGRESS is written at most once a second, the others always.

        No folder, or one that cannot be written, is none of the run's business.
        """
        with self._lock:
            self._facts |= {"event": event, **facts}
            now = time.monotonic()
            if self.folder is None or (event == "PROGRESS" and now - self._written < BEAT):
                return
            self._written = now
            self._write(self.folder, attempts=1 if event == "PROGRESS" else 3)

    def _write(self, folder: Path, attempts: int) -> None:
        # Not synced to the disk: it must outlive the process, not the machine.
        text = json.dumps(plain({**self._facts, "pid": os.getpid(), "time": round(time.time(), 3)}), indent=1)
        part = folder / f".{self.NAME}.{os.getpid()}.part"
        for attempt in range(attempts):
            try:
                part.write_text(text + "\n", encoding="utf-8")
                part.replace(folder / self.NAME)
                return
            except OSError:  # on Windows, while the window reads it
                with suppress(OSError):
                    part.unlink(missing_ok=True)
                if attempt + 1 < attempts and folder.is_dir():
                    time.sleep(0.05)


# ---------------------------------------------------------------------------------------------------------- herald


class Herald:
    """Hears the run and tells the window, in its language.

    Stages begin at 0, only rise, and end at their total. Lines come 50 in a burst, then 20 a second (warnings and
    other lines are counted apart, so that chatter cannot displace a warning); a line says how many were left out: all
    of them stand in the log file. Errors and the lines of success always pass.

    Parameters
    ----------
    channel : Channel
    state : LastState
    time_left : TimeLeft, optional
    """

    def __init__(self, channel: Channel, state: LastState, time_left: TimeLeft | None = None) -> None:
        self._channel, self._state = channel, state
        self._lock = threading.Lock()
        self._limits = {"INFO": LineLimit(), "WARN": LineLimit()}
        self._time_left = time_left or TimeLeft()
        self._counts: dict[str, tuple[int, int]] = {}
        self._phase = 0
        self._stats: dict[str, Any] = {"phase_index": 0, "phase_name": ""}
        self._stats |= dict.fromkeys(("files_done", "files_total", "tiles_done", "tiles_total"), 0)

    def __call__(self, key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        """A `host.progress.Listener`."""
        with self._lock:
            self._time_left(key, progress, level, **fields)
            if count := stage_count(key, progress, level, fields):
                self._count(*count)
            else:
                self._line(key, str(level), fields)

    # ---- stages

    def _count(self, stage: str, current: int, total: int) -> None:
        if total <= 0 or current <= self._counts.get(stage, (-1, 0))[0]:
            return
        if stage not in self._counts:
            self._begin(stage, total)
            if current == 0:
                return
        self._send_count(stage, min(current, total), total)

    def _begin(self, stage: str, total: int) -> None:
        if self._counts:  # what follows has begun: what was before is done
            before, (done, all_of_it) = next(reversed(self._counts.items()))
            if done < all_of_it:
                self._send_count(before, all_of_it, all_of_it)
        number, operation, _ = STAGES[stage]
        if number != self._phase:
            self._phase = number
            self._channel.send(f"PHASE_UPDATE:{number}", None, "ETA_LEVEL")
        self._stats |= {"phase_index": int(number), "phase_name": stage}
        self._state.note(
            "PHASE_STARTED", phase=stage, phase_index=number, operation=operation, tile_id=None, current=0, total=total
        )
        self._send_count(stage, 0, total)

    def _send_count(self, stage: str, current: int, total: int) -> None:
        self._counts[stage] = (current, total)
        self._channel.send("STAGE_PROGRESS", stage, current, {"total": total})
        if stage == "phase1_scan":
            self._channel.send(f"RAW_FILE_COUNT_UPDATE:{current}/{total}", None, "ETA_LEVEL")
            self._stats |= {"files_done": current, "files_total": total}
        elif stage == "phase3_master_tiles":
            self._count_tiles(current, total)
        if current:
            tile = current if STAGES[stage][2] == "tile" else None
            self._state.note("PROGRESS", current=current, total=total, tile_id=tile)

    def _count_tiles(self, current: int, total: int) -> None:
        self._channel.send(f"MASTER_TILE_COUNT_UPDATE:{current}/{total}", None, "ETA_LEVEL")
        self._stats |= {"tiles_done": current, "tiles_total": total}

    # ---- lines

    def _line(self, key: str, level: str, fields: dict[str, Any]) -> None:
        if key == MASTER_TILES_GIVEN:
            self._count_tiles(int(fields["num_tiles"]), int(fields["num_tiles"]))
        text = fields.pop("text", key)
        limit = self._limits.get(level)
        if limit is not None and key not in LOCALISED and not limit.passes():
            return
        self._tell_left_out()
        if key in LOCALISED:
            self._channel.send(key, None, level, fields)
        else:
            self._channel.send(text, None, level)

    def _tell_left_out(self, at_the_end: bool = False) -> None:
        for level, limit in self._limits.items():
            if limit.left_out and (at_the_end or limit.has_room()):
                kind = "warnings" if level == "WARN" else "lines"
                count = limit.take_left_out()
                self._channel.send(f"... and {count} more {kind}: zemosaic_worker.log has them all", None, level)

    # ---- time

    def beat(self, sample: Mapping[str, Any]) -> None:
        """Time left and resource figures, in the sampler's thread.

        Parameters
        ----------
        sample : mapping
            Fields of `host.telemetry.STATS_FIELDS` that are known.
        """
        with self._lock:
            seconds = self._time_left.seconds()
            stats = dict(self._stats)
            self._tell_left_out()
        if seconds is not None:
            stats["eta_seconds"] = round(seconds, 1)
            self._channel.send(f"ETA_UPDATE:{clock_text(seconds)}", None, "ETA_LEVEL")
        self._channel.send("STATS_UPDATE", None, "ETA_LEVEL", {**sample, **stats})

    def close(self) -> None:
        """Say what is left to say."""
        if self._lock.acquire(timeout=0.2):  # the thread that holds it may be the one that has to be left behind
            try:
                self._tell_left_out(at_the_end=True)
            finally:
                self._lock.release()
