"""Bad input, each tried as a user would: a named warning or one clear sentence, never a traceback, nothing lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning

import zemosaic_worker
from scenes.small_scene import LOG, digests, pixels, product, run, write_scene
from zemosaic_pipeline import errors
from zemosaic_pipeline.fits import admission, writer
from zemosaic_pipeline.fits.headers import quiet
from zemosaic_pipeline.host import folders, telemetry
from zemosaic_pipeline.phases import phase5_aesthetic, phase5_coadd, phase5_normalise, phase6_save
from zemosaic_pipeline.pixels import backend_base, backend_cuda
from zemosaic_pipeline.resample import placed
from zemosaic_pipeline.resume import pieces
from zemosaic_pipeline.resume.checkpoints import FOLDER

OUTPUTS = {"run_report.json", LOG} | {f"zemosaic_MT4_R4_{n}" for n in ("science.fits", "coverage.fits", "preview.png")}


@pytest.fixture(scope="session")
def good_panels(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "panels"
    write_scene(folder)
    return folder


@pytest.fixture
def panels(good_panels, tmp_path) -> Path:
    """Four good panels of one's own."""
    return Path(shutil.copytree(good_panels, tmp_path / "in"))


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


def one_sentence(capsys, *words: str) -> str:
    """What the user reads of a failure: one sentence with these words, and no traceback."""
    err = capsys.readouterr().err
    assert "Traceback" not in err and "Warning" not in err
    told = [line for line in err.splitlines() if line.startswith("zemosaic-worker: ")]
    assert len(told) == 1, err
    for word in words:
        assert word in told[0]
    return told[0]


def left_in(folder: Path) -> set[str]:
    """Names in an output folder, without what a resume can use, which is meant to stay (test_resume looks into it)."""
    return {path.name for path in folder.iterdir()} - {FOLDER}


# ------------------------------------------------------------------------------ one bad file among four good panels


def panel_header(folder: Path, **cards) -> fits.Header:
    header = fits.getheader(folder / "panel_01.fits")
    header.update(cards)
    return header


def panel_data(folder: Path) -> np.ndarray:
    return fits.getdata(folder / "panel_01.fits").astype("f4")


def write(folder: Path, data, header=None) -> None:
    fits.PrimaryHDU(data, header).writeto(folder / "bad.fits")


def truncated(folder: Path) -> None:
    whole = (folder / "panel_01.fits").read_bytes()
    (folder / "bad.fits").write_bytes(whole[: len(whole) // 2])


def header_only(folder: Path) -> None:
    (folder / "bad.fits").write_bytes((folder / "panel_01.fits").read_bytes()[:2880])


def without_wcs(folder: Path) -> None:
    write(folder, panel_data(folder))


def broken_gzip(folder: Path) -> None:
    (folder / "bad.fits.gz").write_bytes(b"\x1f\x8b\x08\x00" + bytes(40))


def mono(folder: Path) -> None:
    write(folder, panel_data(folder)[0], panel_header(folder))


def foreign_axes(folder: Path) -> None:
    cards = {"CTYPE1": "FREQ", "CTYPE2": "VELO", "CUNIT1": "Hz", "CUNIT2": "m/s", "CDELT1": 1.0, "CDELT2": 1.0}
    write(folder, panel_data(folder), fits.Header({**cards, "CRVAL1": 1e9, "CRPIX1": 1.0}))


def no_determinant(folder: Path) -> None:
    write(folder, panel_data(folder), panel_header(folder, PC1_1=1.0, PC1_2=1.0, PC2_1=1.0, PC2_2=1.0))


def raw_sub(folder: Path) -> None:
    header = panel_header(folder, BAYERPAT="GRBG")
    del header["MT_NFRAMES"]
    write(folder, panel_data(folder)[0].clip(0, 65535).astype("u2"), header)


BAD_FILES = {
    "empty": (lambda folder: (folder / "bad.fits").touch(), "is empty"),
    "truncated": (truncated, "truncated"),
    "text": (lambda folder: (folder / "bad.fits").write_text("this is a letter\n" * 500), "not a FITS file"),
    "short text": (lambda folder: (folder / "bad.fits").write_text("SIMPLE"), "FITS header"),
    "header without data": (header_only, "no data"),
    "broken gzip": (broken_gzip, "gzip"),
    "1-D": (lambda folder: write(folder, np.zeros(100, "f4"), panel_header(folder)), "one-dimensional"),
    "4-D": (lambda folder: write(folder, np.zeros((2, 3, 9, 9), "f4"), panel_header(folder)), "4 axes (9 x 9 x 3 x 2)"),
    "NAXIS=0": (lambda folder: write(folder, None), "holds no image"),
    "no WCS": (without_wcs, "WCS"),
    "non-celestial WCS": (foreign_axes, "celestial"),
    "zero determinant": (no_determinant, "singular"),
    "all NaN": (lambda f: write(f, panel_data(f) * np.nan, panel_header(f)), "no valid pixel"),
    "all infinite": (lambda f: write(f, panel_data(f) * 0 + np.inf, panel_header(f)), "no valid pixel"),
    "all constant": (lambda f: write(f, panel_data(f) * 0 + 7, panel_header(f)), "same value"),
    "mono among RGB": (mono, "is mono, while most tiles are RGB"),
    "raw sub": (raw_sub, "raw sub"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_one_bad_file_is_set_aside_by_name(kind, panels, out, capsys):
    make, reason = BAD_FILES[kind]
    make(panels)
    before = digests(panels)

    # a raw sub among files of unknown kind makes raw frames of them all: here they are known to be panels
    assert run(panels, out, *(["--tiles"] if kind == "raw sub" else [])) == 0

    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    last_lines = captured.out
    assert "1 warning" in last_lines and "bad.fits" in last_lines and reason in last_lines
    assert reason in (out / LOG).read_text()
    report = json.loads((out / "run_report.json").read_text())
    (aside,) = report["set_aside"]
    assert aside["name"].startswith("bad.fits") and reason in aside["reason"]
    assert left_in(out) == OUTPUTS
    assert digests(panels) == before


@pytest.mark.parametrize("kind", ["empty", "no WCS", "all NaN", "truncated"])
def test_nothing_but_a_bad_file_is_refused(kind, panels, out, capsys):
    make, reason = BAD_FILES[kind]
    make(panels)
    for path in panels.glob("panel_*"):
        path.unlink()
    # without a WCS it is taken for a frame that is yet to be solved
    assert run(panels, out, "--set", "solver_method=none") == 2
    one_sentence(capsys, "bad.fits", reason)
    assert left_in(out) == {LOG}


def test_several_bad_files_and_no_good_one(panels, out, capsys):
    for path in panels.glob("panel_*"):
        path.write_bytes(b"")
    assert run(panels, out) == 2
    one_sentence(capsys, "no usable tile", "panel_00.fits is empty", "3 more")
    assert "panel_03.fits is set aside: it is empty" in (out / LOG).read_text()


def test_infinite_pixels_are_no_data_and_spoil_no_neighbour(panels, out):
    clean = out / "clean"
    assert run(panels, clean, "--quiet", "--set", "feather_px=0") == 0
    with fits.open(panels / "panel_00.fits", mode="update") as hdul:
        hdul[0].data[0, 10, 12], hdul[0].data[1, 11, 60] = np.inf, -np.inf
    assert run(panels, out / "with", "--quiet", "--set", "feather_px=0") == 0
    new, old = pixels(out / "with"), pixels(clean)
    assert np.isfinite(new).all()
    assert np.mean(np.abs(new - old) > 1) < 0.001


@pytest.mark.parametrize("constant", [False, True])
def test_one_tile_only(panels, out, constant):
    for path in sorted(panels.glob("panel_*"))[1:]:
        path.unlink()
    if constant:
        with fits.open(panels / "panel_00.fits", mode="update") as hdul:
            hdul[0].data[:] = 500.0
    assert run(panels, out) == 0
    image = pixels(out)
    tile = fits.getdata(panels / "panel_00.fits")
    assert product(out, "science").name == "zemosaic_MT1_R1_science.fits"
    np.testing.assert_allclose(np.median(image[:, image[0] > 0], axis=1), np.median(tile, axis=(1, 2)), rtol=0.02)


@pytest.mark.parametrize("names", [(), ("notes.txt",)])
def test_zero_tiles(tmp_path, out, capsys, names):
    (tmp_path / "in").mkdir()
    for name in names:
        (tmp_path / "in" / name).write_text("hello")
    assert run(tmp_path / "in", out) == 2
    one_sentence(capsys, "no FITS file", str(tmp_path / "in"))


def test_two_identical_tiles(panels, out, capsys):
    for path in sorted(panels.glob("panel_*"))[1:]:
        path.unlink()
    shutil.copy(panels / "panel_00.fits", panels / "copy.fits")
    assert run(panels, out) == 0
    report = json.loads((out / "run_report.json").read_text())
    gains = np.array([row["gain"] for row in report["tiles"]])
    np.testing.assert_allclose(gains, 1, atol=1e-6)
    np.testing.assert_allclose(np.array([row["offset"] for row in report["tiles"]]), 0, atol=1e-3)


def test_the_same_name_in_two_folders(panels, out):
    for folder in ("night1", "night2"):
        (panels / folder).mkdir()
        for path in sorted(panels.glob("panel_*"))[:2]:
            path.rename(panels / folder / "panel.fits" if path.name[-6] in "02" else panels / folder / "other.fits")
    assert run(panels, out) == 0
    report = json.loads((out / "run_report.json").read_text())
    names = {"night1/panel.fits", "night2/panel.fits", "night1/other.fits", "night2/other.fits"}
    assert {row["name"] for row in report["tiles"]} == names


# --------------------------------------------------------------------------------------------------- folders, disk


def test_output_in_the_input_folder_and_no_mosaic_as_input(panels, capsys):
    before = digests(panels)
    assert run(panels, panels) == 0
    first = pixels(panels)
    assert "warning" not in capsys.readouterr().out
    shutil.copy(product(panels, "science"), panels / "renamed.fit")
    assert run(panels, panels) == 0
    said = capsys.readouterr().out
    for name in ("renamed.fit", "zemosaic_MT4_R4_science.fits", "zemosaic_MT4_R4_coverage.fits"):
        assert f"{name} is set aside: it is a mosaic of an earlier run" in said
    np.testing.assert_array_equal(pixels(panels), first)
    after = digests(panels)
    assert {name: after[name] for name in before} == before


def test_what_an_earlier_run_left_is_not_reported_as_made(panels, out):
    assert run(panels, out, "--set", "final_mosaic_rgb_equalize_enabled=on") == 0
    assert run(panels, out) == 0
    assert "aesthetic" not in json.loads((out / "run_report.json").read_text())["outputs"]


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_input_that_is_no_folder(tmp_path, out, capsys, kind):
    source = tmp_path / "in"
    if kind == "file":
        source.touch()
    assert run(source, out) == 2
    one_sentence(capsys, str(source), {"missing": "does not exist", "file": "not a folder"}[kind])
    assert not out.exists(), "a mistyped input makes no output folder"


@pytest.mark.parametrize("below", [False, True])
def test_a_file_in_place_of_the_output_folder(panels, tmp_path, capsys, below):
    (tmp_path / "file").write_text("mine")
    assert run(panels, tmp_path / "file" / "out" if below else tmp_path / "file") == 2
    one_sentence(capsys, str(tmp_path / "file"), "choose another")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("which", ["in", "in/sub", "out"])
def test_folders_that_cannot_be_used(panels, out, capsys, which):
    folder = panels.parent / which
    folder.mkdir(exist_ok=True)
    folder.chmod(0o500 if which == "out" else 0)
    if os.access(folder, os.W_OK):
        pytest.skip("permissions do not bind the superuser, nor Windows")
    try:
        status = run(panels, out)
    finally:
        folder.chmod(0o700)
    if which == "in/sub":
        assert status == 0 and "sub is set aside: it is a folder that cannot be read" in capsys.readouterr().out
    else:
        assert status == 2
        one_sentence(capsys, str(folder))


def test_a_folder_for_temporary_files_that_is_none(panels, out, tmp_path, capsys):
    assert run(panels, out, "--set", f"coadd_memmap_dir={tmp_path / 'nowhere'}") == 2
    one_sentence(capsys, "coadd_memmap_dir", "nowhere")


def test_no_room_on_the_disk_is_told_before_anything_is_written(panels, out, capsys, monkeypatch):
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert run(panels, out) == 1
    one_sentence(capsys, "_science.fits", "make room")
    assert left_in(out) == {LOG}


@pytest.mark.parametrize("writes", [0, 3, 7])
def test_a_disk_that_fills_up_while_it_is_written(panels, out, capsys, monkeypatch, writes):
    left = [writes]

    def write_at(self, offset, data, real=writer.MosaicWriter._write_at):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, offset, data)

    monkeypatch.setattr(writer.MosaicWriter, "_write_at", write_at)
    assert run(panels, out) == 1
    one_sentence(capsys, "disk is full", "make room")
    assert left_in(out) == {LOG}


@pytest.mark.parametrize("name", ["run_report.json", "preview.png"])
def test_a_disk_that_is_full_at_the_end(panels, out, capsys, monkeypatch, name):
    def fsync(handle):
        path = Path(f"/proc/self/fd/{handle}").resolve().name if sys.platform == "linux" else name
        if name in path:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    assert run(panels, out) == 1
    one_sentence(capsys, "disk is full", name)
    assert not [left for left in left_in(out) if left.startswith(".")]


def test_a_log_that_cannot_be_written_is_no_traceback(panels, out, capsys, monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        flush = close = lambda self: None

    real = folders.LogHandler._open
    monkeypatch.setattr(folders.LogHandler, "_open", lambda self: real(self).close() or Full())
    assert run(panels, out) == 0
    assert "Traceback" not in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ command, settings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", ["settings.json", "not JSON", "line 1"]),
        ("[1, 2]", ["settings.json", "one JSON object"]),
        ('{"kernal": "bilinear"}', ["kernal", "did you mean kernel"]),
        ('{"gain_se_limit": 99}', ["gain_se_limit", "99", "from 0.0001 to 10"]),
        ('{"engine": "reproject", "kernel": "lanczos3"}', ["engine", "lanczos3"]),
    ],
)
def test_configurations_that_cannot_be_used(panels, out, tmp_path, capsys, text, words):
    config = tmp_path / "settings.json"
    config.write_text(text)
    assert run(panels, out, "--config", config) == 2
    one_sentence(capsys, *words)
    assert not out.exists()


def test_panels_are_no_frames(panels, out, capsys):
    for path in panels.iterdir():
        with fits.open(path, mode="update") as hdul:
            hdul[0].header["HIERARCH MT_NFRAMES"] = 1
    assert run(panels, out, "--set", "use_existing_master_tiles=off") == 2
    one_sentence(capsys, "panel_00.fits is a master tile, not a frame", "--tiles", "3 more")
    assert left_in(out) == {LOG}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["INPUT_DIR and OUTPUT_DIR"]),
        (["{in}"], ["INPUT_DIR and OUTPUT_DIR"]),
        (["{in}", "{out}", "--config", "{in}/none.json"], ["none.json", "No such file"]),
        (["{in}", "{out}", "--set", "kernel"], ["--set", "KEY=VALUE"]),
        (["{in}", "{out}", "--set", "colour=on"], ["Unknown setting 'colour'"]),
        (["{in}", "{out}", "--memory-budget", "3"], ["memory_budget", "2GB"]),
        (["{in}", "{out}", "--jobs", "-7"], ["num_processing_workers"]),
        (["{in}", "{out}", "--demo", "{out}"], ["--demo"]),
        (["{in}", "{out}", "--set", "output_wcs_file={in}/panel_09.fits"], ["panel_09.fits"]),
        (["{in}", "{out}", "--set", "global_wcs_res_override=0.01"], ["gigapixels", "panel_0"]),
        (["--demo", "{in}/panel_00.fits/demo"], ["panel_00.fits/demo"]),
    ],
)
def test_commands_that_cannot_be_used(panels, out, capsys, arguments, words):
    filled = [argument.replace("{in}", str(panels)).replace("{out}", str(out)) for argument in arguments]
    assert run(*filled) == 2
    one_sentence(capsys, *words)


def test_wrong_options_are_argparse_s_to_tell(capsys):
    with pytest.raises(SystemExit) as end:
        run("--jobs", "many")
    assert end.value.code == 2 and "--jobs" in capsys.readouterr().err


def test_settings_of_other_programs_are_named_once_in_log_and_report(panels, out, tmp_path, capsys):
    config = tmp_path / "zemosaic_config.json"
    config.write_text('{"intertile_affine_blend": 0.9, "use_existing_master_tiles": false}')
    assert run(panels, out, "--config", config, "--tiles") == 0
    assert capsys.readouterr().out.count("intertile_affine_blend") == 1
    assert "intertile_affine_blend" in (out / LOG).read_text()
    assert any(
        "intertile_affine_blend" in text for text in json.loads((out / "run_report.json").read_text())["warnings"]
    )


def test_verbose_shows_the_traceback_and_nothing_else_does(tmp_path, out, capsys):
    assert run(tmp_path / "none", out, "--verbose") == 2
    assert "Traceback" in capsys.readouterr().err


def test_gpu_on_without_a_gpu_runs_and_says_so_once(panels, out, capsys, monkeypatch):
    def no_card(*arguments):
        raise backend_base.DeviceFailure("no CUDA card was found")

    monkeypatch.setattr(backend_cuda, "open_cuda", no_card)
    assert run(panels, out, "--gpu", "on", "--json-progress") == 0
    messages = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (fallback,) = [m for m in messages if m.get("key") == "phase5_gpu_fallback"]
    assert fallback["level"] == "WARN" and "no CUDA card was found" in fallback["text"]
    assert left_in(out) == OUTPUTS
    report = json.loads((out / "run_report.json").read_text())
    assert report["backend"] == {"used": "cpu", "reason": "no CUDA card was found", "fell_back": True}


def test_a_missing_package_is_named(panels, out, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "reproject.mosaicking", None)
    assert run(panels, out, "--set", "engine=reproject") == 1
    one_sentence(capsys, "reproject", "install")


def test_memory_that_is_not_there(panels, out, capsys, monkeypatch):
    def too_much(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(phase5_coadd, "coadd", too_much)
    assert run(panels, out) == 1
    one_sentence(capsys, "--memory-budget")
    assert left_in(out) == {LOG}


def test_a_tile_that_goes_away_during_the_run(panels, out, capsys, monkeypatch):
    real = admission.scan_tiles

    def scan(*arguments, **options):
        found = real(*arguments, **options)
        (panels / "panel_02.fits").unlink()
        return found

    monkeypatch.setattr(admission, "scan_tiles", scan)
    assert run(panels, out) == 0
    assert "panel_02.fits is set aside: it has pixels that cannot be read" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------------------- Ctrl-C

STAGES = {
    "opening the files": (admission, "open_tile"),
    "laying out the mosaic": (placed, "coordinate_mesh"),
    "looking at the tiles": (pieces, "survey_tile"),
    "measuring": (phase5_normalise, "measure_tile"),
    "solving": (phase5_normalise, "compute_photometric_gains_and_offsets"),
    "writing a block": (writer.MosaicWriter, "write_block"),
    "writing the mask": (writer.MosaicWriter, "write_alpha"),
}
LATE_STAGES = {
    "the aesthetic pass": (phase5_aesthetic, "aesthetic_solution"),
    "the preview": (phase6_save, "save_png"),
    "the report": (zemosaic_worker, "write_json"),
    "a sample": (telemetry.PhaseClock, "report"),
}


def interrupt_at(monkeypatch, place, name) -> None:
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, name, interrupt)


@pytest.mark.parametrize("stage", STAGES)
def test_ctrl_c_leaves_nothing_but_the_log(panels, out, capsys, monkeypatch, stage):
    before = digests(panels)
    with monkeypatch.context() as patch:
        interrupt_at(patch, *STAGES[stage])
        assert run(panels, out, "--set", "two_pass_coverage_renorm=on") == 130
    one_sentence(capsys, "interrupted")
    assert left_in(out) == {LOG}
    assert "interrupted" in (out / LOG).read_text()
    assert digests(panels) == before


@pytest.mark.parametrize("stage", LATE_STAGES)
def test_ctrl_c_later_leaves_whole_files_only(panels, out, capsys, monkeypatch, stage):
    interrupt_at(monkeypatch, *LATE_STAGES[stage])
    options = ["--set", "two_pass_coverage_renorm=on", "--set", "enable_resource_telemetry=on"]
    assert run(panels, out, *options) == 130
    one_sentence(capsys, "interrupted")
    kept = left_in(out)
    assert {"zemosaic_MT4_R4_science.fits", "zemosaic_MT4_R4_coverage.fits"} <= kept
    assert kept <= OUTPUTS - {"run_report.json"} | {"zemosaic_MT4_R4_aesthetic.fits", "resource_telemetry.csv"}
    for path in out.glob("*.fits"):
        with fits.open(path) as hdul:
            hdul.verify("exception")


def test_astropy_stays_silent_where_threads_overlap(panels, out):
    """One thread that leaves `quiet` restores the filters under another, which is still within."""
    warned = []

    def progress(key, stage, level, **fields):
        if key == "STAGE_PROGRESS" and stage < "phase6":  # from there on there is one thread
            one, other = quiet(), quiet()
            one.__enter__()
            other.__enter__()
            one.__exit__(None, None, None)
            warnings.warn("File may have been truncated", AstropyUserWarning, stacklevel=1)
            other.__exit__(None, None, None)
            warned.append(stage)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zemosaic_worker.run_hierarchical_mosaic(panels, out, progress_callback=progress, gpu="off")
    assert {"phase1_scan", "phase4_grid", "phase5_intertile", "phase5_reproject"} <= set(warned)


@pytest.mark.parametrize("stage", ["phase1_scan", "phase4_grid", "phase5_intertile", "phase5_reproject", "phase6"])
def test_a_real_signal_in_each_phase(panels, out, stage):
    sent = []

    def progress(key, current_stage, level, **fields):
        if key == "STAGE_PROGRESS" and current_stage == stage and not sent:
            sent.append(stage)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        zemosaic_worker.run_hierarchical_mosaic(panels, out, progress_callback=progress)
    assert not [name for name in left_in(out) if name.startswith(".") or name.endswith(".part")]
    if stage != "phase6":
        assert left_in(out) == {LOG}


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to catch")
@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_the_program_is_interrupted(panels, out, sig):
    # the slow engine and a second pass: about two seconds of work are left when phase 1 has begun
    slow = ["--set", "engine=reproject", "--set", "two_pass_coverage_renorm=on"]
    command = [sys.executable, zemosaic_worker.__file__, panels, out, "--json-progress", *slow]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.readline()  # phase 1 has begun
        process.send_signal(sig)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err == "zemosaic-worker: interrupted: nothing half-written was left\n"
    assert json.loads(rest.splitlines()[-1])["level"] == "ERROR"
    assert left_in(out) == {LOG}


@pytest.mark.parametrize("asked", [1, 3, 6])
def test_a_caller_that_cancels(panels, out, asked):
    answers = iter([False] * asked)
    with pytest.raises(errors.Cancelled):
        zemosaic_worker.run_hierarchical_mosaic(panels, out, cancelled=lambda: next(answers, True))
    assert left_in(out) == {LOG}
