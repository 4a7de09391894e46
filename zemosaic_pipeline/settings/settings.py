"""Every setting once: name, type, default, unit, range, meaning, the GUI's default, the steps that it acts in.

The fields of `Settings` are the settings of the worker, under the names of the GUI's configuration where it
has them; `SETTINGS` is the table derived from them. `GUI_KEYS` tells of every key of that configuration if
it is honoured (a field of the same name), translated (to another setting), or ignored, and why; those that
are no fields are listed in `settings.gui_keys`. Command line, configuration file, Python call and GUI all
enter through `Settings.from_mapping`. The tables of docs/settings.md are made from the same
source: ``python -m zemosaic_pipeline.settings.docs --update docs/settings.md``.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.settings.fields import MOSAICS, OF_TILES, Setting, setting
from zemosaic_pipeline.settings.gui_keys import FOREIGN_KEYS, GuiKey, translate
from zemosaic_pipeline.settings.values import show


@dataclass(frozen=True)
class Settings:
    """Typed settings of one run. Field names are the keys; `SETTINGS` holds unit, range and meaning of each.

    Raises
    ------
    UsageError
        If two settings contradict each other.
    """

    # Input
    use_existing_master_tiles: bool | None = setting(
        None,
        "the input holds plate-solved panels: Phases 1-3 are skipped; auto looks at the files",
        kind="bool",
        gui_default=False,
        acts_in=(),
    )
    apply_master_tile_crop: bool = setting(False, "trim every tile before use", gui_default=True, acts_in=OF_TILES)
    master_tile_crop_percent: float = setting(
        3.0,
        "trimmed from each side of a tile where that is on",
        unit="% of the side",
        low=0,
        high=45,
        acts_in=OF_TILES,
    )

    # Phase 1: raw frames
    dark: str = setting("", "master dark, or a folder of dark frames", kind="path", ours=True, acts_in=("frame",))
    flat: str = setting("", "master flat, or a folder of flat frames", kind="path", ours=True, acts_in=("frame",))
    bias: str = setting("", "master bias, or a folder of bias frames", kind="path", ours=True, acts_in=("frame",))
    bayer_pattern: str = setting(
        "auto",
        "colour filters of the sensor; auto: what the header says, GRBG for a Seestar",
        choices=("auto", "RGGB", "GRBG", "GBRG", "BGGR"),
        ours=True,
        acts_in=("frame",),
    )
    debayer_method: str = setting(
        "bilinear",
        "how the colours between the filters are interpolated; edge_aware is sharper and loses light of stars",
        choices=("bilinear", "edge_aware"),
        ours=True,
        acts_in=("frame",),
    )
    hot_pixel_sigma: float = setting(
        5.0,
        "a pixel so far above its neighbours is repaired; 0: none",
        unit="sigma",
        low=0,
        high=1000,
        ours=True,
        acts_in=("frame",),
    )
    reject_bad_frames: bool = setting(
        True, "set aside frames that are trailed or clouded beside the others", ours=True, acts_in=()
    )

    # Phase 1: plate solving
    force_resolve_existing_wcs: bool = setting(False, "solve frames that have a WCS in their header, too", acts_in=())
    solver_method: str = setting(
        "auto",
        "plate solver: ASTAP or astrometry.net's solve-field; auto, or one that is not there: what is installed",
        choices=("auto", "astap", "astrometry", "ansvr", "none"),
        gui_default="ansvr",
        acts_in=("solve",),
    )
    solver_timeout: float = setting(
        60.0, "time for one frame", unit="s", low=1, high=3600, ours=True, acts_in=("solve",)
    )
    astap_executable_path: str = setting("", "ASTAP's program; empty: looked for", kind="path", acts_in=("solve",))
    astap_data_directory_path: str = setting(
        "", "folder of ASTAP's star database; empty: ASTAP knows", kind="path", acts_in=("solve",)
    )
    astap_default_search_radius: float = setting(
        3.0, "distance from the pointing in the header to search", unit="degrees", low=0.1, high=180, acts_in=("solve",)
    )
    astap_default_downsample: int = setting(
        2, "ASTAP: binning before stars are found; 0: auto", low=0, high=8, acts_in=("solve",)
    )
    astap_max_instances: int = setting(1, "ASTAP: programs at the same time", low=1, high=64, acts_in=())
    astrometry_local_path: str = setting(
        "",
        "solve-field, or the folder of astrometry.net's programs or index files; empty: looked for",
        kind="path",
        acts_in=("solve",),
    )
    refine_wcs: bool = setting(True, "align the frames of a panel on their stars", ours=True, acts_in=("stack",))

    # Phase 2: panels
    cluster_panel_threshold: float | None = setting(
        None,
        "frames nearer to each other than this belong to one panel; auto: a tenth of the frame's shorter side",
        unit="degrees",
        kind="float",
        low=0,
        high=180,
        gui_default=0.03,
        acts_in=(),
    )
    cluster_target_groups: int = setting(
        0, "at most so many panels: the threshold grows until they are; 0: any number", low=0, high=100000, acts_in=()
    )
    cluster_orientation_split_deg: float = setting(
        0.0,
        "frames turned by more than this are panels of their own; 0: never",
        unit="degrees",
        low=0,
        high=180,
        acts_in=(),
    )
    max_raw_per_master_tile: int = setting(
        0, "at most so many frames in a panel; 0: any number", low=0, high=1000000, acts_in=()
    )
    auto_limit_frames_per_master_tile: bool = setting(True, "limit the frames of a panel where that is 0", acts_in=())

    # Phase 3: master tiles
    stacking_normalize_method: str = setting(
        "linear_fit",
        "frames of a panel are matched in gain and offset, in offset alone, or not at all",
        choices=("linear_fit", "sky_mean", "none"),
        acts_in=("stack",),
    )
    stacking_weighting_method: str = setting(
        "noise_variance",
        "weight of a frame: 1 / noise^2, 1 / (noise FWHM)^2, or all alike",
        choices=("noise_variance", "noise_fwhm", "none"),
        acts_in=("stack",),
    )
    stacking_rejection_algorithm: str = setting(
        "winsorized_sigma_clip",
        "how satellites, planes and moving objects are found",
        choices=("none", "kappa_sigma", "winsorized_sigma_clip", "linear_fit_clip"),
        acts_in=("stack",),
    )
    stacking_kappa_low: float = setting(
        3.0, "rejection limit below the centre", unit="sigma", low=0.1, high=100, acts_in=("stack",)
    )
    stacking_kappa_high: float = setting(
        3.0, "rejection limit above the centre", unit="sigma", low=0.1, high=100, acts_in=("stack",)
    )
    stacking_winsor_limits: tuple[float, float] = setting(
        (0.05, 0.05), "winsorized_sigma_clip: fraction drawn in at both ends", low=0, high=0.49, acts_in=("stack",)
    )
    stacking_final_combine_method: str = setting(
        "mean", "how the samples that are left are combined", choices=("mean", "median"), acts_in=("stack",)
    )

    # Phase 4: output grid
    global_wcs_pixelscale_mode: str = setting(
        "median",
        "pixel scale of the mosaic: of the tiles the median or the finest, or given",
        choices=("median", "min", "given"),
        acts_in=(),
    )
    global_wcs_res_override: float | None = setting(
        None,
        "pixel scale of the mosaic; where it is set, the mode is 'given'",
        unit="arcsec/pixel",
        kind="float",
        low=0.001,
        high=3600,
        acts_in=(),
    )
    global_wcs_orientation: str = setting(
        "north_up", "north up, or turned as most tiles lie", choices=("north_up", "as_tiles"), acts_in=()
    )
    global_wcs_padding_percent: float = setting(
        2.0, "empty margin around the mosaic", unit="% of its size", low=0, high=100, acts_in=()
    )
    output_wcs_file: str = setting(
        "", "FITS file whose header gives WCS and size of the mosaic", kind="path", ours=True, acts_in=()
    )
    max_output_gigapixels: float = setting(
        4.0, "a larger mosaic is refused", unit="10^9 pixels", low=1e-6, high=1000, ours=True, acts_in=()
    )

    # Phase 5: photometric normalisation
    intertile_photometric_match: bool = setting(
        True, "match gain and offset of the tiles in their overlaps", acts_in=("photometry",)
    )
    match_background_for_final: bool = setting(
        True, "match offsets alone where the former is off", acts_in=("photometry",)
    )
    photometry_cell_px: int = setting(
        4,
        "side of the cells in which overlaps are compared; doubled where the memory budget asks for it",
        unit="output pixels",
        low=2,
        high=64,
        ours=True,
        acts_in=(),
    )
    gain_se_limit: float = setting(
        0.05,
        "standard error of ln(gain) above which a tile's gain counts as undetermined and stays 1",
        low=1e-4,
        high=10,
        ours=True,
        acts_in=("stack", "photometry"),
    )
    gradient_order: int = setting(
        2,
        "gradients of the tiles that are matched along: 0 none, 1 planes, 2 planes and curvature",
        low=0,
        high=2,
        ours=True,
        acts_in=("photometry",),
    )
    reject_bad_tiles: bool = setting(
        True,
        "leave out a tile whose values are absurd beside its neighbours'",
        ours=True,
        acts_in=("stack", "photometry"),
    )

    # Phase 5: resampling, combination, weights
    engine: str = setting(
        "native",
        "the worker's own block-wise engine, or the slow independent one of the reproject package",
        choices=("native", "reproject"),
        ours=True,
        acts_in=MOSAICS,
    )
    kernel: str = setting(
        "bilinear",
        "interpolation between input pixels",
        choices=("bilinear", "lanczos3"),
        ours=True,
        acts_in=("stack", *MOSAICS),
    )
    combine_method: str = setting(
        "mean",
        "how the tiles that cover a pixel are combined",
        choices=("mean", "median", "sigma_clip", "winsorized"),
        ours=True,
        acts_in=MOSAICS,
    )
    kappa_low: float = setting(
        3.0,
        "sigma_clip and winsorized: limit below the centre",
        unit="sigma",
        low=0.1,
        high=100,
        ours=True,
        acts_in=MOSAICS,
    )
    kappa_high: float = setting(
        3.0,
        "sigma_clip and winsorized: limit above the centre",
        unit="sigma",
        low=0.1,
        high=100,
        ours=True,
        acts_in=MOSAICS,
    )
    winsor_limits: tuple[float, float] = setting(
        (0.05, 0.05),
        "winsorized: fraction drawn in at the low and at the high end",
        low=0,
        high=0.49,
        ours=True,
        acts_in=MOSAICS,
    )
    feather_px: float | None = setting(
        None,
        "width over which a tile's weight falls to 0 at its edge; 0: none",
        unit="tile pixels",
        kind="float",
        low=0,
        high=100000,
        ours=True,
        acts_in=MOSAICS,
    )
    enable_tile_weighting: bool = setting(True, "weight the tiles by tile_weight_mode; off: all alike", acts_in=MOSAICS)
    tile_weight_mode: str = setting(
        "n_frames",
        "weight of a tile: number of frames, all alike, or the inverse variance of its noise after the gain",
        choices=("n_frames", "uniform", "inverse_variance"),
        acts_in=MOSAICS,
    )
    apply_radial_weight: bool = setting(False, "weigh a tile's centre more than its corners", acts_in=MOSAICS)
    radial_feather_fraction: float = setting(
        0.8,
        "radius where the radial weight has fallen to its floor",
        unit="half diagonal",
        low=0.01,
        high=1,
        acts_in=MOSAICS,
    )
    radial_shape_power: float = setting(2.0, "steepness of the radial fall-off", low=0.1, high=20, acts_in=MOSAICS)
    min_radial_weight_floor: float = setting(0.0, "smallest radial weight", low=0, high=1, acts_in=MOSAICS)

    # Aesthetic mosaic
    two_pass_coverage_renorm: bool = setting(
        False,
        "aesthetic mosaic: even out brightness with coverage in a second pass",
        gui_default=True,
        acts_in=("aesthetic",),
    )
    two_pass_cov_sigma_px: float = setting(
        50.0,
        "sigma of the blur of the coverage map in that pass",
        unit="output pixels",
        low=1,
        high=5000,
        acts_in=("aesthetic",),
    )
    two_pass_cov_gain_clip: tuple[float, float] = setting(
        (0.85, 1.18), "range of the gains of that pass", kind="gain range", low=0.01, high=100, acts_in=("aesthetic",)
    )
    level_sky: bool = setting(
        False,
        "aesthetic mosaic: subtract a plane per channel, laid through the darkest places",
        ours=True,
        acts_in=("aesthetic",),
    )
    final_mosaic_rgb_equalize_enabled: bool = setting(
        False, "aesthetic mosaic: balance the channels", acts_in=("aesthetic",)
    )
    final_mosaic_rgb_equalize_gain_clip: tuple[float, float] = setting(
        (0.8, 1.25), "range of the gains of that balance", kind="gain range", low=0.01, high=100, acts_in=("aesthetic",)
    )
    final_mosaic_black_point_equalize_enabled: bool = setting(
        False, "aesthetic mosaic: set the black point", acts_in=("aesthetic",)
    )
    final_mosaic_black_point_percentile: float = setting(
        0.1, "percentile that becomes black", unit="%", low=0, high=50, acts_in=("aesthetic",)
    )

    # Machine
    gpu: str = setting(
        "auto",
        "CUDA card for the work on pixels: auto, where there is one; on, and a warning where there is none",
        choices=("auto", "on", "off"),
        ours=True,
        acts_in=(),
    )
    gpu_id_phase5: int = setting(0, "number of the card", low=0, high=255, acts_in=())
    gpu_selector: str = setting("", "card chosen by a part of its name; goes before the number", acts_in=())
    parallel_gpu_vram_fraction: float = setting(
        0.8, "share of the card's free memory that may be used", low=0.05, high=1, acts_in=()
    )
    memory_budget: int = setting(
        2 * 10**9,
        "memory for the blocks in work",
        unit="bytes",
        kind="size",
        low=64e6,
        high=1e15,
        ours=True,
        acts_in=(),
    )
    num_processing_workers: int = setting(-1, "threads; -1 or 0: all cores", low=-1, high=1024, acts_in=())
    resume: str = setting(
        "auto",
        "go on where a run with the same input and settings was stopped; force: know the input by its content alone",
        choices=("off", "auto", "force"),
        acts_in=(),
    )
    cache_retention: str = setting(
        "run_end",
        "what a resume can use is removed at the end of the run, or kept for another run",
        choices=("run_end", "per_tile", "keep"),
        acts_in=(),
    )
    coadd_memmap_dir: str = setting("", "folder for temporary files; empty: in OUTPUT_DIR", kind="path", acts_in=())
    cleanup_temp_artifacts: bool = setting(True, "remove temporary files at the end", acts_in=())

    # Outputs
    keep_master_tiles: bool = setting(
        True, "keep the master tiles made of raw frames in OUTPUT_DIR", ours=True, acts_in=()
    )
    save_final_as_uint16: bool = setting(
        False, "write the mosaics as uint16 (BZERO) instead of float32", acts_in=MOSAICS
    )
    legacy_rgb_cube: bool = setting(False, "write colour as (H, W, 3) instead of (3, H, W)", acts_in=MOSAICS)
    preview_png_p_low: float = setting(1.0, "preview: percentile shown black", unit="%", low=0, high=100, acts_in=())
    preview_png_p_high: float = setting(99.9, "preview: percentile shown white", unit="%", low=0, high=100, acts_in=())
    preview_png_asinh_a: float = setting(
        12.0, "preview: strength of the asinh stretch", low=0.01, high=10000, acts_in=()
    )
    preview_png_max_dim: int = setting(
        3200, "preview: longest side", unit="pixels", low=64, high=32768, acts_in=("aesthetic",)
    )
    enable_resource_telemetry: bool = setting(False, "sample CPU, memory and GPU load during the run", acts_in=())
    resource_telemetry_interval_sec: float = setting(
        1.5, "time between two samples", unit="s", low=0.1, high=3600, acts_in=()
    )
    resource_telemetry_log_to_csv: bool = setting(True, "write the samples to resource_telemetry.csv", acts_in=())
    logging_level: str = setting(
        "INFO", "what the log holds", choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"), acts_in=()
    )

    def __post_init__(self) -> None:
        for wrong, sentence in _contradictions(self):
            if wrong:
                raise UsageError(sentence)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any], source: str = "command line") -> tuple[Settings, list[str]]:
        """Read settings from loosely typed values.

        Parameters
        ----------
        mapping : mapping of str to object
            Keys of `SETTINGS` or of `GUI_KEYS`. Strings and lists are taken where numbers and tuples are
            meant; None means the default.
        source : str
            Where the values come from, for messages. From ``"gui"`` unknown keys are passed over in silence.

        Returns
        -------
        settings : Settings
        notes : list of str
            At most one line, naming the keys that are not honoured though changed from the GUI's default.

        Raises
        ------
        UsageError
            For an unknown key (except from the GUI), a wrong type, a value out of range, a contradiction.
        """
        values: dict[str, Any] = {
            key: row.coerce(mapping[key], source) for key, row in _BY_KEY.items() if mapping.get(key) is not None
        }
        translate(mapping, values, source, _BY_KEY)
        unused = []
        for key, value in mapping.items():
            known = GUI_KEYS.get(key)
            if known is None and key not in _BY_KEY and source != "gui":
                raise UsageError(_unknown_key(key, source))
            if known is not None and known.is_changed(value):
                unused.append(key)
        notes = []
        if unused:
            names = ", ".join(sorted(unused))
            notes.append(f"Settings that this version does not use (docs/settings.md says why): {names}")
        return cls(**values), notes


def _contradictions(s: Settings) -> list[tuple[bool, str]]:
    given = s.global_wcs_res_override is not None
    reproject = s.engine == "reproject"
    return [
        (
            s.global_wcs_pixelscale_mode == "given" and not given,
            "global_wcs_pixelscale_mode = 'given' needs global_wcs_res_override (arcsec per pixel).",
        ),
        (
            given and bool(s.output_wcs_file),
            "global_wcs_res_override and output_wcs_file both give the pixel scale: set only one of them.",
        ),
        (
            s.preview_png_p_low >= s.preview_png_p_high,
            f"preview_png_p_low = {s.preview_png_p_low:g} must be below preview_png_p_high = {s.preview_png_p_high:g}.",
        ),
        (
            reproject and s.gpu == "on",
            "engine = 'reproject' runs on the CPU only: use engine = 'native' or gpu = 'off'.",
        ),
        (
            reproject and s.kernel != "bilinear",
            f"engine = 'reproject' has no kernel = '{s.kernel}': use engine = 'native' or bilinear.",
        ),
        (
            reproject and s.combine_method != "mean",
            f"engine = 'reproject' has no combine_method = '{s.combine_method}': use engine = 'native'.",
        ),
    ]


SETTINGS: tuple[Setting, ...] = tuple(Setting(key=f.name, **f.metadata) for f in fields(Settings))
_BY_KEY: dict[str, Setting] = {row.key: row for row in SETTINGS}
GUI_KEYS: dict[str, GuiKey] = FOREIGN_KEYS | {
    row.key: GuiKey(row.key, "honoured", row.meaning) for row in SETTINGS if row.in_gui
}


def _unknown_key(key: Any, source: str) -> str:
    near = difflib.get_close_matches(str(key), [*_BY_KEY, *GUI_KEYS], n=1, cutoff=0.5)
    hint = f": did you mean {near[0]}?" if near else "; docs/settings.md lists all of them."
    return f"Unknown setting {show(key)} ({source}){hint}"


# ---- command line, configuration


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """Read the arguments of ``--set``; the last one counts where a key is given twice.

    Raises
    ------
    UsageError
        For an argument that is not KEY=VALUE.
    """
    result = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key.strip():
            raise UsageError(f"--set {show(item)} cannot be used: write --set KEY=VALUE.")
        result[key.strip()] = value.strip()
    return result


def load_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a JSON file of settings (the GUI's ``zemosaic_config.json`` is one).

    Raises
    ------
    UsageError
        If the file cannot be read or does not hold one JSON object; names file and line.
    """
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"Cannot read the configuration {path}: {error.strerror or error}.") from None
    except json.JSONDecodeError as error:
        raise UsageError(
            f"The configuration {path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}."
        ) from None
    except (ValueError, RecursionError) as error:  # not text, a number too long, endless nesting
        raise UsageError(f"The configuration {path} is not JSON: {error}.") from None
    if not isinstance(config, dict):
        raise UsageError(f'The configuration {path} must hold one JSON object: {{"key": value, ...}}.')
    return config
