"""A run that the window stops, in every phase; one that does not listen; one whose window has died."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from scenes.places import ROOT
from stand_ins import gui_start
from stand_ins.gui_start import (
    CANCELLED,
    STATE,
    GuiProcess,
    check_protocol,
    leftovers,
    longest_silence,
    snapshot,
    start,
)
from zemosaic_pipeline.synthetic.night import Night, write_night

STOPS = 20
RAW_STOPS = 6
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM: terminate() ends a process at once")


def is_gone(number: int) -> bool:
    """Whether a process has ended, mourned by its parent or not."""
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


PANEL_STAGES = ["start", "phase1_scan", "phase4_grid", "phase5_intertile", "phase5_reproject", "second pass", "phase6"]
RAW_STAGES = ["phase1_scan", "phase2_cluster", "phase3_master_tiles"]


def stop_at(k: int, source: Path, folder: Path, stages: list[str] = PANEL_STAGES) -> SimpleNamespace:
    """Start a run and stop it in its k-th way: in each phase in turn, a random while after it began."""
    moment = random.Random(k)
    wanted = stages[k % len(stages)]

    def reached(run: GuiProcess) -> bool:
        if wanted == "start":
            return bool(run.messages)
        if wanted == "second pass":
            return any(m[1] == "phase5_reproject" and m[2] > m[3]["total"] // 2 for m in run.messages)
        return any(m[1] == wanted for m in run.messages)

    run = start(**snapshot(source, folder, use_existing_master_tiles=stages is PANEL_STAGES))
    while run.process.is_alive() and not reached(run):
        run.listen(0.05)
    time.sleep(moment.uniform(0, 0.3))
    asked = time.monotonic()
    run.process.terminate()
    run.listen_to_the_end()
    return SimpleNamespace(run=run, folder=folder, seconds=time.monotonic() - asked, wanted=wanted)


@pytest.fixture(scope="module")
def stopped(panels, tmp_path_factory) -> Iterator[list[SimpleNamespace]]:
    """Runs that were stopped in all phases, two at a time."""
    folders = [tmp_path_factory.mktemp(f"stop{k}") for k in range(STOPS)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda k: stop_at(k, panels, folders[k]), range(STOPS)))


@pytest.fixture(scope="module")
def stopped_nights(tmp_path_factory) -> list[SimpleNamespace]:
    """Runs on raw frames that were stopped in Phases 1 to 3."""
    night = Night(rows=1, columns=3, frames=8, shape=(480, 320), with_wcs=True, bad_frames=False, hot=100, warm=100)
    lights, _ = write_night(tmp_path_factory.mktemp("night"), night)
    folders = [tmp_path_factory.mktemp(f"stop{k}") for k in range(RAW_STOPS)]
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda k: stop_at(k, lights, folders[k], RAW_STAGES), range(RAW_STOPS)))


@posix
def test_a_run_on_raw_frames_stops_in_its_phases(stopped_nights):
    check_stops(stopped_nights, 3)
    for stop in stopped_nights:
        assert leftovers(stop.folder) == []


@posix
def test_a_run_stops_in_every_phase(stopped):
    check_stops(stopped, 5)


def check_stops(stopped, phases: int) -> None:
    """Every run has ended in time and by the protocol, and in so many phases by the stop."""
    ends = set()
    for stop in stopped:
        end = "cancelled" if stop.run.heard(CANCELLED) else "done"  # the last moment may be too late
        check_protocol(stop.run.messages, end)
        assert stop.run.process.exitcode == {"cancelled": 130, "done": 0}[end], stop.wanted
        assert stop.seconds < 4, stop.wanted
        state = json.loads((stop.folder / STATE).read_text()) if (stop.folder / STATE).exists() else None
        assert state is None or state["event"] == {"cancelled": "WORKER_CANCELLED", "done": "WORKER_DONE"}[end]
        ends.add((stop.wanted, end))
    assert len({wanted for wanted, end in ends if end == "cancelled"}) >= phases


@posix
def test_a_stopped_run_leaves_whole_files_only(stopped, done):
    whole = {path.name: path.stat().st_size for path in done.folder.iterdir()}
    for stop in stopped:
        assert leftovers(stop.folder) == []
        for path in stop.folder.iterdir():
            if path.suffix in (".fits", ".png"):
                assert path.stat().st_size == whole[path.name], path


@posix
def test_a_process_may_be_stopped_while_it_starts(panels, tmp_path):
    for delay in (0.05, 0.3):
        run = start(**snapshot(panels, tmp_path))
        time.sleep(delay)
        run.process.terminate()
        began = time.monotonic()
        run.listen_to_the_end()
        assert time.monotonic() - began < 4 and leftovers(tmp_path) == []
        if run.messages:
            check_protocol(run.messages, "cancelled")
        else:  # the interpreter had not come to us yet
            assert run.process.exitcode == -signal.SIGTERM


@posix
def test_a_run_that_does_not_listen_is_ended(tmp_path):
    """The main thread is in one long call, a program runs, files are half-written."""
    run = start(gui_start.deaf, output_dir=str(tmp_path))
    while not any(message[0].startswith("child") for message in run.messages):
        run.listen(1)
    child = int(run.messages[-1][0].split()[1])
    assert len(leftovers(tmp_path)) == 2
    run.process.terminate()
    began = time.monotonic()
    run.listen_to_the_end()
    assert 2 < time.monotonic() - began < 4
    check_protocol(run.messages, "cancelled")
    assert run.process.exitcode == 130 and leftovers(tmp_path) == []
    assert longest_silence(run.messages, run.times, "STATS_UPDATE") < 2
    assert is_gone(child)


ORPHAN = """
import os, signal, sys
from pathlib import Path
from stand_ins import gui_start

if __name__ == "__main__":
    run = gui_start.start(gui_start.deaf, output_dir=sys.argv[1])
    while not any(message[0].startswith("child") for message in run.messages):
        run.listen(1)
    print(run.process.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_a_run_whose_window_has_died_ends(tmp_path):
    program, output = tmp_path / "window.py", tmp_path / "out"
    program.write_text(ORPHAN)
    output.mkdir()
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    window = subprocess.Popen(
        [sys.executable, program, output],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    number = int(window.stdout.readline())
    window.wait()
    began = time.monotonic()
    window.communicate()  # until the worker, which has the same standard output, is gone
    assert time.monotonic() - began < 5
    assert is_gone(number)
    assert leftovers(output) == []
    assert json.loads((output / STATE).read_text())["event"] == "WORKER_CANCELLED"
