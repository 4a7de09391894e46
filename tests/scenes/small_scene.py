"""Panels of one small sky, as files: what the tests of the whole worker run on."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits

import zemosaic_worker
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.synthetic.panels import Layout, Panel, Sky, make_panels, make_sky, mosaic_shape, write_panels

LAYOUT = Layout(rows=2, columns=2, shape=(96, 128), overlap=0.4, noise=2.0, rotation_deg=4.0)
#: In each of them only the log may remain of a run that ended early.
LOG = "zemosaic_worker.log"


def small_sky(channels: int = 3, layout: Layout = LAYOUT) -> Sky:
    """A sky with enough stars for the gains of every panel to be known."""
    return make_sky(mosaic_shape(layout), stars=150, channels=channels)


def write_scene(folder: Path, channels: int = 3, layout: Layout = LAYOUT, dtype: str = "float32") -> list[Panel]:
    """Write the panels of the scene into a folder."""
    panels = make_panels(layout, small_sky(channels, layout))
    if channels == 1:
        panels = [Panel(p.data[0], p.wcs, p.gain, p.offset, p.noise, p.fwhm) for p in panels]
    write_panels(panels, folder, dtype)
    return panels


def run(*arguments: object) -> int:
    """The command line in this process; a warning of a library on the user's terminal is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return zemosaic_worker.main([str(a) for a in arguments])


def digests(folder: Path) -> dict[str, str]:
    """Content of every file below a folder."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def product(folder: Path, kind: str) -> Path:
    """The one file of a kind (science, aesthetic, coverage, preview) in an output folder."""
    (path,) = folder.glob(f"zemosaic_MT*_R*_{kind}.*")
    return path


def pixels(folder: Path, kind: str = "science") -> np.ndarray:
    """Image of a product, in native byte order."""
    return fits.getdata(product(folder, kind)).astype("f4")


#: Every way to resample and to combine, for what must hold for all of them.
OPTIONS = {
    "mean": CoaddOptions(),
    "lanczos": CoaddOptions(kernel=ResamplingKernel.LANCZOS3),
    "median": CoaddOptions(combine=CombineMethod.MEDIAN),
    "sigma_clip": CoaddOptions(combine=CombineMethod.SIGMA_CLIP, kappa_low=1.5, kappa_high=1.5),
    "winsorized": CoaddOptions(combine=CombineMethod.WINSORIZED, winsor_limits=(0.2, 0.2)),
    "winsorized_sigma_clip": CoaddOptions(combine=CombineMethod.WINSORIZED_SIGMA_CLIP),
    "linear_fit_clip": CoaddOptions(combine=CombineMethod.LINEAR_FIT_CLIP),
    "sum": CoaddOptions(combine=CombineMethod.SUM),
    "min": CoaddOptions(combine=CombineMethod.MIN),
    "last": CoaddOptions(combine=CombineMethod.LAST),
}


def long_ago(folder: Path) -> None:
    """Set the files' times back: a file of this very moment is always in doubt."""
    for path in folder.iterdir():
        os.utime(path, (time.time() - 3600,) * 2)
