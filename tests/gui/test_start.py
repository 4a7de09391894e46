"""What the window gives a start, understood or refused; how a run that fails is told."""

from __future__ import annotations

import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from stand_ins import gui_start
from stand_ins.gui_here import ListQueue, run_here
from stand_ins.gui_start import RECORDED, STATE, GuiProcess, check_protocol, snapshot, start
from zemosaic_pipeline.errors import Cancelled, RunError, UsageError
from zemosaic_pipeline.gui.process import read_request, serve
from zemosaic_worker import run_hierarchical_mosaic_process


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
