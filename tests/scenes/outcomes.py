"""Small inputs on which every setting has an effect, and what a run made of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from astropy.wcs.utils import proj_plane_pixel_scales

from scenes.small_scene import LAYOUT, pixels, product, small_sky, write_scene
from zemosaic_pipeline.phases.result import MosaicResult
from zemosaic_pipeline.synthetic.night import Night, panel_centre, write_calibration, write_night
from zemosaic_pipeline.synthetic.panels import Layout, make_panels, tangent_wcs, write_panels

NIGHT = Night(
    rows=1,
    columns=1,
    frames=6,
    shape=(200, 160),
    scale=6.0,
    faint_per_megapixel=8000,
    rotation_deg=8,
    drift_px=4,
    dither_px=2,
    clouds=0.15,
    hot=120,
    warm=0,
    trails=1,
    vignetting=0.3,
    with_wcs=True,
    wcs_error_px=1.0,
)


def write_all_scenes(root: Path) -> None:
    """Folders of panels: ``four`` (one of them of 5 frames, and a fifth of a finer scale), ``turned``, ``bad``, ``stack``.

    ``lights`` are raw frames of one panel, a clouded and a trailed one among them; ``darks``, ``flats``, ``biass``
    belong to them, and ``grid.fits`` is where their mosaics go.
    """
    panels = write_scene(root / "four")
    edit(root / "four" / "panel_03.fits", **{"HIERARCH MT_NFRAMES": 5})
    fine = tangent_wcs((96, 128), tuple(panels[0].wcs.wcs.crval), 3.0, 4.0)
    image = small_sky().image(fine, (96, 128)).astype("f4")
    fits.PrimaryHDU(image, fine.to_header()).writeto(root / "four" / "fine.fits")
    write_scene(root / "turned", layout=replace(LAYOUT, rows=1, rotation_deg=0))
    c, s = np.cos(np.deg2rad(20)), np.sin(np.deg2rad(20))
    for path in (root / "turned").iterdir():
        edit(path, PC1_1=c, PC1_2=-s, PC2_1=s, PC2_2=c, CDELT1=-4 / 3600, CDELT2=4 / 3600)
    write_scene(root / "bad")
    with fits.open(root / "bad" / "panel_02.fits", mode="update") as hdul:
        hdul[0].data += np.float32(1e8)
    write_stack(root / "stack")
    write_night(root, NIGHT)
    write_calibration(root, NIGHT, count=3)
    grid = tangent_wcs((190, 150), panel_centre(NIGHT, 0), NIGHT.scale)
    fits.PrimaryHDU(np.zeros((190, 150), "u1"), grid.to_header()).writeto(root / "grid.fits")


def edit(path: Path, **cards) -> None:
    with fits.open(path, mode="update") as hdul:
        hdul[0].header.update(cards)


def write_stack(folder: Path) -> None:
    """Seven takes of one field; every pixel of each is wrong, by much, in one take out of six."""
    layout = Layout(rows=1, columns=1, shape=(64, 80), gain_sigma=0, offset_sigma=0, noise=5.0)
    rng = np.random.default_rng(3)
    takes = []
    for seed in range(7):
        (panel,) = make_panels(layout, small_sky(), seed)
        hit = rng.uniform(size=panel.data.shape) < 1 / 6
        panel.data[hit] += rng.choice([-300, 200], hit.sum()).astype("f4")
        takes.append(panel)
    write_panels(takes, folder)


@dataclass
class Outcome:
    """A finished run: its folder, result, and what its listeners heard."""

    folder: Path
    result: MosaicResult
    heard: list[tuple]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "run_report.json").read_text())

    def image(self, kind: str = "science") -> np.ndarray:
        return pixels(self.folder, kind)

    def header(self) -> fits.Header:
        return fits.getheader(product(self.folder, "science"))

    def scale(self) -> float:
        """Arcseconds a pixel."""
        return 3600 * float(proj_plane_pixel_scales(WCS(self.header(), naxis=2))[0])

    def per_tile(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.report["tiles"]], float)


def differ(a: Outcome, b: Outcome, kind: str = "science", by: float = 0.0) -> bool:
    """The pixels of two runs lie on the same grid and are not the same."""
    one, other = a.image(kind), b.image(kind)
    assert one.shape == other.shape
    return float(np.abs(one - other).max()) > by


def night(run, **settings) -> Outcome:
    """A run on the raw frames."""
    return run("lights", **settings)


def frames(outcome: Outcome, name: str) -> np.ndarray:
    """A number of the report of each stacked frame."""
    return np.array([row[name] for row in outcome.report["frames"] if row["status"] == "stacked"], float)


def panels(outcome: Outcome) -> int:
    return len(outcome.report["tiles"])


def level(outcome: Outcome) -> np.ndarray:
    image = outcome.image()
    return np.array([np.median(plane[plane != 0]) for plane in image])


def spy(monkeypatch, place: Any, name: str) -> list[SimpleNamespace]:
    """Record the arguments of a function (or class) that still does its work."""
    calls, real = [], getattr(place, name)

    def recorded(*arguments, **options):
        calls.append(SimpleNamespace(args=arguments, options=options))
        return real(*arguments, **options)

    monkeypatch.setattr(place, name, recorded)
    return calls
