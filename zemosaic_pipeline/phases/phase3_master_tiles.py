"""Phase 3: the frames of each panel become a master tile, by the engine and the photometric model of Phase 5.

A frame is a tile whose pixels are calibrated and debayered as they are read. So everything that a mosaic of panels
gets, a panel of frames gets too: certified coordinates, gains and offsets from the overlaps, weights, rejection,
bounded memory, either backend.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.errors import UsageError
from zemosaic_pipeline.files import file_digest, not_written, pack, unpack
from zemosaic_pipeline.fits.admission import MASTER_TILES
from zemosaic_pipeline.fits.tile import Tile, open_tile
from zemosaic_pipeline.fits.writer import MosaicWriter
from zemosaic_pipeline.host.progress import Reporter
from zemosaic_pipeline.phases.phase4_grid import lay_out
from zemosaic_pipeline.phases.phase5_normalise import Scene, normalise
from zemosaic_pipeline.phases.run import BLOCK_SHARE, STORE_SHARE, Run, set_frame_aside
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.pixels.methods import CombineMethod, ResamplingKernel
from zemosaic_pipeline.raw.solved import SolvedFrame
from zemosaic_pipeline.resample.coadd import CoaddPlan, coadd
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.output_grid import grid_header
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.survey import TileSurvey
from zemosaic_pipeline.resume.fingerprint import fingerprint
from zemosaic_pipeline.settings.settings import Settings
from zemosaic_pipeline.stars.alignment import align_frames

#: Frames of a panel are compared with so many of them, not each with each: its noise is common to all, and leaves with
#: the gauge.
HUBS = 1
#: Cells in which frames are compared, in pixels: their noise is larger than a master tile's, and so are their overlaps.
CELL = 8
#: Width of the ramp at a frame's edge, in pixels.
FEATHER = 24.0


def master_tiles(run: Run, panels: Sequence[Sequence[SolvedFrame]], scratch: Path) -> list[Tile]:
    """Phase 3: the master tile of every panel, opened as a tile of the mosaic.

    What a stopped run has finished is used, if the frames, their solutions and the settings are the same.

    Raises
    ------
    UsageError
        No panel has a usable frame.
    """
    folder = run.output_dir / MASTER_TILES
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise not_written(folder, error) from error
    run.reporter.stage("phase3_master_tiles", 0, len(panels))
    run.reporter.info("run_info_phase3_started", f"stacking {sum(map(len, panels))} frames of {len(panels)} panels")
    run.switch.start()
    tiles = []
    for number, frames in enumerate(panels, start=1):
        path = folder / f"master_tile_{number:03d}.fits"
        run.check()
        mark = master_tile(run, number, list(frames), path, scratch)
        if mark is not None:
            run.kept.vouch(path, mark)
            tiles.append(open_tile(path, f"{MASTER_TILES}/{path.name}", scratch))
        run.reporter.stage("phase3_master_tiles", number, len(panels))
    for stale in sorted(folder.glob("master_tile_*.fits")):
        if stale not in [tile.path for tile in tiles]:
            stale.unlink()
    if not tiles:
        with suppress(OSError):  # something of the user's lies in it
            folder.rmdir()
        raise UsageError("No panel has a usable frame: see the warnings.")
    run.reporter.info("run_info_phase3_finished", f"{len(tiles)} master tiles", num_master_tiles=len(tiles))
    return tiles


def master_tile(run: Run, number: int, frames: list[SolvedFrame], path: Path, scratch: Path) -> str | None:
    """Make one master tile, or find it made; returns its fingerprint, None where none of its frames can be used."""
    for item in frames:
        run.frames[item.name]["panel"] = number
    frames = aligned(run, frames)
    if not frames:
        return None
    mark = fingerprint(
        "stack",
        run.settings,
        run.switch.name,
        [(item.name, item.mark) for item in frames],
        [item.wcs.to_header_string(relax=True) for item in frames],
    )
    found = run.kept.load("stack", path.name, mark)
    before = None if found is None else unpack(found)
    if before is not None and path.is_file() and file_digest(path) == before["digest"]:
        run.reporter.info("", f"resume: {path.name} of the stopped run is used")
        for name, facts in before["frames"].items():
            run.frames[name] |= facts
        return mark
    if not stack(run, number, frames, path, scratch):
        return None
    if run.kept.enabled:
        facts = {item.name: {k: run.frames[item.name].get(k) for k in STACK_FACTS} for item in frames}
        run.kept.save("stack", path.name, mark, pack({"digest": file_digest(path), "frames": facts}))
    return mark


def remove_master_tiles(tiles: Sequence[Tile]) -> None:
    """With ``keep_master_tiles`` off, the end of the files that `master_tiles` made."""
    for tile in tiles:
        tile.path.unlink(missing_ok=True)
    for folder in {tile.path.parent for tile in tiles}:
        with suppress(OSError):  # something of the user's lies in it
            folder.rmdir()


#: What the report says of a frame in a stack.
STACK_FACTS = ("status", "reason", "weight", "gain", "noise_normalised")


def aligned(run: Run, frames: list[SolvedFrame]) -> list[SolvedFrame]:
    """The frames with their WCS refined on the stars that they share; those whose WCS lies are set aside."""
    if len(frames) < 2:
        return frames
    found = align_frames(
        [item.stars for item in frames],
        [item.wcs for item in frames],
        [item.frame.shape for item in frames],
        [None if item.frame.ra is None else (item.frame.ra, item.frame.dec) for item in frames],
    )
    kept = []
    for item, refined in zip(frames, found, strict=True):
        if refined.reason is not None:
            set_frame_aside(run, item.name, refined.reason)
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
        engine="native",
        combine_method="mean",
        feather_px=FEATHER,
        enable_tile_weighting=settings.stacking_weighting_method != "none",
        tile_weight_mode="inverse_variance" if settings.stacking_weighting_method != "none" else "uniform",
        apply_radial_weight=False,
        two_pass_coverage_renorm=False,
    )


def panel_run(run: Run) -> Run:
    """The run of one panel: its progress is no progress of the mosaic, and its warnings are its own."""
    silent = Reporter(logging.Logger("panel", logging.CRITICAL))
    return replace(
        run,
        settings=panel_settings(run.settings),
        reporter=silent,
        aside=[],
        frames={},
        hubs=HUBS,
        kept=type(run.kept)(),
    )


def stack(run: Run, number: int, frames: Sequence[SolvedFrame], path: Path, scratch: Path) -> bool:
    """Stack the frames of one panel into a master tile; False where none of them can be used."""
    sub = panel_run(run)
    tiles = [item.frame.tile(item.wcs) for item in frames]
    by_name = {item.name: item for item in frames}
    store = run.store or PixelStore(int(STORE_SHARE * run.settings.memory_budget))
    try:
        grid, placed = lay_out(sub, tiles)
        looks = {tile: known(item.survey) for tile, item in zip(tiles, frames, strict=True)}
        scene = normalise(sub, grid, placed, looks, store)
    except UsageError:  # no frame is left
        scene = None
    for item in sub.aside:
        set_frame_aside(run, item.name, item.reason)
    tell(run, number, [text for text in sub.reporter.warnings if "set aside" not in text])
    if scene is None:
        return False
    scene = weighed(run.settings, scene, by_name)
    used = [by_name[item.tile.name] for item in scene.placed]
    note_frames(run, scene)
    write_stack(sub, run.settings, scene, master_header(number, scene, used), path)
    return True


def tell(run: Run, number: int, warnings: Sequence[str]) -> None:
    """The warnings of a panel: those of one kind ("NAME: gain_undetermined: ...") are one, and the log holds all."""
    kinds: dict[str, list[str]] = {}
    for text in warnings:
        kind = next((part for part in text.split(": ") if re.fullmatch("[a-z_]+", part)), text)
        kinds.setdefault(kind, []).append(text)
    for first, *more in kinds.values():
        rest = f" (and {len(more)} more of this kind: see the log)" if more else ""
        run.reporter.warn("", f"panel {number}: {first}{rest}")
        for text in more:
            run.reporter.info("", f"panel {number}: {text}")


def known(survey: TileSurvey) -> Future:
    """A survey that was made before, as `normalise` takes it."""
    future: Future = Future()
    future.set_result(survey)
    return future


def weighed(settings: Settings, scene: Scene, frames: dict[str, SolvedFrame]) -> Scene:
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
    exposures = [item.frame.exposure for item in frames]
    header["HIERARCH MT_NFRAMES"] = sum(item.frame.n_frames for item in frames)
    header["NCOMBINE"] = (len(frames), "number of images combined")
    if all(value is not None for value in exposures):
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


def write_stack(sub: Run, settings: Settings, scene: Scene, header: fits.Header, path: Path) -> None:
    """Coadd the frames and write the master tile, block by block, as one step on one backend.

    ALPHA is the coverage in units of 1/255 of what all frames together weigh: Phase 5 weighs the tile's pixels by it.
    """
    shape, channels = scene.grid.shape, scene.channels
    options = stack_options(settings)
    full = sum(item.weight for item in scene.placed)

    def step(backend: Backend) -> None:
        limit = backend.free_bytes(settings.parallel_gpu_vram_fraction)
        budget = int(BLOCK_SHARE * settings.memory_budget)
        budget = budget if limit is None else min(limit, 4 * budget)
        with ExitStack() as stack:
            image = (channels, *shape) if channels > 1 else shape
            writer = stack.enter_context(MosaicWriter(path, header, image, "f4", alpha_shape=shape))

            def sink(block: Rect, values: np.ndarray, weights: np.ndarray) -> None:
                writer.write_block(block[0], block[2], values if channels > 1 else values[0])
                alpha = np.clip(np.rint(weights * np.float32(255.0 / full)), 1, 255).astype(np.uint8)
                alpha[weights == 0] = 0
                writer.write_alpha(block[0], block[2], alpha)

            plan = CoaddPlan(scene.placed, scene.solution, scene.grid, options, scene.store)
            coadd(plan, backend, sink, budget, sub.jobs, sub.cancelled)
            sub.check()

    sub.switch.run(step)
