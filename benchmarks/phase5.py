"""Speed and memory of Phase 5 as whole processes, beside reproject and SWarp on the same tiles.

    python benchmarks/phase5.py speed [--runs 3]     9 tiles of 3 x 1920 x 1080; ratios, in turn, several times
    python benchmarks/phase5.py memory               36 tiles into about 12,000 x 12,000 x 3, budget 1 GB: peak RSS

Every program is started afresh and reads and writes FITS files; the worker's Python start, photometric matching,
coverage, preview and report are included. reproject and SWarp make three single-channel mosaics without matching (SWarp
with its own background subtraction off). Times on a busy machine mean little; the ratios are what to quote.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from zemosaic_pipeline.synthetic.panels import Layout, make_panels, make_sky, mosaic_shape, panel_wcs, write_panels  # noqa: E402

REPROJECT = """
import sys, numpy as np
from pathlib import Path
from astropy.io import fits
from reproject import reproject_interp
from reproject.mosaicking import find_optimal_celestial_wcs, reproject_and_coadd
folder, out = Path(sys.argv[1]), Path(sys.argv[2])
hdus = [fits.open(p)[0] for p in sorted(folder.glob("*_0.fits"))]
wcs, shape = find_optimal_celestial_wcs(hdus)
for c in range(3):
    hdus = [fits.open(p)[0] for p in sorted(folder.glob(f"*_{c}.fits"))]
    array, _ = reproject_and_coadd(hdus, wcs, shape_out=shape, reproject_function=reproject_interp)
    fits.writeto(out / f"reproject_{c}.fits", array.astype("f4"), wcs.to_header(relax=True), overwrite=True)
"""


def make_tiles(folder: Path) -> None:
    """Nine RGB tiles of 1920 x 1080, and the same as single-channel files for the peers."""
    layout = Layout(shape=(1080, 1920), rotation_deg=3.0)
    panels = make_panels(layout, make_sky(mosaic_shape(layout), stars=8000))
    write_panels(panels, folder / "rgb")
    (folder / "mono").mkdir()
    for k, panel in enumerate(panels):
        for c in range(3):
            header = panel.wcs.to_header(relax=True)
            fits.writeto(folder / "mono" / f"panel_{k:02d}_{c}.fits", panel.data[c], header)


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "NUMBA_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}


def timed(command: list[str], env: dict[str, str]) -> float:
    """Wall-clock seconds of a whole process that must succeed; nobody waits for what another left to the disk."""
    if hasattr(os, "sync"):
        os.sync()
    start = time.perf_counter()
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def worker_command(source: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "zemosaic_worker.py"),
        str(source),
        str(out),
        "--gpu",
        "off",
        "--quiet",
        *options,
    ]


def swarp_run(folder: Path, out: Path, env: dict[str, str]) -> float:
    """Three SWarp runs, one a channel, default Lanczos-3, all cores, no background subtraction."""
    total = 0.0
    for c in range(3):
        files = sorted(str(path) for path in (folder / "mono").glob(f"*_{c}.fits"))
        total += timed(
            [
                "SWarp" if shutil.which("SWarp") else "swarp", *files,
                "-IMAGEOUT_NAME", str(out / f"swarp_{c}.fits"), "-WEIGHTOUT_NAME", str(out / f"swarp_{c}_w.fits"),
                "-SUBTRACT_BACK", "N", "-RESAMPLE_DIR", str(out), "-VERBOSE_TYPE", "QUIET", "-WRITE_XML", "N",
                "-COMBINE_TYPE", "AVERAGE",
            ],
            env,
        )  # fmt: skip
    return total


def speed(runs: int) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_tiles(folder)
        env = environment(folder / "numba")
        script = folder / "reproject_run.py"
        script.write_text(REPROJECT)
        out = folder / "out"
        out.mkdir()
        worker = worker_command(folder / "rgb", out / "worker")
        print(f"cold start (first run ever, compilation included): {timed(worker, env):.1f} s")
        have_swarp = shutil.which("SWarp") or shutil.which("swarp")
        times: dict[str, list[float]] = {"worker": [], "reproject": [], "SWarp": []}
        for run in range(runs):
            times["worker"].append(timed(worker, env))
            times["reproject"].append(timed([sys.executable, str(script), str(folder / "mono"), str(out)], env))
            if have_swarp:
                times["SWarp"].append(swarp_run(folder, out, env))
            print(f"run {run + 1}: " + ", ".join(f"{k} {v[-1]:.2f} s" for k, v in times.items() if v), flush=True)
        for peer in ("reproject", "SWarp"):
            if times[peer]:
                ratios = [p / w for p, w in zip(times[peer], times["worker"], strict=True)]
                print(
                    f"{peer} / worker: median {statistics.median(ratios):.1f} "
                    f"(min {min(ratios):.1f}, max {max(ratios):.1f})"
                )
        if not have_swarp:
            print("SWarp is not installed: not compared")


def memory(side: int, budget: str) -> None:
    """Peak RSS of the worker on 6 x 6 tiles that make a mosaic of about ``side`` squared."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tile = int(side / (1 + 5 * 0.9))
        layout = Layout(rows=6, columns=6, shape=(tile, tile), overlap=0.1)
        # the photometry is judged elsewhere: noise and a gradient fill the tiles without rendering 4 gigapixels of sky
        sky = make_sky(mosaic_shape(layout), stars=10)
        rng = np.random.default_rng(5)
        (folder / "in").mkdir()
        for k in range(36):
            wcs: WCS = panel_wcs(layout, sky, *divmod(k, 6), 0.5)
            data = rng.normal(1000 + 10 * k, 12, (3, tile, tile)).astype(np.float32)
            data[:, ::40, ::40] += 2000
            fits.writeto(folder / "in" / f"tile_{k:02d}.fits", data, wcs.to_header(relax=True))
        command = worker_command(folder / "in", folder / "out", "--memory-budget", budget)
        start = time.perf_counter()
        process = subprocess.Popen(command, env=environment(folder / "numba"))
        _, status, usage = os.wait4(process.pid, 0)
        science = next((folder / "out").glob("*_science.fits"))
        header = fits.getheader(science)
        print(
            f"exit {os.waitstatus_to_exitcode(status)}; mosaic {header['NAXIS1']} x {header['NAXIS2']} x {header['NAXIS3']}; "
            f"budget {budget}; peak RSS {usage.ru_maxrss / 1e6:.2f} GB; {time.perf_counter() - start:.0f} s"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--side", type=int, default=12000)
    parser.add_argument("--budget", default="1GB")
    options = parser.parse_args()
    if options.what == "speed":
        speed(options.runs)
    else:
        memory(options.side, options.budget)


if __name__ == "__main__":
    main()
