"""What the settings of Phase 1 do: calibration, stars, plate solving."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from scenes.outcomes import NIGHT, Outcome, differ, frames, level, night
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.phases import phase1_solve
from zemosaic_pipeline.platesolve import choose
from zemosaic_pipeline.platesolve.base import SolveError, SolverMissing
from zemosaic_pipeline.synthetic.night import night_truth


def test_dark(run, scenes):
    # the darks hold the bias (256) and what is left of the hot pixels; unrepaired ones pass for stars, by which other
    # frames are kept, so that the level is compared with repair
    np.testing.assert_allclose(level(night(run)) - level(night(run, dark=str(scenes / "darks"))), 256, atol=5)
    one = night(run, dark=str(scenes / "darks"), hot_pixel_sigma=0, stacking_rejection_algorithm="none")
    other = night(run, hot_pixel_sigma=0, stacking_rejection_algorithm="none")
    apart = other.image() - one.image()
    assert np.mean(apart[one.image() != 0] > 350) > 0.01


def test_flat(run, scenes):
    def middle_over_corners(outcome: Outcome) -> float:
        image = outcome.image()[1]
        h, w = image.shape
        corners = [image[y : y + h // 6, x : x + w // 6] for y in (0, h - h // 6) for x in (0, w - w // 6)]
        sides = np.concatenate([c[c != 0] for c in corners])
        return float(np.median(image[h // 3 : -h // 3, w // 3 : -w // 3]) / np.median(sides))

    bias = str(scenes / "biass")
    plain, flattened = night(run, bias=bias), night(run, bias=bias, flat=str(scenes / "flats"))
    assert middle_over_corners(plain) > middle_over_corners(flattened) + 0.1


def test_bias(run, scenes):
    np.testing.assert_allclose(level(night(run)) - level(night(run, bias=str(scenes / "biass"))), 256, atol=12)


def test_bayer_pattern(run):
    right, wrong = level(night(run)), level(night(run, bayer_pattern="RGGB"))
    assert right.argmax() == 1  # the sky glows in green
    assert wrong[0] > right[0] + 10 and wrong[1] < right[1] - 10


def test_debayer_method(run):
    assert differ(night(run), night(run, debayer_method="edge_aware"), by=1)


def test_hot_pixel_sigma(run):
    options = {"stacking_rejection_algorithm": "none", "refine_wcs": False}
    repaired, left = night(run, **options), night(run, hot_pixel_sigma=0, **options)
    assert np.mean(left.image() - repaired.image() > 100) > 0.02


def test_reject_bad_frames(run):
    assert len(frames(night(run), "weight")) == 4
    assert len(frames(night(run, reject_bad_frames=False), "weight")) == 6


@pytest.fixture
def solver(monkeypatch) -> list:
    """Hints that the plate solver got; it finds nothing."""
    asked = []

    def solve(image, stars, hints, scratch, cancelled):
        asked.append(hints)
        raise SolveError("Nothing was found.")

    monkeypatch.setattr(phase1_solve, "choose_solver", lambda settings, warn: SimpleNamespace(solve=solve))
    return asked


def test_force_resolve_existing_wcs(run, solver):
    run("lights", fresh=True)
    assert solver == []
    with pytest.raises(UsageError, match="cannot be solved"):
        run("lights", force_resolve_existing_wcs=True)
    assert len(solver) == 6


@pytest.fixture
def looked_for(monkeypatch) -> list[tuple]:
    """Solvers that were looked for, with what the settings say of them; there is none."""
    calls = []

    def nothing(name: str):
        def find(*arguments):
            calls.append((name, *arguments))
            raise SolverMissing(f"No {name}.")

        return find

    for name in ("find_astap", "find_astrometry_net"):
        monkeypatch.setattr(choose, name, nothing(name))
    return calls


def unsolved(run, **settings) -> None:
    with pytest.raises(UsageError, match="no plate solver"):
        run("lights", force_resolve_existing_wcs=True, **settings)


def test_solver_method(run, looked_for):
    for method, order in (("astap", "find_astap"), ("astrometry", "find_astrometry_net"), ("none", None)):
        looked_for.clear()
        unsolved(run, solver_method=method)
        assert (looked_for[0][0] if looked_for else None) == order


def test_solver_timeout(run, looked_for):
    unsolved(run, solver_timeout=7)
    assert [call[-1] for call in looked_for] == [7, 7]


def test_astap_executable_path(run, looked_for):
    unsolved(run, astap_executable_path="/opt/astap")
    assert looked_for[0][1] == "/opt/astap"


def test_astap_data_directory_path(run, looked_for):
    unsolved(run, astap_data_directory_path="/opt/stars")
    assert looked_for[0][2] == "/opt/stars"


def test_astap_default_search_radius(run, solver):
    with pytest.raises(UsageError):
        run("lights", force_resolve_existing_wcs=True, astap_default_search_radius=5.5)
    assert {hints.radius for hints in solver} == {5.5}


def test_astap_default_downsample(run, looked_for):
    unsolved(run, astap_default_downsample=4)
    assert looked_for[0][3] == 4


def test_astap_max_instances(run, looked_for):
    unsolved(run, astap_max_instances=3)
    assert looked_for[0][4] == 3


def test_astrometry_local_path(run, looked_for):
    unsolved(run, astrometry_local_path="/opt/astrometry")
    assert looked_for[1][1] == "/opt/astrometry"


def test_refine_wcs(run):
    def errors(outcome: Outcome) -> np.ndarray:
        """Where the frames are, beside the truth (pixels), without what they share."""
        truth = night_truth(NIGHT)
        used = [row for row in outcome.report["frames"] if row["status"] == "stacked"]
        off = []
        for row in used:
            sky = WCS(fits.Header.fromstring(row["wcs"])).pixel_to_world_values(80, 100)
            off.append(np.subtract(truth.frame(row["name"]).wcs.world_to_pixel_values(*sky), (80, 100)))
        return np.std(off, axis=0)

    assert errors(night(run)).max() < 0.2 < errors(night(run, refine_wcs=False)).min()
