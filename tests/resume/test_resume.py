"""What a stopped run leaves, and what the next one makes of it: the same bits, or a named reason why not."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import zemosaic_worker
from scenes.places import ROOT
from scenes.small_scene import long_ago, product, write_scene
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.files import checksum, pack, unpack
from zemosaic_pipeline.fits.preview import PreviewAccumulator
from zemosaic_pipeline.fits.writer import MosaicWriter
from zemosaic_pipeline.phases import phase5_canvas
from zemosaic_pipeline.resample.blocks import without
from zemosaic_pipeline.resume import index, inputs
from zemosaic_pipeline.resume.checkpoints import FOLDER, Checkpoints, Codec
from zemosaic_pipeline.resume.fingerprint import fingerprint, program_files, settings_of
from zemosaic_pipeline.settings.settings import SETTINGS as ROWS
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.synthetic.panels import Layout
from zemosaic_worker import run_hierarchical_mosaic

#: Large enough that 64 threads, which share the memory budget, cut it into some dozens of blocks.
LAYOUT = Layout(rows=3, columns=3, shape=(150, 180), overlap=0.4, noise=2.0, rotation_deg=4.0)
SETTINGS = {"gpu": "off", "memory_budget": "64MB", "num_processing_workers": 40, "two_pass_coverage_renorm": True}
SETTINGS |= {"final_mosaic_rgb_equalize_enabled": True, "two_pass_cov_sigma_px": 16, "preview_png_max_dim": 300}
SETTINGS |= {"level_sky": True}
KINDS = ("science", "aesthetic", "coverage", "preview")
STEPS = {"frame", "solve", "stack", "survey", "photometry", "science", "aesthetic"}


def mosaics(folder: Path) -> dict[str, bytes]:
    return {kind: product(folder, kind).read_bytes() for kind in KINDS}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture(scope="session")
def scene(tmp_path_factory) -> SimpleNamespace:
    """Nine panels, and what an uninterrupted run that keeps nothing makes of them."""
    panels, out = tmp_path_factory.mktemp("panels"), tmp_path_factory.mktemp("whole")
    write_scene(panels, layout=LAYOUT)
    long_ago(panels)
    run_hierarchical_mosaic(panels, out, resume="off", **SETTINGS)
    return SimpleNamespace(panels=panels, whole=mosaics(out), names=names(out))


@pytest.fixture
def panels(scene, tmp_path) -> Path:
    """A copy of the panels that may be spoilt."""
    shutil.copytree(scene.panels, tmp_path / "in")
    return tmp_path / "in"


class Stopped(Exception):
    """Ends a run as a crash would."""


def stop_after(monkeypatch, blocks: int) -> None:
    """Let the run crash once so many blocks are finished, in both passes together."""
    count, lock = [0], threading.Lock()
    real = phase5_canvas.Canvas.put

    def put(self, *block):
        with lock:
            count[0] += 1
            if count[0] > blocks:
                raise Stopped
        real(self, *block)

    monkeypatch.setattr(phase5_canvas.Canvas, "put", put)


def stopped(panels: Path, out: Path, blocks: int = 12, **settings) -> None:
    """A run that crashed in the middle of the first pass (or where ``blocks`` says)."""
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, blocks)
        with pytest.raises(Stopped):
            run_hierarchical_mosaic(panels, out, **{**SETTINGS, **settings})


def resumed(panels: Path, out: Path, **settings) -> SimpleNamespace:
    """The next run: what its report says of the resume, and its log."""
    result = run_hierarchical_mosaic(panels, out, **{**SETTINGS, **settings})
    log = (out / "zemosaic_worker.log").read_text()
    return SimpleNamespace(**result.report["resume"], log=log, warnings=result.report["warnings"])


# ------------------------------------------------------------------------------------------------------- whole runs


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_at_random_moments_and_resumed_it_is_the_same_mosaic(scene, tmp_path):
    """Twenty kills in five chains: four runs are killed one after the other, the fifth comes to its end."""
    settings = [f"{key}={value}" for key, value in {**SETTINGS, "num_processing_workers": 100}.items()]
    options = ["--json-progress", *(word for text in settings for word in ("--set", text))]
    program = [sys.executable, zemosaic_worker.__file__, scene.panels]
    chance, used = random.Random(4), Counter()
    for number in range(5):
        out = tmp_path / f"out{number}"
        for _ in range(4):
            kill_in([*program, out, *options], chance)
        subprocess.run([*program, out, *options], check=True, stdout=subprocess.DEVNULL)
        assert mosaics(out) == scene.whole
        assert names(out) == scene.names
        used.update(json.loads((out / "run_report.json").read_text())["resume"]["used"].keys())
    assert used["photometry"] >= 2 and used["science"] >= 2, used


def kill_in(command: list, chance: random.Random) -> None:
    """Start a run and kill it a random time after a random stage has begun."""
    stage = chance.choice(["phase1_scan", "phase5_intertile", "phase5_reproject", "phase5_reproject"])
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if stage in line:
                break
        time.sleep(chance.uniform(0, 0.5))
        process.kill()


@pytest.mark.parametrize("blocks", [0, 1, 12, 40])
def test_a_crashed_run_goes_on_where_it_was(scene, tmp_path, blocks):
    stopped(scene.panels, tmp_path, blocks)
    found = resumed(scene.panels, tmp_path)
    assert mosaics(tmp_path) == scene.whole
    assert names(tmp_path) == scene.names
    assert found.used["survey"] == 9 and found.used["photometry"] == 1
    total = found.used.get("science", 0) + found.used.get("aesthetic", 0)
    assert total == blocks and not found.made_again and not found.warnings
    assert "the photometric solution of the stopped run is used" in found.log
    assert ("of the science mosaic is there" in found.log) == (blocks > 0)


def test_a_run_that_stops_in_the_second_pass_takes_the_finished_science_mosaic_back(scene, tmp_path):
    with pytest.MonkeyPatch.context() as patch:

        def stop(*arguments, **more):
            raise Stopped

        patch.setattr(sys.modules["zemosaic_pipeline.phases.phase5_aesthetic"], "aesthetic_solution", stop)
        with pytest.raises(Stopped):
            run_hierarchical_mosaic(scene.panels, tmp_path, **SETTINGS)
    assert product(tmp_path, "science").read_bytes() == scene.whole["science"], "it is complete and stays"
    found = resumed(scene.panels, tmp_path)
    assert "resume: 100 % of the science mosaic" in found.log
    assert mosaics(tmp_path) == scene.whole


@pytest.mark.parametrize(
    "more", [{"legacy_rgb_cube": True}, {"save_final_as_uint16": True}, {"combine_method": "median"}]
)
def test_other_files_and_other_ways_to_combine(scene, tmp_path, more):
    run_hierarchical_mosaic(scene.panels, tmp_path / "whole", resume="off", **SETTINGS, **more)
    stopped(scene.panels, tmp_path / "out", **more)
    found = resumed(scene.panels, tmp_path / "out", **more)
    assert mosaics(tmp_path / "out") == mosaics(tmp_path / "whole")
    assert bool(found.used.get("science")) == ("save_final_as_uint16" not in more), "rounded values are not exact"


@pytest.mark.parametrize(
    "more",
    [
        {"memory_budget": "2GB", "num_processing_workers": 3},
        {"preview_png_p_high": 99.0, "logging_level": "DEBUG"},
        {"cache_retention": "keep"},
    ],
)
def test_settings_that_change_no_bit_do_not_matter(scene, tmp_path, more):
    stopped(scene.panels, tmp_path)
    found = resumed(scene.panels, tmp_path, **more)
    assert found.used["science"] == 12 and not found.made_again
    for kind in KINDS[:3]:
        assert product(tmp_path, kind).read_bytes() == scene.whole[kind]
    assert (FOLDER in names(tmp_path)) == ("cache_retention" in more)


@pytest.mark.parametrize(
    ("more", "kept"),
    [
        ({"kernel": "lanczos3"}, {"survey", "photometry"}),
        ({"gain_se_limit": 0.02}, {"survey", "science"}),  # the solution comes out the same, and so does the mosaic
        ({"apply_master_tile_crop": True}, set()),
        ({"resume": "off"}, set()),
    ],
)
def test_settings_that_matter_to_a_step_make_that_step_again(scene, tmp_path, more, kept):
    stopped(scene.panels, tmp_path / "out")
    found = resumed(scene.panels, tmp_path / "out", **more)
    assert set(found.used) == kept
    assert ("resume: science belongs to another input or other settings" in found.log) == (
        "science" not in kept and "resume" not in more
    )
    run_hierarchical_mosaic(scene.panels, tmp_path / "whole", **{**SETTINGS, "resume": "off", **more})
    assert mosaics(tmp_path / "out") == mosaics(tmp_path / "whole")


# ----------------------------------------------------------------------------------------------------------- inputs


def change_pixels(path: Path, times: tuple[int, int] | None = None) -> None:
    """Change some pixels in the middle of a file."""
    data = bytearray(path.read_bytes())
    middle = len(data) // 2 // 4 * 4
    data[middle : middle + 4000] = np.full(1000, 5000, ">f4").tobytes()
    path.write_bytes(bytes(data))
    if times:
        os.utime(path, ns=times)


@pytest.fixture
def digested(monkeypatch):
    """Digests of the inputs at once and without rest."""
    monkeypatch.setattr(inputs, "DIGESTS_AFTER", 0.0)
    monkeypatch.setattr(inputs, "DIGEST_IDLE", 0.0)


@pytest.mark.parametrize("seconds", [-3600, -0.5])
def test_a_changed_input_is_named_and_only_its_pieces_are_made_again(scene, panels, tmp_path, seconds):
    stopped(panels, tmp_path / "out")
    change_pixels(panels / "panel_03.fits")
    found = resumed(panels, tmp_path / "out")
    assert "panel_03.fits has changed since the stopped run, or may have" in found.log
    assert found.used == {"survey": 8}
    assert found.made_again == {"input": 1, "survey": 1, "photometry": 1, "science": 1}
    run_hierarchical_mosaic(panels, tmp_path / "whole", resume="off", **SETTINGS)
    assert mosaics(tmp_path / "out") == mosaics(tmp_path / "whole") != scene.whole


@pytest.mark.skipif(os.name == "nt", reason="Windows has no time of the last change of an inode")
def test_pixels_changed_with_size_and_time_kept_are_noticed(panels, tmp_path):
    stopped(panels, tmp_path / "out")
    found = (panels / "panel_03.fits").stat()
    change_pixels(panels / "panel_03.fits", (found.st_atime_ns, found.st_mtime_ns))
    assert resumed(panels, tmp_path / "out").used == {"survey": 8}
    run_hierarchical_mosaic(panels, tmp_path / "whole", resume="off", **SETTINGS)
    assert mosaics(tmp_path / "out") == mosaics(tmp_path / "whole")


@pytest.mark.parametrize("known", [True, False])
def test_a_touched_input_is_known_by_its_content_where_a_digest_was_made(panels, tmp_path, request, known):
    if known:
        request.getfixturevalue("digested")
    kept = opened(tmp_path)
    kept.identify([panels / "panel_03.fits"])
    token = kept.token(panels / "panel_03.fits")
    kept.note("science", "block", "print", 1)
    if known:
        wait_for(lambda: not kept._inputs._undigested and kept._inputs._thread is None)
    kept.close()
    os.utime(panels / "panel_03.fits")
    again = opened(tmp_path)
    again.identify([panels / "panel_03.fits"])
    assert (again.token(panels / "panel_03.fits") == token) == known
    again.close()


@pytest.mark.parametrize("mode", ["auto", "force"])
def test_moved_inputs_are_known_by_force(scene, panels, tmp_path, digested, mode):
    stopped(panels, tmp_path / "out")
    moved = tmp_path / "elsewhere"
    panels.rename(moved)
    for path in moved.iterdir():
        os.utime(path)
    found = resumed(moved, tmp_path / "out", resume=mode)
    assert found.used.get("science", 0) == (12 if mode == "force" else 0)
    assert mosaics(tmp_path / "out") == scene.whole


def test_a_file_of_this_very_moment_is_in_doubt(tmp_path):
    path = tmp_path / "young.fits"
    path.write_bytes(b"pixels")
    tokens = set()
    for _ in range(2):
        kept = opened(tmp_path)
        kept.identify([path])
        kept.note("science", "block", "print", 1)
        tokens.add(kept.token(path))
        kept.close()
    assert len(tokens) == 2


def opened(folder, tell=lambda level, text: None) -> Checkpoints:
    """The checkpoints in an output folder."""
    found = index.read_index(folder / FOLDER, tell)
    assert found is not None
    return Checkpoints(found, Settings(), tell)


def wait_for(condition) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


# ----------------------------------------------------------------------------------------------------------- damage


def test_a_damaged_block_is_named_and_made_again_alone(scene, tmp_path):
    stopped(scene.panels, tmp_path)
    part = tmp_path / FOLDER / "science.part"
    index = [json.loads(line.split(b" ", 1)[1]) for line in (tmp_path / FOLDER / "index").read_bytes().splitlines()]
    y0, _, x0, _ = map(int, next(row for row in index if row.get("step") == "science" and "note" in row)["key"].split())
    with part.open("r+b") as stream:
        head = stream.read(28800).index(b"END" + b" " * 77) // 2880 * 2880 + 2880
        width = 512
        for card in range(0, head, 80):
            stream.seek(card)
            text = stream.read(80)
            if text.startswith(b"NAXIS1 "):
                width = int(text[10:30])
        stream.seek(head + 4 * (y0 * width + x0))
        stream.write(b"\x01")
    found = resumed(scene.panels, tmp_path)
    assert found.used["science"] == 11
    assert found.warnings == [w for w in found.warnings if f"rows {y0} to" in w and "damaged" in w] != []
    assert mosaics(tmp_path) == scene.whole


def test_a_damaged_piece_and_a_torn_line_are_made_again_alone(scene, tmp_path):
    stopped(scene.panels, tmp_path)
    pieces, index = tmp_path / FOLDER / "pieces", tmp_path / FOLDER / "index"
    data = bytearray(pieces.read_bytes())
    data[10] ^= 1
    pieces.write_bytes(bytes(data))
    index.write_bytes(index.read_bytes()[:-5])
    found = resumed(scene.panels, tmp_path)
    assert found.used == {"survey": 8, "photometry": 1, "science": 11} and found.made_again == {"survey": 1}
    assert [w for w in found.warnings if "survey of panel_" in w and "damaged" in w]
    assert mosaics(tmp_path) == scene.whole


@pytest.mark.parametrize("what", ["garbage", "another version", "no folder", "empty folder", "no mosaic"])
def test_leftovers_of_no_use_are_no_obstacle(scene, tmp_path, what):
    folder = tmp_path / FOLDER
    if what == "no folder":
        folder.write_text("mine")
    else:
        stopped(scene.panels, tmp_path)
    if what == "garbage":
        (folder / "index").write_bytes(os.urandom(1000))
    elif what == "another version":
        lines = (folder / "index").read_bytes().splitlines(keepends=True)
        (folder / "index").write_bytes(b"".join(lines[1:]))
    elif what == "empty folder":
        shutil.rmtree(folder)
        folder.mkdir()
    elif what == "no mosaic":
        (folder / "coverage.part").unlink()
    found = resumed(scene.panels, tmp_path)
    assert "science" not in found.used
    assert mosaics(tmp_path) == scene.whole
    if what == "no folder":
        assert folder.read_text() == "mine", "what is not ours stays"
    else:
        assert names(tmp_path) == scene.names
    if what != "no mosaic":
        assert found.log.count("the run starts afresh") == 1 and not found.used


def test_a_disk_that_takes_no_pieces_does_not_stop_the_run(scene, tmp_path, monkeypatch):
    def full(handle, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index, "_write_all", full)
    found = resumed(scene.panels, tmp_path)
    assert found.log.count("is not kept for a resume") == 1
    assert mosaics(tmp_path) == scene.whole and names(tmp_path) == scene.names


def test_what_a_killed_run_left_lying_is_removed(scene, tmp_path):
    (tmp_path / ".zemosaic_tmp_77_ab_x").mkdir()
    (tmp_path / ".zemosaic_MT9_R9_preview.png.77.part").touch()
    (tmp_path / ".mine.77.part").touch()
    resumed(scene.panels, tmp_path)
    assert names(tmp_path) == scene.names | {".mine.77.part"}


def test_a_mistyped_setting_keeps_what_another_run_has_left_and_leaves_nothing_itself(scene, tmp_path):
    wrong = {"output_wcs_file": str(tmp_path / "none.fits")}
    with pytest.raises(UsageError):
        run_hierarchical_mosaic(scene.panels, tmp_path, **SETTINGS, **wrong)
    assert FOLDER not in names(tmp_path)
    stopped(scene.panels, tmp_path)
    with pytest.raises(UsageError):
        run_hierarchical_mosaic(scene.panels, tmp_path, **SETTINGS, **wrong)
    assert resumed(scene.panels, tmp_path).used["science"] == 12


def test_two_runs_into_one_folder_are_one_too_many(scene, tmp_path):
    second = []

    def try_another(key, *rest, **more):
        if key == "run_info_phase4_finished":
            with pytest.raises(UsageError, match=r"another run is writing to .*wait for its end") as told:
                run_hierarchical_mosaic(scene.panels, tmp_path, **SETTINGS)
            second.append(told.value)

    run_hierarchical_mosaic(scene.panels, tmp_path, progress_callback=try_another, **SETTINGS)
    assert len(second) == 1 and mosaics(tmp_path) == scene.whole
    assert "done in" in (tmp_path / "zemosaic_worker.log").read_text(), "the log of the first is untouched"


# ---------------------------------------------------------------------------------------------------- its parts


@pytest.mark.parametrize("seed", range(5))
def test_the_picture_does_not_depend_on_how_the_mosaic_is_cut(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(map(int, rng.integers(1, 90, 2)))
    image = (rng.normal(size=(2, *shape)) * 10.0 ** rng.integers(-6, 6, (2, *shape))).astype(np.float32)
    image[:, rng.random(shape) < 0.2] = np.nan
    max_dim = int(rng.integers(1, 60))
    whole = PreviewAccumulator(shape, 2, max_dim)
    whole.add(0, 0, image)
    blocks = random_cut(shape, rng)
    cut = PreviewAccumulator(shape, 2, max_dim)
    for y0, y1, x0, x1 in blocks:
        cut.add(y0, x0, image[:, y0:y1, x0:x1])
    np.testing.assert_array_equal(cut.image(), whole.image())


def random_cut(shape, rng) -> list[tuple[int, int, int, int]]:
    """Rectangles that cover an image, in any order."""
    blocks = [(0, shape[0], 0, shape[1])]
    for _ in range(20):
        y0, y1, x0, x1 = block = blocks[rng.integers(len(blocks))]
        blocks.remove(block)
        if rng.random() < 0.5 and y1 - y0 > 1:
            middle = int(rng.integers(y0 + 1, y1))
            blocks += [(y0, middle, x0, x1), (middle, y1, x0, x1)]
        elif x1 - x0 > 1:
            middle = int(rng.integers(x0 + 1, x1))
            blocks += [(y0, y1, x0, middle), (y0, y1, middle, x1)]
        else:
            blocks.append(block)
    return [blocks[n] for n in rng.permutation(len(blocks))]


@pytest.mark.parametrize("seed", range(5))
def test_what_is_left_to_do_covers_every_pixel_once(seed):
    rng = np.random.default_rng(seed)
    count = np.zeros((60, 70), int)
    done = random_cut(count.shape, rng)[:8]
    for y0, y1, x0, x1 in done + without(random_cut(count.shape, rng), done):
        count[y0:y1, x0:x1] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_mosaic_in_the_making_is_taken_up_as_it_was_left(tmp_path, seed, interleaved):
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(3, 40, 50)).astype(np.float32)
    header, target, part = phase5_canvas.fits.Header(), tmp_path / "m.fits", tmp_path / "m.part"
    blocks = random_cut(image.shape[1:], rng)

    def writer(resume):
        return MosaicWriter(target, header, image.shape, "f4", (40, 50), interleaved, waiting=part, resume=resume)

    sums = {}
    with pytest.raises(Stopped), writer(False) as first:
        for y0, y1, x0, x1 in blocks[:6]:
            sums[y0, y1, x0, x1] = first.write_block(y0, x0, image[:, y0:y1, x0:x1])
        raise Stopped
    assert part.exists() and not target.exists()
    for _ in range(2):  # from the unfinished file, then from the finished one
        with writer(True) as second:
            assert second.resumed
            for (y0, y1, x0, x1), total in sums.items():
                values, found = second.read_block(y0, x0, (y1 - y0, x1 - x0))
                assert found == total
                np.testing.assert_array_equal(values, image[:, y0:y1, x0:x1])
    assert target.exists() and not part.exists()


def test_a_checksum_notices_every_changed_byte_and_lost_stretch():
    data = np.random.default_rng(0).integers(0, 256, 30_001).astype(np.uint8)
    whole = checksum(data)
    for place in (0, 8191, 8192, 16_384, 30_000):
        changed = data.copy()
        changed[place] ^= 1
        assert checksum(changed) != whole
    changed = data.copy()
    changed[4096:8192] = 0
    assert checksum(changed) != whole and checksum(data.tobytes()) == whole


def test_a_step_has_the_settings_whose_rows_name_it():
    assert {step for row in ROWS for step in row.acts_in} == STEPS
    found = {step: settings_of(step, Settings()) for step in STEPS}
    assert "reject_bad_tiles" in found["stack"] and "reject_bad_tiles" in found["photometry"]
    assert not any("logging_level" in names for names in found.values())
    with pytest.raises(ValueError, match="'stacks' is no step"):
        fingerprint("stacks", Settings())


def test_a_fingerprint_reads_every_module_of_the_program():
    """A module that it passed over could change while old pieces go on being used."""
    every = {*(ROOT / "zemosaic_pipeline").rglob("*.py"), *ROOT.glob("zemosaic_*.py")}
    assert set(program_files()) == every and len(every) > 60


def test_a_fingerprint_tells_apart_what_differs():
    settings = Settings()
    parts = [(), (1,), (1.5,), ("1",), ("1", "2"), ("12",), (("1", "2"),), (None,), (True,), (b"1",)]
    parts += [(np.zeros(2),), (np.zeros(2, "f4"),), (np.zeros((1, 2)),)]
    found = [fingerprint("science", settings, *some) for some in parts]
    assert len(set(found)) == len(found) == len(parts)
    assert found[0] == fingerprint("science", replace(settings, memory_budget=10**9))
    assert found[0] != fingerprint("science", replace(settings, kernel="lanczos3"))
    with pytest.raises(TypeError):
        fingerprint("science", settings, object())


def test_arrays_come_back_to_the_bit():
    values = {
        "a": np.array([[np.nan, np.inf, -0.0]]),
        "b": np.arange(3, dtype=">i2"),
        "c": [1, "x"],
        "d": np.zeros((0, 4)),
    }
    found = unpack(pack(values))
    assert list(found["c"]) == [1, "x"]
    for name in "abd":
        assert found[name].tobytes() == values[name].tobytes() and found[name].dtype == values[name].dtype
        assert found[name].shape == values[name].shape


BYTES = Codec(bytes, bytes)


def test_pieces_are_kept_from_run_to_run(tmp_path):
    said: list[tuple[str, str]] = []

    def piece(kept, n, mark="print", made=None, **more):
        """Piece ``n``, and whether it had to be made."""
        calls = []
        data = kept.cached("solve", f"frame {n}", mark, lambda: calls.append(n) or made or b"%d" % n * n, BYTES, **more)
        return data, bool(calls)

    first = opened(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        assert all(fresh for _, fresh in pool.map(lambda n: piece(first, n), range(300)))
    assert first.cached("solve", "none", "print", lambda: None, BYTES) is None
    first.close()
    second = opened(tmp_path, lambda *line: said.append(line))
    assert [piece(second, n) for n in range(300)] == [(b"%d" % n * n, False) for n in range(300)]
    assert second.used == {"solve": 300} and not said
    assert piece(second, 7, "another print", b"new") == (b"new", True)
    assert piece(second, 8, made=b"better", valid=lambda data: False) == (b"better", True)
    assert second.used == {"solve": 300} and second.made_again == {"solve": 2}
    assert [(level, text.split(" is ")[0].split(" belongs ")[0]) for level, text in said] == [
        ("INFO", "resume: solve of frame 7"),
        ("INFO", "resume: solve of frame 8"),
    ]
    assert second.cached("solve", "none", "print", lambda: b"made", BYTES) == b"made", "None is not kept"
    assert piece(second, 9, title="the ninth") == (b"9" * 9, False) and "the ninth of the stopped run" in said[-1][1]
    second.close()
    third = opened(tmp_path)
    assert piece(third, 7, "another print") == (b"new", False) and piece(third, 8) == (b"better", False)
    third.close()
