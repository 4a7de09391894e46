"""A synthetic night from raw frames to the mosaic: is it right, how fast is it, how much memory does it take?

    python benchmarks/raw_to_tiles.py judge   [--small] [--with-wcs] [--frames 25] [--keep DIR]
    python benchmarks/raw_to_tiles.py speed   [--runs 3] [--frames 40] [--cores 2]
    python benchmarks/raw_to_tiles.py memory  [--frames 200] [--budget 1.5GB]

``judge`` runs the worker on 4 panels of 25 frames of 1080 x 1920 (hot pixels, clouds, three satellites, a clouded and a
trailed frame) and holds solutions, master tiles and mosaic against the truth; how, stands in `night_judge`. It needs a
plate solver with Tycho-2 data (``--with-wcs``: the true WCS stands in the headers, a pixel off at random).

``speed`` stacks the frames of one panel with the worker and with Siril (debayer, register on the stars, winsorized
stack with additive and multiplicative normalisation), in turn, whole processes on the same cores. The frames
carry their WCS, as Siril does not solve them either: both align on the stars. The ratios are what to quote.

``memory`` tells the worker's peak resident memory on many frames under a budget.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import night_judge as nj  # noqa: E402

from zemosaic_pipeline.synthetic.night import DEMO, Night, Truth, night_truth, write_night  # noqa: E402

SIRIL = """requires 1.0.0
setcpu {cores}
setext fit
cd lights
convert light -debayer -out=../process
cd ../process
register light
stack r_light rej winsorized 3 3 -norm=addscale -out=../result
close
"""


@contextmanager
def folder_for(keep: Path | None) -> Iterator[Path]:
    """The folder to work in: the given one, which stays, or one that goes afterwards."""
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
    else:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)


def worker_command(source: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(HERE.parent / "zemosaic_worker.py"),
        str(source),
        str(out),
        "--gpu",
        "off",
        "--quiet",
        *options,
    ]


def environment(cache: Path, cores: int | None = None) -> dict[str, str]:
    env = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(HERE.parent)}
    if cores:
        env |= {name: str(cores) for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS")}
    return env


# ---- judge


def wcs_of(cards: Mapping[str, object] | str) -> WCS:
    """A WCS from what the report tells of a frame: its header cards as a mapping or as text."""
    if isinstance(cards, str):
        separator = "\n" if "\n" in cards else ""
        return WCS(fits.Header.fromstring(cards, sep=separator), naxis=2)
    return WCS(fits.Header(dict(cards)), naxis=2)


def panel_of(tile: nj.Picture, truth: Truth) -> int:
    """The panel in whose middle a master tile lies."""
    centre = tile.wcs.pixel_to_world_values((tile.shape[1] - 1) / 2, (tile.shape[0] - 1) / 2)
    return min((f for f in truth.frames), key=lambda f: _separation(f.wcs.wcs.crval, centre)).panel


def _separation(a: Sequence[float], b: Sequence[float]) -> float:
    return float(np.hypot((a[0] - b[0]) * np.cos(np.deg2rad(a[1])), a[1] - b[1]))


def weights_of(report: Mapping, truth: Truth, panel: int) -> tuple[dict[str, float], str]:
    """The weights that the worker says it used for a panel's frames; the ideal ones where it says nothing."""
    members = {f.name for f in truth.frames if f.panel == panel}
    told = {Path(e["name"]).name: e.get("weight") for e in report.get("frames", ())}
    used = {name: float(np.mean(w)) for name, w in told.items() if name in members and w is not None and np.mean(w) > 0}
    return (used, "as reported") if used else (nj.best_weights(truth, panel), "best possible: the report names none")


def judge_tile(path: Path, truth: Truth, report: Mapping) -> tuple[list[nj.Verdict], nj.Picture, np.ndarray]:
    """The verdicts on a master tile, the tile, and its noise in the truth's units (3,)."""
    picture = nj.read_picture(path)
    panel = panel_of(picture, truth)
    tile = nj.match(picture, truth)
    weights, said = weights_of(report, truth, panel)
    found = [nj.judge_trails(tile, truth, panel), nj.judge_hot_pixels(tile, truth, panel)]
    found.append(nj.judge_noise(tile, truth, weights))
    least = np.sqrt(
        nj.ideal_level(truth, weights, tile.nebula) / nj.ideal_level(truth, nj.best_weights(truth, panel), tile.nebula)
    )
    print(
        f"\n{path.name}: panel {panel}, stars {tile.fwhm:.2f} px wide (frames {truth.night.fwhm:g}), noise {tile.sigma.round(2)}"
    )
    print(
        f"    weights {said} ({len(weights)} frames); noise of these weights over the least possible {least.mean():.3f}"
    )
    found = [verdict for verdict in found if verdict]
    print("\n".join(map(str, found)), flush=True)
    return found, picture, tile.sigma


def judge_output(out: Path, truth: Truth) -> list[nj.Verdict]:
    """All verdicts on a run's output folder, printed as they are found."""
    report = json.loads((out / "run_report.json").read_text(encoding="utf-8"))
    solved = {Path(e["name"]).name: wcs_of(e["wcs"]) for e in report["frames"] if e.get("wcs")}
    verdicts = [nj.judge_solving(truth, solved)]
    print(verdicts[0], flush=True)
    tiles, sigmas = [], []
    for path in sorted((out / "master_tiles").glob("*.fits")):
        found, picture, sigma = judge_tile(path, truth, report)
        verdicts += found
        tiles.append(picture)
        sigmas.append(sigma)
    mosaic = nj.match(nj.read_picture(next(out.glob("*_science.fits"))), truth)
    region = nj.regions(mosaic.picture, tiles)
    stars = nj.star_fluxes(mosaic, truth)
    last = [nj.judge_sky_step(mosaic, region, np.median(sigmas, axis=0))]
    last += [nj.judge_linearity(stars), nj.judge_colour(stars, region)]
    print(f"\n{mosaic.picture.name}: {len(tiles)} tiles (wanted {truth.night.panels}), stars {mosaic.fwhm:.2f} px wide")
    print("\n".join(map(str, last)), flush=True)
    return verdicts + last


def judge(options: argparse.Namespace) -> int:
    """Make the night, run the worker, judge; the exit status is 1 where anything is not as wanted."""
    night = replace(DEMO, with_wcs=options.with_wcs) if options.small else Night(with_wcs=options.with_wcs)
    night = replace(night, frames=options.frames or night.frames, wcs_error_px=1.0 if options.with_wcs else 0.0)
    with folder_for(options.keep) as folder:
        out = folder / "out"
        truth = night_truth(night) if options.judge_only else run_night(folder, night, options.worker)
        verdicts = judge_output(out, truth)
    failed = [v for v in verdicts if not v.passed]
    print(f"\n{len(verdicts) - len(failed)} of {len(verdicts)} as wanted")
    return 1 if failed else 0


def run_night(folder: Path, night: Night, more: Sequence[str]) -> Truth:
    """Write the night into a folder and run the worker on it."""
    start = time.perf_counter()
    lights, truth = write_night(folder, night)
    print(f"{night.total} frames written in {time.perf_counter() - start:.0f} s")
    shutil.rmtree(folder / "out", ignore_errors=True)
    start = time.perf_counter()
    subprocess.run(worker_command(lights, folder / "out", *more), env=environment(folder / "numba"), check=True)
    print(f"worker: {time.perf_counter() - start:.0f} s\n", flush=True)
    return truth


# ---- speed


def timed(command: Sequence[str], env: Mapping[str, str], log: Path) -> float:
    """Seconds of a whole process; where it fails, the end of what it said."""
    start = time.perf_counter()
    with log.open("w", encoding="utf-8") as text:
        status = subprocess.run(command, env=dict(env), stdout=text, stderr=subprocess.STDOUT, check=False).returncode
    if status:
        raise SystemExit(f"{command[0]} ended with {status}:\n" + log.read_text(encoding="utf-8")[-3000:])
    return time.perf_counter() - start


def siril_seconds(folder: Path, cores: int) -> float:
    """Debayer, register and stack ``folder/lights`` with Siril; what it leaves but the result is removed."""
    work = folder / "siril"
    shutil.rmtree(work, ignore_errors=True)
    (work / "lights").mkdir(parents=True)
    for path in (folder / "lights").iterdir():
        os.link(path, work / "lights" / path.name)
    script = work / "stack.ssf"
    script.write_text(SIRIL.format(cores=cores), encoding="utf-8")
    # a home of its own: no user's preferences
    env = environment(folder / "numba", cores) | {"HOME": str(work), "XDG_CONFIG_HOME": str(work / "config")}
    (work / "config").mkdir()
    seconds = timed([*pinned(cores), "siril-cli", "-d", str(work), "-s", str(script)], env, work / "log.txt")
    if not (work / "result.fit").is_file():
        raise SystemExit("Siril made no result:\n" + (work / "log.txt").read_text(encoding="utf-8")[-3000:])
    shutil.rmtree(work / "process")
    return seconds


def pinned(cores: int) -> list[str]:
    """What holds a process to this many cores, where the system has it."""
    return ["taskset", "-c", f"0-{cores - 1}"] if shutil.which("taskset") else []


def speed(options: argparse.Namespace) -> int:
    """Worker and Siril in turn on the frames of one panel."""
    cores, frames = options.cores, options.frames or 40
    night = Night(rows=1, columns=1, frames=frames, bad_frames=False, with_wcs=True, wcs_error_px=0.5)
    with folder_for(options.keep) as folder:
        lights, _ = write_night(folder, night)
        env = environment(folder / "numba", cores)
        worker = [*pinned(cores), *worker_command(lights, folder / "out", "--jobs", str(cores), *options.worker)]
        times: dict[str, list[float]] = {"worker": [], "Siril": []}
        siril = shutil.which("siril-cli") is not None
        if options.only != "siril":
            print(f"cold start (first run ever, compilation included): {timed(worker, env, folder / 'log.txt'):.1f} s")
        for run in range(options.runs):
            if options.only != "siril":
                shutil.rmtree(folder / "out", ignore_errors=True)
                times["worker"].append(timed(worker, env, folder / "log.txt"))
            if siril and options.only != "worker":
                times["Siril"].append(siril_seconds(folder, cores))
            print(f"run {run + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items() if v), flush=True)
        for name, seconds in times.items():
            if seconds:
                middle = statistics.median(seconds)
                print(f"{name}: {middle:.2f} s, {1000 * cores * middle / frames:.0f} core-ms a frame")
        if times["worker"] and times["Siril"]:
            ratios = [s / w for s, w in zip(times["Siril"], times["worker"], strict=True)]
            print(
                f"Siril / worker: median {statistics.median(ratios):.2f} (min {min(ratios):.2f}, max {max(ratios):.2f})"
            )
        if not siril:
            print("Siril is not installed: not compared")
    return 0


# ---- memory


def memory(options: argparse.Namespace) -> int:
    """Peak RSS of the worker on many frames, spread over four panels."""
    frames = (options.frames or 200) // 4
    with folder_for(options.keep) as folder:
        lights, truth = write_night(folder, Night(frames=frames, with_wcs=True, wcs_error_px=0.5))
        command = worker_command(lights, folder / "out", "--memory-budget", options.budget, *options.worker)
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment(folder / "numba"))
        _, status, usage = os.wait4(process.pid, 0)
        code = os.waitstatus_to_exitcode(status)
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
        print(
            f"exit {code}; {truth.night.total} frames of 1080 x 1920; budget {options.budget}; peak RSS {peak:.2f} GB; "
            f"{time.perf_counter() - start:.0f} s"
        )
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "speed", "memory"))
    parser.add_argument("--frames", type=int, help="frames of a panel (judge 25), in all (speed 40, memory 200)")
    parser.add_argument("--runs", type=int, default=3, help="speed: runs of each")
    parser.add_argument("--cores", type=int, default=os.cpu_count() or 1, help="speed: cores for each")
    parser.add_argument("--only", choices=("worker", "siril"), help="speed: time one of them alone")
    parser.add_argument("--budget", default="1.5GB", help="memory: the worker's budget")
    parser.add_argument("--small", action="store_true", help="judge: the demonstration's night")
    parser.add_argument("--with-wcs", action="store_true", help="judge: without a plate solver")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave everything there")
    parser.add_argument(
        "--judge-only", action="store_true", help="judge: the output in the folder of --keep as it stands"
    )
    parser.add_argument("--worker", nargs=argparse.REMAINDER, default=[], help="what follows goes to the worker")
    options = parser.parse_args(arguments)
    return {"judge": judge, "speed": speed, "memory": memory}[options.what](options)


if __name__ == "__main__":
    sys.exit(main())
