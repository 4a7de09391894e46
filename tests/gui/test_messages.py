"""The window's queue and state file: dead ends, limits on lines, counts made whole."""

from __future__ import annotations

import json
import math
import pickle
import queue as queues
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stand_ins import gui_start
from stand_ins.clock import Clock
from stand_ins.gui_here import ListQueue, run_here
from stand_ins.gui_start import STATE, start
from zemosaic_pipeline.gui.line_limit import LineLimit
from zemosaic_pipeline.gui.messages import Channel, Herald, LastState, plain
from zemosaic_pipeline.host.progress import TimeLeft


class Dead:
    """A queue that fails in one way or another."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def put(self, *args: Any) -> None:
        raise self.error


@pytest.mark.parametrize("error", [ValueError("closed"), BrokenPipeError(), EOFError(), RuntimeError("odd")])
def test_a_dead_queue_does_not_harm_the_run(tmp_path, error):
    worked = []

    def engine(source: Path, output: Path, *, progress_callback: Any, **options: Any) -> None:
        for number in range(4):
            progress_callback("STAGE_PROGRESS", "phase1_scan", number, total=3)
        worked.append(True)

    assert run_here(engine, tmp_path, queue=Dead(error)).status == 0 and worked


def test_a_full_queue_that_nobody_reads_does_not_hold_the_run_up(tmp_path):
    queue = queues.Queue(maxsize=2)
    began = time.monotonic()

    def engine(source: Path, output: Path, *, progress_callback: Any, **options: Any) -> None:
        for number in range(1000):
            progress_callback("STAGE_PROGRESS", "phase1_scan", number, total=999)

    assert run_here(engine, tmp_path, queue=queue).status == 0
    assert time.monotonic() - began < 3


def test_the_process_ends_though_nobody_reads(tmp_path):
    """Far more than a pipe holds; `multiprocessing` itself would wait for ever."""
    run = start(gui_start.chatty, output_dir=str(tmp_path), limited=False)
    run.process.join(30)
    assert run.process.exitcode == 0


def test_fields_that_cannot_travel(tmp_path):
    def engine(source: Path, output: Path, *, progress_callback: Any, **options: Any) -> None:
        odd = {"shape": (np.int64(3), 4), "crval": np.array([1.5, np.nan]), "self": 1, "key": 2, "default_text": 3}
        odd |= {"filename": Path("a") / "b\udcff", "call": engine, "many": {1: {2.5}}}
        progress_callback("run_info_phase4_finished", None, "INFO", text="laid out", **odd)
        progress_callback("gone ", None, "WARN", text="it is " + "long " * 1000)

    run = run_here(engine, tmp_path)
    gui_start.check_form(run.messages)
    said = {message[0]: message for message in run.messages}
    fields = said["run_info_phase4_finished"][3]
    assert fields.keys() == {"shape", "crval", "filename", "call", "many"}
    assert (fields["shape"], fields["crval"], fields["many"]) == ([3, 4], [1.5, None], {"1": [2.5]})
    assert fields["filename"].encode() == str(Path("a") / "b").encode() + b"\\udcff"
    (long,) = [message for key, message in said.items() if key.startswith("it is long")]
    assert len(long[0]) == 2000 and len(pickle.dumps(long)) < 4096  # a pipe takes it whole or not at all


# ------------------------------------------------------------------------------------------------- limits and times


def test_lines_pass_in_a_burst_and_then_at_a_rate():
    clock = Clock()
    limit = LineLimit(burst=50, per_second=20, clock=clock)
    assert sum(limit.passes() for _ in range(1000)) == 50
    assert limit.take_left_out() == 950 and limit.take_left_out() == 0
    clock.now = 1.0
    assert sum(limit.passes() for _ in range(1000)) == 20
    clock.now = 100.0
    assert sum(limit.passes() for _ in range(1000)) == 50


def test_warnings_are_counted_apart_and_errors_always_pass():
    queue = ListQueue()
    herald = Herald(Channel(queue), LastState())
    for number in range(500):
        herald(f"line {number}", None, "INFO", text=f"line {number}")
    for number in range(60):
        herald(f"warning {number}", None, "WARN", text=f"warning {number}")
        herald(f"error {number}", None, "ERROR", text=f"error {number}")
    herald("run_success_mosaic_saved", None, "SUCCESS", text="saved", filename="a.fits")
    herald.close()
    levels = [message[2] for message in queue.messages if not message[0].startswith("...")]
    assert [levels.count(level) for level in ("WARN", "ERROR", "SUCCESS")] == [50, 60, 1]
    assert 50 <= levels.count("INFO") < 60
    told = [int(re.search(r"\d+", message[0])[0]) for message in queue.messages if message[0].startswith("...")]
    assert sum(told) == 500 + 60 - levels.count("INFO") - 50


def test_stages_are_made_whole():
    """A stage that begins late or ends early, and counts that fall, as in work that is done again."""
    queue = ListQueue()
    herald = Herald(Channel(queue), LastState())
    for stage, current in (("phase1_scan", 2), ("phase1_scan", 1), ("phase2_cluster", 0), ("phase1_scan", 4)):
        herald("STAGE_PROGRESS", stage, current, total=5)
    herald("STAGE_PROGRESS", "phase3_master_tiles", 0, total=0)
    counts = [(m[1], m[2]) for m in queue.messages if m[0] == "STAGE_PROGRESS"]
    assert counts == [("phase1_scan", 0), ("phase1_scan", 2), ("phase1_scan", 5), ("phase2_cluster", 0)]


def test_the_time_left_is_told_from_two_seconds_on():
    clock, queue = Clock(), ListQueue()
    herald = Herald(Channel(queue), LastState(), TimeLeft(clock))
    herald("STAGE_PROGRESS", "phase6", 0, total=4)
    clock.now = 1.0
    herald.beat({"cpu_percent": 50.0})
    assert [message[0] for message in queue.messages][-1] == "STATS_UPDATE"
    assert queue.messages[-1][3]["cpu_percent"] == 50 and "eta_seconds" not in queue.messages[-1][3]
    clock.now = 100.0
    herald("STAGE_PROGRESS", "phase6", 1, total=4)
    herald.beat({})
    clock_line, stats = queue.messages[-2:]
    assert stats[3]["eta_seconds"] >= 300  # the stage in hand alone has three quarters to go
    hours, minutes, seconds = (int(part) for part in clock_line[0].removeprefix("ETA_UPDATE:").split(":"))
    assert abs(3600 * hours + 60 * minutes + seconds - stats[3]["eta_seconds"]) <= 1


# --------------------------------------------------------------------------------------------------- state file


def test_the_state_file_is_written_at_most_once_a_second(tmp_path, monkeypatch):
    state, clock = LastState(), Clock()
    state.folder = tmp_path
    monkeypatch.setattr("zemosaic_pipeline.gui.messages.time.monotonic", clock)

    def current() -> int:
        return json.loads((tmp_path / STATE).read_text())["current"]

    state.note("PHASE_STARTED", phase="phase1_scan", current=0)
    for number in range(1, 10):
        clock.now += 0.3
        state.note("PROGRESS", current=number)
        assert current() == number // 4 * 4
    state.note("WORKER_DONE", current=99)
    assert current() == 99 and [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_state_file_that_cannot_be_written_is_no_trouble(tmp_path):
    state = LastState()
    state.note("WORKER_STARTED")
    for folder in (tmp_path / "missing", Path(__file__)):
        state.folder = folder
        state.note("WORKER_DONE")


def test_plain_values():
    given = {"a": np.float32(1.5), 2: [np.bool_(True), math.inf, None], "b": Path("x"), "c": frozenset([1])}
    assert plain(given) == {"a": 1.5, "2": [True, None, None], "b": "x", "c": [1]}
    assert type(plain(np.float64(2))) is float and type(plain(np.int64(2))) is int
