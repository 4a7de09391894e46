"""What a run says while it works: one reporter for the log file, the terminal, and whoever drives the run.

A message has a key (localisable by a graphical interface, may be empty), an English text, a level and fields. Stage
counts are limited to ten a second at the source, and never fall: work that is done again, because a GPU gave up, goes
unseen until it is further than before. `LineLimit` bounds lines for a listener that must not be flooded, and
`TimeLeft` tells from the counts how long the run will take.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

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
    of the run have passed.

    Parameters
    ----------
    clock : callable
        Seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._to_come = dict(STAGE_SHARES)
        self._seen: dict[str, _StageTime] = {}
        self._skipped: set[str] = set()
        self._shown: float | None = None
        self._shown_at = 0.0

    def count(self, stage: str, current: int, total: int) -> None:
        """``current`` of ``total`` of a stage are done; a stage that begins ends those before it."""
        now = self._clock()
        if stage not in self._seen:
            for name in list(self._to_come):
                if list(STAGE_SHARES).index(name) <= list(STAGE_SHARES).index(stage):
                    del self._to_come[name]
            self._finish_current(now)
            self._seen[stage] = _StageTime(now)
        entry = self._seen[stage]
        entry.fraction = min(current / total, 1.0) if total > 0 else 0.0
        entry.seconds = now - entry.began

    def skip(self, stages: Iterable[str]) -> None:
        """Leave stages out of account, done or not: this run does not have them, or not at their usual cost."""
        for name in stages:
            self._skipped.add(name)
            self._to_come.pop(name, None)

    def _finish_current(self, now: float) -> None:
        if self._seen:
            last = self._seen[next(reversed(self._seen))]
            last.seconds, last.fraction = now - last.began, 1.0

    def _estimate(self, now: float) -> float | None:
        """Seconds left by the counts alone; None as long as there is too little to tell from."""
        counted = {name: entry for name, entry in self._seen.items() if name not in self._skipped}
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
        now = self._clock()
        estimate = self._estimate(now)
        if estimate is None or now - self._began < 2:
            return self._shown if self._shown is None else self._count_down(now)
        if self._shown is None:
            self._shown, self._shown_at = estimate, now
            return estimate
        elapsed = now - self._shown_at
        self._count_down(now)
        inertia = min(max(0.05 * estimate, 1.0), 10.0)  # seconds
        self._shown += (estimate - self._shown) * -math.expm1(-elapsed / inertia)
        return self._shown

    def _count_down(self, now: float) -> float:
        self._shown = max(0.0, self._shown - (now - self._shown_at))
        self._shown_at = now
        return self._shown


def clock_text(seconds: float) -> str:
    """Seconds as HH:MM:SS; more than 99 hours take more digits."""
    whole = max(0, math.ceil(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"
