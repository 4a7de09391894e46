"""A whole run as the graphical interface starts it: what it says and makes; what importing needs."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys

from scenes.places import ROOT
from scenes.small_scene import LOG, product
from stand_ins.gui_start import STATE, check_protocol, longest_silence
from zemosaic_worker import run_hierarchical_mosaic, run_hierarchical_mosaic_process


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
