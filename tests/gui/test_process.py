"""The worker as the graphical interface starts it: what it says, how it ends, how it stops."""

from __future__ import annotations

import json
import math
import os
import pickle
import queue as queues
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest

import zemosaic_worker
from scenes.small_scene import LOG, digests, product, write_scene
from stand_ins import gui_start
from stand_ins.gui_start import (
    CANCELLED,
    RECORDED,
    STATE,
    GuiProcess,
    check_protocol,
    leftovers,
    longest_silence,
    snapshot,
    start,
)
from zemosaic_pipeline.errors import Cancelled, RunError, UsageError
from zemosaic_pipeline.gui.line_limit import LineLimit
from zemosaic_pipeline.gui.messages import Channel, Herald, LastState, plain
from zemosaic_pipeline.gui.process import read_request, serve
from zemosaic_pipeline.host.progress import STAGE_SHARES, TimeLeft, clock_text
from zemosaic_pipeline.synthetic.night import Night, write_night
from zemosaic_pipeline.synthetic.panels import Layout
from zemosaic_worker import run_hierarchical_mosaic, run_hierarchical_mosaic_process

ROOT = Path(zemosaic_worker.__file__).parent
#: Many small panels: every phase lasts some tenths of a second.
MANY = Layout(rows=8, columns=8, shape=(192, 256), overlap=0.3, noise=2.0)
STOPS = 20
RAW_STOPS = 6
posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM: terminate() ends a process at once")


@pytest.fixture(scope="session")
def panels(tmp_path_factory) -> Path:
    """A folder of 64 panels."""
    folder = tmp_path_factory.mktemp("many") / "panels"
    write_scene(folder, layout=MANY)
    return folder


@pytest.fixture(scope="session")
def done(panels, tmp_path_factory) -> SimpleNamespace:
    """A whole run, started as the window does."""
    folder = tmp_path_factory.mktemp("gui") / "new" / "folder"
    before = digests(panels)
    run = start(**snapshot(panels, folder, key_of_version_9=[{}])).listen_to_the_end()
    assert digests(panels) == before
    return SimpleNamespace(run=run, messages=run.messages, folder=folder)


# ------------------------------------------------------------------------------------------------------- whole runs


def test_a_whole_run_keeps_the_protocol(done):
    check_protocol(done.messages, "done")
    assert done.run.process.exitcode == 0
    stages = [message[1] for message in done.run.heard("STAGE_PROGRESS") if message[2] == 0]
    assert stages == ["phase1_scan", "phase4_grid", "phase5_intertile", "phase5_reproject", "phase6", "phase7"]
    phases = [message[0] for message in done.messages if message[0].startswith("PHASE_UPDATE")]
    assert phases == [f"PHASE_UPDATE:{n}" for n in (1, 4, 5, 6, 7)]
    assert longest_silence(done.messages, done.run.times, "STATS_UPDATE") < 2


def test_a_whole_run_makes_what_a_call_from_python_makes(done, panels, tmp_path):
    assert {path.name for path in done.folder.iterdir()} == {
        *(product(done.folder, kind).name for kind in ("science", "aesthetic", "coverage", "preview")),
        *("run_report.json", LOG, STATE),
    }
    settings = json.loads((done.folder / "run_report.json").read_text())["settings"]
    result = run_hierarchical_mosaic(panels, tmp_path, **settings)
    assert result.science.read_bytes() == product(done.folder, "science").read_bytes()


def test_counters_figures_and_lines(done):
    keys = [message[0] for message in done.messages]
    assert "RAW_FILE_COUNT_UPDATE:0/64" in keys and "RAW_FILE_COUNT_UPDATE:64/64" in keys
    assert "MASTER_TILE_COUNT_UPDATE:64/64" in keys
    assert [key for key in keys if key.startswith("ETA")][-1] == "ETA_UPDATE:00:00:00"
    figures = done.run.heard("STATS_UPDATE")[-1][3]
    assert (figures["files_done"], figures["files_total"]) == (64, 64)
    assert 0 <= figures["cpu_percent"] <= 100 and 50 < figures["ram_used_mb"] < figures["ram_total_mb"]
    assert figures["phase_name"] == "phase7" and figures.get("eta_seconds", 0) >= 0  # it may be over before 2 s
    said = {message[0]: message[3] for message in done.messages if message[2] in ("INFO", "SUCCESS")}
    assert said["run_info_existing_master_tiles_mode"] == {"num_tiles": 64}
    assert set(said["run_info_phase4_finished"]) == {"shape", "crval"}
    assert said["run_success_mosaic_saved"] == {"filename": product(done.folder, "science").name}
    assert said["run_success_processing_completed"]["duration"] > 0
    state = json.loads((done.folder / STATE).read_text())
    assert state["event"] == "WORKER_DONE" and {"phase", "operation", "tile_id"} <= state.keys()


def test_the_program_folder_may_be_a_package(panels, tmp_path):
    """As in the window's program: a package whose worker is imported as a top-level module, run from elsewhere."""
    package = tmp_path / "zemosaic"
    package.mkdir()
    (package / "__init__.py").touch()
    for module in ROOT.glob("zemosaic_*.py"):
        shutil.copy(module, package)
    shutil.copytree(ROOT / "zemosaic_pipeline", package / "zemosaic_pipeline")
    shutil.copy(ROOT / "tests/stand_ins/gui_start.py", package / "window.py")
    shutil.copytree(ROOT / "tests/stand_ins/data", package / "data")
    (package / "run_zemosaic.py").write_text(
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\n"
        "import window, zemosaic_worker\n"
        "if __name__ == '__main__':\n"
        "    folder = Path(sys.argv[1])\n"
        "    import zemosaic_pipeline\n"
        "    assert Path(zemosaic_worker.__file__).parent == Path(zemosaic_pipeline.__file__).parents[1] == folder\n"
        "    run = window.start(**window.snapshot(Path(sys.argv[2]), folder.parent / 'out')).listen_to_the_end()\n"
        "    window.check_protocol(run.messages, 'done')\n"
    )
    some = tmp_path / "panels"
    some.mkdir()
    for path in sorted(panels.iterdir())[:3]:
        shutil.copy(path, some)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "zemosaic.run_zemosaic", package, some]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert product(tmp_path / "out", "science").is_file()


def test_the_entrance_is_found_by_name():
    assert pickle.loads(pickle.dumps(run_hierarchical_mosaic_process)) is run_hierarchical_mosaic_process


LIGHT = """
import sys, time

class Refuse:
    def find_spec(self, name, path=None, target=None):
        root = name.partition(".")[0]
        allowed = root in {"numpy", "scipy", "astropy", "erfa", "yaml", "packaging", "astropy_iers_data"}
        if not (allowed or root in sys.stdlib_module_names or root.startswith(("zemosaic_", "_"))):
            raise ImportError(f"{name} is not installed here")

sys.meta_path.insert(0, Refuse())
began = time.perf_counter()
import zemosaic_worker
print(time.perf_counter() - began)
"""


def test_importing_needs_only_numpy_scipy_astropy_and_little_time():
    runs = [
        subprocess.run([sys.executable, "-c", LIGHT], cwd=ROOT, capture_output=True, text=True, check=False)
        for _ in range(3)
    ]
    assert [run.stderr for run in runs] == ["", "", ""]
    assert min(float(run.stdout) for run in runs) < 1


# --------------------------------------------------------------------------------------------------------- failures


def fails(sentence: str, status: int = 2, target: Any = run_hierarchical_mosaic_process, **kwargs: Any) -> GuiProcess:
    """A process that ends with PROCESS_ERROR and a sentence."""
    run = start(target, **kwargs).listen_to_the_end()
    check_protocol(run.messages, "error")
    assert re.search(sentence, run.error) and "\n" not in run.error
    assert run.process.exitcode == status
    return run


def test_an_empty_input_folder(tmp_path):
    (tmp_path / "in").mkdir()
    fails("There is no FITS file", **snapshot(tmp_path / "in", tmp_path / "out"))
    state = json.loads((tmp_path / "out" / STATE).read_text())
    assert state["event"] == "WORKER_ERROR" and "no FITS file" in state["error"]


def test_a_mistake_in_the_program(tmp_path, capfd):
    """The window hears of it, and whoever mends it finds the traceback; an older success is not mistaken for it."""
    (tmp_path / STATE).write_text('{"event": "WORKER_DONE"}')
    fails("ZeroDivisionError: a mistake", 1, gui_start.broken, output_dir=str(tmp_path))
    assert "Traceback" in capfd.readouterr().err
    assert json.loads((tmp_path / STATE).read_text())["event"] == "WORKER_ERROR"


@pytest.mark.parametrize(
    ("key", "value"), [("kappa_low", "plenty"), ("winsor_limits", {}), ("gpu_id_phase5", -7), ("input_dir", 10**30)]
)
def test_a_silly_value_in_a_real_start(tmp_path, key, value):
    fails(key, **snapshot(tmp_path, tmp_path / "out", **{key: value}))
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- in this process


class ListQueue:
    """A queue that keeps what was put."""

    def __init__(self) -> None:
        self.messages: list[tuple] = []

    def put(self, message: tuple, block: bool = True, timeout: float | None = None) -> None:
        pickle.dumps(message)
        self.messages.append(message)


def run_here(engine: Any, tmp_path: Path, *args: Any, queue: Any = None, **kwargs: Any) -> SimpleNamespace:
    """`serve` with an engine of the test's own, in this process."""
    queue = queue or ListQueue()
    folders = {"input_dir": str(tmp_path), "output_dir": str(tmp_path)}
    status = serve(engine, queue, args, folders | kwargs)
    messages = getattr(queue, "messages", [])
    error = next((message[3]["error"] for message in messages if message[0] == "PROCESS_ERROR"), "")
    return SimpleNamespace(status=status, messages=messages, error=error)


def idle(source: Path, output: Path, **options: Any) -> None:
    """An engine that has nothing to do."""


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UsageError("no tiles"), 2, "^no tiles$"),
        (RunError("disk full"), 1, "^disk full$"),
        (MemoryError(), 1, "memory_budget"),
        (ModuleNotFoundError("gone", name="numba"), 1, "package numba is missing"),
        (ModuleNotFoundError("gone", name="zemosaic_pipeline.resample.placed"), 1, "an error in the program"),
        (SystemExit(0), 1, "an error in the program"),
    ],
)
def test_every_failure_becomes_one_sentence(tmp_path, error, status, told):
    def engine(*args: Any, **options: Any) -> None:
        raise error

    run = run_here(engine, tmp_path)
    check_protocol(run.messages, "error")
    assert run.status == status and re.search(told, run.error)


@pytest.mark.parametrize("error", [Cancelled("stopped"), KeyboardInterrupt()])
def test_a_stop_is_no_failure(tmp_path, error):
    def engine(*args: Any, **options: Any) -> None:
        raise error

    run = run_here(engine, tmp_path)
    check_protocol(run.messages, "cancelled")
    assert run.status == 130
    assert json.loads((tmp_path / STATE).read_text())["event"] == "WORKER_CANCELLED"


def test_a_call_in_this_process_leaves_its_signals_alone(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(SystemExit) as end:
        run_hierarchical_mosaic_process(ListQueue(), input_dir=str(tmp_path / "none"), output_dir=str(tmp_path))
    assert end.value.code == 2
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


def test_a_file_that_asks_for_another_program_mode(tmp_path):
    (tmp_path / "stack_plan.csv").touch()
    run = run_here(idle, tmp_path)
    assert run.status == 2 and "stack_plan.csv" in run.error and "ZeGrid" in run.error


@pytest.mark.parametrize("asked", [{"sds_mode_default": "true"}, {"filter_overrides": {"sds_mode": True}}])
def test_settings_that_ask_for_another_program_mode(tmp_path, asked):
    run = run_here(idle, tmp_path, **asked)
    assert run.status == 2 and "SDS" in run.error
    assert run_here(idle, tmp_path, sds_mode_default="off", filter_overrides={"sds_mode": False}).status == 0


@pytest.mark.parametrize("kwargs", [{"input_dir": ""}, {"output_dir": None}, {"input_dir": "x" * 5000}])
def test_folders_that_cannot_be(tmp_path, kwargs):
    run = run_here(idle, tmp_path, **kwargs)
    assert run.status == 2 and next(iter(kwargs)) in run.error


def test_arguments_without_a_name_are_refused(tmp_path):
    assert "positional" in run_here(idle, tmp_path, "/input").error


def test_settings_arrive(tmp_path):
    heard = {}

    def engine(source: Path, output: Path, **options: Any) -> None:
        heard.update(options, folders=(source, output))

    solver = {"solver_choice": "NONE", "timeout": 9}
    kwargs = {"input_dir": f" {tmp_path} ", "output_dir": str(tmp_path / "out"), "preview_png_max_dim": "640"}
    assert serve(engine, ListQueue(), (), {**kwargs, "intertile_affine_blend": 0.9}, solver) == 0
    assert heard["folders"] == (tmp_path, tmp_path / "out")
    assert heard["settings"].preview_png_max_dim == 640
    assert any("intertile_affine_blend" in note for note in heard["notes"])
    assert not heard["cancelled"]()


def test_what_the_filter_window_sends_arrives(tmp_path):
    plans = []

    def engine(source: Path, output: Path, **options: Any) -> None:
        plans.append(options["plan"])

    paths = [str(tmp_path / f"{name}.fit") for name in "abc"]
    frames = [{"path": path, "RA": 1.0} for path in paths]
    window = {"filtered_header_items": frames, "filter_overrides": {"preplan_master_groups": [frames[:1], frames[1:]]}}
    raw = {"use_existing_master_tiles": False}
    for kwargs in (raw | window, raw, raw | {"filter_overrides": {}, "filtered_header_items": []}):
        assert run_here(engine, tmp_path, **kwargs).status == 0
    assert plans[0].frames == set(map(Path, paths))
    assert plans[0].groups == ((Path(paths[0]),), (Path(paths[1]), Path(paths[2])))
    assert plans[1:] == [None, None]


SILLY = (object(), "silly", "", -1, 10**400, -1e308, math.nan, math.inf, [], [1, [2]], {}, {"a": {}}, b"\xff", True)


def test_silly_values_of_every_recorded_key_are_taken_or_refused_by_name(tmp_path):
    """As wrong a type as can be, negative, huge, empty: never anything but a sentence that names the key."""
    given = snapshot(tmp_path, tmp_path / "out", use_existing_master_tiles=False)
    assert len(RECORDED["kwargs"]) == 278
    refused = set()
    for key in [*RECORDED["kwargs"], "solver_settings_dict", "filter_overrides", "filtered_header_items"]:
        for value in SILLY:
            try:
                read_request((), given | {key: value})
            except UsageError as error:
                refused.add(key)
                assert key in str(error), (key, str(error))
                assert "\n" not in str(error) and len(str(error)) < 400
    assert len(refused) > 40


def test_silly_solver_settings(tmp_path):
    given = snapshot(tmp_path, tmp_path / "out")
    for value in SILLY:
        for changes in (value, {"timeout": value}, {"solver_choice": value}):
            try:
                read_request((), given, changes)
            except UsageError as error:
                assert re.search("solver|timeout", str(error)), str(error)


# -------------------------------------------------------------------------------------------------------- dead ends


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


# ------------------------------------------------------------------------------------------------------------- stop


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


# ------------------------------------------------------------------------------------------------- limits and times


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


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


# ------------------------------------------------------------------------------------------------------- state file


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
