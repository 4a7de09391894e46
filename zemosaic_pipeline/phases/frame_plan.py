"""Which raw frames a run uses, and how they are grouped, where the user has chosen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class FramePlan:
    """Frames that are used and their panels, as absolute paths; None where the user left that to the worker."""

    frames: frozenset[Path] | None = None
    groups: tuple[tuple[Path, ...], ...] | None = None

    def chosen(self) -> frozenset[Path] | None:
        """The frames to use: those that were kept, or else those of the groups."""
        if self.frames is None and self.groups is not None:
            return frozenset(path for group in self.groups for path in group)
        return self.frames
