"""The worker as a process of the graphical interface.

The window starts `zemosaic_worker.run_hierarchical_mosaic_process` in a spawned, daemonic process and reads a queue.
`gui.messages` says what is in it; ``PROCESS_DONE`` is the last message, whatever happens.

A stop is asked of the run first (``cancelled``), which then ends as after any error and cleans up. A run that does not
answer within `GRACE` seconds, because it is in one long call, is ended by the thread that hears of stops: it removes
the unfinished files, says good-bye and ends the process. What is finished stays for a later run.

Exit status: 0 the mosaic stands; 1 the run failed; 2 the input or a setting cannot be used; 130 it was stopped.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import DONE, ExitStatus, Outcome, UsageError, outcome_of
from zemosaic_pipeline.gui.messages import BEAT, Channel, Herald, LastState, Message, MessageQueue
from zemosaic_pipeline.gui.plan import read_plan
from zemosaic_pipeline.host.folders import remove_temporary
from zemosaic_pipeline.host.threads import collect_seldom
from zemosaic_pipeline.phases.frame_plan import FramePlan
from zemosaic_pipeline.phases.result import Engine
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.settings.values import show, to_bool

GRACE = 2.5
"""Seconds that a stopped run has to end by itself; the window waits 4 s."""
FLUSH = 2.0
"""Seconds that the last messages have to leave the process, if anybody reads them; after a stop, a fourth of it."""
EVENTS = {ExitStatus.DONE: "WORKER_DONE", ExitStatus.INTERRUPTED: "WORKER_CANCELLED"}
"""What the state file says of an end; of all others it says WORKER_ERROR."""
STOPPED = Outcome(ExitStatus.INTERRUPTED)


# ------------------------------------------------------------------------------------------------------------ stop


class StopWatcher:
    """Context manager that hears of a stop whatever the main thread does.

    A signal (SIGTERM, Ctrl-C, on Windows also Ctrl-Break) is written by the system's own handler into a socket, which
    a thread reads: Python's handlers run only between two steps of the main thread, which may be in one long call. A
    parent process that has died counts as a stop.

    Parameters
    ----------
    give_up : callable
        Called in that thread where the context has not ended `GRACE` seconds after the stop.

    Attributes
    ----------
    stopped : threading.Event
    reason : str
        Why, once it is stopped.
    orphaned : bool
        The parent process has died: nobody reads the queue.
    """

    SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGBREAK") if hasattr(signal, name))
    INTERVAL = 0.5  # seconds between two looks at the parent

    def __init__(self, give_up: Callable[[], object]) -> None:
        self.stopped = threading.Event()
        self.reason = ""
        self.orphaned = False
        self._give_up = give_up
        self._over = threading.Event()
        self._parent = multiprocessing.parent_process()

    def __enter__(self) -> StopWatcher:
        self._hear, self._tell = socket.socketpair()
        self._hear.settimeout(self.INTERVAL)
        self._tell.setblocking(False)
        self._before: dict[int, Any] = {}
        with suppress(ValueError):  # not the main thread: signals are somebody else's
            self._before_fd = signal.set_wakeup_fd(self._tell.fileno(), warn_on_full_buffer=False)
            for number in self.SIGNALS:
                self._before[number] = signal.signal(number, lambda *_: None)
        self._thread = threading.Thread(target=self._watch, name="zemosaic-stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        if self._before:
            for number, handler in self._before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._before_fd)
        with suppress(OSError):
            self._tell.send(b"\0")
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * self.INTERVAL)
        self._hear.close()
        self._tell.close()

    def stop(self, reason: str) -> None:
        """Stop the run; the first reason counts."""
        if not self.stopped.is_set():
            self.reason = reason
            self.stopped.set()

    def _watch(self) -> None:
        patience = math.inf
        while not self._over.is_set():
            if self._heard() & set(self.SIGNALS):
                self.stop("stopped by the user")
            elif self._parent is not None and not self._parent.is_alive():
                self.orphaned = True
                self.stop("the program that started it is gone")
            if self.stopped.is_set():
                patience = min(patience, time.monotonic() + GRACE)
                self._hear.settimeout(0.1)
            if time.monotonic() >= patience and not self._over.is_set():
                self._give_up()
                return

    def _heard(self) -> set[int]:
        """Numbers of the signals that have come since the last call."""
        try:
            return set(self._hear.recv(64))
        except OSError:  # nothing came
            return set()


# ------------------------------------------------------------------------------------------------------------- run


@dataclass(frozen=True)
class StartRequest:
    """What the window asks for; ``plan`` is what the user arranged in its filter window, if it was used."""

    source: Path
    output: Path
    settings: Settings
    notes: list[str]
    plan: FramePlan | None = None


def read_request(args: Sequence[Any], kwargs: Mapping[str, Any], solver_settings: Any = None) -> StartRequest:
    """Understand the arguments of a start.

    Raises
    ------
    UsageError
        One of them cannot be used, and which; or another program mode is asked for.
    """
    if args:
        raise UsageError(f"positional arguments ({show(args[0])}, ...) are not understood: give input_dir=... by name.")
    mapping = dict(kwargs)
    if solver_settings is not None:
        mapping["solver_settings_dict"] = solver_settings
    settings, notes = Settings.from_mapping(mapping, "gui")
    folders = {}
    for key, what in (("input_dir", "the folder of the FITS files"), ("output_dir", "where the mosaic goes")):
        text = os.fspath(mapping.get(key) or "").strip()  # `from_mapping` has refused what is no path
        if not text:
            raise UsageError(f"{key} is empty: choose {what}.")
        folders[key] = Path(text)
    refuse_other_modes(mapping, folders["input_dir"])
    return StartRequest(folders["input_dir"], folders["output_dir"], settings, notes, frame_plan(mapping, settings))


def frame_plan(mapping: Mapping[str, Any], settings: Settings) -> FramePlan | None:
    """What the user arranged in the filter window; None where that is nothing.

    Raises
    ------
    UsageError
        It is there and cannot be understood.
    """
    overrides, items = mapping.get("filter_overrides"), mapping.get("filtered_header_items")
    if settings.use_existing_master_tiles or not (overrides or items):
        return None
    plan = read_plan(overrides, items)
    return None if plan == FramePlan() else plan


def refuse_other_modes(mapping: Mapping[str, Any], source: Path) -> None:
    """Raise `UsageError` where the window asks for a program mode that is not this program's."""
    try:
        found = source.is_dir()
        plan = (source / "stack_plan.csv").is_file()
    except OSError as error:
        raise UsageError(f"input_dir = {show(str(source))} cannot be used: {error.strerror or error}.") from error
    if not found:
        raise UsageError(f"input_dir: the folder {source} does not exist, or is no folder; choose another one.")
    if plan:
        raise UsageError(
            f"{source / 'stack_plan.csv'} asks for the ZeGrid mode, which this worker does not have: "
            "move the file away to make the mosaic in the classic mode."
        )
    overrides = mapping.get("filter_overrides")
    asked = [mapping.get("sds_mode_default"), mapping.get("sds_mode")]
    if isinstance(overrides, Mapping):
        asked += [overrides.get("sds_mode_default"), overrides.get("sds_mode")]
    if any(_switched_on(value) for value in asked):
        raise UsageError("The SDS mode is not part of this worker: switch it off (sds_mode_default) and start again.")


def _switched_on(value: Any) -> bool:
    try:
        return to_bool(value)
    except ValueError:
        return False


class GuiRun:
    """One run for the window.

    Parameters
    ----------
    engine : Engine
        ``zemosaic_worker.run_hierarchical_mosaic``.
    queue : MessageQueue
        The window's.
    args, kwargs, solver_settings
        What the window gave.
    """

    def __init__(
        self,
        engine: Engine,
        queue: MessageQueue,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        solver_settings: Any = None,
    ) -> None:
        self._engine = engine
        self._given = (args, kwargs, solver_settings)
        self._channel = Channel(queue)
        self._state = LastState()
        self._herald = Herald(self._channel, self._state)
        self._request: StartRequest | None = None
        self._watch = StopWatcher(self._give_up)
        self._ending = threading.Lock()  # taken once, by the thread that ends the run

    def run(self) -> int:
        """Run and return the exit status; in a child process, end the process with it."""
        if in_child():
            collect_seldom()
        with self._watch:
            self._channel.send("CHRONO_START_REQUEST", None, "CHRONO_LEVEL")
            outcome = self._attempt()
            if not self._ending.acquire(blocking=False):
                threading.Event().wait()  # the watching thread is ending the process
            self._say_end(outcome)
            if in_child():
                end_process(self._channel, outcome.status, FLUSH if self._patient() else FLUSH / 4)
        return outcome.status

    def _patient(self) -> bool:
        return not self._watch.stopped.is_set()

    def _attempt(self) -> Outcome:
        """The run, and whatever may come of it."""
        try:
            self._work()
            return DONE
        except BaseException as error:  # whatever it is, the window must hear of it
            if self._watch.stopped.is_set():  # what breaks while a run is being stopped is of no interest
                return STOPPED
            return outcome_of(error) or program_error(error)

    def _work(self) -> None:
        args, kwargs, solver_settings = self._given
        self._state.folder = existing_folder(kwargs.get("output_dir"))
        self._state.note("WORKER_STARTED", phase="start", operation="reading the settings")
        request = self._request = read_request(args, kwargs, solver_settings)
        self._state.folder = request.output
        from zemosaic_pipeline.host.telemetry import ResourceMonitor

        with ResourceMonitor(None, BEAT, self._herald.beat, gpu_index=request.settings.gpu_id_phase5):
            self._engine(
                request.source,
                request.output,
                progress_callback=self._herald,
                settings=request.settings,
                notes=request.notes,
                cancelled=self._watch.stopped.is_set,
                plan=request.plan,
            )

    def _say_end(self, outcome: Outcome) -> None:
        """The last messages; nothing is sent after them."""
        if self._watch.orphaned:
            self._channel.abandon()
        self._herald.close()
        failed = outcome.status in (ExitStatus.FAILED, ExitStatus.UNUSABLE)
        self._state.note(EVENTS.get(outcome.status, "WORKER_ERROR"), error=outcome.sentence if failed else None)
        if outcome.status == ExitStatus.DONE:
            self._channel.send("ETA_UPDATE:00:00:00", None, "ETA_LEVEL")
        last: list[Message] = []
        if outcome.status == ExitStatus.INTERRUPTED:
            reason = self._watch.reason or "stopped by the user"
            last.append(("log_key_processing_cancelled", None, "WARN", {"reason": reason}))
        elif failed:
            last.append(("PROCESS_ERROR", None, "ERROR", {"error": outcome.sentence}))
        last += [("CHRONO_STOP_REQUEST", None, "CHRONO_LEVEL", {}), ("PROCESS_DONE", None, "INFO", {})]
        self._channel.close(*last)

    def _give_up(self) -> None:
        """End the process although the main thread has not come to its end; called by the watching thread."""
        if not in_child():
            return
        if self._ending.acquire(timeout=0.3):
            self._clean()
            self._say_end(STOPPED)
        end_process(self._channel, STOPPED.status, FLUSH / 4, self._clean)

    def _clean(self) -> None:
        end_children()
        if self._request is not None:
            settings = self._request.settings
            folders = {self._request.output, Path(settings.coadd_memmap_dir or self._request.output)}
            remove_temporary(folders, settings.cleanup_temp_artifacts)


def program_error(error: BaseException) -> Outcome:
    """The end by an error in the program; its traceback goes to standard error."""
    if sys.stderr is not None:  # a program without a console has none
        traceback.print_exception(error)
    sentence = f"an error in the program ({type(error).__name__}: {error}): zemosaic_worker.log holds what to report"
    return Outcome(ExitStatus.FAILED, sentence)


def existing_folder(value: Any) -> Path | None:
    """`value` as a folder that exists, or None."""
    try:
        folder = Path(value)
        return folder if str(value).strip() and folder.is_dir() else None
    except (TypeError, ValueError, OSError):
        return None


def in_child() -> bool:
    """Whether this is a process of its own, which may be ended."""
    return multiprocessing.parent_process() is not None


def end_children() -> None:
    """Kill what this process has started (a plate solver)."""
    # not imported here: the thread that is left behind may be holding the lock of an import
    psutil = sys.modules.get("psutil")
    if psutil is None:
        return
    with suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                child.kill()


def end_process(channel: Channel, status: int, seconds: float, last: Callable[[], object] = lambda: None) -> None:
    """Let the messages out and end the process at once: no thread and no library may hold it up at its exit."""
    channel.flush(seconds)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    last()
    os._exit(status)


def serve(
    engine: Engine,
    queue: MessageQueue,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    solver_settings: Any = None,
) -> int:
    """Run `engine` for the window; see `GuiRun`. Returns the exit status, except in a child process, which ends."""
    return GuiRun(engine, queue, args, kwargs, solver_settings).run()
