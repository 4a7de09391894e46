"""zemosaic_pipeline.fits.headers: any WCS against astropy's own, frame counts, files that hold only a header."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.fits_samples import H, W, celestial_header, pixels, save
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.fits.headers import looks_stacked, read_wcs_file
from zemosaic_pipeline.fits.tile import open_tile

SIP = {"A_ORDER": 2, "A_2_0": 1e-4, "B_ORDER": 2, "B_0_2": -2e-4, "A_1_1": 3e-5}
CD = {"CD1_1": 8e-4, "CD1_2": 5e-4, "CD2_1": -5e-4, "CD2_2": 8e-4}
PC = {"PC1_1": 0.8, "PC1_2": -0.6, "PC2_1": 0.6, "PC2_2": 0.8}


@pytest.mark.parametrize(
    "header",
    [
        celestial_header(),
        celestial_header(CDELT1=0.001),
        celestial_header(**PC),
        celestial_header(("RA---TAN-SIP", "DEC--TAN-SIP"), **CD, **SIP),
        celestial_header(("RA---TPV", "DEC--TPV"), **CD, PV1_1=1.01, PV1_4=0.02, PV2_1=0.99, PV2_7=0.03),
        celestial_header(("RA---ZEA", "DEC--ZEA")),
        celestial_header(("GLON-CAR", "GLAT-CAR")),
    ],
    ids=["identity", "mirrored", "PC", "SIP", "TPV", "ZEA", "galactic"],
)
@pytest.mark.parametrize("shape", [(H, W), (3, H, W)])
def test_any_celestial_wcs_is_kept(tmp_path, header, shape):
    path = save(tmp_path / "a.fits", pixels("f4", shape), header)
    tile = open_tile(path)
    y, x = np.mgrid[0:H:4, 0:W:4]
    np.testing.assert_allclose(tile.wcs.all_pix2world(x, y, 0), WCS(header).all_pix2world(x, y, 0), rtol=1e-13)
    assert tile.wcs.naxis == 2


@pytest.mark.parametrize("more", [{}, CD, PC, {"CROTA2": 30.0}, {**CD, **SIP}])
def test_latitude_first_becomes_longitude_first(tmp_path, more):
    kind = "TAN-SIP" if "A_ORDER" in more else "TAN"
    swap = {"CRVAL1": 68.0, "CRVAL2": 315.0, **more}
    header = celestial_header((f"DEC--{kind}", f"RA---{kind}"), **swap)
    tile = open_tile(save(tmp_path / "a.fits", pixels("f4", (H, W)), header))
    assert tile.wcs.wcs.lng == 0
    y, x = np.mgrid[0:H:4, 0:W:4]
    dec, ra = WCS(header).all_pix2world(x, y, 0)
    np.testing.assert_allclose(tile.wcs.all_pix2world(x, y, 0), [ra, dec], rtol=1e-12)


def test_sky_on_the_outer_axes_of_an_interleaved_image(tmp_path):
    header = celestial_header(("", "RA---TAN"), CTYPE3="DEC--TAN", CRVAL2=315.0, CRVAL3=68.0, CDELT3=0.001)
    tile = open_tile(save(tmp_path / "a.fits", pixels("f4", (H, W, 3)), header))
    assert tile.wcs.naxis == 2 and tile.wcs.wcs.crval.tolist() == [315, 68]


@pytest.mark.parametrize(
    ("cards", "frames"),
    [
        ({}, 1),
        ({"MT_NFRAMES": 30, "NCOMBINE": 2}, 30),
        ({"STACKCNT": 7.0}, 7),
        ({"NCOMBINE": "many", "STACKCNT": 5}, 5),
        ({"MT_NFRAMES": 0, "NCOMBINE": -3}, 1),
    ],
)
def test_frame_count(tmp_path, cards, frames):
    header = celestial_header()
    for key, value in cards.items():
        header[f"HIERARCH {key}" if len(key) > 8 else key] = value
    path = save(tmp_path / "a.fits", pixels("f4", (H, W)), header)
    assert open_tile(path).n_frames == frames


@pytest.mark.parametrize("kind", ["fits", "header only", "gz", "newlines", "80 columns", "sloppy"])
def test_wcs_file(tmp_path, kind):
    path, header = tmp_path / "grid.hdr", celestial_header(**PC)
    sized = fits.Header([("SIMPLE", True), ("BITPIX", -32), ("NAXIS", 2), ("NAXIS1", W), ("NAXIS2", H)])
    sized.extend(header)
    if kind == "fits":
        save(path, pixels("f4", (3, H, W)), header)
    elif kind == "header only":
        path.write_text(sized.tostring())
    elif kind == "gz":
        path.write_bytes(gzip.compress(sized.tostring().encode()))
    elif kind == "newlines":
        path.write_text(sized.tostring(sep="\n", endcard=True, padding=False))
    elif kind == "80 columns":
        path.write_text(sized.tostring(endcard=False, padding=False).removeprefix(sized.cards[0].image))
    else:
        path.write_text("a grid\n\n" + "\n".join(f"{k} = {v!r} / note" for k, v in sized.items() if k != "SIMPLE"))
    wcs, shape = read_wcs_file(path)
    assert shape == (H, W) and wcs.pixel_shape == (W, H)
    np.testing.assert_allclose(wcs.all_pix2world(3, 4, 0), WCS(header).all_pix2world(3, 4, 0), rtol=1e-13)


def test_wcs_file_without_a_size(tmp_path):
    celestial_header().totextfile(tmp_path / "a.head")
    assert read_wcs_file(tmp_path / "a.head")[1] is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello\n",
        b"\x1f\x8bxx",
        b"\x1f\x8b\x08" + bytes(7) + b"\xff" * 50,
        b"SIMPLE  = nonsense" * 200,
        b"\0" * 5000,
    ],
)
def test_unusable_wcs_file(tmp_path, content):
    (tmp_path / "grid.hdr").write_bytes(content)
    with pytest.raises(UsageError, match=r"grid\.hdr"):
        read_wcs_file(tmp_path / "grid.hdr")
    with pytest.raises(UsageError, match="missing"):
        read_wcs_file(tmp_path / "missing")


def test_looks_stacked():
    assert looks_stacked(fits.Header({"NAXIS": 2}))
    assert not looks_stacked(fits.Header({"NAXIS": 2, "BAYERPAT": "RGGB"}))
    assert looks_stacked(fits.Header({"NAXIS": 3, "NAXIS3": 3, "BAYERPAT": "RGGB"}))
