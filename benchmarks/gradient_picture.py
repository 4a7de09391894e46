"""The picture of docs/photometry.md: a mosaic of nine panels whose sky has gradients, beside the true sky.

From left to right: gains and levels matched, but no gradients (``gradient_order`` = 0); gradients matched; the panels
without what was added to them. All in one stretch; a pixel of the picture is the median of a square.

    python benchmarks/gradient_picture.py [FILE]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import photometry_scenes as scenes
from photometry_judge import block_medians

from zemosaic_photometry import PhotometryOptions, compute_photometric_gains_and_offsets
from zemosaic_pipeline.fits.preview import save_png

PICTURE = Path(__file__).resolve().parents[1] / "docs/images/gradients.png"
CASE, SEED = "plane5", 1
#: The sky of the case has more stars, and its nebula is so bright that five sigma would not show beside it.
STARS, NEBULA = 1000, 0.25
#: Pixels of the mosaic in one of the picture, along each axis, and the width of the gaps.
SQUARE, GAP = 5, 8
#: Black below the sky, the bend of the curve and white above it, in units of a tile's noise.
BLACK, BEND, WHITE = -6.0, 12.0, 60.0
#: Steps between the grey levels that are used: what is finer is noise, and makes a large file.
LEVELS = 5


def states(scene: scenes.Scene) -> list[np.ndarray]:
    """Small pictures (C, h, w) of the mosaics, NaN where there is no data."""
    shown = []
    for order in (0, 2):
        solution = compute_photometric_gains_and_offsets(scene.coarse, PhotometryOptions(gradient_order=order))
        shown.append(block_medians(scenes.mosaic(scene, solution)[0], SQUARE))
    return [*shown, block_medians(scenes.true_mosaic(scene)[0], SQUARE)]


def grey(picture: np.ndarray, noise: float) -> np.ndarray:
    """A picture (C, h, w) as bytes (h, w, C): linear about the sky, logarithmic above, all skies at one level."""
    height = (picture - np.nanpercentile(picture, 30, axis=(1, 2), keepdims=True)) / noise - BLACK
    bytes_ = 255 * np.arcsinh(np.clip(height, 0, WHITE) / BEND) / np.arcsinh(WHITE / BEND)
    stepped = np.round(bytes_ / LEVELS) * LEVELS
    return np.moveaxis(np.nan_to_num(np.minimum(stepped, 255)).astype(np.uint8), 0, 2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("file", nargs="?", type=Path, default=PICTURE)
    options = parser.parse_args(arguments)
    scene = scenes.make_scene(scenes.CASES[CASE].layout, SEED, STARS, NEBULA)
    pictures = [grey(picture, scene.layout.noise) for picture in states(scene)]
    gap = np.full((len(pictures[0]), GAP, pictures[0].shape[2]), 255, np.uint8)
    save_png(np.concatenate([pictures[0], gap, pictures[1], gap, pictures[2]], axis=1), options.file)
    print(f"{options.file}: {options.file.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
