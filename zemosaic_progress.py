"""What a run says while it works: one reporter for the log file, the terminal, and whoever drives the run.

A message has a key (localisable by a graphical interface, may be empty), an English text, a level and fields. Stage
counts are limited to ten a second at the source.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

LEVELS = {"INFO": logging.INFO, "SUCCESS": logging.INFO, "WARN": logging.WARNING, "ERROR": logging.ERROR}
PHASE_OF_STAGE = {
    "phase1_scan": 1,
    "phase2_cluster": 2,
    "phase3_master_tiles": 3,
    "phase4_grid": 4,
    "phase5_intertile": 5,
    "phase5_reproject": 5,
    "phase6": 6,
    "phase7": 7,
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
        self.callbacks = callbacks
        self.warnings: list[str] = []
        self._last: tuple[str, float] = ("", 0.0)

    def say(self, level: str, key: str, text: str, **fields: Any) -> None:
        """One message; ``text`` goes to the log, the key (or the text where there is none) to the listeners."""
        if level == "WARN":
            self.warnings.append(text)
        self.logger.log(LEVELS[level], text)
        for callback in self.callbacks:
            callback(key or text, None, level, **{"text": text, **fields})

    def info(self, key: str, text: str, **fields: Any) -> None:
        self.say("INFO", key, text, **fields)

    def warn(self, key: str, text: str, **fields: Any) -> None:
        self.say("WARN", key, text, **fields)

    def stage(self, stage: str, current: int, total: int) -> None:
        """Count of a stage; the first and the last always get through."""
        now = time.monotonic()
        inside = self._last[0] == stage and 0 < current < total
        if inside and now - self._last[1] < SECONDS_BETWEEN_COUNTS:
            return
        self._last = (stage, now)
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
        elif level != "INFO":
            self._line(f"{'' if level == 'SUCCESS' else level.lower() + ': '}{fields.get('text', key)}")

    def _count(self, stage: str, current: int, total: int) -> None:
        if not self._stream.isatty():
            if stage != self._stage:
                self._line(f"phase {PHASE_OF_STAGE.get(stage, '')} {stage}")
            self._stage = stage
            return
        if stage != self._stage:
            self.close()
            from tqdm import tqdm

            self._stage = stage
            self._bar = tqdm(total=total, desc=f"[{PHASE_OF_STAGE.get(stage, '')}/7] {stage}", file=self._stream)
        self._bar.total = total
        self._bar.update(current - self._bar.n)
        self._bar.refresh()

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
