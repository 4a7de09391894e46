"""zemosaic_pipeline.fits.tile: every kind of input against astropy's own reading, and every kind of bad input."""

from __future__ import annotations

import gzip
import os
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.fits_samples import IMAGE, H, W, celestial_header, pixels, save
from zemosaic_pipeline.errors import UnusableFile
from zemosaic_pipeline.fits import tile as zf


@pytest.fixture
def panel(tmp_path) -> Path:
    return save(tmp_path / "a.fits", pixels("f4", (3, H, W)), celestial_header())


# --------------------------------------------------------------------------------------------- reading pixels


@pytest.mark.parametrize("shape", [(H, W), (3, H, W), (H, W, 3), (1, H, W), (1, 1, H, W), (1, 3, H, W), (3, 1, H, W)])
@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "i4", "f4", "f8"])
@pytest.mark.parametrize("form", ["plain", "gz", "compressed"])
def test_rows_are_what_astropy_reads(tmp_path, dtype, shape, form):
    data, header = pixels(dtype, shape), celestial_header()
    path = tmp_path / {"plain": "a.fit", "gz": "a.fits.gz", "compressed": "a.fits.fz"}[form]
    if form == "compressed":
        method = "GZIP_2" if np.dtype(dtype).kind == "f" else "RICE_1"
        image = fits.CompImageHDU(data, header, compression_type=method, quantize_level=0)
        fits.HDUList([fits.PrimaryHDU(), image]).writeto(path)
    else:
        save(path, data, header)
    tile = zf.open_tile(path, "a", tmp_path)
    planar = np.moveaxis(data, 2, 0) if shape == (H, W, 3) else data
    expected = planar.reshape(-1, H, W).astype("f4")

    assert tile.shape == (H, W) and tile.channels == expected.shape[0]
    assert tile.wcs.pixel_shape == (W, H)
    for y0, y1 in [(0, H), (5, 9), (H - 1, H), (7, 7)]:
        rows = tile.read_rows(y0, y1)
        assert rows.dtype == np.float32 and rows.dtype.isnative and rows.flags.writeable
        np.testing.assert_array_equal(rows, expected[:, y0:y1])
    assert tile.read_alpha_rows(0, 3) is None


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("bitpix", "scale", "zero"), [("i2", 0.5, 100.25), ("i4", 1, 2**31), ("u1", 2, -128)])
def test_scaled_integers_and_blank(tmp_path, compressed, bitpix, scale, zero):
    stored = np.arange(H * W, dtype=bitpix).reshape(H, W) % 200
    hdu = fits.PrimaryHDU(stored, celestial_header())
    if compressed:
        hdu = fits.CompImageHDU(stored, celestial_header())
    path = tmp_path / "a.fits"
    hdu.writeto(path)
    with fits.open(path, mode="update", do_not_scale_image_data=True, disable_image_compression=True) as hdul:
        header = hdul[-1].header
        header["BSCALE"], header["BZERO"], header["BLANK"] = scale, zero, 7
    expected = (stored * float(scale) + zero).astype("f4")
    expected[stored == 7] = np.nan
    assert np.isnan(expected).any()
    np.testing.assert_array_equal(zf.open_tile(path).read_rows(0, H)[0], expected)


def test_lossy_compression_is_decoded_like_astropy(tmp_path):
    data = pixels("f4", (3, H, W))
    data[1, 4, 5] = np.nan
    fits.CompImageHDU(data, celestial_header(), quantize_level=16).writeto(tmp_path / "a.fz")
    expected = fits.getdata(tmp_path / "a.fz", 1).astype("f4")
    expected[:, 4, 5] = np.nan
    np.testing.assert_array_equal(zf.open_tile(tmp_path / "a.fz").read_rows(3, 9), expected[:, 3:9])


def test_a_pixel_without_data_in_one_channel_is_without_data_in_all(tmp_path):
    data = pixels("f8", (3, H, W))
    data[0, 2, 3], data[1, 4, 5], data[2, 6, 7], data[0, 8, 9] = np.nan, np.inf, -np.inf, 1e300
    rows = zf.open_tile(save(tmp_path / "a.fits", data, celestial_header())).read_rows(0, H)
    empty = np.zeros((H, W), bool)
    empty[[2, 4, 6, 8], [3, 5, 7, 9]] = True
    for channel in rows:
        np.testing.assert_array_equal(np.isnan(channel), empty)
    np.testing.assert_array_equal(rows[:, ~empty], data[:, ~empty].astype("f4"))


@pytest.mark.parametrize(
    ("alpha", "full"),
    [
        (np.array([0, 51, 255], "u1"), 255),
        (np.array([0, 0.2, 1], "f4"), 1),
        (np.array([np.nan, 0.2, 1], "f8"), 1),
        (np.array([0, 1, 1], "u1"), 1),
        (np.array([0, 300, 65535], "u2"), 65535),
    ],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_alpha_is_mask_and_weight(tmp_path, alpha, full, compressed):
    mask = np.resize(alpha, (H, W))
    kind = fits.CompImageHDU if compressed and alpha.dtype.kind != "f" else fits.ImageHDU
    path = save(tmp_path / "a.fits", pixels("u2", (3, H, W)), celestial_header(), kind(mask, name="ALPHA"))
    tile = zf.open_tile(path)
    weights = np.nan_to_num(mask.astype("f8")) / full
    np.testing.assert_allclose(tile.read_alpha_rows(2, 9), weights[2:9], rtol=1e-6)
    rows = tile.read_rows(2, 9)
    np.testing.assert_array_equal(np.isnan(rows), np.broadcast_to(weights[2:9] == 0, rows.shape))


def test_image_in_an_extension_and_alpha_never_taken_for_it(tmp_path):
    data = pixels("i2", (H, W))
    alpha = fits.ImageHDU(np.full((H, W), 255, "u1"), celestial_header(), name="ALPHA")
    table = fits.BinTableHDU.from_columns([fits.Column("x", "J", array=[1])])
    path = save(tmp_path / "a.fits", None, None, alpha, table, fits.ImageHDU(data, celestial_header()))
    np.testing.assert_array_equal(zf.open_tile(path).read_rows(0, H)[0], data)
    with pytest.raises(UnusableFile, match="no image"):
        zf.open_tile(save(tmp_path / "b.fits", None, None, alpha))


def test_wcs_of_the_primary_header_holds_for_an_extension(tmp_path):
    path = save(tmp_path / "a.fits", None, celestial_header(NCOMBINE=12), fits.ImageHDU(pixels("f4", (H, W))))
    tile = zf.open_tile(path)
    assert tile.n_frames == 12
    assert tile.wcs.wcs.crval.tolist() == [315, 68] and tile.wcs.pixel_shape == (W, H)


def test_rows_can_be_read_on_many_threads(panel):
    tile, expected = zf.open_tile(panel), fits.getdata(panel)
    with ThreadPoolExecutor(8) as pool:
        for y, rows in enumerate(pool.map(lambda y: tile.read_rows(y, y + 1), list(range(H)) * 10)):
            np.testing.assert_array_equal(rows[:, 0], expected[:, y % H])


def test_a_file_that_shrinks_or_goes_away_is_named(panel):
    tile = zf.open_tile(panel)
    os.truncate(panel, 3000)
    with pytest.raises(UnusableFile, match=r"a\.fits: .*shorter"):
        tile.read_rows(0, H)
    panel.unlink()
    with pytest.raises(UnusableFile, match=r"a\.fits"):
        tile.read_rows(0, H)
    with pytest.raises(ValueError, match="outside"):
        tile.read_rows(0, H + 1)


def test_reading_leaves_the_file_as_it_was(panel):
    before = panel.read_bytes()
    zf.open_tile(panel).read_rows(0, H)
    assert panel.read_bytes() == before


def test_array_tile():
    data, weights = pixels("f8", (3, H, W)), np.full((H, W), 2.5)
    data[1, 0, 0], weights[0, 1] = np.inf, 0
    tile = zf.array_tile(data, WCS(celestial_header()), weights=weights, n_frames=4)
    rows = tile.read_rows(0, 2)
    assert np.isnan(rows[:, 0, :2]).all() and not np.isnan(rows[:, 0, 2:]).any()
    np.testing.assert_array_equal(rows[:, 1], data[:, 1].astype("f4"))
    np.testing.assert_array_equal(tile.read_alpha_rows(0, H), weights.astype("f4"))
    assert np.isinf(data[1, 0, 0]) and tile.n_frames == 4
    assert zf.array_tile(data[0], tile.wcs).read_alpha_rows(0, 1) is None
    with pytest.raises(ValueError, match="do not fit"):
        zf.array_tile(data, tile.wcs, weights=weights[1:])


# -------------------------------------------------------------------------------------------------- bad input


def without(*keys) -> fits.Header:
    header = celestial_header()
    for key in keys:
        del header[key]
    return header


def bad_image(data, header):
    return lambda path: save(path, data, header)


def bad_alpha(mask):
    return lambda path: save(path, IMAGE, celestial_header(), fits.ImageHDU(mask, name="ALPHA"))


def bad_compression(path):
    fits.CompImageHDU(IMAGE, celestial_header()).writeto(path)
    path.write_bytes(path.read_bytes().replace(b"COMPRESSED_DATA", b"COMPRESSEX_DATA"))


def matrix(kind, *values) -> fits.Header:
    return celestial_header(**dict(zip([f"{kind}{i}_{j}" for i in (1, 2) for j in (1, 2)], values, strict=True)))


def bad_bytes(content):
    return lambda path: path.write_bytes(content)


def bad_cut(size, **comp):
    def make(path):
        data = pixels("f4", (100, 90))
        if comp:
            fits.CompImageHDU(data, celestial_header()).writeto(path)
        else:
            save(path, data, celestial_header())
        os.truncate(path, size if size > 0 else path.stat().st_size + size)

    return make


BAD = {
    "empty": (bad_bytes(b""), "is empty"),
    "text": (bad_bytes(b"just some notes\n" * 300), "is not a FITS file"),
    "header cut": (bad_bytes(fits.PrimaryHDU(IMAGE).header.tostring().encode()[:400]), "broken FITS header"),
    "binary noise": (bad_bytes(b"SIMPLE" + bytes(range(256)) * 40), "broken FITS header|no image"),
    "truncated": (bad_cut(20000), "is truncated .20000 of 38880 bytes"),
    "without data": (bad_cut(2880), "has a header but no data"),
    "compressed truncated": (bad_cut(-2880, comp=1), "is truncated"),
    "broken compression": (bad_compression, "cannot be decoded"),
    "broken gzip": (bad_bytes(gzip.compress(os.urandom(9000))[:5000]), "broken gzip"),
    "empty in gzip": (bad_bytes(gzip.compress(b"")), "is empty"),
    "text in gzip": (bad_bytes(gzip.compress(b"notes")), "is not a FITS file"),
    "NAXIS=0": (bad_image(None, celestial_header()), "holds no image"),
    "1-D": (bad_image(IMAGE[0], celestial_header()), "one-dimensional"),
    "4-D": (bad_image(pixels("f4", (2, 3, H, W)), celestial_header()), "4 axes"),
    "two channels": (bad_image(pixels("f4", (2, H, W)), celestial_header()), "has 2 channels"),
    "four channels": (bad_image(pixels("f4", (H, W, 4)), celestial_header()), "has 4 channels"),
    "one pixel": (bad_image(IMAGE[:1, :1], celestial_header()), "only 1 x 1 pixels"),
    "no WCS": (bad_image(IMAGE, None), "has no WCS"),
    "raw sub": (bad_image(IMAGE, fits.Header({"BAYERPAT": "GRBG"})), "raw sub .BAYERPAT GRBG."),
    "not celestial": (bad_image(IMAGE, celestial_header(("WAVE", "LINEAR"))), "not celestial .WAVE, LINEAR"),
    "half celestial": (bad_image(IMAGE, celestial_header(("RA---TAN", "FREQ"))), "WCS"),
    "no scale": (bad_image(IMAGE, without("CDELT1", "CDELT2")), "without a pixel scale"),
    "singular PC": (bad_image(IMAGE, matrix("PC", 1.0, 1.0, 1.0, 1.0)), "WCS .*ingular"),
    "singular CD": (bad_image(IMAGE, matrix("CD", 1e-4, 2e-4, 1e-4, 2e-4)), "WCS .*ingular"),
    "all but singular CD": (
        bad_image(IMAGE, matrix("CD", 1e-4, 2e-4, 1e-4, 2e-4 + 1e-17)),
        "zero determinant",
    ),
    "zero CD": (bad_image(IMAGE, matrix("CD", 0.0, 0.0, 0.0, 0.0)), "WCS .*ingular"),
    "zero CDELT": (bad_image(IMAGE, celestial_header(CDELT1=0.0)), "WCS"),
    "beyond the sky": (bad_image(IMAGE, celestial_header(("RA---SIN", "DEC--SIN"), CRPIX1=-1e6)), "centre"),
    "unknown projection": (bad_image(IMAGE, celestial_header(("RA---XYZ", "DEC--XYZ"))), "WCS"),
    "latitude first, TPV": (
        bad_image(IMAGE, celestial_header(("DEC--TPV", "RA---TPV"), CRVAL1=68.0, CRVAL2=315.0, PV1_4=0.3)),
        "latitude axis first",
    ),
    "alpha of another size": (bad_alpha(np.ones((4, 5), "u1")), "ALPHA mask of 5 x 4"),
    "alpha hides all": (bad_alpha(np.zeros((H, W), "u1")), "hides every pixel"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_file_is_named_with_its_reason(tmp_path, case):
    make, reason = BAD[case]
    make(tmp_path / "bad.fits")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UnusableFile, match=reason) as caught:
            zf.open_tile(tmp_path / "bad.fits", "bad", scratch)
    assert caught.value.path == tmp_path / "bad.fits" and "\n" not in str(caught.value)
    assert not list(scratch.iterdir())


def test_no_header_whatever_escapes_as_another_error(tmp_path, panel):
    """Any byte of a header may be wrong: it opens, or it is an UnusableFile."""
    good, rng = panel.read_bytes(), np.random.default_rng(5)
    used = len(fits.getheader(panel)) * 80
    for _ in range(150):
        spoilt = bytearray(good)
        for _ in range(rng.integers(1, 6)):
            spoilt[rng.integers(0, used)] = rng.choice(list(b" =/'0123456789ABCEN.-\x00\xff"))
        (tmp_path / "b.fits").write_bytes(spoilt)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                zf.open_tile(tmp_path / "b.fits").read_rows(0, 2)
            except UnusableFile:
                continue


@pytest.mark.parametrize(
    ("dtype", "channels", "blank"), [("u2", 3, True), ("f4", 1, True), ("u2", 1, False), ("f4", 3, True)]
)
def test_zeros_in_all_channels_are_no_data_where_files_use_them_so(tmp_path, dtype, channels, blank):
    data = np.full((channels, 20, 24), 7, dtype)
    data[:, :, :5] = 0
    data[:, 3, 10] = 0  # a clipped dark pixel
    data[0, 4, 8:20] = 0  # in RGB one channel may be 0
    header = celestial_header()
    path = tmp_path / "tile.fits"
    fits.writeto(path, data if channels == 3 else data[0], header)
    rows = zf.open_tile(path).read_rows(0, 20)
    assert np.isnan(rows[:, :, :5]).all() == blank
    assert rows[0, 3, 10] == 0
    assert np.isnan(rows[0, 4, 8:20]).all() == (blank and channels == 1)
    assert (rows[:, 5:, 5:] == 7).all()
