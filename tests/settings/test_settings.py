"""The settings table: what the GUI sends, what a user types, and what neither may break."""

from __future__ import annotations

import ast
import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from scenes.places import ROOT
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.settings import docs as zst
from zemosaic_pipeline.settings import gui_keys as zfk
from zemosaic_pipeline.settings.fields import Setting, setting
from zemosaic_pipeline.settings.settings import GUI_KEYS, SETTINGS, Settings, load_config, parse_overrides
from zemosaic_pipeline.settings.values import format_size, to_size

RECORDED = json.loads((ROOT / "tests/stand_ins/data/gui_kwargs.json").read_text(encoding="utf-8"))["kwargs"]
# Sent in some starts of the GUI, not in the recorded one.
NOT_RECORDED = {"solver_settings_dict", "filter_invoked", "filter_overrides", "filtered_header_items"}
BY_KEY = {row.key: row for row in SETTINGS}


def read(source: str = "command line", **values: object) -> Settings:
    return Settings.from_mapping(values, source)[0]


# ---- the GUI's snapshot


def test_recorded_start_gives_settings_and_no_note():
    settings, notes = Settings.from_mapping(RECORDED, "gui")
    assert notes == []
    assert settings.gpu == "off"
    assert settings.use_existing_master_tiles is True
    assert settings.two_pass_cov_gain_clip == (0.85, 1.18)
    assert settings.num_processing_workers == 0
    assert settings.global_wcs_res_override is None


def test_every_gui_key_has_one_status():
    listed = [key for keys in zfk._IGNORED.values() for key in keys]
    listed += [*zfk._TRANSLATED, *(row.key for row in SETTINGS if row.in_gui)]
    assert len(listed) == len(set(listed)) == len(GUI_KEYS)
    assert set(GUI_KEYS) == set(RECORDED) | NOT_RECORDED
    assert {row.status for row in GUI_KEYS.values()} == {"honoured", "translated", "ignored"}
    assert all(row.why for row in GUI_KEYS.values())


def test_settings_that_are_ours_are_not_in_the_gui():
    assert not {row.key for row in SETTINGS if not row.in_gui} & set(RECORDED)


def test_recorded_defaults_are_those_of_the_table():
    """Where the GUI's default is another one than ours, the table says so."""
    set_by_the_user = {"use_existing_master_tiles", "num_processing_workers", "resume"}
    for row in SETTINGS:
        if row.in_gui and row.key not in set_by_the_user:
            gui_default = row.default if row.gui_default is None else row.gui_default
            assert row.coerce(RECORDED[row.key], "gui") == gui_default, row.key


def test_changed_ignored_keys_are_named_in_one_note():
    changed = RECORDED | {
        "intertile_gain_clip": [0.5, 2.0],
        "phase5_chunk_mb": "256",
        "qt_theme_mode": "dark",
    }
    _, notes = Settings.from_mapping(changed, "gui")
    assert len(notes) == 1
    assert notes[0].endswith(": intertile_gain_clip, phase5_chunk_mb")


@pytest.mark.parametrize("same", ["0.9,1.1", (0.9, 1.1), ["0.9", 1.1], "[0.9, 1.1]", None])
def test_a_default_written_otherwise_is_unchanged(same):
    assert Settings.from_mapping(RECORDED | {"intertile_gain_clip": same}, "gui")[1] == []


def test_unknown_gui_keys_are_passed_over():
    assert Settings.from_mapping({"key_of_version_9": object()}, "gui") == (Settings(), [])


# ---- translations


def test_gpu_switch_of_the_gui():
    assert read("gui", use_gpu_phase5=True).gpu == "auto"
    assert read("gui", use_gpu_phase5="false").gpu == "off"
    assert read(use_gpu_phase5=False, gpu="on").gpu == "on"


def test_background_extraction_of_the_gui_is_a_level_sky():
    assert Settings.from_mapping(RECORDED, "gui")[0].level_sky
    assert not read("gui", final_mosaic_dbe_enabled="false").level_sky
    assert not Settings().level_sky
    assert read(final_mosaic_dbe_enabled=False, level_sky=True).level_sky


def test_cap_on_workers():
    assert read(parallel_max_cpu_workers=4).num_processing_workers == 4
    assert read(parallel_max_cpu_workers=4, num_processing_workers=2).num_processing_workers == 2
    assert read(parallel_max_cpu_workers=4, num_processing_workers=8).num_processing_workers == 4
    assert read(parallel_max_cpu_workers=0, num_processing_workers=8).num_processing_workers == 8


def test_log_level_of_the_worker():
    assert read("gui", logging_level="INFO", worker_logging_level="debug").logging_level == "DEBUG"
    assert read(logging_level="ERROR", worker_logging_level="INFO").logging_level == "ERROR"
    assert read(logging_level="warn").logging_level == "WARNING"


def test_resolution_override_sets_the_mode():
    settings = read("gui", global_wcs_pixelscale_mode="median", global_wcs_res_override="2.4")
    assert (settings.global_wcs_pixelscale_mode, settings.global_wcs_res_override) == ("given", 2.4)


def test_incremental_is_the_same_engine():
    assert read("gui", final_assembly_method="incremental") == Settings()
    with pytest.raises(UsageError, match="final_assembly_method"):
        read("gui", final_assembly_method="magic")


# ---- the rows


def test_a_row_must_say_where_its_setting_acts():
    with pytest.raises(TypeError, match="acts_in"):
        setting(1.0, "a number that nobody classified")
    with pytest.raises(ValueError, match="setting typo acts in unknown steps: stak"):
        Setting("typo", "int", 1, acts_in=("stak",))


def test_every_setting_has_one_test_of_its_effect():
    """``test_NAME`` in one of the files ``test_effect_*.py``; a new setting needs one there."""
    files = sorted((ROOT / "tests/settings").glob("test_effect_*.py"))
    found = [
        node.name
        for path in files
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    ]
    assert sorted(found) == sorted(f"test_{row.key}" for row in SETTINGS)


# ---- loose values


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("winsor_limits", "0.05,0.1", (0.05, 0.1)),
        ("winsor_limits", "[0.05, 0.1]", (0.05, 0.1)),
        ("winsor_limits", [0.05, "0.1"], (0.05, 0.1)),
        ("apply_radial_weight", "Yes", True),
        ("apply_radial_weight", 0, False),
        ("photometry_cell_px", "16", 16),
        ("photometry_cell_px", 16.0, 16),
        ("kappa_low", " 2.5 ", 2.5),
        ("feather_px", "auto", None),
        ("feather_px", "0", 0.0),
        ("use_existing_master_tiles", "auto", None),
        ("global_wcs_res_override", "", None),
        ("kernel", "Lanczos3", "lanczos3"),
        ("memory_budget", "1.5GB", 1_500_000_000),
        ("memory_budget", 10**9, 10**9),
        ("coadd_memmap_dir", Path("scratch"), "scratch"),
    ],
)
def test_loose_values(key, value, expected):
    result = getattr(read(**{key: value}), key)
    assert result == expected
    assert type(result) is type(expected)


def test_none_means_default():
    assert Settings.from_mapping(dict.fromkeys([*BY_KEY, *GUI_KEYS])) == (Settings(), [])


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row.key)
def test_defaults_are_of_their_own_kind_and_survive_text(row):
    """Every default passes its own check: as a report's JSON gives it back and as docs/settings.md writes it."""
    again = row.coerce(json.loads(json.dumps(row.default)), "test")
    assert again == row.default
    assert type(again) is type(row.default)
    if row.default != "":
        assert row.coerce(zst._show_default(row, row.default), "docs/settings.md") == row.default


def test_whole_settings_survive_json():
    settings = read(kernel="lanczos3", winsor_limits="0,0.2", feather_px=12, memory_budget="1GB", gpu="off")
    as_json = json.loads(json.dumps({f.name: getattr(settings, f.name) for f in fields(settings)}))
    assert Settings.from_mapping(as_json) == (settings, [])


# ---- silly values


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("kappa_low", "three", "a number from 0.1 to 100"),
        ("kappa_low", float("nan"), "a number"),
        pytest.param("kappa_low", 10**400, "a number", id="kappa_low-beyond-float"),
        ("kappa_low", True, "a number"),
        ("kappa_low", -3, "from 0.1 to 100"),
        ("photometry_cell_px", 8.5, "a whole number from 2 to 64"),
        pytest.param("photometry_cell_px", "9" * 5000, "a whole number", id="cell-long-text"),
        pytest.param("photometry_cell_px", 10**5000, "a whole number", id="cell-long-number"),
        ("reject_bad_tiles", "perhaps", "true or false"),
        ("reject_bad_tiles", 2, "true or false"),
        ("combine_method", "average", "one of mean, median, sigma_clip, winsorized"),
        ("combine_method", "", "one of mean"),
        ("winsor_limits", 0.05, "two numbers"),
        ("winsor_limits", [0.1], "two numbers"),
        ("winsor_limits", [0.1, [0.2]], "two numbers"),
        ("winsor_limits", [0.1, 0.6], "from 0 to 0.49"),
        ("two_pass_cov_gain_clip", [1.18, 0.85], "with 1 between them"),
        ("memory_budget", "lots", "a size"),
        ("memory_budget", "2KB", "at least 64MB"),
        ("memory_budget", "1e9", "a size"),
        ("gpu_selector", 7, "a text"),
        ("output_wcs_file", "a\0b", "a path"),
        ("global_wcs_res_override", 0, "a number from 0.001 to 3600, or auto"),
        ("input_dir", 3, "a path"),
        ("use_gpu_phase5", "maybe", "true or false"),
    ],
)
def test_refusal_names_key_source_and_what_is_allowed(key, value, allowed):
    with pytest.raises(UsageError) as caught:
        Settings.from_mapping({key: value}, "my.json")
    message = str(caught.value)
    assert key in message
    assert "my.json" in message
    assert allowed in message
    assert len(message) < 250
    assert "\n" not in message


SILLY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=6,
)


@hypothesis_settings(max_examples=600, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(key=st.sampled_from(sorted({*BY_KEY, *GUI_KEYS})), value=SILLY)
@example("memory_budget", "9" * 400 + ".5TB")
@example("memory_budget", "9" * 5000)
@example("intertile_gain_clip", ["1,2", "3"])
def test_a_silly_value_is_accepted_or_refused_by_name(key, value):
    try:
        settings, notes = Settings.from_mapping(RECORDED | {key: value}, "gui")
    except UsageError as error:
        assert key in str(error)
    else:
        assert len(notes) <= 1
        assert all(row.coerce(getattr(settings, row.key), "test") == getattr(settings, row.key) for row in SETTINGS)


# ---- unknown keys, contradictions


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("combine_methd", "combine_method"),
        ("featherpx", "feather_px"),
        ("stacking_kapa_low", "stacking_kappa_low"),
    ],
)
def test_unknown_key_suggests_the_nearest(key, near):
    with pytest.raises(UsageError, match=f"'{key}'.*did you mean {near}"):
        Settings.from_mapping({key: 1})


def test_unknown_key_with_no_neighbour():
    with pytest.raises(UsageError, match=r"Unknown setting 'qqq'.*docs/settings.md"):
        Settings.from_mapping({"qqq": 1})


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"global_wcs_pixelscale_mode": "given"}, "global_wcs_res_override"),
        ({"global_wcs_res_override": 2, "output_wcs_file": "a.fits"}, "output_wcs_file"),
        ({"preview_png_p_low": 50, "preview_png_p_high": 50}, "preview_png_p_low"),
        ({"engine": "reproject", "gpu": "on"}, "gpu"),
        ({"engine": "reproject", "kernel": "lanczos3"}, "kernel"),
        ({"engine": "reproject", "combine_method": "winsorized"}, "combine_method"),
    ],
)
def test_contradictions_are_refused(values, named):
    with pytest.raises(UsageError, match=named):
        Settings.from_mapping(values)
    with pytest.raises(UsageError, match=named):
        replace(Settings(), **values)


# ---- command line, configuration file, sizes


def test_overrides():
    items = ["kernel=lanczos3", " feather_px = 12 ", "gpu_selector=a=b", "kernel=bilinear"]
    assert parse_overrides(items) == {"kernel": "bilinear", "feather_px": "12", "gpu_selector": "a=b"}
    for wrong in ("kernel", "=3", ""):
        with pytest.raises(UsageError, match="KEY=VALUE"):
            parse_overrides([wrong])


def test_config_file(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(RECORDED), encoding="utf-8-sig")
    settings, notes = Settings.from_mapping(load_config(path), str(path))
    assert settings.two_pass_coverage_renorm
    assert notes == []


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b'{\n"kernel": lanczos3}', "line 2"),
        (b"[1, 2]", "one JSON object"),
        (b"", "line 1"),
        (b"\xff\xfe\x00", "not JSON"),
        pytest.param(b"[" * 100_000, "not JSON", id="endless nesting"),
        pytest.param(b'{"a": ' + b"9" * 5000 + b"}", "not JSON", id="long number"),
    ],
)
def test_config_that_is_none(tmp_path, content, named):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=named) as caught:
        load_config(path)
    assert "config.json" in str(caught.value)


def test_config_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"none\.json"):
        load_config(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("512 MiB", 2**29),
        ("1.5g", 15 * 10**8),
        ("2.3GB", 23 * 10**8),
        ("4096", 4096),
        (7, 7),
    ],
)
def test_sizes(text, size):
    assert to_size(text) == size


@given(st.integers(min_value=0, max_value=10**18))
@example(2 * 10**9)
@example(3 * 2**30)
def test_sizes_survive_writing(size):
    assert to_size(format_size(size)) == size


@pytest.mark.parametrize("wrong", ["", "GB", "-1", -1, "2 potatoes", None, [1], True, "1ib", float("inf")])
def test_what_is_no_size(wrong):
    with pytest.raises(ValueError, match=r"^not (a |finite)"):
        to_size(wrong)


# ---- the page of settings


def test_table_holds_every_key():
    table = zst.settings_table_markdown()
    for key in {*BY_KEY, *GUI_KEYS}:
        assert f"`{key}`" in table
    assert "| `memory_budget` | `2GB` | bytes |" in table
    for line in table.splitlines():
        assert line.count("|") in (0, 4, 6), line


def test_update_rewrites_only_what_lies_between_the_markers(tmp_path, capsys):
    path = tmp_path / "settings.md"
    path.write_text(f"before\n{zst.SETTINGS_BEGIN}\nold\n{zst.SETTINGS_END}\nafter\n", encoding="utf-8")
    assert zst.main(["--update", str(path)]) == 0
    text = path.read_text(encoding="utf-8")
    assert text == f"before\n{zst.SETTINGS_BEGIN}\n{zst.settings_table_markdown()}{zst.SETTINGS_END}\nafter\n"
    path.write_text("no markers", encoding="utf-8")
    assert zst.main(["--update", str(path)]) == 2
    assert path.read_text(encoding="utf-8") == "no markers"
    assert "settings.md" in capsys.readouterr().err


def test_page_of_settings_is_up_to_date():
    text = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert zst.update_markdown(text) == text, "run: python -m zemosaic_pipeline.settings.docs --update docs/settings.md"
