"""Stars found, frames judged, WCS aligned and handed on: against synthetic frames whose truth is known."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from astropy import units as u
from astropy.coordinates import SkyCoord
from astropy.io import fits
from astropy.wcs import WCS, Sip
from scipy.special import erf

from scenes.places import real_files
from zemosaic_pipeline.stars.alignment import align_frames
from zemosaic_pipeline.stars.detection import Stars, find_stars, position_error
from zemosaic_pipeline.stars.matching import Affine, fit_affine, moved_wcs, pointing_disagrees, transfer_wcs
from zemosaic_pipeline.stars.quality import frame_quality

SHAPE = (1920, 1080)
NOISE = 20.0


# ------------------------------------------------------------------------------------------------------- finding


def paint(shape, x, y, flux, fwhm, noise=NOISE, sky=1000.0, stretch=1.0, seed=0):
    """Gaussian stars integrated over the pixels, longer along x by `stretch`."""
    image = np.zeros(shape)
    s, t = fwhm / 2.3548, fwhm / 2.3548 * stretch
    for a, b, f in zip(x, y, flux, strict=True):
        columns, rows = np.arange(shape[1]) - a, np.arange(shape[0]) - b
        gx = (erf((columns + 0.5) / t / 2**0.5) - erf((columns - 0.5) / t / 2**0.5)) / 2
        gy = (erf((rows + 0.5) / s / 2**0.5) - erf((rows - 0.5) / s / 2**0.5)) / 2
        image += f * gy[:, None] * gx
    return (image + sky + np.random.default_rng(seed).normal(0, noise, shape)).astype(np.float32)


@pytest.fixture(scope="module")
def lattice():
    """Stars on a wide lattice, each somewhere within its pixel."""
    rng = np.random.default_rng(1)
    y, x = np.mgrid[20:390:30, 20:590:30].astype(float)
    x, y = (c.ravel() + rng.uniform(-0.5, 0.5, c.size) for c in (x, y))
    return x, y, 10 ** rng.uniform(3.5, 5, x.size)


def matched(stars, x, y):
    """For each true star the found one within a pixel."""
    distance = np.hypot(stars.x[None] - x[:, None], stars.y[None] - y[:, None])
    nearest = distance.argmin(axis=1)
    found = distance[np.arange(len(x)), nearest] < 1
    return np.flatnonzero(found), nearest[found]


@pytest.mark.parametrize("fwhm", [2.0, 3.0, 5.0])
def test_positions_are_as_good_as_the_noise_allows(lattice, fwhm):
    x, y, flux = lattice
    stars = find_stars(paint((400, 600), x, y, flux, fwhm))
    k, j = matched(stars, x, y)
    assert len(k) >= 0.97 * len(x)
    assert len(stars) <= len(x) + 1, "nothing else is found"
    off = np.hypot(stars.x[j] - x[k], stars.y[j] - y[k])
    bound = np.sqrt(8 * np.pi) * (fwhm / 2.3548) ** 2 * NOISE / flux[k]
    assert np.sqrt(np.mean((off / np.hypot(bound, 0.005)) ** 2) / 2) < 1.35
    # the errors that the alignment weighs them with
    assert 0.3 < np.sqrt(np.mean((off / position_error(stars)[j]) ** 2) / 2) < 1.35


def test_what_is_measured(lattice):
    x, y, flux = lattice
    stars = find_stars(paint((400, 600), x, y, flux, 3.5))
    k, j = matched(stars, x, y)
    bright = flux[k] > 2e4
    assert np.median(stars.fwhm[j][bright]) == pytest.approx(np.hypot(3.5, 2.3548 / 12**0.5), rel=0.03)
    assert np.median(stars.elongation[j][bright]) == pytest.approx(1, abs=0.03)
    # a circle of 1.5 FWHM holds all but 2 thousandths of a Gaussian
    assert np.median(stars.flux[j][bright] / flux[k][bright]) == pytest.approx(1, abs=0.01)
    assert stars.background == pytest.approx(1000, abs=1)
    assert stars.noise == pytest.approx(NOISE, rel=0.03)
    assert (np.diff(stars.flux) <= 0).all()
    assert len(find_stars(paint((400, 600), x, y, flux, 3.5), limit=10)) == 10
    long = find_stars(paint((400, 600), x, y, flux, 3.0, stretch=2.0))
    assert 1.7 < np.median(long.elongation[:50]) < 2.0, "what is below the threshold is not seen"


def test_missing_pixels_edges_and_byte_order(lattice):
    x, y, flux = lattice
    image = paint((400, 600), x, y, flux, 3.0)
    whole = find_stars(image)
    assert np.array_equal(find_stars(image.astype(">f4")).x, whole.x)
    image[:, 300:] = np.nan
    image[:, :3] = np.nan
    half = find_stars(image)
    assert np.isfinite([half.background, half.noise]).all()
    assert half.x.max() < 297
    k, _ = matched(half, x, y)
    assert len(k) >= 0.95 * (x < 295).sum()
    cut = find_stars(paint((400, 600), np.r_[x, 0.0, 599.0], np.r_[y, 200, 200.0], np.r_[flux, 1e6, 1e6], 3.0))
    assert cut.x.min() > 4 and cut.x.max() < 595, "stars cut by the edge are left out"


def test_hot_pixels_and_trails_are_no_stars(lattice):
    x, y, flux = lattice
    image = paint((400, 600), x, y, flux, 3.0)
    rng = np.random.default_rng(2)
    hot = rng.integers(5, 395, 200), rng.integers(5, 595, 200)
    image[hot] += 20_000
    rows, columns = np.mgrid[:400, :600]
    image += 3000 * np.exp(-(((columns - 1.3 * rows - 31.5) / 3) ** 2)).astype(np.float32)
    stars = find_stars(image)
    _, j = matched(stars, x, y)
    assert len(stars) - len(j) <= 5


def test_saturated_stars_are_told(lattice):
    x, y, flux = lattice
    image = paint((400, 600), np.r_[x, 155.2], np.r_[y, 155.3], np.r_[flux, 3e6], 4.0)
    stars = find_stars(np.minimum(image, 65535))
    assert stars.flat[0] and not stars.flat[1:].any()
    assert (stars.x[0], stars.y[0]) == pytest.approx((155.2, 155.3), abs=0.05)


@pytest.mark.parametrize("value", [np.nan, 0.0, 500.0])
def test_an_image_of_nothing_has_no_stars(value):
    for shape in ((300, 400), (1, 1), (3, 400)):
        assert len(find_stars(np.full(shape, value, np.float32))) == 0


def test_noise_has_no_stars_and_a_frame_full_of_light_does_not_fail():
    rng = np.random.default_rng(3)
    noise = rng.normal(0, 30, (600, 600)).astype(np.float32)
    assert len(find_stars(noise)) <= 1
    # the Bayer pattern left in, as in a luminance of neighbouring pixels: noise that is not white
    assert len(find_stars((noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)) / 3)) <= 20
    crowded = rng.exponential(1, (600, 600)).astype(np.float32) ** 4
    assert len(find_stars(crowded, limit=50)) <= 50
    with pytest.raises(ValueError, match="shape"):
        find_stars(np.zeros((3, 50, 50), np.float32))


# ------------------------------------------------------------------------------------------------------- quality


def night(count, seed=0, stars=200, fwhm=3.0, elongation=1.1, light=1.0):
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(count):
        flux = np.sort(1e3 * (rng.pareto(1.2, stars) + 1))[::-1] * light * rng.normal(1, 0.05)
        shape = fwhm * rng.normal(1, 0.03), elongation * rng.normal(1, 0.02)
        columns = [rng.uniform(0, 1000, (2, stars)), [flux], *[[np.full(stars, s)] for s in shape]]
        frames.append(Stars(*np.concatenate(columns), 1000.0, NOISE))
    return frames


def test_bad_frames_are_named_with_numbers():
    trailed, blurred = night(1, 1, elongation=1.7)[0], night(1, 2, fwhm=6.5)[0]
    dim, few, none = night(1, 3, light=0.2)[0], night(1, 4, stars=60)[0], night(1, 5, stars=0)[0]
    reasons = frame_quality([*night(12), trailed, blurred, dim, few, none])
    assert reasons[:12] == [None] * 12
    for reason, word in zip(reasons[12:], ["trailed", "blurred", "clouded", "clouded", "no stars"], strict=True):
        assert word in reason and any(c.isdigit() for c in reason)


def test_few_frames_are_judged_by_absolute_limits_only():
    dim, trailed = night(1, 3, light=0.2)[0], night(1, 1, elongation=2.6)[0]
    assert [bool(r) for r in frame_quality([*night(1), dim, trailed])] == [False, False, True]
    assert frame_quality([]) == []


def test_frames_are_compared_with_their_kind():
    short, long = night(8, 6, stars=60, light=0.2), night(12, 7)
    kinds = ["10 s"] * 8 + ["60 s"] * 12
    assert frame_quality([*short, *long], kinds) == [None] * 20
    assert any(frame_quality([*short, *long])[:8])


# ----------------------------------------------------------------------------------------------------- alignment


def make_wcs(ra=315.4, dec=68.15, angle=0.0, sip=False, scale=2.39):
    """A WCS of the telescope; with `sip` its distortion is 3 pixels in the corners."""
    wcs = WCS(naxis=2)
    suffix = "-SIP" if sip else ""
    wcs.wcs.ctype = ["RA---TAN" + suffix, "DEC--TAN" + suffix]
    wcs.wcs.crval, wcs.wcs.crpix = (ra, dec), (540.5, 960.5)
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    wcs.wcs.cd = scale / 3600 * np.array([[-c, s], [s, c]])
    if sip:
        a, b = np.zeros((4, 4)), np.zeros((4, 4))
        a[2, 0], a[0, 2], a[3, 0], a[1, 2] = 3e-6, -2e-6, 2e-9, 2e-9
        b[1, 1], b[0, 3], b[2, 1] = 3e-6, 2e-9, 2e-9
        wcs.sip = Sip(a, b, None, None, wcs.wcs.crpix)
    wcs.wcs.set()
    return wcs


@pytest.fixture(scope="module")
def sky():
    """Positions (N, 2) and fluxes of the stars of a sky."""
    rng = np.random.default_rng(5)
    away, angle = np.sqrt(rng.uniform(0, 1, 4000)) * 1.6, rng.uniform(0, 360, 4000)
    place = SkyCoord(315.4, 68.15, unit="deg").directional_offset_by(angle * u.deg, away * u.deg)
    return np.stack([place.ra.deg, place.dec.deg], axis=1), 1e3 * (rng.pareto(1.0, 4000) + 1)


def observe(wcs, sky, seed, spurious=30, lost=0.1, shape=SHAPE):
    """What `find_stars` gives of a frame: noisy positions, some stars lost, some that are none."""
    rng = np.random.default_rng(seed)
    xy = wcs.all_world2pix(sky[0], 0)
    seen = ((xy > 5) & (xy < np.array(shape[::-1]) - 6)).all(axis=1) & (rng.uniform(size=len(xy)) > lost)
    xy, flux = np.concatenate([xy[seen], rng.uniform((0, 0), shape[::-1], (spurious, 2))]), sky[1][seen]
    flux = np.concatenate([flux, 1e3 * (rng.pareto(1.0, spurious) + 1)])
    order = np.argsort(-flux)[:400]
    one = np.ones(len(order))
    stars = Stars(*xy[order].T, flux[order], 3.0 * one, one, 500.0, NOISE)
    noise = rng.normal(0, position_error(stars), (2, len(order)))
    return replace(stars, x=stars.x + noise[0], y=stars.y + noise[1])


def errors(wcs, truth):
    """Where `truth` has what `wcs` says, in pixels, over the frame (N, 2)."""
    grid = np.stack(np.meshgrid(np.linspace(0, 1079, 6), np.linspace(0, 1919, 8)), axis=-1).reshape(-1, 2)
    return truth.all_world2pix(wcs.all_pix2world(grid, 0), 0) - grid


def rms(steps):
    return float(np.sqrt((np.asarray(steps) ** 2).sum(axis=-1).mean()))


@pytest.fixture(scope="module", params=[False, True], ids=["TAN", "TAN-SIP"])
def panel(request, sky):
    """True WCS of 16 frames (four of them another night, turned), the stars seen, and WCS that are somewhat off."""
    rng = np.random.default_rng(6)
    truth, given, stars = [], [], []
    for k in range(16):
        angle = rng.uniform(-3, 3) + (121 if k >= 12 else 0)
        wcs = make_wcs(315.4 + rng.normal(0, 0.05), 68.15 + rng.normal(0, 0.02), angle, request.param)
        truth.append(wcs)
        stars.append(observe(wcs, sky, 100 + k))
        given.append(moved_wcs(wcs, Affine(np.eye(2) + rng.normal(0, 2e-4, (2, 2)), rng.normal(0, 0.5, 2))))
    return truth, given, stars


def test_frames_are_aligned(panel):
    truth, given, stars = panel
    kept = [wcs.to_header_string(relax=True) for wcs in given]
    start = time.perf_counter()
    found = align_frames(stars, given, SHAPE)
    assert time.perf_counter() - start < 2
    assert kept == [wcs.to_header_string(relax=True) for wcs in given], "what was given is not changed"
    before = np.array([errors(g, t) for g, t in zip(given, truth, strict=True)])
    after = np.array([errors(f.wcs, t) for f, t in zip(found, truth, strict=True)])
    assert rms(before) > 0.7
    # frames of one night share what no star can tell: where the panel as a whole lies
    assert rms(after[:12] - after[:12].mean(axis=0)) < 0.03
    assert rms(after[12:] - after[12:].mean(axis=0)) < 0.03
    assert rms(after) < 0.3
    for item, wcs, step in zip(found, given, before - after, strict=True):
        assert item.reason is None and item.matched > 200 and item.rms_px < 0.15
        assert item.shift_px == pytest.approx(rms(step), rel=0.1, abs=0.01)
        if wcs.sip is not None:
            assert np.array_equal(item.wcs.sip.a, wcs.sip.a) and np.array_equal(item.wcs.sip.b, wcs.sip.b)
            again = WCS(item.wcs.to_header(relax=True))
            assert rms(errors(again, item.wcs)) < 1e-6, "the header tells the same"


def test_the_order_of_the_frames_does_not_matter(panel):
    _, given, stars = panel
    order = np.random.default_rng(1).permutation(16)
    straight = align_frames(stars, given, SHAPE)
    shuffled = align_frames([stars[k] for k in order], [given[k] for k in order], SHAPE)
    assert max(rms(errors(shuffled[n].wcs, straight[k].wcs)) for n, k in enumerate(order)) < 0.02


def test_a_panel_that_agrees_stays(panel):
    truth, _, stars = panel
    assert max(item.shift_px for item in align_frames(stars, truth, SHAPE)) < 0.06


def test_an_offset_of_many_pixels_is_brought_back(panel):
    truth, given, stars = panel
    off = [*given[:5], moved_wcs(given[5], Affine(np.eye(2), np.array([25.0, -17.0])))]
    found = align_frames(stars[:6], off, SHAPE)
    after = np.array([errors(f.wcs, t) for f, t in zip(found, truth, strict=False)])
    assert found[5].reason is None and found[5].shift_px == pytest.approx(np.hypot(25, 17), abs=2)
    assert rms(after - np.median(after, axis=0)) < 0.05


def test_lying_frames_are_named(panel):
    truth, given, stars = panel
    given = list(given)
    ra, dec = truth[3].wcs.crval
    sip = truth[3].sip is not None
    given[3] = make_wcs(ra, dec + 0.3, sip=sip)
    given[7] = make_wcs(*truth[7].wcs.crval, 180, sip=sip)
    given[9] = make_wcs(*truth[9].wcs.crval, -1.5, scale=2.6, sip=sip)
    found = align_frames(stars, given, SHAPE)
    assert [k for k, item in enumerate(found) if item.reason] == [3, 7, 9]
    assert "not where its WCS says" in found[3].reason and found[3].wcs is given[3]


def test_of_two_that_disagree_the_pointing_decides_else_the_number_of_stars(panel):
    truth, given, stars = panel
    ra, dec = truth[0].wcs.crval
    lying = make_wcs(ra + 0.3, dec + 0.3)
    pair = [stars[0], stars[1]], [lying, given[1]]
    assert [bool(r.reason) for r in align_frames(*pair, SHAPE, [(ra, dec), (ra, dec)])] == [True, False]
    more = replace(
        stars[1], **{c: getattr(stars[1], c)[:200] for c in ("x", "y", "flux", "fwhm", "elongation", "flat")}
    )
    assert [bool(r.reason) for r in align_frames([stars[0], more], pair[1], SHAPE)] == [False, True]


def test_what_cannot_be_judged_keeps_its_wcs(panel, sky):
    _, given, stars = panel
    far = make_wcs(315.4, 66.7)
    empty = Stars(*np.zeros((5, 0)), 500.0, NOISE)
    found = align_frames([*stars[:3], observe(far, sky, 50), empty], [*given[:3], far, given[3]], SHAPE)
    assert [item.reason for item in found] == [None] * 5
    assert found[3].wcs is far and found[4].wcs is given[3] and found[4].matched == 0 and found[0].matched > 200
    assert align_frames([], [], SHAPE) == []
    assert align_frames(stars[:1], given[:1], SHAPE)[0].wcs is given[0]


def test_moving_a_wcs_is_exact():
    wcs = make_wcs(angle=30)
    turn = Affine(np.array([[1.001, 0.002], [-0.0015, 0.9995]]), np.array([0.7, -3.2]))
    points = np.random.default_rng(0).uniform(0, 1000, (50, 2))
    for version in (wcs, WCS(wcs.to_header())):  # CD, and PC with CDELT
        moved = moved_wcs(version, turn)
        assert moved.all_world2pix(version.all_pix2world(points, 0), 0) == pytest.approx(turn(points), abs=1e-6)
    sip = make_wcs(sip=True)
    shift = Affine(np.eye(2), np.array([12.3, -4.5]))
    moved = moved_wcs(sip, shift)
    assert moved.all_world2pix(sip.all_pix2world(points, 0), 0) == pytest.approx(shift(points), abs=1e-4)


@pytest.mark.parametrize("model", ["shift", "rigid", "similar", "affine"])
def test_fits_find_their_own_model(model):
    c, s = np.cos(0.1), np.sin(0.1)
    matrix = {"shift": np.eye(2), "rigid": [[c, -s], [s, c]], "similar": [[1.2 * c, -1.2 * s], [1.2 * s, 1.2 * c]]}
    truth = Affine(np.array(matrix.get(model, [[1.1, 0.2], [0.0, 0.8]])), np.array([5.0, -7.0]))
    points = np.random.default_rng(0).uniform(0, 100, (8, 2))
    weight = np.r_[np.ones(7), 0]
    target = truth(points)
    target[7] += 100
    found = fit_affine(points, target, weight, model)
    assert found.matrix == pytest.approx(truth.matrix) and found.shift == pytest.approx(truth.shift)


# --------------------------------------------------------------------------------------------------- transferred WCS


@pytest.mark.parametrize("sip", [False, True])
@pytest.mark.parametrize("spurious,lost", [(30, 0.1), (150, 0.4)])
def test_a_solution_is_handed_on(sky, sip, spurious, lost):
    rng = np.random.default_rng(8)
    reference = make_wcs(sip=sip)
    stars = observe(reference, sky, 1)
    times = []
    for k in range(8):
        truth = make_wcs(315.4 + rng.normal(0, 0.3), 68.15 + rng.normal(0, 0.15), rng.uniform(0, 360), sip)
        mine = observe(truth, sky, 10 + k, spurious, lost)
        start = time.perf_counter()
        found = transfer_wcs(mine, stars, reference)
        times.append(time.perf_counter() - start)
        assert found is not None and rms(errors(found, truth)) < 0.12
        assert (found.sip is not None) == sip
    assert np.median(times) < 0.05


def test_a_frame_of_another_scale_or_with_few_stars_is_solved(sky):
    reference = make_wcs()
    stars = observe(reference, sky, 1)
    other = make_wcs(315.45, 68.2, 77, scale=4.78)
    found = transfer_wcs(observe(other, sky, 2), stars, reference, 4.7)
    assert rms(errors(found, other)) < 0.15
    near = make_wcs(315.42, 68.16, 77)
    few = observe(near, sky, 3, spurious=0)
    few = replace(few, **{c: getattr(few, c)[:40] for c in ("x", "y", "flux", "fwhm", "elongation", "flat")})
    assert rms(errors(transfer_wcs(few, stars, reference), near)) < 0.2


def test_unrelated_fields_are_refused():
    rng = np.random.default_rng(9)
    for count in (3, 9, 15, 50, 400):
        for _ in range(12):
            a, b = night(2, int(rng.integers(2**31)), stars=count)
            assert transfer_wcs(a, b, make_wcs()) is None
            # and are not aligned with each other either
            reasons = [item.reason for item in align_frames([a, b], [make_wcs(), make_wcs()], (1000, 1000))]
            assert sum(reason is not None for reason in reasons) == (count >= 9)


def test_a_mirrored_frame_is_refused(sky):
    reference = make_wcs()
    stars = observe(reference, sky, 1)
    assert transfer_wcs(replace(stars, x=1079 - stars.x), stars, reference) is None


def test_a_pointing_outside_the_frame_contradicts_its_wcs():
    wcs = make_wcs(0.1, 60)
    assert pointing_disagrees(wcs, 359.7, 60.3, SHAPE) is None
    assert pointing_disagrees(wcs, None, None, SHAPE) is None
    assert "1.00 degrees" in pointing_disagrees(wcs, 0.1, 61.0, SHAPE)


# --------------------------------------------------------------------------------------------------------- real frames


@pytest.fixture(scope="module")
def real():
    cv2 = pytest.importorskip("cv2")
    paths = real_files("ngc7023_seestar")
    stars = []
    for path in paths:
        colour = cv2.cvtColor(fits.getdata(path).astype(np.uint16), cv2.COLOR_BayerGB2RGB)
        stars.append(find_stars(colour.astype(np.float32).mean(axis=2)))
    return stars, [WCS(fits.getheader(path)) for path in paths]


@pytest.mark.realdata
def test_real_frames_of_two_nights(real):
    stars, given = real
    assert all(len(s) > 150 and 2 < np.median(s.fwhm) < 5 for s in stars)
    assert frame_quality(stars) == [None] * 6
    found = align_frames(stars, given, SHAPE)
    assert all(item.reason is None and item.matched > 150 and item.rms_px < 0.3 for item in found)
    for reference in (0, 4):
        for k in range(6):
            wcs = transfer_wcs(stars[k], stars[reference], found[reference].wcs)
            assert rms(errors(wcs, found[k].wcs)) < 0.2
    turned = [*given[:4], given[4], moved_wcs(given[5], Affine(-np.eye(2), np.array([1079.0, 1919.0])))]
    assert [bool(item.reason) for item in align_frames(stars, turned, SHAPE)] == [False] * 5 + [True]
