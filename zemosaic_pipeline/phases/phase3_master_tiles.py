"""Phase 3: the frames of each panel become a master tile, by the engine and the photometric model of Phase 5.

A frame is a tile whose pixels are calibrated and debayered as they are read. So everything that a mosaic of panels
gets, a panel of frames gets too: certified coordinates, gains and offsets from the overlaps, weights, rejection,
bounded memory, either backend.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.errors import Notice, UsageError
from zemosaic_pipeline.files import file_digest, not_written, pack, unpack
from zemosaic_pipeline.fits.admission import MASTER_TILES
from zemosaic_pipeline.fits.tile import Tile, open_tile
from zemosaic_pipeline.fits.writer import MosaicWriter
from zemosaic_pipeline.phases.phase4_grid import usable
from zemosaic_pipeline.phases.phase5_canvas import alpha_of
from zemosaic_pipeline.phases.phase5_normalise import Scene, coarse_cell, matched
from zemosaic_pipeline.phases.run import Run, Tools
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.raw.frame import Frame
from zemosaic_pipeline.raw.solved import SolvedFrame
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import choose_output_grid, grid_header
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile, place_tiles
from zemosaic_pipeline.resample.survey import TileSurvey
from zemosaic_pipeline.resume.checkpoints import Codec
from zemosaic_pipeline.resume.pieces import backend_name, exact_wcs
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.stars.alignment import align_frames

#: Frames of a panel are compared with so many of them, not each with each: its noise is common to all, and leaves with
#: the gauge.
HUBS = 1
#: Cells in which frames are compared, in pixels: their noise is larger than a master tile's, and so are their overlaps.
CELL = 8
#: Width of the ramp at a frame's edge, in pixels.
FEATHER = 24.0


def master_tiles(run: Run, panels: Sequence[Sequence[SolvedFrame]], pixels: PixelStore) -> list[Tile]:
    """The master tile of every panel, opened as a tile of the mosaic.

    What a stopped run has finished is used, if the frames, their solutions and the settings are the same.

    Raises
    ------
    UsageError
        No panel has a usable frame.
    """
    reporter = run.reporter
    folder = run.output / MASTER_TILES
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
    reporter.stage("phase3_master_tiles", 0, len(panels))
    reporter.info("run_info_phase3_started", f"stacking {sum(map(len, panels))} frames of {len(panels)} panels")
    run.tools.switch.start()
    tiles = []
    for number, frames in enumerate(panels, start=1):
        path = folder / f"master_tile_{number:03d}.fits"
        run.tools.check()
        if master_tile(run, number, list(frames), path, pixels):
            tiles.append(open_tile(path, f"{MASTER_TILES}/{path.name}", run.scratch))
        reporter.stage("phase3_master_tiles", number, len(panels))
    for stale in sorted(folder.glob("master_tile_*.fits")):
        if stale not in [tile.path for tile in tiles]:
            stale.unlink()
    if not tiles:
        with suppress(OSError):  # something of the user's lies in it
            folder.rmdir()
        raise UsageError("No panel has a usable frame: see the warnings.")
    reporter.info("run_info_phase3_finished", f"{len(tiles)} master tiles", num_master_tiles=len(tiles))
    return tiles


@dataclass(frozen=True)
class Stacked:
    """A master tile as the checkpoints keep it: the digest of its file, and what the report says of its frames."""

    digest: str
    frames: dict[str, dict[str, Any]]


STACKED: Codec[Stacked | None] = Codec(lambda made: pack(vars(made)), lambda data: Stacked(**unpack(data)))
#: What the report says of a frame in a stack.
STACK_FACTS = ("status", "reason", "weight", "gain", "noise_normalised")


def master_tile(run: Run, number: int, frames: list[SolvedFrame], path: Path, pixels: PixelStore) -> bool:
    """Make one master tile, or find it made; False where none of its frames can be used."""
    for item in frames:
        run.frames[item.name]["panel"] = number
    frames = aligned(run, frames)
    if not frames:
        return False
    backend = run.tools.switch.backend
    cell = stack_cell(run.settings, frames)
    fingerprint = run.kept.fingerprint(
        "stack",
        backend_name(backend),
        cell,
        [(item.name, item.measured.fingerprint) for item in frames],
        [exact_wcs(item.wcs) for item in frames],
    )

    def make() -> Stacked | None:
        if not stack(run, number, frames, path, pixels, cell):
            return None
        facts = {item.name: {key: run.frames[item.name].get(key) for key in STACK_FACTS} for item in frames}
        # what another backend has made, after a failure of the GPU, is not what the fingerprint says: it is not kept
        same = fingerprint and run.tools.switch.backend is backend
        return Stacked(file_digest(path) if same else "", facts)

    def still_there(made: Stacked | None) -> bool:
        return made is not None and path.is_file() and file_digest(path) == made.digest

    made = run.kept.cached("stack", path.name, fingerprint, make, STACKED, valid=still_there, title=path.name)
    if made is None:
        return False
    if made.digest:  # the file is what the fingerprint says
        run.kept.vouch(path, fingerprint)
    for name, facts in made.frames.items():
        if facts["status"] == "set aside" != run.frames[name]["status"]:  # by the run that was stopped
            run.set_frame_aside(name, facts["reason"])
        run.frames[name] |= facts
    return True


def remove_master_tiles(run: Run, tiles: Sequence[Tile]) -> None:
    """With ``keep_master_tiles`` off, the end of the files that `master_tiles` made."""
    if run.settings.keep_master_tiles:
        return
    paths = [tile.path for tile in tiles if tile.path is not None]
    for path in paths:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:  # another program has it open
            run.reporter.warn("", f"{path} cannot be removed ({error.strerror or error})")
    for folder in {path.parent for path in paths}:
        with suppress(OSError):  # something of the user's lies in it
            folder.rmdir()


def aligned(run: Run, frames: list[SolvedFrame]) -> list[SolvedFrame]:
    """The frames with their WCS refined on the stars that they share; those whose WCS lies are set aside."""
    if len(frames) < 2:
        return frames
    found = align_frames(
        [item.stars for item in frames],
        [item.wcs for item in frames],
        [item.frame.shape for item in frames],
        [pointing_of(item.frame) for item in frames],
    )
    kept = []
    for item, refined in zip(frames, found, strict=True):
        if refined.reason is not None:
            run.set_frame_aside(item.name, refined.reason)
            continue
        wcs = refined.wcs if run.settings.refine_wcs else item.wcs
        run.frames[item.name] |= {
            "shift_px": refined.shift_px,
            "rms_px": refined.rms_px,
            "matched_stars": refined.matched,
            "wcs": wcs.to_header_string(relax=True),
        }
        kept.append(replace(item, wcs=wcs))
    return kept


def pointing_of(frame: Frame) -> tuple[float, float] | None:
    """Where its header says that the telescope pointed."""
    return None if frame.ra is None or frame.dec is None else (frame.ra, frame.dec)


# ------------------------------------------------------------------------------------------------------- one panel


def panel_settings(settings: Settings) -> Settings:
    """The settings of Phase 5 that stack a panel, from those of Phase 3."""
    normalise_by = settings.stacking_normalize_method
    return replace(
        settings,
        apply_master_tile_crop=False,
        global_wcs_pixelscale_mode="median",
        global_wcs_res_override=None,
        global_wcs_orientation="as_tiles",
        global_wcs_padding_percent=0.0,
        output_wcs_file="",
        intertile_photometric_match=normalise_by == "linear_fit",
        match_background_for_final=normalise_by != "none",
        photometry_cell_px=CELL,
        gradient_order=0,
        engine="native",
        combine_method="mean",
        feather_px=FEATHER,
        enable_tile_weighting=settings.stacking_weighting_method != "none",
        tile_weight_mode="inverse_variance" if settings.stacking_weighting_method != "none" else "uniform",
        apply_radial_weight=False,
        two_pass_coverage_renorm=False,
    )


def stack_cell(settings: Settings, frames: Sequence[SolvedFrame]) -> int:
    """Side of the cells in which the frames of a panel are compared."""
    area = sum(item.frame.shape[0] * item.frame.shape[1] for item in frames)
    return coarse_cell(panel_settings(settings), area, frames[0].frame.channels)


def stack(
    run: Run, number: int, frames: Sequence[SolvedFrame], path: Path, pixels: PixelStore, cell: int
) -> bool:  # fmt: skip
    """Stack the frames of one panel into a master tile; False where none of them can be used."""
    # its progress is no progress of the mosaic, and nothing of it is kept but the tile
    tools = Tools(panel_settings(run.settings), run.tools.switch, run.tools.jobs, run.tools.cancelled, hubs=HUBS)
    tiles = [item.frame.tile(item.wcs) for item in frames]
    try:
        grid = choose_output_grid(tiles, tools.settings)
    except UsageError as error:
        for item in frames:
            run.set_frame_aside(item.name, f"is of a panel that cannot be laid out ({str(error).rstrip('.')})")
        return False
    found: list[tuple[PlacedTile, TileSurvey]] = []
    for item, frame in zip(place_tiles(tiles, grid), frames, strict=True):
        if item is None:
            run.set_frame_aside(frame.name, "lies outside its panel")
        else:
            found.append((item, frame.measured.survey))
    good, aside = usable(found)
    for item in aside:
        run.set_frame_aside(item.name, item.reason)
    if not good:
        return False
    scene = matched(tools, grid, good, pixels, cell)
    for item in scene.left_out:
        run.set_frame_aside(item.name, item.reason)
    tell(run, number, [warning for warning in scene.solution.warnings if warning.kind != "bad_tile"])  # said above
    by_name = {item.name: item for item in frames}
    scene = sharper_first(run.settings, scene, by_name)
    used = [by_name[item.tile.name] for item in scene.placed]
    note_frames(run, scene)
    write_stack(tools, stack_options(run.settings), scene, master_header(number, scene, used), path)
    return True


def tell(run: Run, number: int, warnings: Sequence[Notice]) -> None:
    """The warnings of a panel: those of one kind are one, and the log holds all."""
    kinds: dict[str, list[Notice]] = {}
    for warning in warnings:
        kinds.setdefault(warning.kind, []).append(warning)
    for first, *more in kinds.values():
        rest = f" (and {len(more)} more of this kind: see the log)" if more else ""
        run.reporter.warn("", f"panel {number}: {first.text}{rest}", kind=first.kind, subject=first.subject)
        for warning in more:
            run.reporter.info("", f"panel {number}: {warning.text}")


def sharper_first(settings: Settings, scene: Scene, frames: dict[str, SolvedFrame]) -> Scene:
    """With ``noise_fwhm``, the weights by noise divided by the square of the width of the stars."""
    if settings.stacking_weighting_method != "noise_fwhm":
        return scene
    width = np.array([np.median(frames[item.tile.name].stars.fwhm) for item in scene.placed])
    factor = (np.nanmedian(width) / np.where(np.isfinite(width), width, np.nanmedian(width))) ** 2
    placed = [replace(item, weight=item.weight * float(f)) for item, f in zip(scene.placed, factor, strict=True)]
    return replace(scene, placed=placed)


def note_frames(run: Run, scene: Scene) -> None:
    """What the stack found of each frame, for the report."""
    for k, item in enumerate(scene.placed):
        run.frames[item.tile.name] |= {
            "status": "stacked",
            "weight": item.weight,
            "gain": [float(v) for v in scene.solution.gain[k]],
            "noise_normalised": [float(v) for v in scene.surveys[k].noise / scene.solution.gain[k]],
        }


def master_header(number: int, scene: Scene, frames: Sequence[SolvedFrame]) -> fits.Header:
    """Header of a master tile: its WCS, what went into it, and the noise that follows from that."""
    header = grid_header(scene.grid)
    exposures = [item.frame.exposure for item in frames if item.frame.exposure is not None]
    header["HIERARCH MT_NFRAMES"] = sum(item.frame.n_frames for item in frames)
    header["NCOMBINE"] = (len(frames), "number of images combined")
    if len(exposures) == len(frames):
        header["EXPTOTAL"] = (float(sum(exposures)), "[s] total exposure")
    dates = sorted(item.frame.date for item in frames if item.frame.date)
    if dates:
        header["DATE-OBS"] = (dates[0], "begin of the first frame")
        header["DATE-END"] = (dates[-1], "begin of the last frame")
    header["MT_PANEL"] = (number, "number of the panel")
    for channel, value in enumerate(expected_noise(scene)):
        header[f"MT_NOIS{channel}"] = (float(value), "noise of the stack, before resampling")
    return header


def expected_noise(scene: Scene) -> np.ndarray:
    """Noise of a weighted mean of all frames, float64 (C,), from the frames' own: sqrt(sum w^2 s^2) / sum w."""
    noise = np.stack([facts.noise for facts in scene.surveys]) / scene.solution.gain
    weight = np.array([item.weight for item in scene.placed])[:, None]
    return np.sqrt(np.sum((weight * noise) ** 2, axis=0)) / np.sum(weight)


def stack_options(settings: Settings) -> CoaddOptions:
    """How the frames of a panel are combined."""
    combine = CombineMethod(settings.stacking_rejection_algorithm)
    if settings.stacking_final_combine_method == "median":
        combine = CombineMethod.MEDIAN
    return CoaddOptions(
        kernel=ResamplingKernel(settings.kernel),
        combine=combine,
        kappa_low=settings.stacking_kappa_low,
        kappa_high=settings.stacking_kappa_high,
        winsor_limits=settings.stacking_winsor_limits,
    )


def write_stack(tools: Tools, options: CoaddOptions, scene: Scene, header: fits.Header, path: Path) -> None:
    """Coadd the frames and write the master tile, block by block, as one step on one backend.

    ALPHA is the coverage in units of 1/255 of what all frames together weigh: Phase 5 weighs the tile's pixels by it.
    """
    shape, channels = scene.grid.shape, scene.channels
    full = sum(item.weight for item in scene.placed)

    def step(backend: Backend) -> None:
        budget = tools.block_bytes(backend.free_bytes(tools.settings.parallel_gpu_vram_fraction))
        with ExitStack() as stack:
            image = (channels, *shape) if channels > 1 else shape
            writer = stack.enter_context(MosaicWriter(path, header, image, "f4", alpha_shape=shape))

            def sink(block: Rect, values: np.ndarray, weights: np.ndarray) -> None:
                writer.write_block(block[0], block[2], values if channels > 1 else values[0])
                writer.write_alpha(block[0], block[2], alpha_of(weights, full))

            plan = CoaddPlan(scene.placed, scene.solution, scene.grid, options, scene.pixels)
            coadd(plan, backend, sink, budget, tools.jobs, tools.cancelled)
            tools.check()

    tools.switch.run(step)
