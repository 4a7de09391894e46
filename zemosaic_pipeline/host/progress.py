"""What a run says while it works: one reporter for the log file, the terminal, and whoever drives the run.

A message has a key (localisable by a graphical interface, may be empty), an English text, a level and fields. Stage
counts are limited to ten a second at the source, and never fall: work that is done again, because a GPU gave up, goes
unseen until it is further than before. `TimeLeft` tells from the counts how long the run will take.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from zemosaic_pipeline.errors import Notice

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
#: Stages that a run on given master tiles does not have, or not at their usual cost.
RAW_STAGES = ("phase1_scan", "phase2_cluster", "phase3_master_tiles")
#: The message that says that it is such a run.
MASTER_TILES_GIVEN = "run_info_existing_master_tiles_mode"
SECONDS_BETWEEN_COUNTS = 0.1


class Listener(Protocol):
    """Whoever hears what a run says, in any thread, one message at a time.

    A line comes as ``(key or text, None, level, text=text, **fields)`` with a level of `LEVELS`, a count as
    ``("STAGE_PROGRESS", stage, current, total=total)``, which `stage_count` reads.
    """

    def __call__(self, key: str, progress: str | None, level: str | int, /, **fields: Any) -> object: ...


class StageCount(NamedTuple):
    """So many of the things that a stage counts are done."""

    stage: str
    current: int
    total: int


def stage_count(key: str, progress: str | None, level: str | int, fields: Mapping[str, Any]) -> StageCount | None:
    """The count that a message to a `Listener` holds; None for a line."""
    return StageCount(str(progress), int(level), int(fields["total"])) if key == "STAGE_PROGRESS" else None


class Reporter:
    """Sends every message to the log and to the listeners.

    Parameters
    ----------
    logger : logging.Logger
    callbacks : Listener
        As many as there are.

    Attributes
    ----------
    warnings : list of Notice
        Every warning so far.
    """

    def __init__(self, logger: logging.Logger, *callbacks: Listener) -> None:
        self.logger = logger
        self.callbacks = list(callbacks)
        self.warnings: list[Notice] = []
        self._counts: dict[str, int] = {}
        self._last = 0.0
        self._lock = threading.RLock()  # stages count in many threads; the listeners hear one message at a time

    def say(self, level: str, key: str, text: str, *, kind: str = "", subject: str = "", **fields: Any) -> None:
        """One message; ``text`` goes to the log, the key (or the text where there is none) to the listeners.

        ``kind`` and ``subject`` of a warning are those of `errors.Notice`; listeners do not hear them.
        """
        with self._lock:
            if level == "WARN":
                self.warnings.append(Notice(text, kind, subject))
            self.logger.log(LEVELS[level], "%s", text)
            for callback in self.callbacks:
                callback(key or text, None, level, **{"text": text, **fields})

    def info(self, key: str, text: str, **fields: Any) -> None:
        self.say("INFO", key, text, **fields)

    def warn(self, key: str, text: str, *, kind: str = "", subject: str = "", **fields: Any) -> None:
        self.say("WARN", key, text, kind=kind, subject=subject, **fields)

    @property
    def warning_texts(self) -> list[str]:
        """The texts of all warnings so far, for the report."""
        return [warning.text for warning in self.warnings]

    def stage(self, stage: str, current: int, total: int) -> None:
        """Count of a stage; the first and the last always get through."""
        with self._lock:
            now, before = time.monotonic(), self._counts.get(stage, -1)
            if current <= before or (0 < current < total and now - self._last < SECONDS_BETWEEN_COUNTS):
                return
            self._counts[stage], self._last = current, now
            for callback in self.callbacks:
                callback("STAGE_PROGRESS", stage, int(current), total=int(total))


#: What each stage takes of a run on raw subs, in per cent of its time; the run's own pace soon counts for more.
STAGE_SHARES = {
    "phase1_scan": 30.0,
    "phase2_cluster": 1.0,
    "phase3_master_tiles": 37.0,
    "phase4_grid": 5.0,
    "phase5_intertile": 9.0,
    "phase5_reproject": 15.0,
    "phase6": 2.0,
    "phase7": 1.0,
}


@dataclass
class _StageTime:
    began: float
    seconds: float = 0.0  # until the last count
    fraction: float = 0.0


class TimeLeft:
    """Seconds that a run still needs, from the counts of its stages.

    The stage in hand is extrapolated by its own pace (the more of it is done, the less its share counts); those to
    come take their `STAGE_SHARES` at the pace of what is behind. The answer runs down with the clock and is drawn
    towards the estimate, so that it does not jump where a stage turns out longer. Nothing is told before 2 s and 2 %
    of the run have passed. It may be used from several threads.

    Parameters
    ----------
    clock : callable
        Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._to_come = dict(STAGE_SHARES)
        self._begun: dict[str, _StageTime] = {}
        self._skipped: set[str] = set()
        self._shown: float | None = None
        self._shown_at = 0.0
        self._lock = threading.Lock()

    def __call__(self, key: str, progress: str | None, level: str | int, /, **fields: Any) -> None:
        """A `Listener`: counts, and the message that the run has no `RAW_STAGES`."""
        if count := stage_count(key, progress, level, fields):
            self.count(*count)
        elif key == MASTER_TILES_GIVEN:
            self.skip(RAW_STAGES)

    def count(self, stage: str, current: int, total: int) -> None:
        """``current`` of ``total`` of a stage are done; a stage that begins ends those before it."""
        with self._lock:
            now = self._clock()
            if stage not in self._begun:
                self._begin(stage, now)
            entry = self._begun[stage]
            entry.fraction = min(current / total, 1.0) if total > 0 else 0.0
            entry.seconds = now - entry.began

    def _begin(self, stage: str, now: float) -> None:
        order = list(STAGE_SHARES)
        for name in order[: order.index(stage) + 1]:
            self._to_come.pop(name, None)
        self._finish_current(now)
        self._begun[stage] = _StageTime(now)

    def skip(self, stages: Iterable[str]) -> None:
        """Leave stages out of account, done or not: this run does not have them, or not at their usual cost."""
        with self._lock:
            for name in stages:
                self._skipped.add(name)
                self._to_come.pop(name, None)

    def _finish_current(self, now: float) -> None:
        if self._begun:
            last = self._begun[next(reversed(self._begun))]
            last.seconds, last.fraction = now - last.began, 1.0

    def _estimate(self, now: float) -> float | None:
        """Seconds left by the counts alone; None as long as there is too little to tell from."""
        counted = {name: entry for name, entry in self._begun.items() if name not in self._skipped}
        if not counted:
            return None
        name, stage = next(reversed(counted.items()))
        behind = {key: entry for key, entry in counted.items() if key != name}
        share_behind = sum(STAGE_SHARES[key] for key in behind)
        by_share = None
        if share_behind:
            pace = sum(entry.seconds for entry in behind.values()) / share_behind
            by_share = STAGE_SHARES[name] * pace
        whole = self._whole_stage(stage, by_share, now)
        if whole is None:
            return None
        seconds = sum(entry.seconds for entry in behind.values()) + whole
        pace = seconds / (share_behind + STAGE_SHARES[name])
        share_done = share_behind + STAGE_SHARES[name] * stage.fraction
        if share_done < 0.02 * (share_behind + STAGE_SHARES[name] + sum(self._to_come.values())):
            return None
        return (1 - stage.fraction) * whole + pace * sum(self._to_come.values())

    @staticmethod
    def _whole_stage(stage: _StageTime, by_share: float | None, now: float) -> float | None:
        """Seconds that the stage in hand takes from its begin to its end."""
        if stage.fraction == 0:
            # nothing counted yet: what is left of the share, but never less than half of what has gone
            return None if by_share is None else max(by_share, 1.5 * (now - stage.began))
        by_count = stage.seconds / stage.fraction
        if by_share is None:
            return by_count
        trust = min(1.0, 2 * stage.fraction)
        return trust * by_count + (1 - trust) * by_share

    def seconds(self) -> float | None:
        """Seconds left, or None as long as nobody can know."""
        with self._lock:
            now = self._clock()
            self._shown = self._drawn_to(self._estimate(now), now)
            self._shown_at = now
            return self._shown

    def _drawn_to(self, estimate: float | None, now: float) -> float | None:
        """What was shown, run down with the clock and drawn towards the estimate."""
        if now - self._began < 2:
            estimate = None
        if self._shown is None:
            return estimate
        elapsed = now - self._shown_at
        shown = max(0.0, self._shown - elapsed)
        if estimate is None:
            return shown
        inertia = min(max(0.05 * estimate, 1.0), 10.0)  # seconds
        return shown + (estimate - shown) * -math.expm1(-elapsed / inertia)


def clock_text(seconds: float) -> str:
    """Seconds as HH:MM:SS; more than 99 hours take more digits."""
    whole = max(0, math.ceil(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
