"""Small FITS files for the tests."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from astropy.io import fits

H, W = 21, 17


def celestial_header(ctype=("RA---TAN", "DEC--TAN"), **more) -> fits.Header:
    cards = {
        "CTYPE1": ctype[0],
        "CTYPE2": ctype[1],
        "CRVAL1": 315.0,
        "CRVAL2": 68.0,
        "CRPIX1": 8.0,
        "CRPIX2": 11.0,
        "CDELT1": -0.001,
        "CDELT2": 0.001,
    }
    return fits.Header({**cards, **more})


def pixels(dtype, shape, seed=1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if np.dtype(dtype).kind in "iu":
        info = np.iinfo(dtype)
        return rng.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
    return rng.normal(1000, 300, shape).astype(dtype)


def save(path: Path, data, header=None, *extensions) -> Path:
    fits.HDUList([fits.PrimaryHDU(data, header), *extensions]).writeto(path)
    return path


IMAGE = pixels("f4", (H, W))
