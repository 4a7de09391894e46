"""The keys of the GUI's configuration that are no settings of the worker, and what becomes of each.

They are translated (to another setting) or ignored. `FOREIGN_KEYS` holds them all.
"""

from __future__ import annotations

import json
import numbers
from dataclasses import dataclass
from typing import Any

from zemosaic_pipeline.settings.values import to_bool, to_float


@dataclass(frozen=True)
class GuiKey:
    """What becomes of one key of the GUI's configuration.

    Attributes
    ----------
    key, why : str
    status : str
        ``honoured``, ``translated`` or ``ignored``.
    defaults : tuple
        The GUI's defaults, any of which counts as unchanged. Empty: no notice is taken of a change.
    """

    key: str
    status: str
    why: str
    defaults: tuple[Any, ...] = ()

    def is_changed(self, value: Any) -> bool:
        """Whether the user has given another value than the GUI's default."""
        plain = _plain(value)
        return value is not None and bool(self.defaults) and all(plain != _plain(d) for d in self.defaults)


def _plain(value: Any) -> Any:
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
    "parallel_max_cpu_workers": "upper limit of `num_processing_workers`; 0: none",
}
# Groups of keys: "status: why", then "key=default ..." with the default as JSON or a bare word, alternatives
# joined by "|". A key without one is window state or a place on this computer: a change of it is not named.
_UNUSED = """\
ignored: frames are solved from their stars, which the worker finds itself, by a local program
    astap_default_sensitivity=100 astap_drizzled_fallback_enabled=false astrometry_api_key
    astrometry_downsample=2
ignored: every frame's header says what it is, a Seestar's too
    auto_detect_seestar=true force_seestar_mode=false
ignored: `gpu` decides for all phases, and the picture is the same
    stack_use_gpu=false use_gpu_stack=false
ignored: one winsorized sigma clipping, and one contract for pixels without data
    wsc_impl=pixinsight stack_stat_min_finite_frac=0.02 stack_stat_min_finite_px_per_channel=4096
    stack_stat_min_nonzero_frac=1e-05
ignored: only held an unstable solver in check; clipping one channel shifts colour
    intertile_gain_clip=[0.9,1.1] intertile_offset_clip=[-2000,2000] intertile_affine_blend=0.3
    intertile_pair_gain_clip=[0.5,2.0] intertile_pair_offset_abs_max=5000.0
    intertile_recenter_clip=[0.85,1.18] intertile_gain_prior_lambda=0.02
    intertile_underconstrained_force_mode=offset_only intertile_underconstrained_gain_clip=[0.85,1.18]
    intertile_underconstrained_guard_enabled=true intertile_underconstrained_max_active_tiles=2
    intertile_underconstrained_max_pairs=1 intertile_underconstrained_offset_clip=[-2000,2000]
ignored: one solver with an exact gauge, from block means of every whole overlap, weighted by their errors
    intertile_preview_size=128 intertile_overlap_min=0.05 intertile_sky_percentile=[30,70]
    intertile_robust_clip_sigma=2.5 intertile_global_recenter=true intertile_max_irls_iters=3
    intertile_prune_k=8 intertile_prune_weight_mode=area intertile_enforce_requested_solver=false
    intertile_gain_offset_v2=false intertile_offset_only_v1=false use_auto_intertile=false
ignored: corrects single tiles or anchors beforehand: the solution takes all overlaps at once
    anchor_quality_median_clip_sigma=2.5 anchor_quality_probe_limit=12
    anchor_quality_span_range=[0.02,6.0] center_out_anchor_mode=auto_central_quality
    center_out_normalization_p3=true p3_center_min_overlap_fraction=0.03 p3_center_preview_size=256
    p3_center_robust_clip_sigma=2.5 p3_center_sky_percentile=[25,60] enable_poststack_anchor_review=true
    poststack_anchor_median_clip_sigma=3.5 poststack_anchor_min_improvement=0.12
    poststack_anchor_probe_limit=8 poststack_anchor_span_range=[0.004,10.0]
    poststack_anchor_use_overlap_affine=true poststack_equalize_rgb=false
    poststack_rgb_equalize_bg_percentile=[5,85] poststack_rgb_equalize_gain_clip=[0.95,1.05]
    poststack_rgb_equalize_min_coverage=0.01 poststack_rgb_equalize_min_samples=5000
    existing_master_tiles_anchor_gain_clip=[0.9,1.1]
    existing_master_tiles_anchor_photometry_enabled=true
    existing_master_tiles_final_rgb_equalize_gain_clip=[0.9,1.1]
    existing_master_tiles_rgb_balance_gain_clip=[0.9,1.1]
    existing_master_tiles_rgb_balance_min_pixels=5000 existing_master_tiles_rgb_balance_prephase5=true
ignored: a bad tile is known by its residuals (`reject_bad_tiles`); inputs are never moved
    existing_master_tiles_quality_gate_enabled=true
    existing_master_tiles_quality_gate_min_valid_frac=0.05 existing_master_tiles_quality_gate_mode=warn
    existing_master_tiles_quality_gate_ratio_threshold=5000.0
    existing_master_tiles_quality_gate_sigma_threshold=8.0 quality_gate_edge_band_px=64
    quality_gate_enabled=false quality_gate_erode_px=3 quality_gate_k_sigma=2.5
    quality_gate_move_rejects=true quality_gate_threshold=0.48
ignored: tile borders: no data means weight 0, the feather hides edges; to trim: `apply_master_tile_crop`
    altaz_alpha_sidecar_format=png altaz_alpha_soft_threshold=0.001 altaz_cleanup_enabled=false
    altaz_decay=0.15 altaz_export_alpha_fits=true altaz_export_alpha_sidecar=false
    altaz_margin_percent=5.0 altaz_min_coverage_abs=3.0 altaz_min_coverage_frac=0.5
    altaz_morph_open_px=3 altaz_nanize=true altaz_nanize_threshold=0.001
    altaz_strict_overlap_crop_alpha_threshold=0.02 altaz_strict_overlap_crop_bbox_pad_px=6
    altaz_strict_overlap_crop_enabled=true altaz_strict_overlap_crop_min_nonzero_frac=0.08
    altaz_strict_overlap_crop_min_size_px=256 altaz_unknown_policy=auto quality_crop_band_px=32
    quality_crop_enabled=false quality_crop_k_sigma=2.0 quality_crop_margin_px=8 quality_crop_min_run=2
    crop_follow_signal=true global_wcs_autocrop_enabled=true global_wcs_autocrop_margin_px=128
ignored: every weight is applied once: `tile_weight_mode`, the feather, ALPHA
    tile_weight_v4_curve=sqrt tile_weight_v4_enabled=true tile_weight_v4_max=1.35
    tile_weight_v4_min=0.75 tile_weight_v4_residual_penalty_enabled=false
    tile_weight_v4_residual_penalty_strength=0.35 tile_weight_v4_strength=1.0
    tile_weight_v4_temporal_penalty_enabled=false tile_weight_v4_temporal_penalty_hours=6.0
    tile_weight_v4_temporal_penalty_strength=0.2 phase5_alpha_soft_weights=true
    phase5_alpha_weight_floor=0.02 incremental_feather_parity=false
ignored: master tiles are coadded as they are, in one step
    inter_master_local_scale=final inter_master_max_group=64 inter_master_memmap_policy=auto
    inter_master_merge_enable=false inter_master_min_group_size=2 inter_master_overlap_threshold=0.6
    inter_master_photometry_clip_sigma=3.0 inter_master_photometry_intersuper=true
    inter_master_photometry_intragroup=true inter_master_stack_method=winsor
ignored: retouching (holes filled, seams painted, background subtracted) is left to an image editor
    aesthetic_fits_use_patchwork=true aesthetic_hole_fill_blend=0.85 aesthetic_hole_fill_enabled=true
    aesthetic_hole_fill_max_radius_px=96 aesthetic_hole_fill_only_near_seams=true
    aesthetic_hole_fill_protect_stars_details=true aesthetic_profile_preset=strong
    aesthetic_profile_presets patchwork_suppressor_enabled=true patchwork_suppressor_max_delta=0.3
    patchwork_suppressor_only_near_seams=true patchwork_suppressor_protect_stars=false
    patchwork_suppressor_seam_band_px=320 patchwork_suppressor_sigma_px=64.0
    patchwork_suppressor_strength=strong visual_seam_heal_enabled=false
    visual_seam_heal_max_rel_delta=0.08 visual_seam_heal_multiscale_enabled=false
    visual_seam_heal_multiscale_mid_gain=0.35 visual_seam_heal_multiscale_mid_rel_scale=0.7
    visual_seam_heal_multiscale_mid_sigma_scale=0.6 visual_seam_heal_seam_sigma=2.5
    visual_seam_heal_sigma_large=96.0 visual_seam_heal_sigma_small=24.0 visual_seam_heal_strength=0.45
    final_mosaic_dbe_enabled=true final_mosaic_dbe_obj_dilate_px=3 final_mosaic_dbe_obj_k=3.0
    final_mosaic_dbe_sample_step=24 final_mosaic_dbe_smoothing=0.6 final_mosaic_dbe_strength=normal
ignored: output names are fixed; which files are written follows from the settings above
    aesthetic_fits_suffix=_aesthetic scientific_fits_suffix=_science export_aesthetic_fits=true
    save_display_fits=false preview_png_apply_wb=false final_mosaic_rgb_equalize_clip_enabled=true
ignored: memory is bounded by blocks (`memory_budget`, `parallel_gpu_vram_fraction`), always
    assembly_process_workers=0 chunk_profile_mode=safe_dynamic coadd_cleanup_memmap=true
    coadd_use_memmap=true gpu_eta_profiles gpu_hybrid_vram_guard=true parallel_autotune_enabled=true
    parallel_target_cpu_load=0.95 parallel_target_ram_fraction=0.9 phase3_chunk_scale_critical=0.5
    phase3_chunk_scale_high=0.7 phase3_ram_critical_pct=88.0 phase3_ram_high_pct=82.0
    phase5_chunk_auto=true phase5_chunk_mb=128 winsor_auto_fallback_on_memory_error=true
    winsor_max_frames_per_pass=0 winsor_memmap_fallback=auto winsor_min_frames_per_pass=4
    winsor_split_strategy=sequential winsor_worker_limit=0
ignored: belongs to other program modes (SDS, ZeGrid)
    allow_batch_duplication=true batch_overlap_pct=40 global_coadd_k=2.0 global_coadd_method=kappa_sigma
    global_wcs_output_path=global_mosaic_wcs.fits grid_workers=0 min_safe_stack=3
    sds_coverage_threshold=0.92 sds_enable_final_black_point_equalize=false
    sds_enable_final_rgb_equalize=false sds_final_rgb_equalize_gain_clip=[0.95,1.05]
    sds_min_batch_size=5 sds_min_coverage_keep=0.4 sds_mode_default=false sds_target_batch_size=10
    target_stack=5 use_gpu_grid=true
ignored: state of the window, of no concern to the worker
    early_filter_enabled enable_early_filter filter_invoked input_folder language output_folder
    preferred_gui_backend preferred_gui_backend_explicit qt_filter_window_geometry qt_main_columns_state
    qt_main_left_state qt_main_window_geometry qt_theme_mode skip_filter_ui
"""


def _parse_default(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _foreign_keys() -> dict[str, GuiKey]:
    rows = [GuiKey(key, "translated", target) for key, target in _TRANSLATED.items()]
    status = why = ""
    for line in _UNUSED.splitlines():
        if not line.startswith(" "):
            status, _, why = line.partition(": ")
            continue
        for word in line.split():
            key, _, text = word.partition("=")
            defaults = tuple(_parse_default(part) for part in text.split("|")) if text else ()
            rows.append(GuiKey(key, status, why, defaults))
    return {row.key: row for row in rows}


FOREIGN_KEYS: dict[str, GuiKey] = _foreign_keys()
