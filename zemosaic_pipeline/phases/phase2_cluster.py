"""Phase 2: the frames of each panel."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.phases.clustering import Grouping, group_frames, linking_length
from zemosaic_pipeline.phases.run import Run, nothing_usable
from zemosaic_pipeline.raw.solved import PointedFrame, SolvedFrame, field_of
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.stars.quality import frame_quality

Pointed = TypeVar("Pointed", bound=PointedFrame)


def panels_of(run: Run, frames: Sequence[SolvedFrame]) -> list[list[SolvedFrame]]:
    """The frames of each panel; as the user arranged them where he did.

    Bad frames are judged beside the others of their panel and set aside.
    """
    settings, reporter = run.settings, run.reporter
    reporter.stage("phase2_cluster", 0, len(frames))
    reporter.info("run_info_phase2_started", "grouping the frames into panels")
    if run.plan is not None and run.plan.groups is not None:
        groups = planned_groups(frames, run.plan.groups)
    else:
        groups = grouped(settings, frames)
    panels = []
    for group in groups:
        reasons: list[str | None] = [None] * len(group)
        if settings.reject_bad_frames:
            kinds = [(item.frame.shape, item.frame.exposure) for item in group]
            reasons = frame_quality([item.stars for item in group], kinds)
        kept = []
        for item, reason in zip(group, reasons, strict=True):
            if reason is None:
                kept.append(item)
            else:
                run.set_frame_aside(item.name, reason)
        if kept:
            panels.append(kept)
    run.tools.check()
    if not panels:
        raise UsageError(nothing_usable(run.aside, what="frame"))
    reporter.stage("phase2_cluster", len(frames), len(frames))
    reporter.info("run_info_phase2_finished", f"{len(panels)} panels", num_groups=len(panels))
    return panels


def planned_groups(frames: Sequence[SolvedFrame], groups: Sequence[Sequence[Path]]) -> list[list[SolvedFrame]]:
    """The panels of the filter window, given as files; frames that it put into none are one more."""
    by_path = {item.frame.path.absolute(): item for item in frames}
    found = [[by_path.pop(path) for path in group if path in by_path] for group in groups]
    return [group for group in [*found, list(by_path.values())] if group]


def grouped(settings: Settings, frames: Sequence[Pointed]) -> list[list[Pointed]]:
    """The panels that the settings of Phase 2 ask for."""
    fields = [field_of(item.frame) for item in frames]
    grouping = Grouping(
        threshold_deg=linking_length(settings.cluster_panel_threshold, fields),
        orientation_split_deg=settings.cluster_orientation_split_deg,
        target_groups=settings.cluster_target_groups,
        field_deg=float(np.median(fields)),
        cap=settings.max_raw_per_master_tile,
        auto_cap=settings.auto_limit_frames_per_master_tile,
    )
    ra, dec = np.transpose([item.centre for item in frames])
    found = group_frames(
        ra,
        dec,
        grouping,
        orientation_deg=[item.orientation for item in frames],
        mount=[item.frame.mount or "" for item in frames],
        order=[item.frame.date or item.name for item in frames],
    )
    return [[frames[k] for k in members] for members in found]
