"""Raw frames: colours where the header says they are, hot pixels gone, stars kept, the same bits in any strips."""

from __future__ import annotations

import gzip
from itertools import pairwise, product
from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from scenes.fits_samples import celestial_header
from scenes.places import real_files
from zemosaic_pipeline.errors import UnusableFile
from zemosaic_pipeline.raw.calibration import Calibration, load_calibration
from zemosaic_pipeline.raw.frame import open_frame
from zemosaic_pipeline.raw.header import PATTERNS

PLAIN = Calibration(debayer_method="bilinear", hot_pixel_sigma=0)
REPAIR = Calibration(debayer_method="bilinear", hot_pixel_sigma=8)
SKY, NOISE = 800.0, 30.0


def save(path, data, **cards):
    header = fits.Header()
    header.update(cards)
    fits.PrimaryHDU(data, header).writeto(path, overwrite=True)
    return path


def frame_of(path, calibration=PLAIN):
    return open_frame(path, path.name, calibration, path.parent)


def whole(frame):
    return frame.pixels.image.read(0, frame.shape[0])


def mosaic(rgb, pattern="RGGB"):
    """What a sensor with this pattern sees of an image (3, H, W)."""
    out = np.empty(rgb.shape[1:], rgb.dtype)
    for k, colour in enumerate(pattern):
        y, x = divmod(k, 2)
        out[y::2, x::2] = rgb["RGB".index(colour), y::2, x::2]
    return out


# ------------------------------------------------------------------------------------------------------- colours


@pytest.mark.parametrize("height", [20, 21])
@pytest.mark.parametrize(
    ("pattern", "order", "method"), list(product(PATTERNS, ("TOP-DOWN", "BOTTOM-UP", None), ("bilinear", "edge_aware")))
)
def test_colours_come_from_where_the_header_says(tmp_path, pattern, order, method, height):
    # a picture that is linear in x and y, which either method interpolates exactly
    y, x = np.mgrid[0:24, 0:26]
    picture = np.stack([1000 + 8 * x + 4 * y, 5000 - 4 * x + 8 * y, 9000 + 4 * x - 16 * y]).astype("u2")
    sensor = mosaic(picture, pattern)
    for dx, dy in product((0, 1), (0, 1)):
        window = (slice(dy, dy + height), slice(dx, dx + 24))
        step = -1 if order == "BOTTOM-UP" else 1
        cards = {"ROWORDER": order} if order else {}
        stored = sensor[window][::step]
        path = save(tmp_path / "a.fits", stored, BAYERPAT=pattern.lower(), XBAYROFF=dx, YBAYROFF=float(dy), **cards)
        frame = frame_of(path, Calibration(debayer_method=method))
        assert (frame.channels, frame.shape) == (3, stored.shape)
        np.testing.assert_array_equal(whole(frame)[:, 1:-1, 1:-1], picture[:, *window][:, ::step][:, 1:-1, 1:-1])


def slow_bilinear(cfa, pattern):
    """Mean, in float64, of the nearest samples of each colour in the 3 x 3 pixels, or the pixel itself."""
    colours = np.array([["RGB".index(pattern[y % 2 * 2 + x % 2]) for x in range(-1, 99)] for y in range(-1, 99)])
    padded = np.pad(cfa.astype(float), 1, mode="reflect")
    out = np.empty((3, *cfa.shape))
    for y, x, c in np.ndindex(*cfa.shape, 3):
        near, kind = padded[y : y + 3, x : x + 3], colours[y : y + 3, x : x + 3] == c
        out[c, y, x] = near[1, 1] if kind[1, 1] else near[kind].mean()
    return out


@pytest.mark.parametrize("pattern", PATTERNS)
def test_bilinear_is_the_mean_of_the_nearest_samples(tmp_path, pattern):
    cfa = np.random.default_rng(2).normal(500, 300, (9, 13)).astype("f4")  # fractions, and below 0
    frame = frame_of(save(tmp_path / "a.fits", cfa, BAYERPAT=pattern))
    np.testing.assert_allclose(whole(frame), slow_bilinear(cfa, pattern), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("method", ["edge_aware", "bilinear"])
@pytest.mark.parametrize(("pattern", "code"), {"RGGB": "BG", "GRBG": "GB", "GBRG": "GR", "BGGR": "RG"}.items())
def test_both_methods_are_those_of_opencv(tmp_path, pattern, code, method):
    cv2 = pytest.importorskip("cv2")
    cfa = np.random.default_rng(3).integers(0, 65536, (30, 44), dtype="u2")
    name = f"COLOR_Bayer{code}2RGB" + ("_EA" if method == "edge_aware" else "")
    theirs = np.moveaxis(cv2.cvtColor(cfa, getattr(cv2, name)).astype(float), 2, 0)[:, 1:-1, 1:-1]
    frame = frame_of(save(tmp_path / "a.fits", cfa, BAYERPAT=pattern), Calibration(method, hot_pixel_sigma=0))
    apart = theirs - whole(frame)[:, 1:-1, 1:-1]
    assert apart.min() >= -0.25 and apart.max() <= 0.5  # OpenCV rounds halves up


@pytest.mark.parametrize("camera", ["INSTRUME", "CREATOR", "TELESCOP"])
def test_a_seestar_without_pattern_is_grbg(tmp_path, camera):
    data = np.random.default_rng(4).integers(500, 900, (12, 14), dtype="u2")
    told = frame_of(save(tmp_path / "told.fits", data, BAYERPAT="GRBG"))
    guessed = frame_of(save(tmp_path / "guessed.fits", data, **{camera: "ZWO Seestar S50"}))
    np.testing.assert_array_equal(whole(guessed), whole(told))
    assert frame_of(save(tmp_path / "float.fits", data.astype("f4"), INSTRUME="Seestar S50")).channels == 1
    assert frame_of(save(tmp_path / "stack.fits", data, INSTRUME="Seestar S50", STACKCNT=9)).channels == 1
    assert frame_of(save(tmp_path / "other.fits", data, INSTRUME="ASI294MM")).channels == 1


def test_the_setting_goes_before_the_header(tmp_path):
    data = np.random.default_rng(4).integers(500, 900, (12, 14), dtype="u2")
    told = frame_of(save(tmp_path / "told.fits", data, BAYERPAT="BGGR"))
    odd = save(tmp_path / "odd.fits", data, BAYERPAT="wrong", ROWORDER="BOTTOM-UP", XBAYROFF=1)
    forced = frame_of(odd, Calibration("bilinear", "BGGR", 0))
    np.testing.assert_array_equal(whole(forced), whole(told))


def test_mono_and_rgb_frames_pass_unchanged(tmp_path):
    data = np.random.default_rng(5).integers(500, 900, (3, 12, 14), dtype="u2")
    mono = frame_of(save(tmp_path / "mono.fits", data[0]))
    rgb = frame_of(save(tmp_path / "rgb.fits", data, BAYERPAT="GRBG"), Calibration(bayer_pattern="RGGB"))
    assert (mono.channels, rgb.channels) == (1, 3)
    np.testing.assert_array_equal(whole(mono), data[:1])
    np.testing.assert_array_equal(whole(rgb), data)


# ----------------------------------------------------------------------------------------------- strips and files


@pytest.fixture(scope="module")
def strange_frame(tmp_path_factory):
    """An odd-sized float frame with hot pixels, holes, infinity, and masters."""
    folder = tmp_path_factory.mktemp("strange")
    rng = np.random.default_rng(6)
    data = rng.normal(SKY, NOISE, (41, 35)).astype("f4")
    for value in (9000, np.nan, np.inf, -np.inf, -4000):
        data[rng.integers(0, 41, 9), rng.integers(0, 35, 9)] = value
    flat = rng.uniform(2e4, 3e4, data.shape).astype("f4")
    flat[20:24, 10:14] = 0
    save(folder / "flat.fits", flat, BAYERPAT="GBRG")
    save(folder / "dark.fits", rng.normal(200, 5, data.shape).astype("f4"))

    def make(method, sigma):
        wanted = {"dark": str(folder / "dark.fits"), "flat": str(folder / "flat.fits"), "bias": ""}
        wanted |= {"debayer_method": method, "bayer_pattern": "auto", "hot_pixel_sigma": sigma}
        calibration = load_calibration(SimpleNamespace(**wanted), folder, lambda text: None)
        return frame_of(save(folder / "light.fits", data, BAYERPAT="GBRG"), calibration)

    return make


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    cuts=st.lists(st.integers(1, 40), max_size=6, unique=True),
    method=st.sampled_from(["edge_aware", "bilinear"]),
    sigma=st.sampled_from([0.0, 5.0]),
    chunk=st.sampled_from([1, 7, 128]),
)
def test_strips_are_the_whole_bit_by_bit(strange_frame, cuts, method, sigma, chunk):
    frame = strange_frame(method, sigma)
    expected = whole(frame)
    assert np.isnan(expected).any() and np.isfinite(expected).any()
    edges = [0, *sorted(cuts), 41]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("zemosaic_pipeline.raw.frame._CHUNK_ROWS", chunk)
        strips = [frame.pixels.image.read(a, b) for a, b in pairwise(edges)]
    np.testing.assert_array_equal(np.concatenate(strips, axis=1), expected)


def test_compressed_files_hold_the_same_frame(tmp_path):
    data = np.random.default_rng(7).integers(0, 65536, (40, 50), dtype="u2")
    path = save(tmp_path / "a.fits", data, BAYERPAT="GRBG", EXPTIME=10.0, RA=10.0, DEC=20.0)
    expected = frame_of(path, REPAIR)
    (tmp_path / "a.fits.gz").write_bytes(gzip.compress(path.read_bytes()))
    hdu = fits.CompImageHDU(data, fits.getheader(path), compression_type="RICE_1")
    fits.HDUList([fits.PrimaryHDU(), hdu]).writeto(tmp_path / "a.fits.fz")
    for name in ("a.fits.gz", "a.fits.fz"):
        frame = frame_of(tmp_path / name, REPAIR)
        np.testing.assert_array_equal(whole(frame), whole(expected))
        np.testing.assert_array_equal(frame.pixels.image.read(7, 19), whole(expected)[:, 7:19])
        assert (frame.channels, frame.exposure, frame.ra, frame.saturation) == (3, 10.0, 10.0, 65535.0)


# ----------------------------------------------------------------------------------------------------- hot pixels


def starry(fwhm, peaks=(200, 1000, 5000, 30000), shape=(400, 400), seed=8):
    """Sensor image of stars with known centres on a noisy sky, and the stars' windows; green is twice red."""
    rng = np.random.default_rng(seed)
    truth, windows = np.zeros((3, *shape)), []
    y, x = np.mgrid[0 : shape[0], 0 : shape[1]]
    for k, (cy, cx) in enumerate(product(range(20, shape[0] - 19, 40), range(20, shape[1] - 19, 40))):
        near = (slice(cy - 12, cy + 13), slice(cx - 12, cx + 13))
        dy, dx = rng.uniform(-0.5, 0.5, 2)
        r2 = (y[near] - cy - dy) ** 2 + (x[near] - cx - dx) ** 2
        star = peaks[k % len(peaks)] * np.exp(-4 * np.log(2) * r2 / fwhm**2)
        truth[:, *near] += star * np.array([0.5, 1, 0.6])[:, None, None]
        windows.append(near)
    sensor = mosaic(truth) + rng.normal(SKY, NOISE, shape)
    return sensor.round().clip(0, 65535).astype("u2"), windows


@pytest.mark.parametrize("fwhm", [1.6, 2.0, 3.0])
@pytest.mark.parametrize("sigma", [5, 8])
def test_stars_keep_their_flux(tmp_path, fwhm, sigma):
    sensor, windows = starry(fwhm)
    path = save(tmp_path / "a.fits", sensor, BAYERPAT="RGGB")
    before, after = whole(frame_of(path)), whole(frame_of(path, Calibration("bilinear", "auto", sigma)))
    spike = 0 if sigma == 8 else 15 * NOISE  # at 5 sigma the sky's own noise is cut now and then
    for window in windows:
        flux = (before[:, *window] - SKY).sum((1, 2))
        change = (after[:, *window] - before[:, *window]).sum((1, 2))
        assert (np.abs(change) <= np.maximum(0.005 * np.abs(flux), spike)).all()
    total = np.mean([(before[:, *w] - SKY).sum((1, 2)) for w in windows], axis=0)
    lost = np.mean([(before - after)[:, *w].sum((1, 2)) for w in windows], axis=0)
    assert (np.abs(lost) < 5e-4 * total).all()


def test_hot_and_dead_pixels_are_repaired(tmp_path):
    rng = np.random.default_rng(9)
    sensor, windows = starry(2.0)
    near_star = np.zeros(sensor.shape, bool)
    for window in windows:
        near_star[window] = True
    places = rng.permutation(np.argwhere(~near_star))[:160]
    pairs = places[:30] + np.array([0, 1])  # two side by side
    same_colour = places[30:60] + np.array([2, 0])
    border = [[0, 0], [0, 7], [399, 399], [17, 399], [399, 18]]
    spoilt = np.concatenate([places, pairs, same_colour, border])
    spoilt = spoilt[(spoilt < 400).all(1)]
    hot = sensor.copy()
    hot[tuple(spoilt.T)] = rng.choice([0, 1200, 3000, 65535], len(spoilt))  # 13 sigma and more

    before = whole(frame_of(save(tmp_path / "a.fits", sensor, BAYERPAT="RGGB")))
    after = whole(frame_of(save(tmp_path / "b.fits", hot, BAYERPAT="RGGB"), REPAIR))

    apart = np.abs(after - before)[:, *spoilt.T]
    assert (apart < 6 * NOISE).all()
    assert np.sqrt(np.mean(apart**2)) < 1.5 * NOISE


def test_without_a_threshold_hot_pixels_stay(tmp_path):
    data = np.random.default_rng(9).normal(SKY, NOISE, (20, 20)).astype("u2")
    data[9, 9] = 60000
    assert whole(frame_of(save(tmp_path / "a.fits", data))).max() == 60000
    assert whole(frame_of(save(tmp_path / "a.fits", data), REPAIR)).max() < 1000


def test_a_nebula_s_noise_and_edges_are_left_alone(tmp_path):
    rng = np.random.default_rng(10)
    nebula = gaussian_filter(rng.normal(0, 1, (3, 300, 300)), (0, 6, 6))
    sensor = mosaic(2000 + 900 * nebula / nebula.std())
    sensor[:, 150:] += 3000  # a sharp edge
    sensor = rng.poisson(sensor.clip(100)).astype("u2")
    path = save(tmp_path / "a.fits", sensor, BAYERPAT="RGGB")
    assert np.count_nonzero(whole(frame_of(path)) != whole(frame_of(path, REPAIR))) < 3e-5 * 3 * sensor.size


def test_lone_holes_are_filled_and_a_large_one_is_no_data(tmp_path):
    y, x = np.mgrid[0:40, 0:40]
    truth = (1000 + 2 * y + 3 * x).astype("f4")
    data = truth.copy()
    data[10, 10] = data[20, 33] = np.nan
    data[24:32, 8:16] = np.nan
    data[:, 25] = np.nan  # a dead column
    frame = frame_of(save(tmp_path / "a.fits", data, BAYERPAT="RGGB"))
    image = frame.tile(WCS(naxis=2)).read_rows(0, 40)
    holes = np.isnan(image).any(axis=0)
    assert holes[24:32, 8:16].all()
    holes[23:33, 7:17] = False  # what is interpolated from the hole, too
    assert not holes.any()
    np.testing.assert_allclose(image[:, 10, 10], truth[10, 10], atol=1)
    np.testing.assert_allclose(image[:, 4:36, 25], np.broadcast_to(truth[4:36, 25], (3, 32)), atol=1)


# --------------------------------------------------------------------------------------------------- what it says


def test_facts_of_a_seestar(tmp_path):
    cards = dict(EXPTIME=10.0, RA=315.5, DEC=68.2, FOCALLEN=250, XPIXSZ=2.9, XBINNING=2, EQMODE=1)
    cards |= {"CCD-TEMP": 31.1, "DATE-OBS": "2024-07-31T02:44:22.7"}
    frame = frame_of(save(tmp_path / "a.fits", np.zeros((8, 8), "u2"), BAYERPAT="GRBG", **cards))
    assert (frame.exposure, frame.ra, frame.dec, frame.mount) == (10.0, 315.5, 68.2, "eq")
    assert (frame.date, frame.temperature, frame.wcs, frame.n_frames) == ("2024-07-31T02:44:22.7", 31.1, None, 1)
    assert frame.scale == pytest.approx(206.265 * 2.9 / 250, rel=1e-5)  # XPIXSZ includes the binning


@pytest.mark.parametrize(
    ("cards", "ra", "dec"),
    [
        ({"RA": "21 02 00", "DEC": "+68 12 36"}, 315.5, 68.21),
        ({"OBJCTRA": "21:02:00.0", "OBJCTDEC": "-00:30:00"}, 315.5, -0.5),
        ({"RA": "21h02m00s", "DEC": "-8d12m36s"}, 315.5, -8.21),
        ({"RA": (21.0, "[h] right ascension"), "DEC": 5.0}, 315.0, 5.0),
        ({"RA": "315.5", "DEC": "68.21"}, 315.5, 68.21),
        ({"RA": "unknown", "DEC": 5.0, "OBJCTRA": "21 02 00", "OBJCTDEC": "+68 12 36"}, 315.5, 68.21),
        ({"RA": 400.0, "DEC": 5.0}, None, None),
        ({"RA": 10.0, "DEC": 95.0}, None, None),
        ({"RA": 0.0, "DEC": 0.0}, None, None),
        ({"RA": 10.0}, None, None),
    ],
)
def test_pointing(tmp_path, cards, ra, dec):
    frame = frame_of(save(tmp_path / "a.fits", np.zeros((8, 8), "u2"), **cards))
    assert (frame.ra, frame.dec) == (pytest.approx(ra), pytest.approx(dec))


@pytest.mark.parametrize(
    ("cards", "expected"),
    [
        ({"FOCALLEN": 500, "PIXSIZE1": 3.0, "XBINNING": 2}, 206.265 * 6 / 500),
        ({"FOCALLEN": 500, "XPIXSZ": (3.0, "unbinned pixel size"), "XBINNING": 2}, 206.265 * 6 / 500),
        ({"FOCALLEN": 0, "XPIXSZ": 3.0}, None),
        ({"XPIXSZ": 3.0}, None),
    ],
)
def test_scale(tmp_path, cards, expected):
    frame = frame_of(save(tmp_path / "a.fits", np.zeros((8, 8), "u2"), **cards))
    assert frame.scale == (expected and pytest.approx(expected, rel=1e-5))


def test_a_wcs_is_taken_and_a_broken_one_is_none(tmp_path):
    data = np.zeros((21, 17), "u2")
    good = frame_of(save(tmp_path / "a.fits", data, BAYERPAT="GRBG", **celestial_header()))
    assert good.scale == pytest.approx(3.6) and good.wcs.pixel_shape == (17, 21)
    np.testing.assert_allclose((good.ra, good.dec), WCS(celestial_header()).all_pix2world(8, 10, 0), atol=1e-6)
    broken = celestial_header(PC1_1=1.0, PC1_2=1.0, PC2_1=1.0, PC2_2=1.0)
    frame = frame_of(save(tmp_path / "b.fits", data, BAYERPAT="GRBG", **broken))
    assert frame.wcs is None and whole(frame).shape == (3, 21, 17)


def test_a_tile_and_the_luminance_have_the_frame_s_pixels(tmp_path):
    data = np.random.default_rng(11).integers(0, 1000, (300, 20), dtype="u2")
    data[100:104] = 0  # zeros of a sensor are data
    frame = frame_of(save(tmp_path / "a.fits", data, BAYERPAT="GRBG"))
    wcs = WCS(celestial_header())
    tile = frame.tile(wcs)
    assert (tile.shape, tile.channels, tile.name) == ((300, 20), 3, "a.fits")
    assert tile.wcs.pixel_shape == (20, 300) and wcs.pixel_shape is None
    np.testing.assert_array_equal(tile.read_rows(50, 200), whole(frame)[:, 50:200])
    np.testing.assert_array_equal(frame.luminance(), whole(frame).mean(axis=0))


# ----------------------------------------------------------------------------------------------------- bad files


def truncated(path):
    save(path, np.ones((900, 40), "u2"), BAYERPAT="GRBG")
    path.write_bytes(path.read_bytes()[:40000])


BAD = {
    "empty": (lambda p: p.touch(), "is empty"),
    "text": (lambda p: p.write_text("this is a letter\n" * 500), "not a FITS file"),
    "short text": (lambda p: p.write_text("SIMPLE"), "FITS header"),
    "truncated": (truncated, "truncated"),
    "header only": (lambda p: p.write_bytes(save(p, np.ones((50, 50), "u2")).read_bytes()[:2880]), "no data"),
    "broken gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08\x00" + bytes(40)), "gzip"),
    "missing": (lambda p: None, "cannot be opened"),
    "1-D": (lambda p: save(p, np.zeros(100, "u2"), BAYERPAT="GRBG"), "one-dimensional"),
    "4-D": (lambda p: save(p, np.zeros((2, 3, 9, 9), "u2")), "4 axes"),
    "NAXIS=0": (lambda p: save(p, None, BAYERPAT="GRBG"), "holds no image"),
    "a line": (lambda p: save(p, np.zeros((1, 90), "u2"), BAYERPAT="GRBG"), "only 90 x 1 pixels"),
    "pattern": (lambda p: save(p, np.zeros((9, 9), "u2"), BAYERPAT="RGBW"), "unknown BAYERPAT of 'RGBW'"),
    "pattern number": (lambda p: save(p, np.zeros((9, 9), "u2"), BAYERPAT=3), "unknown BAYERPAT of '3'"),
    "offset": (lambda p: save(p, np.zeros((9, 9), "u2"), BAYERPAT="RGGB", XBAYROFF="left"), "unreadable XBAYROFF"),
    "half": (lambda p: save(p, np.zeros((9, 9), "u2"), BAYERPAT="RGGB", YBAYROFF=0.5), "unreadable YBAYROFF"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_file_has_its_reason(tmp_path, kind):
    make, reason = BAD[kind]
    make(tmp_path / "bad.fits")
    with pytest.raises(UnusableFile, match=reason):
        frame_of(tmp_path / "bad.fits")


def test_a_file_that_breaks_later_is_told(tmp_path):
    path = save(tmp_path / "a.fits", np.ones((900, 40), "u2"), BAYERPAT="GRBG")
    frame = frame_of(path)
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(UnusableFile, match="cannot be read"):
        frame.luminance()


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.realdata
def test_real_subs():
    files = real_files("ngc7023_seestar")
    for path in files[::5]:
        frame = open_frame(path, path.name, REPAIR, "unused")
        assert (frame.channels, frame.shape, frame.exposure) == (3, (1920, 1080), float(path.name.split("_")[2][:-3]))
        image = whole(frame)
        strips = [frame.pixels.image.read(y, min(y + 173, 1920)) for y in range(0, 1920, 173)]
        np.testing.assert_array_equal(np.concatenate(strips, axis=1), image)
        sensor = fits.getdata(path)
        plain = whole(open_frame(path, "", PLAIN, "unused"))
        greens = (sensor[::2, ::2].mean() + sensor[1::2, 1::2].mean()) / 2
        expected = [sensor[::2, 1::2].mean(), greens, sensor[1::2, ::2].mean()]
        np.testing.assert_allclose(plain.mean(axis=(1, 2), dtype=float), expected, rtol=1e-3)
        changed = np.count_nonzero(image[1] != plain[1])
        assert 10 < changed < 1000  # hot pixels there are, stars there are thousands
