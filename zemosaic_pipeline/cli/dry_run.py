"""``--dry-run``: what a run would do and need, from the headers alone; nothing is written."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zemosaic_pipeline.errors import UnusableFile, UsageError
from zemosaic_pipeline.fits.admission import RawFrame, scan_tiles
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.host.threads import run_parallel, worker_count
from zemosaic_pipeline.phases.phase1_frames import find_frames, open_raw
from zemosaic_pipeline.phases.phase2_cluster import grouped
from zemosaic_pipeline.phases.phase6_save import wants_aesthetic
from zemosaic_pipeline.raw.calibration import load_calibration
from zemosaic_pipeline.raw.frame import Frame
from zemosaic_pipeline.raw.solved import PointedFrame
from zemosaic_pipeline.resample.output_grid import choose_output_grid
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.sky import tangent_plane

#: Seconds of one core for a megapixel of a raw frame (reading, stars, comparison, stacking), for one frame in the
#: solver, and for a megapixel of tiles in the mosaic. Measured on one machine in 2026: right within a factor of three.
SECONDS_PER_FRAME_MEGAPIXEL, SECONDS_PER_SOLVE, SECONDS_PER_TILE_MEGAPIXEL = 0.25, 2.0, 0.1
SECONDS_TO_START = 2.0


@dataclass(frozen=True)
class Plan:
    """What a run would do: numbers of files, frames and panels, output grid (H, W), bytes, seconds.

    ``frames`` and ``unsolved`` are 0 for an input of panels; ``aside`` are the lines on files that cannot be used.
    """

    frames: int
    unsolved: int
    panels: list[int]
    shape: tuple[int, int] | None
    channels: int
    memory: int
    disk: int
    seconds: float
    aside: list[str]

    def lines(self) -> Iterator[str]:
        """The plan in words."""
        if self.frames:
            yield f"frames     {self.frames}, {self.unsolved} of them without a WCS (to be solved)"
            largest = f", {min(self.panels)} to {max(self.panels)} frames each" if self.panels else ""
            yield f"panels     {len(self.panels)}{largest}"
        else:
            yield f"panels     {len(self.panels)}"
        if self.shape:
            yield f"grid       about {self.shape[1]} x {self.shape[0]} pixels, {self.channels} channels"
        else:
            yield "grid       unknown before the frames are solved (no WCS and no pointing in their headers)"
        yield f"memory     {self.memory / 1e9:.3g} GB for the work on pixels, besides the program itself"
        yield f"disk       about {self.disk / 1e9:.2g} GB in the output folder"
        yield f"time       about {duration(self.seconds)}"
        for text in self.aside:
            yield f"set aside  {text}"


def duration(seconds: float) -> str:
    """A time that nobody knows exactly."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 1):.0f} seconds"


def plan_run(source: Path, output: Path, settings: Settings) -> Plan:
    """What a run on these folders would do.

    Raises
    ------
    UsageError
        It would be refused.
    """
    with tempfile.TemporaryDirectory(prefix="zemosaic_") as scratch:
        if settings.use_existing_master_tiles is not False:
            try:
                tiles, aside = scan_tiles(source, scratch, output, raw_ends=settings.use_existing_master_tiles is None)
            except RawFrame:
                pass
            else:
                return plan_of_tiles(settings, tiles, [f"{item.name} {item.reason}" for item in aside])
        return plan_of_frames(settings, source, output, Path(scratch))


def plan_of_tiles(settings: Settings, tiles: Sequence[Tile], aside: list[str]) -> Plan:
    """The plan for an input of panels."""
    if not tiles:
        raise UsageError(f"There is no usable tile: {aside[0] if aside else 'the input folder is empty'}.")
    grid = choose_output_grid(tiles, settings)
    area = sum(tile.shape[0] * tile.shape[1] for tile in tiles)
    return Plan(
        0, 0, [1] * len(tiles), grid.shape, tiles[0].channels, settings.memory_budget,
        mosaic_bytes(settings, grid.shape, tiles[0].channels), mosaic_seconds(settings, area), aside,
    )  # fmt: skip


def plan_of_frames(settings: Settings, source: Path, output: Path, scratch: Path) -> Plan:
    """The plan for an input of raw frames; the frames' headers are read, not their pixels."""
    files, problems = find_frames(source, output, scratch, settings, None)
    calibration = load_calibration(settings, scratch, lambda text: None)

    def header(name: str) -> Frame | str:
        try:
            return open_raw(files[name], name, calibration, scratch)
        except UnusableFile as error:
            return f"{name} {error.reason}"

    found = run_parallel(header, list(files), worker_count(settings))
    frames = [item for item in found if isinstance(item, Frame)]
    aside = [f"{item.name} {item.reason}" for item in problems] + [item for item in found if isinstance(item, str)]
    if not frames:
        raise UsageError(f"There is no usable frame: {aside[0] if aside else 'the input folder holds no FITS file'}.")
    pointed = [item for frame in frames if (item := pointed_at(frame)) is not None]
    panels = [len(group) for group in grouped(settings, pointed)] if pointed else []
    shape = None
    if pointed:
        shape = choose_output_grid([item.frame.tile(item.wcs) for item in pointed], settings).shape
    unsolved = sum(frame.wcs is None or settings.force_resolve_existing_wcs for frame in frames)
    area = [frame.shape[0] * frame.shape[1] for frame in frames]
    channels = frames[0].channels
    tile_bytes = len(panels) * 1.1 * max(area) * (4 * channels + 1)
    seconds = (
        sum(area) / 1e6 * SECONDS_PER_FRAME_MEGAPIXEL + SECONDS_PER_SOLVE * min(unsolved, 3 * max(len(panels), 1))
    ) / worker_count(settings) + mosaic_seconds(settings, len(panels) * max(area))
    mosaic = mosaic_bytes(settings, shape, channels) if shape else 0
    return Plan(
        len(frames), unsolved, panels, shape, channels, settings.memory_budget, int(tile_bytes + mosaic), seconds,
        aside,
    )  # fmt: skip


def pointed_at(frame: Frame) -> PointedFrame | None:
    """The frame with the WCS of its header, or one that its pointing gives; None where it has neither."""
    if frame.wcs is not None:
        return PointedFrame(frame, frame.wcs)
    if frame.ra is None or frame.dec is None or frame.scale is None:
        return None
    wcs = tangent_plane(frame.ra, frame.dec, frame.scale / 3600, frame.shape)
    wcs.pixel_shape = frame.shape[::-1]
    return PointedFrame(frame, wcs)


def mosaic_bytes(settings: Settings, shape: tuple[int, int], channels: int) -> int:
    """Size of the mosaic's files."""
    pixel = 2 if settings.save_final_as_uint16 else 4
    mosaics = 2 if wants_aesthetic(settings) else 1
    return shape[0] * shape[1] * (mosaics * (pixel * channels + 1) + 4)


def mosaic_seconds(settings: Settings, area: int) -> float:
    """Expected time of Phases 4 to 7 for tiles of so many pixels together."""
    passes = 2 if wants_aesthetic(settings) else 1
    return SECONDS_TO_START + passes * area / 1e6 * SECONDS_PER_TILE_MEGAPIXEL / worker_count(settings)
