"""Mosaics of panels with gradients by other programs, side by side with ours, judged by the same judge.

Panels of a known sky (`photometry_scenes`) are written as FITS files, a channel a file, brought together on our output
grid by each program that is installed, and judged as `photometry_judge` says, after an overall scale and constant. The scale is
that of the stars, since SWarp takes the nebula away with the background (which is judged as sky that is missing, and
leaves a part in its stars' figure, too):

- Montage: a plane per panel and its level from the overlaps (mBgModel), then the mean (mAdd);
- SWarp: a mesh of its own background out of each panel (SUBTRACT_BACK), then the mean;
- reproject: constants from the overlaps (match_background), then the mean.

None of them finds gains: "equal" is the case in which there are none.

    python benchmarks/gradient_peers.py [--cases equal plane5] [--seeds 1]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import photometry_judge as judging
import photometry_scenes as scenes

from zemosaic_photometry import compute_photometric_gains_and_offsets

MONTAGE = ("mImgtbl", "mProjExec", "mOverlaps", "mDiffExec", "mFitExec", "mBgModel", "mBgExec", "mAdd")
FIGURES = ("low", "low_q", "seam", "star", "colour")
#: Cases without SIP, which SWarp does not read.
CASES = [name for name, case in scenes.CASES.items() if not case.layout.sip]
#: Makes one channel of a mosaic, (H, W), NaN where there is none, of files in a folder that is its own.
Peer = Callable[[Sequence[Path], fits.Header, Path], np.ndarray]


def plain_header(wcs: WCS, shape: tuple[int, int]) -> fits.Header:
    """Header of an image with a linear WCS that every program reads: a CD matrix, no PC and no CDELT."""
    header = fits.Header({"SIMPLE": True, "BITPIX": -32, "NAXIS": 2, "NAXIS1": shape[1], "NAXIS2": shape[0]})
    for axis in (1, 2):
        header[f"CTYPE{axis}"] = wcs.wcs.ctype[axis - 1]
        header[f"CUNIT{axis}"] = "deg"
        header[f"CRVAL{axis}"] = wcs.wcs.crval[axis - 1]
        header[f"CRPIX{axis}"] = wcs.wcs.crpix[axis - 1]
        for other in (1, 2):
            header[f"CD{axis}_{other}"] = wcs.pixel_scale_matrix[axis - 1, other - 1]
    header["EQUINOX"] = 2000.0
    return header


def write_channel(scene: scenes.Scene, channel: int, folder: Path) -> list[Path]:
    """One channel of the panels, a file each."""
    folder.mkdir(parents=True)
    paths = []
    for k, panel in enumerate(scene.panels):
        paths.append(folder / f"panel_{k:03d}.fits")
        fits.writeto(paths[-1], panel.data[channel], plain_header(panel.wcs, panel.data.shape[1:]))
    return paths


def run(*command: object) -> None:
    """Run a program that must succeed; Montage says so in words and exits with 0."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, check=False)
    if done.returncode or 'stat="ERROR"' in done.stdout:
        raise RuntimeError(f"{command[0]} failed: {(done.stdout + done.stderr)[-500:]}")


def montage(paths: Sequence[Path], header: fits.Header, folder: Path) -> np.ndarray:
    """Project, fit planes to the differences in the overlaps, solve for a plane a panel, take it off, add."""
    template = folder / "grid.hdr"
    tables = ("raw", "projected", "pairs", "fitted", "found", "corrected")
    raw, projected, pairs, fitted, found, corrected = (folder / f"{name}.tbl" for name in tables)
    template.write_text(header.tostring(sep="\n", endcard=True, padding=False) + "\n")
    at = {name: folder / name for name in ("projected", "differences", "corrected")}
    for place in at.values():
        place.mkdir()
    run("mImgtbl", paths[0].parent, raw)
    run("mProjExec", "-p", paths[0].parent, raw, template, at["projected"], folder / "stats.tbl")
    run("mImgtbl", at["projected"], projected)
    run("mOverlaps", projected, pairs)
    run("mDiffExec", "-p", at["projected"], pairs, template, at["differences"])
    run("mFitExec", pairs, fitted, at["differences"])
    run("mBgModel", projected, fitted, found)
    run("mBgExec", "-p", at["projected"], projected, found, at["corrected"])
    # the names in a table are those of the files that it was made of
    run("mImgtbl", at["corrected"], corrected)
    run("mAdd", "-e", corrected, template, folder / "mosaic.fits")
    return fits.getdata(folder / "mosaic.fits").astype(float)


def swarp(paths: Sequence[Path], header: fits.Header, folder: Path) -> np.ndarray:
    """Its defaults but for the mean in place of the median, and surface brightness kept."""
    out, weight = folder / "mosaic.fits", folder / "weight.fits"
    (folder / "mosaic.head").write_text(header.tostring(sep="\n", endcard=True, padding=False) + "\n")
    run(
        swarp_name(), *paths, "-IMAGEOUT_NAME", out, "-WEIGHTOUT_NAME", weight, "-RESAMPLE_DIR", folder,
        "-SUBTRACT_BACK", "Y", "-COMBINE_TYPE", "AVERAGE", "-FSCALASTRO_TYPE", "NONE", "-WRITE_XML", "N",
    )  # fmt: skip
    return np.where(fits.getdata(weight) > 0, fits.getdata(out), np.nan).astype(float)


def swarp_name() -> str:
    return "SWarp" if shutil.which("SWarp") else "swarp"


def reproject(paths: Sequence[Path], header: fits.Header, folder: Path) -> np.ndarray:
    """The coadd with matched constants."""
    from reproject import reproject_interp
    from reproject.mosaicking import reproject_and_coadd

    array, seen = reproject_and_coadd(
        list(map(str, paths)), header, reproject_function=reproject_interp, match_background=True
    )
    return np.where(seen > 0, array, np.nan)


PEERS: dict[str, Peer] = {"Montage": montage, "SWarp": swarp, "reproject": reproject}


def missing(peer: str) -> str:
    """What of a program is not installed, or nothing."""
    if peer == "reproject":
        return ""  # the program itself needs it
    needed = MONTAGE if peer == "Montage" else (swarp_name(),)
    return ", ".join(name for name in needed if shutil.which(name) is None)


def peer_mosaic(peer: str, scene: scenes.Scene) -> np.ndarray:
    """The mosaic (C, H, W) by another program."""
    header = plain_header(scene.grid.wcs, scene.grid.shape)
    planes = []
    for channel in range(scene.sky.channels):
        with tempfile.TemporaryDirectory() as name:
            paths = write_channel(scene, channel, Path(name) / "panels")
            work = Path(name) / "work"
            work.mkdir()
            planes.append(PEERS[peer](paths, header, work))
    return np.stack(planes)


def compare(name: str, seed: int, peers: Sequence[str]) -> None:
    """Print a line for ours, the floor and each peer."""
    scene = scenes.case_scene(scenes.CASES[name], seed)
    truth = judging.true_sky(scene)
    makers: dict[str, Callable[[], np.ndarray]] = {
        "floor": lambda: scenes.true_mosaic(scene)[0],
        "ours": lambda: scenes.mosaic(scene, compute_photometric_gains_and_offsets(scene.coarse))[0],
    }
    for peer in peers:
        makers[peer] = lambda peer=peer: peer_mosaic(peer, scene)
    for who, make in makers.items():
        start = time.perf_counter()
        values = make()
        found = judging.judge(values, truth, scene.layout.noise, by_stars=True).figures
        cells = "".join(f"{found[key]:9.3f}" for key in FIGURES)
        print(f"{name:9} {seed:4}  {who:10}{cells}   ({time.perf_counter() - start:.0f} s)", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare on the cases asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["equal", "plane5", "bowl"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    options = parser.parse_args(arguments)
    for peer in PEERS:
        if absent := missing(peer):
            print(f"{peer} is not installed ({absent}): skipped")
    present = [peer for peer in PEERS if not missing(peer)]
    print(f"{'case':9} seed  {'':10}" + "".join(f"{key:>9}" for key in FIGURES))
    for name in options.cases:
        for seed in options.seeds:
            compare(name, seed, present)
    return 0


if __name__ == "__main__":
    sys.exit(main())
