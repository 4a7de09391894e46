"""zemosaic_pipeline.host.progress: the time that a run still needs."""

from __future__ import annotations

from itertools import pairwise

import pytest

from stand_ins.clock import Clock
from zemosaic_pipeline.host.progress import STAGE_SHARES, TimeLeft, clock_text


def told_at(durations: dict[str, float], clock: Clock, panels: bool = False) -> list[tuple[float, float | None]]:
    """Play a run of so many seconds a stage: what is told each second, as (moment, seconds left)."""
    left, told = TimeLeft(clock), []
    for stage, seconds in durations.items():
        began = clock.now
        left.count(stage, 0, 40)
        if panels and stage == "phase4_grid":
            left.skip(("phase1_scan", "phase2_cluster", "phase3_master_tiles"))
        for step in range(1, 41):
            until = began + seconds * step / 40
            while clock.now + 1 < until:
                clock.now += 1
                told.append((clock.now, left.seconds()))
            clock.now = until
            left.count(stage, step, 40)
            told.append((clock.now, left.seconds()))
    return told


RUNS = {
    "as usual": ({name: 3 * share for name, share in STAGE_SHARES.items()}, 0.05),
    "slow to solve": ({n: s * (20 if n == "phase1_scan" else 3) for n, s in STAGE_SHARES.items()}, 2.0),
    "slow to stack": ({n: s * (10 if n == "phase3_master_tiles" else 2) for n, s in STAGE_SHARES.items()}, 0.7),
    "panels": ({"phase1_scan": 1, "phase4_grid": 10, "phase5_intertile": 20, "phase5_reproject": 60, "phase6": 4}, 0.4),
}


@pytest.mark.parametrize("name", RUNS)
def test_the_time_left_converges(name):
    durations, worst = RUNS[name]
    told = told_at(durations, Clock(), panels=name == "panels")
    total = told[-1][0]
    known = [(now, left) for now, left in told if left is not None]
    assert known[0][0] >= 2 and known[0][0] < 0.2 * total, "nothing at once, something soon"
    errors = {now / total: abs(left - (total - now)) / total for now, left in known}
    assert max(errors.values()) < worst
    assert max(error for share, error in errors.items() if share > 0.95) < 0.25 * max(worst, 0.4)
    for (before, first), (after, second) in pairwise(known):
        assert abs(second - first) < 0.1 * total + (after - before), "no leaps"
    assert known[-1][1] < 0.06 * total


def test_clock_text():
    assert [clock_text(s) for s in (-1, 0, 0.2, 83, 3599.5, 360_000)] == [
        *("00:00:00", "00:00:00", "00:00:01", "00:01:23", "01:00:00", "100:00:00")
    ]
