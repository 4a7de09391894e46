"""What ZeMosaic's window imports by name from a module of this name, and nothing else."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

from zemosaic_pipeline.arrays import make_radial_weight_map
from zemosaic_pipeline.fits.find import EXCLUDED_DIRS, is_path_excluded

__all__ = [
    "EXCLUDED_DIRS",
    "ensure_user_config_dir",
    "get_app_base_dir",
    "get_runtime_temp_dir",
    "get_user_config_dir",
    "is_path_excluded",
    "make_radial_weight_map",
]


def get_app_base_dir() -> Path:
    """Return the folder that holds the program (in a frozen build, the folder of its bundled files)."""
    if getattr(sys, "frozen", False):
        return Path(getattr(sys, "_MEIPASS", Path(sys.executable).parent)).resolve()
    return Path(__file__).resolve().parent


def get_user_config_dir() -> Path:
    """Return the folder of the user's configuration, ``~/ZeMosaic``; it need not exist."""
    return Path.home() / "ZeMosaic"


def ensure_user_config_dir() -> Path:
    """Return `get_user_config_dir`, made if it was missing."""
    folder = get_user_config_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def get_runtime_temp_dir() -> Path:
    """Return a folder for temporary files, the user's own, made if it was missing."""
    # on a machine with several users the system's folder is shared, and one user cannot write in another's
    owner = f"-{os.getuid()}" if hasattr(os, "getuid") else ""
    folder = Path(tempfile.gettempdir()) / f"zemosaic{owner}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
