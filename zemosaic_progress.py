"""What a run says while it works: one reporter for the log file, the terminal, and whoever drives the run.

A message has a key (localisable by a graphical interface, may be empty), an English text, a level and fields. Stage
counts are limited to ten a second at the source, and never fall: work that is done again, because a GPU gave up, goes
unseen until it is further than before.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TextIO

LEVELS = {"INFO": logging.INFO, "SUCCESS": logging.INFO, "WARN": logging.WARNING, "ERROR": logging.ERROR}
#: Number of the phase, what is done in it, and what is counted.
STAGES = {
    "phase1_scan": (1, "opening the files", "file"),
    "phase2_cluster": (2, "grouping the frames", "frame"),
    "phase3_master_tiles": (3, "stacking the tiles", "tile"),
    "phase4_grid": (4, "laying out the mosaic", "step"),
    "phase5_intertile": (5, "comparing the overlaps", "tile"),
    "phase5_reproject": (5, "resampling and coadding", "row"),
    "phase6": (6, "saving", "file"),
    "phase7": (7, "cleaning up", "step"),
}
SECONDS_BETWEEN_COUNTS = 0.1

Callback = Callable[..., Any]


class Reporter:
    """Sends every message to the log and to the listeners.

    Parameters
    ----------
    logger : logging.Logger
    callbacks : callables
        Each is called as ``callback(key_or_text, progress, level, **fields)``: log messages with ``progress`` None;
        counts as ``("STAGE_PROGRESS", stage, current, total=total)``.

    Attributes
    ----------
    warnings : list of str
        Every warning so far, for the end of the output and the report.
    """

    def __init__(self, logger: logging.Logger, *callbacks: Callback) -> None:
        self.logger = logger
        self.callbacks = list(callbacks)
        self.warnings: list[str] = []
        self._counts: dict[str, int] = {}
        self._last = 0.0
        self._lock = threading.RLock()  # stages count in many threads; the listeners hear one message at a time

    def say(self, level: str, key: str, text: str, **fields: Any) -> None:
        """One message; ``text`` goes to the log, the key (or the text where there is none) to the listeners."""
        with self._lock:
            if level == "WARN":
                self.warnings.append(text)
            self.logger.log(LEVELS[level], "%s", text)
            for callback in self.callbacks:
                callback(key or text, None, level, **{"text": text, **fields})

    def info(self, key: str, text: str, **fields: Any) -> None:
        self.say("INFO", key, text, **fields)

    def warn(self, key: str, text: str, **fields: Any) -> None:
        self.say("WARN", key, text, **fields)

    def stage(self, stage: str, current: int, total: int) -> None:
        """Count of a stage; the first and the last always get through."""
        with self._lock:
            now, before = time.monotonic(), self._counts.get(stage, -1)
            if current <= before or (0 < current < total and now - self._last < SECONDS_BETWEEN_COUNTS):
                return
            self._counts[stage], self._last = current, now
            for callback in self.callbacks:
                callback("STAGE_PROGRESS", stage, int(current), total=int(total))


class TerminalBar:
    """A progress bar with phase, rate and time left on a terminal; plain lines elsewhere."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._bar: Any = None
        self._stage = ""

    def __call__(self, key: str, progress: Any, level: Any, **fields: Any) -> None:
        if key == "STAGE_PROGRESS":
            self._count(progress, level, fields["total"])
        elif level in ("SUCCESS", "ERROR"):  # warnings are listed at the end
            self._line(("error: " if level == "ERROR" else "") + fields.get("text", key))

    def _count(self, stage: str, current: int, total: int) -> None:
        phase, title, unit = STAGES[stage]
        if stage != self._stage:
            self.close()
            self._stage = stage
            if self._stream.isatty():
                from tqdm import tqdm

                self._bar = tqdm(total=total, desc=f"[{phase}/7] {title}", unit=f" {unit}", file=self._stream)
            else:
                self._line(f"[{phase}/7] {title}")
        if self._bar is not None:
            self._bar.total = total
            self._bar.update(current - self._bar.n)
            self._bar.refresh()
            if current >= total:  # lines that follow stand below it
                self.close()

    def _line(self, text: str) -> None:
        if self._bar is not None:
            self._bar.clear()
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Finish the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class JsonLines:
    """Every message as one JSON object a line on a stream, for programs that drive the command line."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stdout

    def __call__(self, key: str, progress: Any, level: Any, **fields: Any) -> None:
        if key == "STAGE_PROGRESS":
            message = {"stage": progress, "current": level, "total": fields["total"]}
        else:
            message = {"level": level, "key": key, **fields}
        print(json.dumps(message, default=str), file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to finish."""
