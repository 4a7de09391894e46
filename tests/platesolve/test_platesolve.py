"""Plate solving: real solve-field on true star positions, real refusals of ASTAP, programs that hang, the choice."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import stat
import sys
import threading
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.index_stars import index_file, stars_near
from scenes.places import real_files
from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.platesolve import astap, astrometry_net
from zemosaic_pipeline.platesolve.base import Hints, SolveError, SolverMissing, run_program, wcs_header
from zemosaic_pipeline.platesolve.choose import choose_solver
from zemosaic_pipeline.settings.settings import Settings

SHAPE = (1920, 1080)


@dataclass(frozen=True)
class Stars:
    x: np.ndarray
    y: np.ndarray
    flux: np.ndarray


NO_STARS = Stars(np.zeros(0), np.zeros(0), np.zeros(0))


def no_image():
    raise AssertionError("the image was asked for")


def never():
    return False


def tan_wcs(ra, dec, angle, mirrored=False, scale=2.4):
    """A TAN WCS about the centre of a frame of SHAPE; scale in arcsec per pixel, angle in degrees."""
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = ["RA---TAN", "DEC--TAN"]
    wcs.wcs.radesys = "ICRS"
    wcs.wcs.crval = [ra, dec]
    wcs.wcs.crpix = [540.5, 960.5]
    wcs.wcs.cd = np.array([[c if mirrored else -c, s], [-s if mirrored else s, c]]) * scale / 3600
    return wcs


def rms_pixels(header, truth):
    """Root mean square distance in pixels, over the frame, of the positions that two WCS give."""
    y, x = np.mgrid[0 : SHAPE[0] - 1 : 9j, 0 : SHAPE[1] - 1 : 9j].reshape(2, -1)
    solved = truth.all_world2pix(*WCS(header).all_pix2world(x, y, 0), 0)
    return np.sqrt(np.mean((solved[0] - x) ** 2 + (solved[1] - y) ** 2))


def true_stars(wcs, seed, spurious=80, jitter=0.1):
    """The stars of the index files in a frame, their positions off by `jitter` pixels (1 sigma), among spurious ones."""
    rng = np.random.default_rng(seed)
    sky = stars_near(*wcs.wcs.crval, 0.8)
    xy = wcs.wcs_world2pix(sky[:, :2], 0)
    inside = ((xy > 0) & (xy < SHAPE[::-1])).all(axis=1)
    xy = xy[inside] + rng.normal(0, jitter, (inside.sum(), 2))
    flux = 10 ** (-0.4 * (sky[inside, 2] - 20)) * rng.uniform(0.8, 1.2, inside.sum())
    xy = np.concatenate([xy, rng.uniform(0, 1, (spurious, 2)) * SHAPE[::-1]])
    flux = np.concatenate([flux, 10 ** rng.uniform(1.5, 3.3, spurious)])
    order = np.argsort(-flux)
    return Stars(*xy[order].T, flux[order])


@pytest.fixture
def solve_field():
    """The real solve-field with its index files, or a loud skip."""
    index_file()
    try:
        return astrometry_net.find_astrometry_net("", 30.0)
    except SolverMissing as reason:
        pytest.skip(f"NO SOLVE-FIELD, plate solving is NOT tested: {reason}")


# ------------------------------------------------------------------------------------------------ real solve-field

POINTINGS = {
    "pointed": (Hints(SHAPE, 83.4, -5.9, 3.0, 2.4), tan_wcs(83.8, -5.4, 33.0)),
    "telescope lied": (Hints(SHAPE, 10.0, 41.0, 3.0, 2.4), tan_wcs(83.8, -5.4, 33.0)),
    "blind": (Hints(SHAPE, None, None, 3.0, None), tan_wcs(210.8, 54.3, 121.0)),
    "wrong focal length": (Hints(SHAPE, 210.0, 54.0, 3.0, 1.2), tan_wcs(210.8, 54.3, 200.0)),
    "mirrored, at the pole": (Hints(SHAPE, 37.0, 89.0, 3.0, 2.3), tan_wcs(37.9, 89.26, 290.0, mirrored=True)),
}


@pytest.mark.parametrize("case", POINTINGS)
def test_solve_field_finds_the_true_wcs(solve_field, tmp_path, case):
    hints, truth = POINTINGS[case]
    solution = solve_field.solve(no_image, true_stars(truth, seed=len(case)), hints, tmp_path, never)
    assert rms_pixels(solution.header, truth) < 0.3
    assert solution.solver == "astrometry.net"
    assert 0 < solution.seconds < 20
    assert not list(tmp_path.iterdir())
    cards = {"WCSAXES", "LONPOLE", "LATPOLE", "RADESYS"} | {f"CD{i}_{j}" for i in (1, 2) for j in (1, 2)}
    cards |= {f"{key}{k}" for key in ("CTYPE", "CUNIT", "CRVAL", "CRPIX") for k in (1, 2)}
    assert set(solution.header) == cards


@pytest.mark.realdata
def test_solve_field_on_real_subs(solve_field, tmp_path):
    sep = pytest.importorskip("sep", reason="NO SEP: stars of real subs cannot be found")
    for path in real_files("ngc7023_seestar"):
        data, header = fits.getdata(path).astype(np.float32), fits.getheader(path)
        data = data.reshape(960, 2, 540, 2).mean(axis=(1, 3))  # each Bayer cell is one pixel
        data -= sep.Background(data).back()
        found = np.sort(sep.extract(data, 5, err=1.4826 * np.median(np.abs(data)), minarea=4), order="flux")[::-1]
        stars = Stars(2 * found["x"] + 0.5, 2 * found["y"] + 0.5, found["flux"])
        hints = Hints(SHAPE, header["RA"], header["DEC"], 3.0, 206.265 * header["XPIXSZ"] / header["FOCALLEN"])
        solution = solve_field.solve(no_image, stars, hints, tmp_path, never)
        assert rms_pixels(solution.header, WCS(header)) < 1, path.name


def test_solve_field_without_a_match(solve_field, tmp_path):
    rng = np.random.default_rng(1)
    clouds = Stars(rng.uniform(0, 1080, 25), rng.uniform(0, 1920, 25), np.arange(25, 0, -1.0))
    with pytest.raises(SolveError, match="no match for its 25 brightest stars"):
        solve_field.solve(no_image, clouds, POINTINGS["pointed"][0], tmp_path, never)
    with pytest.raises(SolveError, match="Only 0 stars"):
        solve_field.solve(no_image, NO_STARS, POINTINGS["pointed"][0], tmp_path, never)
    assert not list(tmp_path.iterdir())


def solve_in_thread(pipe, solver, stars, hints, scratch):
    def work():
        pipe.send(solver.solve(no_image, stars, hints, scratch, never).header.tostring())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def test_solve_field_from_a_thread_of_a_daemonic_process(solve_field, tmp_path):
    hints, truth = POINTINGS["pointed"]
    receiver, sender = multiprocessing.Pipe(duplex=False)
    arguments = (sender, solve_field, true_stars(truth, seed=3), hints, tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=solve_in_thread, args=arguments, daemon=True)
    process.start()
    assert receiver.poll(30)
    assert rms_pixels(fits.Header.fromstring(receiver.recv()), truth) < 0.3
    process.join(10)
    assert process.exitcode == 0


# -------------------------------------------------------------------------------------------------------- programs


def make_program(folder, name, code):
    """Make an executable that runs Python code, and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    script = folder / f"{name}.py"
    script.write_text(code, encoding="utf-8")
    if os.name == "nt":
        program = folder / f"{name}.bat"
        program.write_text(f'@"{sys.executable}" "{script}" %*\n', encoding="utf-8")
        return program
    program = folder / name
    program.write_text(f"#!/bin/sh\nexec '{sys.executable}' '{script}' \"$@\"\n", encoding="utf-8")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


HANGS = """
import pathlib, subprocess, sys, time
if sys.argv[-1] != "child":
    child = subprocess.Popen([sys.executable, __file__, "child"])
    pathlib.Path(__file__).with_suffix(".pid").write_text(str(child.pid))
time.sleep(60)
"""


def alive(pid):
    psutil = pytest.importorskip("psutil")
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def child_of(program):
    """Number of the process that a program of HANGS started; waits for it."""
    file = program.with_suffix(".pid")
    end = time.monotonic() + 10
    while not (file.is_file() and file.read_text()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return int(file.read_text())


def assert_dies(pid):
    end = time.monotonic() + 2
    while alive(pid):
        assert time.monotonic() < end, "a child outlived its group"
        time.sleep(0.02)


def hanging_solvers(folder):
    program = make_program(folder, "solver", HANGS)
    return program, [
        astap.Astap(program, None, 2, 1.0),
        astrometry_net.AstrometryNet(program, None, folder, 1.0),
    ]


def test_a_solver_that_hangs_is_killed_with_its_children(tmp_path):
    program, solvers = hanging_solvers(tmp_path / "bin")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    stars = Stars(*np.random.default_rng(0).uniform(0, 1000, (3, 20)))
    for solver in solvers:
        program.with_suffix(".pid").unlink(missing_ok=True)
        with pytest.raises(SolveError, match=r"solver_timeout"):
            solver.solve(lambda: np.ones((8, 8), np.float32), stars, POINTINGS["blind"][0], scratch, never)
        assert_dies(child_of(program))
        assert not list(scratch.iterdir())


def test_a_stopped_run_kills_the_solver_within_a_second(tmp_path):
    program, solvers = hanging_solvers(tmp_path / "bin")
    stars = Stars(*np.random.default_rng(0).uniform(0, 1000, (3, 20)))
    for solver in solvers:
        program.with_suffix(".pid").unlink(missing_ok=True)
        stopped = []

        def cancelled(stopped=stopped):
            if program.with_suffix(".pid").is_file():
                stopped.append(time.monotonic())
            return bool(stopped)

        with pytest.raises(Cancelled):
            replace(solver, timeout=30.0).solve(
                lambda: np.ones((8, 8), np.float32), stars, POINTINGS["blind"][0], tmp_path, cancelled
            )
        assert time.monotonic() - stopped[0] < 1
        assert_dies(child_of(program))


def test_output_is_kept_within_bounds(tmp_path):
    code = "print('x' * 3_000_000); print('the end')"
    output = run_program([sys.executable, "-c", code], tmp_path, 20, never)
    assert output.endswith("the end" + os.linesep)
    assert len(output) <= 65536


def test_a_program_that_cannot_start(tmp_path):
    with pytest.raises(SolveError, match="cannot be started"):
        run_program([str(tmp_path / "nothing")], tmp_path, 5, never)


# ----------------------------------------------------------------------------------------------------------- ASTAP

ASTAP_WCS = tan_wcs(254.23046742390622, -40.311880588850023, 58.86, scale=2.37)


def recorded_numbers():
    cd = ASTAP_WCS.wcs.cd
    numbers = {"CRPIX1": 540.5, "CRPIX2": 960.5, "CRVAL1": 254.23046742390622, "CRVAL2": -40.311880588850023}
    numbers |= {"CDELT1": 6.58e-4, "CDELT2": 6.58e-4, "CROTA1": -58.86, "CROTA2": -58.87}
    return numbers | {f"CD{i + 1}_{j + 1}": cd[i, j] for i in (0, 1) for j in (0, 1)}


def pascal(value):
    """A number as ASTAP writes it: a blank or a sign, 16 decimals, three digits of exponent."""
    mantissa, exponent = f"{value: .16E}".split("E")
    return f"{mantissa}E{int(exponent):+04d}"


def recorded_ini():
    lines = ["PLTSOLVD=T", *(f"{key}={pascal(value)}" for key, value in recorded_numbers().items())]
    return "\n".join([*lines, "CMDLINE=astap -f image.fits -wcs", "WARNING=Warning scale was inaccurate!", ""])


def recorded_cards():
    """The cards of a .wcs, as ASTAP leaves them: with the image's own, a comment too long, and a byte of Latin-1."""
    cards = [
        "SIMPLE  =                    T / C# FITS",
        "BITPIX  =                   16",
        "NAXIS   =                    2",
    ]
    cards += ["OBJECT  = 'M\xe9t\xe9ore'", "CTYPE1  = 'RA---TAN'           / first parameter RA, projection TANgential"]
    cards += ["CTYPE2  = 'DEC--TAN'           / second parameter DEC", "CUNIT1  = 'deg     '           / Unit"]
    cards += [f"{key:8}= {pascal(value)[:14]}{pascal(value)[-5:]} / known" for key, value in recorded_numbers().items()]
    return [*cards, "PLTSOLVD=                    T / ASTAP", "COMMENT " + "cmdline:/opt/astap " * 5, "END"]


WCS_FILES = {
    "text": "\n".join(recorded_cards()).encode("latin-1"),
    "text, CRLF": "\r\n".join(recorded_cards()).encode("latin-1"),
    "FITS block": "".join(f"{card[:80]:80}" for card in recorded_cards()).ljust(2880 * 2).encode("latin-1"),
    "broken": b"\x00\xff no header at all",
    "none": None,
}
PLAYS = """
import json, pathlib, sys
here = pathlib.Path(__file__).parent
(here / "argv.json").write_text(json.dumps(sys.argv[1:]))
image = pathlib.Path(sys.argv[sys.argv.index("-f") + 1])
(here / "seen.fits").write_bytes(image.read_bytes())
for suffix in (".ini", ".wcs"):
    if (here / ("recorded" + suffix)).is_file():
        image.with_suffix(suffix).write_bytes((here / ("recorded" + suffix)).read_bytes())
"""


def fake_astap(folder, ini, wcs=None, downsample=2):
    """An ASTAP that leaves recorded answers beside the image."""
    program = make_program(folder, "astap_cli", PLAYS)
    if ini is not None:
        (folder / "recorded.ini").write_bytes(ini.encode("latin-1"))
    if wcs is not None:
        (folder / "recorded.wcs").write_bytes(wcs)
    return astap.Astap(program, folder, downsample, 20.0)


@pytest.mark.parametrize("kind", WCS_FILES)
def test_astap_answers_are_read(tmp_path, kind):
    solver = fake_astap(tmp_path / "bin", recorded_ini(), WCS_FILES[kind], downsample=3)
    scratch = tmp_path / "scratch with a blank"
    scratch.mkdir()
    image = np.random.default_rng(2).normal(1000, 10, (64, 36)).astype(np.float32)
    image[30:34, 20:24] += 5000
    image[0, :] = np.nan
    hints = Hints(SHAPE, 254.0, -41.0, 4.5, 2.37)
    solution = solver.solve(lambda: image, NO_STARS, hints, scratch, never)
    assert rms_pixels(solution.header, ASTAP_WCS) < 1e-3  # its text has 12 decimals
    assert not any(key.startswith(("CDELT", "CROTA", "COMMENT", "SIMPLE")) for key in solution.header)
    assert not list(scratch.iterdir())
    argv = json.loads((tmp_path / "bin/argv.json").read_text())
    options = dict(pairwise(argv))
    assert "-wcs" in argv
    assert float(options["-ra"]) == pytest.approx(254 / 15)
    assert float(options["-spd"]) == pytest.approx(49)
    assert float(options["-r"]) == 4.5
    assert float(options["-fov"]) == pytest.approx(1920 * 2.37 / 3600)
    assert options["-z"] == "3"
    assert options["-d"] == str(tmp_path / "bin")
    seen = fits.getdata(tmp_path / "bin/seen.fits")
    assert seen.shape == image.shape
    assert np.corrcoef(seen[1:].ravel(), image[1:].ravel())[0, 1] > 0.99
    assert abs(float(seen[0].mean()) - np.median(seen)) < 100  # no data looks like sky


def test_astap_searches_the_whole_sky_without_a_pointing(tmp_path):
    solver = fake_astap(tmp_path / "bin", recorded_ini())
    solver.solve(lambda: np.eye(8, dtype=np.float32), NO_STARS, Hints(SHAPE, None, None, 3.0, None), tmp_path, never)
    argv = (tmp_path / "bin/argv.json").read_text()
    assert '"-r", "180"' in argv
    assert '"-fov", "0"' in argv
    assert '"-ra"' not in argv


REFUSALS = {
    "\nPLTSOLVD=F\nCMDLINE=astap -f a\nERROR=Not enough stars.\n": "no solution .Not enough stars.",
    "\nPLTSOLVD=F\r\nERROR=No solution\r\nWARNING=Warning, increase downsampling!!\r\n": "No solution; .*downsampling",
    "\nPLTSOLVD=F\nERROR=No star database found.\n": "astap_data_directory_path",
    "\nPLTSOLVD=F\n": "found no solution",
    "PLTSOLVD=T\nCRPIX1= 1.0E+000\n": "cannot be read",
    None: "without an answer",
}


@pytest.mark.parametrize(("ini", "reason"), REFUSALS.items())
def test_astap_refusals_are_one_sentence(tmp_path, ini, reason):
    solver = fake_astap(tmp_path / "bin", ini)
    with pytest.raises(SolveError, match=reason):
        solver.solve(lambda: np.eye(8, dtype=np.float32), NO_STARS, POINTINGS["blind"][0], tmp_path, never)


def test_the_real_astap_refuses_without_a_star_database(tmp_path):
    program = shutil.which("astap_cli")
    if program is None:
        pytest.skip("NO ASTAP is installed: apt-get install astap-cli")
    (tmp_path / "empty").mkdir()
    solver = astap.Astap(Path(program), tmp_path / "empty", 2, 20.0)
    image = np.random.default_rng(2).normal(1000, 10, (200, 200)).astype(np.float32)
    with pytest.raises(SolveError, match=r"no star database .* set astap_data_directory_path"):
        solver.solve(lambda: image, NO_STARS, POINTINGS["pointed"][0], tmp_path, never)
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


COUNTS = (
    PLAYS
    + """
import os, time
begin = time.monotonic()
time.sleep(0.5)
(here / f"{os.getpid()}.times").write_text(json.dumps([begin, time.monotonic()]))
"""
)


def test_astap_runs_so_many_programs_at_once(tmp_path):
    folder = tmp_path / "bin"
    (fake := fake_astap(folder, recorded_ini())).program.with_suffix(".py").write_text(COUNTS, encoding="utf-8")
    solver = replace(fake, instances=threading.Semaphore(2))
    arguments = (lambda: np.eye(8, dtype=np.float32), NO_STARS, POINTINGS["blind"][0], tmp_path, never)
    threads = [threading.Thread(target=solver.solve, args=arguments, daemon=True) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    spans = [json.loads(path.read_text()) for path in folder.glob("*.times")]
    assert len(spans) == 5
    assert max(sum(begin <= moment < end for begin, end in spans) for moment, _ in spans) == 2


def test_waiting_for_another_astap_ends_with_the_run(tmp_path):
    solver = replace(fake_astap(tmp_path / "bin", recorded_ini()), instances=threading.Semaphore(0))
    with pytest.raises(Cancelled):
        solver.solve(no_image, NO_STARS, POINTINGS["blind"][0], tmp_path, lambda: True)


# ---------------------------------------------------------------------------------------------------------- header


def test_distortion_is_kept_where_there_is_any():
    cards = list(tan_wcs(10, 20, 30).to_header().items())
    cards = [(key, value if "CTYPE" not in key else f"{value}-SIP") for key, value in cards]
    sip = [("A_ORDER", 2), ("B_ORDER", 2), ("A_2_0", 0.0), ("B_0_2", 0.0)]
    hints = POINTINGS["blind"][0]
    flat = wcs_header([*cards, *sip, ("DATE", "now")], hints)
    assert flat["CTYPE1"] == "RA---TAN"
    assert "A_ORDER" not in flat
    assert "DATE" not in flat
    bent = wcs_header([*cards, *sip[:3], ("B_0_2", 1e-6)], hints)
    assert bent["CTYPE1"] == "RA---TAN-SIP"
    assert WCS(bent).sip.b[0, 2] == 1e-6


@pytest.mark.parametrize(
    "change", [{"CTYPE1": "LINEAR", "CTYPE2": "LINEAR"}, {"CD1_1": 0.0, "CD1_2": 0.0}, {"CRVAL1": "x"}, {"CD1_1": 1e9}]
)
def test_nonsense_is_no_solution(change):
    numbers = {
        key: value for key, value in recorded_numbers().items() if key[:2] in ("CD", "CR") and "CROTA" not in key
    }
    cards = {"CTYPE1": "RA---TAN", "CTYPE2": "DEC--TAN"} | numbers | change
    with pytest.raises(SolveError, match="The solver's answer"):
        wcs_header(cards.items(), POINTINGS["blind"][0])


# ------------------------------------------------------------------------------------------------- what is there


@pytest.fixture
def bare(monkeypatch):
    """A machine on which no solver is installed."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(astap, "_PLACES", ())
    monkeypatch.setattr(astap, "_DATA_PLACES", ())


@pytest.fixture
def places(tmp_path):
    """Settings that name an ASTAP with a star database, and a solve-field with index files."""
    astap = make_program(tmp_path / "astap", "astap", "")
    (tmp_path / "astap" / "d50_0101.1476").touch()
    make_program(tmp_path / "an", "solve-field", "")
    (tmp_path / "an" / "index-4107.fits").touch()
    return {"astap_executable_path": str(astap), "astrometry_local_path": str(tmp_path / "an")}


CHOICES = [
    ("auto", "both", "ASTAP", None),
    ("auto", "astrometry_local_path", "astrometry.net", None),
    ("astrometry", "both", "astrometry.net", None),
    ("astap", "both", "ASTAP", None),
    ("astap", "astrometry_local_path", "astrometry.net", "astap_executable_path.*astrometry.net is used"),
    ("astrometry", "astap_executable_path", "ASTAP", "solve-field.*astrometry_local_path.*ASTAP is used"),
    ("ansvr", "both", "ASTAP", "ansvr.*not supported: ASTAP is used"),
    ("auto", "none", None, "No plate solver.*astap_executable_path.*astrometry_local_path"),
    ("none", "both", None, None),
]


@pytest.mark.parametrize(("method", "there", "name", "said"), CHOICES)
def test_choice(bare, places, method, there, name, said):
    values = {key: value for key, value in places.items() if there in ("both", key)}
    told = []
    solver = choose_solver(Settings(solver_method=method, solver_timeout=7.0, **values), told.append)
    assert getattr(solver, "name", None) == name
    assert len(told) == (said is not None)
    if said:
        assert re.search(said, told[0])
    if solver is not None:
        assert solver.timeout == 7.0


def test_settings_reach_astap(bare, places):
    settings = Settings(astap_default_downsample=4, astap_max_instances=2, **places)
    solver = choose_solver(settings, print)
    assert solver.downsample == 4
    assert solver.data == Path(places["astap_executable_path"]).parent
    assert [solver.instances.acquire(blocking=False) for _ in range(3)] == [True, True, False]


def test_an_astap_without_a_star_database_is_not_chosen(bare, places, tmp_path):
    (tmp_path / "astap" / "d50_0101.1476").unlink()
    told = []
    assert choose_solver(Settings(solver_method="astap", **places), told.append).name == "astrometry.net"
    assert "star database" in told[0]
    assert "astap_data_directory_path" in told[0]


@pytest.mark.parametrize("kind", ["executable", "folder", "bin", "indices", "config", "folder with config"])
def test_what_astrometry_local_path_may_be(bare, monkeypatch, tmp_path, kind):
    program = make_program(tmp_path / "root/bin", "solve-field", "")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/index-4107.fits").touch()
    (tmp_path / "root/etc").mkdir()
    config = tmp_path / "root/etc/astrometry.cfg"
    config.write_text(f"# site\nadd_path {tmp_path / 'data'}\nautoindex\n", encoding="utf-8")
    monkeypatch.setenv("PATH", str(program.parent) if kind in ("indices", "config", "folder with config") else "")
    given = {"executable": program, "folder": program.parent, "bin": tmp_path / "root", "indices": tmp_path / "data"}
    given |= {"config": config, "folder with config": config.parent}
    solver = astrometry_net.find_astrometry_net(str(given[kind]), 5.0)
    assert solver.program == program
    assert solver.index_folder == (tmp_path / "data" if kind == "indices" else None)
    if kind in ("config", "folder with config", "bin"):
        assert solver.config == config


def test_what_is_missing_of_astrometry_net_is_told_apart(bare, tmp_path):
    find = astrometry_net.find_astrometry_net
    with pytest.raises(SolverMissing, match="solve-field was not found: install"):
        find("", 5.0)
    with pytest.raises(SolverMissing, match="does not exist"):
        find(str(tmp_path / "nowhere"), 5.0)
    make_program(tmp_path / "bin", "solve-field", "")
    (tmp_path / "bin/astrometry.cfg").write_text(f"add_path {tmp_path}\nindex index-4107\n", encoding="utf-8")
    with pytest.raises(SolverMissing, match=r"no index files: install some.*tycho2"):
        find(str(tmp_path / "bin"), 5.0)
    (tmp_path / "index-4107.fits").touch()
    assert find(str(tmp_path / "bin"), 5.0).config == tmp_path / "bin/astrometry.cfg"


def test_a_folder_of_index_files_is_used(solve_field, tmp_path):
    folder = tmp_path / "my index files"
    folder.mkdir()
    (folder / index_file().name).symlink_to(index_file())
    solver = astrometry_net.find_astrometry_net(str(folder), 20.0)
    hints, truth = POINTINGS["pointed"]
    stars = true_stars(truth, seed=4)
    assert rms_pixels(solver.solve(no_image, stars, hints, tmp_path, never).header, truth) < 0.3
    (folder / index_file().name).unlink()
    with pytest.raises(SolveError, match="no index files"):
        solver.solve(no_image, stars, hints, tmp_path, never)
