"""The rows say the truth of where a setting acts: a later run makes again what depends on it, and may keep the rest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from astropy.io import fits

from scenes.outcomes import NIGHT
from scenes.small_scene import long_ago, product
from zemosaic_pipeline.settings.fields import Setting, Value
from zemosaic_pipeline.settings.settings import SETTINGS
from zemosaic_pipeline.synthetic.night import write_night
from zemosaic_worker import run_hierarchical_mosaic

#: Every part of the program that a setting can change has work to do.
BUSY = {
    "gpu": "off",
    "two_pass_coverage_renorm": True,
    "level_sky": True,
    "final_mosaic_rgb_equalize_enabled": True,
    "final_mosaic_black_point_equalize_enabled": True,
}


@pytest.fixture(scope="module")
def lights(tmp_path_factory) -> Path:
    """Frames of one panel; the values of one of them are not of this sky."""
    folder, _ = write_night(tmp_path_factory.mktemp("night"), replace(NIGHT, frames=5, bad_frames=False))
    with fits.open(sorted(folder.iterdir())[1], mode="update") as hdul:
        hdul[0].data = (hdul[0].data + 3e6).astype("f4")
    long_ago(folder)
    return folder


# ------------------------------------------------------------------------------- what a row leaves out changes no bit

#: Other values than the defaults, where no rule of `another` gives one.
ANOTHER: dict[str, Value] = {
    "cluster_panel_threshold": 1.0,
    "global_wcs_pixelscale_mode": "given",
    "global_wcs_res_override": 7.0,
    "feather_px": 7.0,
    "gpu_selector": "another card",
    "memory_budget": 10**9,
    "num_processing_workers": 3,
    "winsor_limits": (0.1, 0.2),
    "stacking_winsor_limits": (0.1, 0.2),
    "two_pass_cov_gain_clip": (0.99, 1.01),
    "final_mosaic_rgb_equalize_gain_clip": (0.99, 1.01),
    "radial_shape_power": 3.0,
}
#: Left as they are: what kind the input is, or where it is solved; contradicts others; removes what is looked at.
LEFT = {
    "use_existing_master_tiles",
    "force_resolve_existing_wcs",
    "output_wcs_file",
    "engine",
    "gpu",
    "keep_master_tiles",
}
#: What acts only through what is found, which enters the fingerprints by its value.
GROUPS = {row.key for row in SETTINGS if row.key.startswith("cluster_")} | {
    "max_raw_per_master_tile",
    "auto_limit_frames_per_master_tile",
    "reject_bad_frames",
}
GRID = {row.key for row in SETTINGS if row.key.startswith("global_wcs_")} | {"photometry_cell_px"}


def another(row: Setting, folder: Path) -> Value:
    """An allowed value other than the one of the busy run."""
    now: Any = BUSY.get(row.key, row.default)
    if row.key in ANOTHER:
        return ANOTHER[row.key]
    if row.kind == "bool":
        return not now
    if row.kind == "choice":
        return row.choices[row.choices.index(now) - 1]
    if row.kind == "path":
        return str(folder)
    if row.kind == "int":
        return now + 1 if now < row.high else now - 1
    return now + (row.high - now) / 10


def outcome(step: str, folder: Path, report: dict[str, Any]) -> object:
    """What a step has made, to the bit."""
    if step == "stack":
        return (folder / "master_tiles" / "master_tile_001.fits").read_bytes()
    if step == "photometry":
        keys = ("name", "gain", "offset", "gradient", "ln_gain_se", "offset_se")
        return [[row[key] for key in keys] for row in report["tiles"]], report["pairs"]
    return product(folder, step).read_bytes()


@pytest.mark.parametrize(
    ("step", "source", "before", "by_value"),
    [
        ("stack", "lights", {"frame", "solve"}, GROUPS),
        ("photometry", "bad", {"survey"}, GRID),
        ("science", "bad", {"survey", "photometry"}, GRID),
        ("aesthetic", "bad", {"survey", "photometry", "science"}, GRID),
    ],
)
def test_a_setting_whose_row_does_not_name_the_step_does_not_change_it(
    lights, scenes, tmp_path, step, source, before, by_value
):
    """All of them are changed at once. A row that forgets a step would have a later run use what is out of date."""
    acting = {row.key for row in SETTINGS if {step, *before} & set(row.acts_in)}
    idle = [row for row in SETTINGS if row.key not in acting | by_value | LEFT]
    changed = {row.key: another(row, tmp_path) for row in idle}
    assert all(value != BUSY.get(row.key, row.default) for row, value in zip(idle, changed.values(), strict=True))
    found = []
    for name, settings in (("one", BUSY), ("other", BUSY | changed)):
        folder = lights if source == "lights" else scenes / source
        result = run_hierarchical_mosaic(folder, tmp_path / name, **settings)
        found.append(outcome(step, tmp_path / name, result.report))
    assert found[0] == found[1]


# ------------------------------------------------------------------------------------ what a row names is made again


def test_other_rejection_of_bad_tiles_makes_the_stacks_again(lights, tmp_path):
    """Frames are judged as tiles are: a kept stack without the bad frame must not pass for one with it."""

    def run(name: str, **settings: Any) -> dict[str, Any]:
        return run_hierarchical_mosaic(lights, tmp_path / name, gpu="off", **settings).report

    def stack(name: str) -> bytes:
        return (tmp_path / name / "master_tiles" / "master_tile_001.fits").read_bytes()

    first = run("kept", cache_retention="keep")
    assert [row["status"] for row in first["frames"]].count("set aside") == 1
    without = stack("kept")
    second = run("kept", cache_retention="keep", reject_bad_tiles=False)
    assert second["resume"]["used"] == {"frame": 5} and second["resume"]["made_again"]["stack"] == 1
    run("fresh", resume="off", reject_bad_tiles=False)
    assert without != stack("kept") == stack("fresh")
    assert run("kept", reject_bad_tiles=False)["resume"]["used"]["stack"] == 1
