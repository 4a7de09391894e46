"""The window's groups: frames and panels as the user arranged them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.phases.frame_plan import FramePlan

#: Keys under which the items of ZeMosaic's filter window may hold their file, and its groups their items.
_PATH_KEYS = ("path", "path_raw", "raw_path", "file_path", "filepath", "file", "filename", "src")
_GROUP_KEYS = ("items", "frames", "entries", "members", "files", "paths")


def read_plan(overrides: Any, items: Any) -> FramePlan:
    """Read what the filter window sends: ``filter_overrides`` and ``filtered_header_items``.

    Raises
    ------
    UsageError
        They are there, and no file can be found in them.
    """
    frames = _paths_of(items, "filtered_header_items")
    groups = overrides.get("preplan_master_groups") if isinstance(overrides, Mapping) else None
    if overrides and not isinstance(overrides, Mapping):
        raise UsageError("Setting filter_overrides (gui) cannot be used: expected a mapping.")
    planned = None
    if groups:
        if not isinstance(groups, Sequence) or isinstance(groups, str):
            raise UsageError("Setting filter_overrides (gui) cannot be used: preplan_master_groups is no list.")
        planned = tuple(tuple(_paths_of(_members(g), "filter_overrides") or ()) for g in groups)
    return FramePlan(frozenset(frames) if frames else None, planned)


def _members(group: Any) -> Any:
    if isinstance(group, Mapping):
        return next((group[key] for key in _GROUP_KEYS if key in group), [group])
    return group


def _paths_of(items: Any, key: str) -> list[Path] | None:
    """Files that a list of the filter window's items names; None for no list."""
    if not items:
        return None
    found = []
    for item in items if isinstance(items, Iterable) and not isinstance(items, str | Mapping) else [None]:
        value = item
        if isinstance(item, Mapping):
            value = next((item[k] for k in _PATH_KEYS if isinstance(item.get(k), str | Path)), None)
        if not isinstance(value, str | Path) or not str(value):
            raise UsageError(f"Setting {key} (gui) cannot be used: expected a list of frames with their paths.")
        found.append(Path(value).absolute())
    return found
