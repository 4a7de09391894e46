"""The keys of the GUI's configuration that are no settings of the worker, and what becomes of each.

They are translated (to another setting, by `translate`) or ignored. `FOREIGN_KEYS` holds them all.
"""

from __future__ import annotations

import numbers
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.settings.fields import Setting, Value
from zemosaic_pipeline.settings.values import show, to_bool, to_float


@dataclass(frozen=True)
class GuiKey:
    """What becomes of one key of the GUI's configuration.

    Attributes
    ----------
    key, why : str
    status : str
        ``honoured``, ``translated`` or ``ignored``.
    default : object
        The GUI's default. None: no notice is taken of a change.
    """

    key: str
    status: Literal["honoured", "translated", "ignored"]
    why: str
    default: object = None

    def is_changed(self, value: object) -> bool:
        """Whether the user has given another value than the GUI's default."""
        return value is not None and self.default is not None and _plain(value) != _plain(self.default)


def _plain(value: object) -> object:
    """Bring loosely typed values to one form: "0.9,1.1" equals [0.9, 1.1], "true" equals True."""
    if isinstance(value, (list, tuple)) and len(value) <= 4:
        return [_plain(v) if isinstance(v, (str, numbers.Real)) else None for v in value]
    if isinstance(value, str):
        text = value.strip().lower()
        if "," in text:
            return _plain(text.strip("[]()").split(","))
        for convert in (to_bool, to_float):
            try:
                return float(convert(text))
            except ValueError:
                continue
        return text
    try:
        return to_float(float(value) if isinstance(value, bool) else value)
    except ValueError:
        return value if isinstance(value, dict) else ("?", id(value))


_TRANSLATED = {
    "input_dir": "argument INPUT_DIR",
    "output_dir": "argument OUTPUT_DIR",
    "use_gpu_phase5": "`gpu`: true is auto, false is off",
    "final_assembly_method": "`engine` native: reproject_coadd and incremental are one block-wise engine",
    "worker_logging_level": "`logging_level`, where that is not set",
    "solver_settings_dict": "`solver_method`, `solver_timeout`, `astap_*`, `force_resolve_existing_wcs`",
    "astrometry_timeout": "`solver_timeout`, where solver_settings_dict says nothing",
    "filter_overrides": "its `preplan_master_groups`: the panels",
    "filtered_header_items": "the frames that are used",
    "final_mosaic_dbe_enabled": "`level_sky`",
    "parallel_max_cpu_workers": "upper limit of `num_processing_workers`; 0: none",
}
#: What the GUI's solver_settings_dict holds, and the setting that it means.
_SOLVER_KEYS = {
    "solver_choice": "solver_method",
    "timeout": "solver_timeout",
    "astap_executable_path": "astap_executable_path",
    "astap_data_directory_path": "astap_data_directory_path",
    "astap_search_radius_deg": "astap_default_search_radius",
    "astap_downsample": "astap_default_downsample",
    "astap_max_instances": "astap_max_instances",
    "force_resolve_existing_wcs": "force_resolve_existing_wcs",
}
#: Why a key is ignored, and the keys with the GUI's defaults: a changed one is named to the user. None: window state or a
#: place on this computer, a change of which is not named.
# fmt: off
_IGNORED: dict[str, dict[str, object]] = {
    "frames are solved from their stars, which the worker finds itself, by a local program": {
        "astap_default_sensitivity": 100, "astap_drizzled_fallback_enabled": False, "astrometry_api_key": None,
        "astrometry_downsample": 2,
    },
    "every frame's header says what it is, a Seestar's too": {
        "auto_detect_seestar": True, "force_seestar_mode": False,
    },
    "`gpu` decides for all phases, and the picture is the same": {
        "stack_use_gpu": False, "use_gpu_stack": False,
    },
    "one winsorized sigma clipping, and one contract for pixels without data": {
        "wsc_impl": "pixinsight", "stack_stat_min_finite_frac": 0.02, "stack_stat_min_finite_px_per_channel": 4096,
        "stack_stat_min_nonzero_frac": 1e-05,
    },
    "only held an unstable solver in check; clipping one channel shifts colour": {
        "intertile_gain_clip": (0.9, 1.1), "intertile_offset_clip": (-2000, 2000), "intertile_affine_blend": 0.3,
        "intertile_pair_gain_clip": (0.5, 2.0), "intertile_pair_offset_abs_max": 5000.0,
        "intertile_recenter_clip": (0.85, 1.18), "intertile_gain_prior_lambda": 0.02,
        "intertile_underconstrained_force_mode": "offset_only", "intertile_underconstrained_gain_clip": (0.85, 1.18),
        "intertile_underconstrained_guard_enabled": True, "intertile_underconstrained_max_active_tiles": 2,
        "intertile_underconstrained_max_pairs": 1, "intertile_underconstrained_offset_clip": (-2000, 2000),
    },
    "one solver with an exact gauge, from block means of every whole overlap, weighted by their errors": {
        "intertile_preview_size": 128, "intertile_overlap_min": 0.05, "intertile_sky_percentile": (30, 70),
        "intertile_robust_clip_sigma": 2.5, "intertile_global_recenter": True, "intertile_max_irls_iters": 3,
        "intertile_prune_k": 8, "intertile_prune_weight_mode": "area", "intertile_enforce_requested_solver": False,
        "intertile_gain_offset_v2": False, "intertile_offset_only_v1": False, "use_auto_intertile": False,
    },
    "corrects single tiles or anchors beforehand: the solution takes all overlaps at once": {
        "anchor_quality_median_clip_sigma": 2.5, "anchor_quality_probe_limit": 12,
        "anchor_quality_span_range": (0.02, 6.0), "center_out_anchor_mode": "auto_central_quality",
        "center_out_normalization_p3": True, "p3_center_min_overlap_fraction": 0.03, "p3_center_preview_size": 256,
        "p3_center_robust_clip_sigma": 2.5, "p3_center_sky_percentile": (25, 60),
        "enable_poststack_anchor_review": True, "poststack_anchor_median_clip_sigma": 3.5,
        "poststack_anchor_min_improvement": 0.12, "poststack_anchor_probe_limit": 8,
        "poststack_anchor_span_range": (0.004, 10.0), "poststack_anchor_use_overlap_affine": True,
        "poststack_equalize_rgb": False, "poststack_rgb_equalize_bg_percentile": (5, 85),
        "poststack_rgb_equalize_gain_clip": (0.95, 1.05), "poststack_rgb_equalize_min_coverage": 0.01,
        "poststack_rgb_equalize_min_samples": 5000, "existing_master_tiles_anchor_gain_clip": (0.9, 1.1),
        "existing_master_tiles_anchor_photometry_enabled": True,
        "existing_master_tiles_final_rgb_equalize_gain_clip": (0.9, 1.1),
        "existing_master_tiles_rgb_balance_gain_clip": (0.9, 1.1), "existing_master_tiles_rgb_balance_min_pixels": 5000,
        "existing_master_tiles_rgb_balance_prephase5": True,
    },
    "a bad tile is known by its residuals (`reject_bad_tiles`); inputs are never moved": {
        "existing_master_tiles_quality_gate_enabled": True, "existing_master_tiles_quality_gate_min_valid_frac": 0.05,
        "existing_master_tiles_quality_gate_mode": "warn", "existing_master_tiles_quality_gate_ratio_threshold": 5000.0,
        "existing_master_tiles_quality_gate_sigma_threshold": 8.0, "quality_gate_edge_band_px": 64,
        "quality_gate_enabled": False, "quality_gate_erode_px": 3, "quality_gate_k_sigma": 2.5,
        "quality_gate_move_rejects": True, "quality_gate_threshold": 0.48,
    },
    "tile borders: no data means weight 0, the feather hides edges; to trim: `apply_master_tile_crop`": {
        "altaz_alpha_sidecar_format": "png", "altaz_alpha_soft_threshold": 0.001, "altaz_cleanup_enabled": False,
        "altaz_decay": 0.15, "altaz_export_alpha_fits": True, "altaz_export_alpha_sidecar": False,
        "altaz_margin_percent": 5.0, "altaz_min_coverage_abs": 3.0, "altaz_min_coverage_frac": 0.5,
        "altaz_morph_open_px": 3, "altaz_nanize": True, "altaz_nanize_threshold": 0.001,
        "altaz_strict_overlap_crop_alpha_threshold": 0.02, "altaz_strict_overlap_crop_bbox_pad_px": 6,
        "altaz_strict_overlap_crop_enabled": True, "altaz_strict_overlap_crop_min_nonzero_frac": 0.08,
        "altaz_strict_overlap_crop_min_size_px": 256, "altaz_unknown_policy": "auto", "quality_crop_band_px": 32,
        "quality_crop_enabled": False, "quality_crop_k_sigma": 2.0, "quality_crop_margin_px": 8,
        "quality_crop_min_run": 2, "crop_follow_signal": True, "global_wcs_autocrop_enabled": True,
        "global_wcs_autocrop_margin_px": 128,
    },
    "every weight is applied once: `tile_weight_mode`, the feather, ALPHA": {
        "tile_weight_v4_curve": "sqrt", "tile_weight_v4_enabled": True, "tile_weight_v4_max": 1.35,
        "tile_weight_v4_min": 0.75, "tile_weight_v4_residual_penalty_enabled": False,
        "tile_weight_v4_residual_penalty_strength": 0.35, "tile_weight_v4_strength": 1.0,
        "tile_weight_v4_temporal_penalty_enabled": False, "tile_weight_v4_temporal_penalty_hours": 6.0,
        "tile_weight_v4_temporal_penalty_strength": 0.2, "phase5_alpha_soft_weights": True,
        "phase5_alpha_weight_floor": 0.02, "incremental_feather_parity": False,
    },
    "master tiles are coadded as they are, in one step": {
        "inter_master_local_scale": "final", "inter_master_max_group": 64, "inter_master_memmap_policy": "auto",
        "inter_master_merge_enable": False, "inter_master_min_group_size": 2, "inter_master_overlap_threshold": 0.6,
        "inter_master_photometry_clip_sigma": 3.0, "inter_master_photometry_intersuper": True,
        "inter_master_photometry_intragroup": True, "inter_master_stack_method": "winsor",
    },
    "retouching (holes filled, seams painted) is left to an image editor": {
        "aesthetic_fits_use_patchwork": True, "aesthetic_hole_fill_blend": 0.85, "aesthetic_hole_fill_enabled": True,
        "aesthetic_hole_fill_max_radius_px": 96, "aesthetic_hole_fill_only_near_seams": True,
        "aesthetic_hole_fill_protect_stars_details": True, "aesthetic_profile_preset": "strong",
        "aesthetic_profile_presets": None, "patchwork_suppressor_enabled": True, "patchwork_suppressor_max_delta": 0.3,
        "patchwork_suppressor_only_near_seams": True, "patchwork_suppressor_protect_stars": False,
        "patchwork_suppressor_seam_band_px": 320, "patchwork_suppressor_sigma_px": 64.0,
        "patchwork_suppressor_strength": "strong", "visual_seam_heal_enabled": False,
        "visual_seam_heal_max_rel_delta": 0.08, "visual_seam_heal_multiscale_enabled": False,
        "visual_seam_heal_multiscale_mid_gain": 0.35, "visual_seam_heal_multiscale_mid_rel_scale": 0.7,
        "visual_seam_heal_multiscale_mid_sigma_scale": 0.6, "visual_seam_heal_seam_sigma": 2.5,
        "visual_seam_heal_sigma_large": 96.0, "visual_seam_heal_sigma_small": 24.0, "visual_seam_heal_strength": 0.45,
    },
    "`level_sky` subtracts a plane, with nothing to choose: a curved background would take nebulae with it": {
        "final_mosaic_dbe_obj_dilate_px": 3, "final_mosaic_dbe_obj_k": 3.0, "final_mosaic_dbe_sample_step": 24,
        "final_mosaic_dbe_smoothing": 0.6, "final_mosaic_dbe_strength": "normal",
    },
    "output names are fixed; which files are written follows from the settings above": {
        "aesthetic_fits_suffix": "_aesthetic", "scientific_fits_suffix": "_science", "export_aesthetic_fits": True,
        "save_display_fits": False, "preview_png_apply_wb": False, "final_mosaic_rgb_equalize_clip_enabled": True,
    },
    "memory is bounded by blocks (`memory_budget`, `parallel_gpu_vram_fraction`), always": {
        "assembly_process_workers": 0, "chunk_profile_mode": "safe_dynamic", "coadd_cleanup_memmap": True,
        "coadd_use_memmap": True, "gpu_eta_profiles": None, "gpu_hybrid_vram_guard": True,
        "parallel_autotune_enabled": True, "parallel_target_cpu_load": 0.95, "parallel_target_ram_fraction": 0.9,
        "phase3_chunk_scale_critical": 0.5, "phase3_chunk_scale_high": 0.7, "phase3_ram_critical_pct": 88.0,
        "phase3_ram_high_pct": 82.0, "phase5_chunk_auto": True, "phase5_chunk_mb": 128,
        "winsor_auto_fallback_on_memory_error": True, "winsor_max_frames_per_pass": 0, "winsor_memmap_fallback": "auto",
        "winsor_min_frames_per_pass": 4, "winsor_split_strategy": "sequential", "winsor_worker_limit": 0,
    },
    "belongs to other program modes (SDS, ZeGrid)": {
        "allow_batch_duplication": True, "batch_overlap_pct": 40, "global_coadd_k": 2.0,
        "global_coadd_method": "kappa_sigma", "global_wcs_output_path": "global_mosaic_wcs.fits", "grid_workers": 0,
        "min_safe_stack": 3, "sds_coverage_threshold": 0.92, "sds_enable_final_black_point_equalize": False,
        "sds_enable_final_rgb_equalize": False, "sds_final_rgb_equalize_gain_clip": (0.95, 1.05),
        "sds_min_batch_size": 5, "sds_min_coverage_keep": 0.4, "sds_mode_default": False, "sds_target_batch_size": 10,
        "target_stack": 5, "use_gpu_grid": True,
    },
    "state of the window, of no concern to the worker": {
        "early_filter_enabled": None, "enable_early_filter": None, "filter_invoked": None, "input_folder": None,
        "language": None, "output_folder": None, "preferred_gui_backend": None, "preferred_gui_backend_explicit": None,
        "qt_filter_window_geometry": None, "qt_main_columns_state": None, "qt_main_left_state": None,
        "qt_main_window_geometry": None, "qt_theme_mode": None, "skip_filter_ui": None,
    },
}
# fmt: on

FOREIGN_KEYS: dict[str, GuiKey] = {key: GuiKey(key, "translated", target) for key, target in _TRANSLATED.items()} | {
    key: GuiKey(key, "ignored", why, default) for why, keys in _IGNORED.items() for key, default in keys.items()
}


def translate(mapping: Mapping[str, Any], values: dict[str, Any], source: str, rows: Mapping[str, Setting]) -> None:
    """Add to the settings what the translated keys of the GUI's configuration say.

    Parameters
    ----------
    mapping : mapping of str to object
        The configuration.
    values : dict
        The settings that it gives under their own names, changed in place; most of them go before a translated one.
    source : str
        Where the configuration comes from, for messages.
    rows : mapping of str to Setting
        The table of settings.

    Raises
    ------
    UsageError
        A value cannot be used.
    """

    def read(key: str, kind: str, default: Value, **limits: Any) -> Any:
        return Setting(key, kind, default, **limits).coerce(mapping.get(key), source)

    for key in ("input_dir", "output_dir"):
        read(key, "path", "")
    read("final_assembly_method", "choice", "", choices=("reproject_coadd", "incremental"))
    use_gpu = read("use_gpu_phase5", "bool", None)
    if use_gpu is not None:
        values.setdefault("gpu", "auto" if use_gpu else "off")
    level_sky = read("final_mosaic_dbe_enabled", "bool", None)
    if level_sky is not None:
        values.setdefault("level_sky", level_sky)
    _read_solver_settings(mapping, values, source, rows)
    level = read("worker_logging_level", "choice", None, choices=rows["logging_level"].choices)
    if level is not None and values.get("logging_level", "INFO") == "INFO":
        values["logging_level"] = level
    limit = read("parallel_max_cpu_workers", "int", 0, low=0, high=1024)
    if limit:
        jobs = values.get("num_processing_workers", 0)
        values["num_processing_workers"] = min(jobs, limit) if jobs > 0 else limit
    if values.get("global_wcs_res_override") is not None:
        values["global_wcs_pixelscale_mode"] = "given"


def _read_solver_settings(
    mapping: Mapping[str, Any], values: dict[str, Any], source: str, rows: Mapping[str, Setting]
) -> None:
    """Add what ``solver_settings_dict`` says: the solver's window goes before the configuration, if it says anything."""
    given = mapping.get("solver_settings_dict")
    if mapping.get("astrometry_timeout") is not None:
        row = rows["solver_timeout"]
        values.setdefault(row.key, replace(row, key="astrometry_timeout").coerce(mapping["astrometry_timeout"], source))
    if given is None:
        return
    if not isinstance(given, Mapping):
        raise UsageError(f"Setting solver_settings_dict = {show(given)} ({source}) cannot be used: expected a mapping.")
    for key, name in _SOLVER_KEYS.items():
        if given.get(key) not in (None, ""):
            row = replace(rows[name], key=f"solver_settings_dict[{key!r}]")
            values[name] = row.coerce(given[key], source)
