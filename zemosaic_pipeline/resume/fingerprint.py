"""What the bits of a piece depend on: which setting acts where, fingerprints, checksums, arrays as bytes.

`resume.checkpoints` uses it to tell whether what a stopped run has left belongs to the run at hand.
"""

from __future__ import annotations

import functools
import hashlib
import platform
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from zemosaic_pipeline.settings.settings import Settings

#: Changes with what the pieces look like.
FORMAT = 1
#: Packages whose versions may change a bit of the result.
LIBRARIES = (
    "zemosaic-worker",
    "numpy",
    "numba",
    "scipy",
    "astropy",
    "reproject",
    "sep",
    "opencv-python-headless",
    "numba-cuda",
)
_COADD = ("science", "aesthetic")
_ALL_5 = ("survey", "photometry", *_COADD)
#: In which steps each setting acts; () where no bit of what is kept depends on it by itself. What earlier steps found
#: enters a fingerprint by its value. A setting that is missing here counts for every step.
ACTS_IN: dict[str, tuple[str, ...]] = {
    "use_existing_master_tiles": (),
    "apply_master_tile_crop": _ALL_5,
    "master_tile_crop_percent": _ALL_5,
    # Phases 1 to 3; the content of the masters enters by their tokens
    "dark": ("frame",),
    "flat": ("frame",),
    "bias": ("frame",),
    "bayer_pattern": ("frame",),
    "debayer_method": ("frame",),
    "hot_pixel_sigma": ("frame",),
    "reject_bad_frames": ("stack",),
    "force_resolve_existing_wcs": ("solve",),
    "solver_method": ("solve",),
    "solver_timeout": ("solve",),
    "astap_executable_path": ("solve",),
    "astap_data_directory_path": ("solve",),
    "astap_default_search_radius": ("solve",),
    "astap_default_downsample": ("solve",),
    "astap_max_instances": (),
    "astrometry_local_path": ("solve",),
    "refine_wcs": ("solve",),
    "cluster_panel_threshold": ("cluster",),
    "cluster_target_groups": ("cluster",),
    "cluster_orientation_split_deg": ("cluster",),
    "max_raw_per_master_tile": ("cluster",),
    "auto_limit_frames_per_master_tile": ("cluster",),
    "stacking_normalize_method": ("stack",),
    "stacking_weighting_method": ("stack",),
    "stacking_rejection_algorithm": ("stack",),
    "stacking_kappa_low": ("stack",),
    "stacking_kappa_high": ("stack",),
    "stacking_winsor_limits": ("stack",),
    "stacking_final_combine_method": ("stack",),
    # Phase 4: the grid that was chosen enters by its header
    "global_wcs_pixelscale_mode": (),
    "global_wcs_res_override": (),
    "global_wcs_orientation": (),
    "global_wcs_padding_percent": (),
    "output_wcs_file": (),
    "max_output_gigapixels": (),
    # Phase 5
    "intertile_photometric_match": ("photometry",),
    "match_background_for_final": ("photometry",),
    "photometry_cell_px": (),  # the cell that was chosen enters by its value, since the memory budget may double it
    "gain_se_limit": ("stack", "photometry"),
    "reject_bad_tiles": ("photometry",),
    "engine": _COADD,
    "kernel": ("stack", *_COADD),
    "combine_method": _COADD,
    "kappa_low": _COADD,
    "kappa_high": _COADD,
    "winsor_limits": _COADD,
    "feather_px": _COADD,
    "enable_tile_weighting": _COADD,
    "tile_weight_mode": _COADD,
    "apply_radial_weight": _COADD,
    "radial_feather_fraction": _COADD,
    "radial_shape_power": _COADD,
    "min_radial_weight_floor": _COADD,
    "two_pass_coverage_renorm": ("aesthetic",),
    "two_pass_cov_sigma_px": ("aesthetic",),
    "two_pass_cov_gain_clip": ("aesthetic",),
    "final_mosaic_rgb_equalize_enabled": ("aesthetic",),
    "final_mosaic_rgb_equalize_gain_clip": ("aesthetic",),
    "final_mosaic_black_point_equalize_enabled": ("aesthetic",),
    "final_mosaic_black_point_percentile": ("aesthetic",),
    # the machine: the backend enters by its name
    "gpu": (),
    "gpu_id_phase5": (),
    "gpu_selector": (),
    "parallel_gpu_vram_fraction": (),
    "memory_budget": (),
    "num_processing_workers": (),
    "resume": (),
    "cache_retention": (),
    "coadd_memmap_dir": (),
    "cleanup_temp_artifacts": (),
    # outputs
    "keep_master_tiles": (),
    "save_final_as_uint16": _COADD,
    "legacy_rgb_cube": _COADD,
    "preview_png_p_low": (),
    "preview_png_p_high": (),
    "preview_png_asinh_a": (),
    "preview_png_max_dim": ("aesthetic",),  # the balance of the channels is measured on the preview
    "enable_resource_telemetry": (),
    "resource_telemetry_interval_sec": (),
    "resource_telemetry_log_to_csv": (),
    "logging_level": (),
}


# ---------------------------------------------------------------------------------------------------- fingerprints


def settings_of(step: str, settings: Settings) -> dict[str, Any]:
    """The settings that act in a step, by name."""
    return {key: value for key, value in vars(settings).items() if step in ACTS_IN.get(key, (step,))}


def fingerprint(step: str, settings: Settings, *parts: Any) -> str:
    """Digest of what a piece of ``step`` depends on, 32 hexadecimal digits.

    Parameters
    ----------
    step : str
        Name of the step, as in :data:`ACTS_IN`.
    settings : Settings
        Those that act in the step are taken.
    *parts
        Tokens of inputs and results of earlier steps: texts, numbers, None, bytes, arrays, and sequences of them.

    Raises
    ------
    TypeError
        A part is of another kind.
    """
    digest = hashlib.blake2b(digest_size=16)
    _absorb(digest, [FORMAT, program(), step, sorted(settings_of(step, settings).items()), parts])
    return digest.hexdigest()


def _absorb(digest: Any, value: Any) -> None:
    """Feed a value into a digest so that different values give different bytes."""
    if isinstance(value, np.ndarray):
        digest.update(f"array {value.dtype.str} {value.shape};".encode())
        digest.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
    elif isinstance(value, bytes):
        digest.update(b"bytes %d;" % len(value) + value)
    elif isinstance(value, list | tuple):
        digest.update(b"list %d;" % len(value))
        for item in value:
            _absorb(digest, item)
    elif value is None or isinstance(value, str | bool | int | float):
        text = repr(value.item() if isinstance(value, np.generic) else value)
        digest.update(f"{len(text)} {text};".encode("utf-8", "backslashreplace"))
    else:
        raise TypeError(f"a fingerprint cannot be made of an object of type {type(value).__name__}")


def program_files() -> list[Path]:
    """The program's modules, in order; none in a frozen build, which holds no sources."""
    package = Path(__file__).parents[1]
    top = [package.parent / f"zemosaic_{name}.py" for name in ("photometry", "utils", "worker")]
    return [path for path in [*top, *sorted(package.rglob("*.py"))] if path.is_file()]


@functools.cache
def program() -> str:
    """Digest of the program's modules and of the versions of what it uses."""
    digest = hashlib.blake2b(digest_size=16)
    for path in program_files():
        digest.update(path.name.encode() + hashlib.blake2b(path.read_bytes()).digest())
    versions = [platform.python_version(), platform.system(), platform.machine()]
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    digest.update("\n".join(versions).encode())
    return digest.hexdigest()
