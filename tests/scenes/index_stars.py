"""True positions of stars, read out of an installed index file of astrometry.net.

An index file holds the unit vectors of its stars as whole numbers (the "data" of a kd-tree; the table
"range" holds lower bounds, upper bounds and the number of units per 1), and sometimes their magnitudes. The
tables are packed bytes in the byte order of the machine that the file was made for.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits

FOLDERS = ("/usr/share/astrometry", "/usr/local/astrometry/data", "/opt/homebrew/share/astrometry")


def index_file() -> Path:
    """Return the installed Tycho-2 index with the most stars, or skip the test and say what to install."""
    found = [path for folder in FOLDERS for path in sorted(Path(folder).glob("index-tycho2-*.fits"))]
    if not found:
        pytest.skip("NO INDEX FILE of astrometry.net is installed: apt-get install astrometry-data-tycho2-08")
    return found[0]  # the smallest quads, hence the most stars


def _packed(hdus: fits.HDUList, name: str, dtype: np.dtype) -> np.ndarray:
    hdu = next(hdu for hdu in hdus[1:] if hdu.header["TTYPE1"] == name)
    count = hdu.header["NAXIS1"] * hdu.header["NAXIS2"] // dtype.itemsize
    return np.fromfile(hdus.filename(), dtype, count, offset=hdu.fileinfo()["datLoc"])


def read_index_stars(path: Path | str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return right ascension, declination (degrees) and magnitude (NaN if not there) of all its stars, float64 (N,)."""
    with fits.open(path or index_file()) as hdus:
        tree = next(hdu.header for hdu in hdus if hdu.header.get("KDT_NAME") == "stars")
        assert tree["KDT_DATA"] == "u32", "an index whose stars are not packed in 32 bits"
        order = "<" if tree["ENDIAN"] == "04:03:02:01" else ">"
        bounds = _packed(hdus, "kdtree_range_stars", np.dtype(f"{order}f8"))
        units = _packed(hdus, "kdtree_data_stars", np.dtype(f"{order}u4")).reshape(-1, 3)
        x, y, z = (units / bounds[6] + bounds[:3]).T
        tags = [hdu.data["MAG_VT"] for hdu in hdus[1:] if "MAG_VT" in (hdu.columns.names or [])]
        mag = np.array(tags[0], np.float64) if tags else np.full(len(x), np.nan)
    return np.degrees(np.arctan2(y, x)) % 360, np.degrees(np.arctan2(z, np.hypot(x, y))), mag


def stars_near(ra: float, dec: float, radius: float, path: Path | str | None = None) -> np.ndarray:
    """Return the stars within `radius` of a position, brightest first: float64 (N, 3) of RA, Dec, magnitude."""
    stars = np.stack(read_index_stars(path), axis=-1)
    lon, lat = np.radians(stars[:, 0] - ra), np.radians(stars[:, 1])
    cosine = np.sin(lat) * np.sin(np.radians(dec)) + np.cos(lat) * np.cos(np.radians(dec)) * np.cos(lon)
    near = stars[cosine > np.cos(np.radians(radius))]
    return near[np.argsort(near[:, 2])]
