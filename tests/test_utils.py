"""zemosaic_utils: atomic files, JSON, folders, the radial weight map."""

from __future__ import annotations

import json
import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

import zemosaic_utils
from zemosaic_pipeline import arrays, errors, files
from zemosaic_pipeline.fits import find


def test_atomic_path_replaces_the_target_and_leaves_nothing_else(tmp_path):
    target = tmp_path / "mosaic.fits"
    target.write_bytes(b"old")
    with files.atomic_path(target) as part:
        assert part.parent == tmp_path and part.name.startswith(".") and part.suffix == ".part"
        assert target.name in part.name and str(os.getpid()) in part.name
        part.write_bytes(b"new")
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_atomic_path_removes_the_part_on_any_exception(tmp_path, error):
    target = tmp_path / "mosaic.fits"
    target.write_bytes(b"old")
    with pytest.raises(error), files.atomic_path(target) as part:
        part.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


def test_atomic_path_names_a_target_that_cannot_be_replaced(tmp_path):
    target = tmp_path / "mosaic.fits"
    target.mkdir()
    with (
        pytest.raises(errors.RunError, match=r"mosaic\.fits cannot be replaced"),
        files.atomic_path(target) as p,
    ):
        p.write_bytes(b"new")
    assert list(tmp_path.iterdir()) == [target]


def test_write_json_converts_numpy_and_non_finite_numbers(tmp_path):
    value = {
        "gain": np.float32(0.5),
        1: np.arange(3),
        "bad": [math.nan, np.inf, np.array([np.nan, 1.0])],
        "flag": np.bool_(True),
        "where": Path("a") / "b",
        "pair": (1, None),
        "names": {"b", "a"},
    }
    files.write_json(tmp_path / "r.json", value)
    assert json.loads((tmp_path / "r.json").read_text("utf-8"), parse_constant=pytest.fail) == {
        "gain": 0.5,
        "1": [0, 1, 2],
        "bad": [None, None, [None, 1.0]],
        "flag": True,
        "where": str(Path("a") / "b"),
        "pair": [1, None],
        "names": ["a", "b"],
    }


def test_write_json_refuses_other_objects_and_keeps_the_old_file(tmp_path):
    files.write_json(tmp_path / "r.json", {"a": 1})
    with pytest.raises(TypeError, match="object"):
        files.write_json(tmp_path / "r.json", {"a": object()})
    assert json.loads((tmp_path / "r.json").read_text()) == {"a": 1}


def test_write_json_tells_an_unwritable_place_in_one_sentence(tmp_path):
    with pytest.raises(errors.RunError, match=r"r\.json cannot be written"):
        files.write_json(tmp_path / "missing" / "r.json", {})


def test_radial_weights_are_one_at_the_centre_and_fall_by_the_cosine():
    weights = arrays.make_radial_weight_map(41, 61, feather_fraction=1.2, shape_power=2.0, min_weight_floor=0.0)
    assert weights.shape == (41, 61) and weights.dtype == np.float32
    reach = 1.2 * math.hypot(41 / 2, 61 / 2)
    for y, x in [(20, 30), (20, 45), (0, 0), (40, 30)]:
        expected = math.cos(math.pi / 2 * math.hypot(y - 20, x - 30) / reach) ** 2
        assert weights[y, x] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (10, 4)])
def test_radial_weights_stay_between_the_floor_and_one(size):
    weights = arrays.make_radial_weight_map(*size, feather_fraction=0.3, min_weight_floor=0.05)
    assert weights.max() == 1 and weights.min() >= np.float32(0.05)
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])


@pytest.mark.parametrize("power", [0.5, 2.5, 3.0])
def test_radial_weights_are_numbers_whatever_the_power(power):
    weights = arrays.make_radial_weight_map(41, 61, 0.5, power, min_weight_floor=0.0)
    assert np.isfinite(weights).all() and weights.min() == 0 and weights.max() == 1


def test_radial_weights_refuse_nonsense():
    with pytest.raises(ValueError, match="pixels"):
        arrays.make_radial_weight_map(0, 5)
    with pytest.raises(ValueError, match="feather_fraction"):
        arrays.make_radial_weight_map(5, 5, feather_fraction=0)


def test_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert zemosaic_utils.get_user_config_dir() == tmp_path / "ZeMosaic"
    assert not (tmp_path / "ZeMosaic").exists()
    assert zemosaic_utils.ensure_user_config_dir().is_dir()
    assert (zemosaic_utils.get_app_base_dir() / "zemosaic_utils.py").is_file()
    assert zemosaic_utils.get_runtime_temp_dir().is_dir()


def test_excluded_paths():
    assert "unaligned_by_zemosaic" in find.EXCLUDED_DIRS
    assert find.is_path_excluded(Path("in") / "Unaligned_by_ZeMosaic" / "a.fit")
    assert not find.is_path_excluded("in/unaligned_by_zemosaic.fit")
    assert find.is_path_excluded("in/x/a.fit", {"x"}) and not find.is_path_excluded("in/a.fit", {"x"})


def test_unusable_file_tells_its_name_and_survives_pickling():
    error = pickle.loads(pickle.dumps(errors.UnusableFile("dir/a.fits", "is empty")))
    assert (str(error), error.path, error.reason) == ("a.fits: is empty", Path("dir/a.fits"), "is empty")
