"""zemosaic_pipeline.fits.admission: which files of a folder are panels, and why the others are not."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from astropy.io import fits

from scenes.fits_samples import IMAGE, H, W, celestial_header, pixels, save
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.fits.admission import scan_tiles
from zemosaic_pipeline.fits.find import find_fits_files


def test_find_fits_files(tmp_path):
    wanted = ["a.FIT", "b.fits", "c.Fts", "d.fits.fz", "e.fit.gz", "f.fz", "sub/deep/b.fits", "sub/g.fits.gz"]
    others = ["x.txt", "x.gz", "x.fits.txt", ".h.fits", "._a.FIT", ".m.fits.77.part", "fits"]
    others += ["unaligned_by_zemosaic/a.fits", "sub/.tmp/a.fits"]
    for name in wanted + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_fits_files(tmp_path)]
    assert found == sorted(found) and set(found) == set(wanted)


def test_links_are_followed_but_not_for_ever(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "night").mkdir()
    (tmp_path / "night" / "a.fits").touch()
    try:
        (tmp_path / "in" / "link").symlink_to(tmp_path / "night", target_is_directory=True)
        (tmp_path / "night" / "back").symlink_to(tmp_path / "in", target_is_directory=True)
    except OSError:
        pytest.skip("this system makes no links")
    assert find_fits_files(tmp_path / "in") == [tmp_path / "in" / "link" / "a.fits"]


def test_an_unreadable_subfolder_is_reported(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    real = os.scandir

    def scandir(path="."):
        if Path(path).name == "locked":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    problems = []
    assert find_fits_files(tmp_path, problems=problems) == []
    assert [(p.name, "Permission denied" in p.reason) for p in problems] == [("locked", True)]


def test_an_input_that_is_no_folder(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        scan_tiles(tmp_path / "missing", tmp_path)
    with pytest.raises(UsageError, match="not a folder"):
        scan_tiles(save(tmp_path / "a.fits", IMAGE), tmp_path)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three RGB panels (two of one name), and one of everything that is set aside."""
    root = tmp_path / "in"
    rgb, header = pixels("f4", (3, H, W)), celestial_header()
    for name in ["p.fits", "night2/p.fits", "q.fit.gz", "out/r.fits", "scratch/s.fits"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        save(root / name, rgb, header)
    save(root / "mono.fits", IMAGE, header)
    save(root / "raw.fits", IMAGE, celestial_header(BAYERPAT="GRBG"))
    save(root / "zemosaic_MT3_R30_science.fits", rgb, header)
    save(root / "renamed.fits", rgb, celestial_header(ZMPROD="science"))
    comp = fits.CompImageHDU(IMAGE, celestial_header(ZMPROD="coverage"))
    fits.HDUList([fits.PrimaryHDU(), comp]).writeto(root / "packed.fits.fz")
    (root / "empty.fits").touch()
    return root


def test_scan(folder):
    steps = []
    tiles, aside = scan_tiles(folder, folder / "scratch", folder / "out", progress=lambda *step: steps.append(step))
    assert [tile.name for tile in tiles] == ["night2/p.fits", "p.fits", "q.fit.gz"]
    reasons = {item.name: item.reason for item in aside}
    for name, word in {
        "mono.fits": "is mono, while most tiles are RGB",
        "raw.fits": "raw sub",
        "zemosaic_MT3_R30_science.fits": "earlier run",
        "renamed.fits": "earlier run",
        "packed.fits.fz": "earlier run",
        "empty.fits": "is empty",
        "out/r.fits": "output folder",
    }.items():
        assert word in reasons.pop(name)
    assert not reasons
    assert steps == [(n, 10) for n in range(11)]


def test_scan_into_the_same_folder(folder):
    """All panels lie in the output folder: that is no reason to set them aside."""
    tiles, aside = scan_tiles(folder, folder / "scratch", folder)
    assert [tile.name for tile in tiles] == ["night2/p.fits", "out/r.fits", "p.fits", "q.fit.gz"]
    assert not [item for item in aside if "output folder" in item.reason]
