"""What a resume uses of Phase 5: surveys of the tiles, the photometric solution, finished blocks of the mosaics.

Each is bit for bit what the run would compute. A block is used only where what stands on disk tells that much: its
values are those of the file, and NaN where its weight is 0. That does not hold for rounded values
(``save_final_as_uint16``), nor for a block with an infinite value, and the engine "reproject" makes no blocks: there the
mosaic is made afresh.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
from astropy.io import fits

from zemosaic_photometry import PhotometricSolution
from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.files import pack, unpack
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.overlaps.pairs import PairRelation
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.resample.output_grid import OutputGrid, grid_header
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile
from zemosaic_pipeline.resample.survey import TileSurvey, survey_tile
from zemosaic_pipeline.resume.checkpoints import Checkpoints
from zemosaic_pipeline.resume.fingerprint import fingerprint
from zemosaic_pipeline.settings.settings import Settings

# -------------------------------------------------------------------------------------------------------- surveys


def survey(kept: Checkpoints, settings: Settings, tile: Tile, store: PixelStore) -> TileSurvey:
    """The survey of a tile: that of the stopped run where it is valid."""
    if not kept.enabled:
        return survey_tile(tile, store)
    mark = fingerprint("survey", settings, kept.token(tile.path), tile.shape, tile.channels)
    found = kept.load("survey", tile.name, mark)
    if found is not None:
        return unpacked_survey(found)
    facts = survey_tile(tile, store)
    kept.save("survey", tile.name, mark, packed_survey(facts))
    return facts


def packed_survey(facts: TileSurvey) -> bytes:
    return pack(
        {
            "valid": np.packbits(facts.valid, axis=None),
            "shape": facts.valid.shape,
            "noise": facts.noise,
            "pixels": int(facts.pixels),
            "spread": float(facts.spread),
        }
    )


def unpacked_survey(data: bytes) -> TileSurvey:
    found = unpack(data)
    shape = tuple(found["shape"])
    valid = np.unpackbits(found["valid"], count=shape[0] * shape[1]).reshape(shape).astype(bool)
    return TileSurvey(valid, found["noise"], found["pixels"], found["spread"])


# ------------------------------------------------------------------------------------------------------- solution


def photometry_mark(
    kept: Checkpoints, settings: Settings, grid: OutputGrid, placed: Sequence[PlacedTile], cell: int, backend: Backend
) -> str:
    """Fingerprint of the photometric solution."""
    tiles = [(item.tile.name, kept.token(item.tile.path), item.tile.shape) for item in placed]
    return fingerprint("photometry", settings, backend_name(backend), cell, *exact_grid(grid), tiles)


def backend_name(backend: Backend) -> str:
    """What computes the pixels: their last bits may depend on it."""
    return f"{backend.name} {getattr(backend, 'description', '')}"


def exact_grid(grid: OutputGrid) -> list[Any]:
    """The output grid for a fingerprint; a header alone rounds its numbers."""
    wcs = grid.wcs
    exact = [wcs.wcs.crval, wcs.wcs.crpix, wcs.pixel_scale_matrix]
    if wcs.sip is not None:
        exact += [wcs.sip.crpix, wcs.sip.a, wcs.sip.b]
    return [grid_header(grid).tostring(), grid.shape, *exact]


def packed_solution(solution: PhotometricSolution) -> bytes:
    own = {f.name: getattr(solution, f.name) for f in fields(solution)}
    pairs = own.pop("pairs")
    for field in fields(PairRelation):
        own[f"pair {field.name}"] = np.array([getattr(pair, field.name) for pair in pairs])
    return pack({**own, "warnings": list(solution.warnings)})


def unpacked_solution(data: bytes) -> PhotometricSolution:
    found = unpack(data)
    columns = {f.name: found.pop(f"pair {f.name}") for f in fields(PairRelation)}
    whole = ("i", "j", "samples")
    pairs = [
        PairRelation(**{name: int(column[n]) if name in whole else column[n] for name, column in columns.items()})
        for n in range(len(columns["i"]))
    ]
    found["warnings"] = tuple(found["warnings"])
    return PhotometricSolution(**found, pairs=tuple(pairs))


# --------------------------------------------------------------------------------------------------------- blocks


class BlockJournal:
    """The finished blocks of one mosaic, whose files wait among the checkpoints until it is complete.

    Parameters
    ----------
    kept : Checkpoints
    product : str
        ``science`` or ``aesthetic``: the step.
    mark : str
        Fingerprint of all that the blocks' bits depend on.

    Attributes
    ----------
    left : dict
        Blocks of an earlier run, (y0, y1, x0, x1) -> checksums of what was written.
    """

    def __init__(self, kept: Checkpoints, product: str, mark: str) -> None:
        self._kept, self.product, self._mark = kept, product, mark
        self._files = (product, "coverage", "aesthetic") if product == "science" else (product,)
        self.left = {tuple(map(int, key.split())): value for key, value in kept.notes(product, mark).items()}

    def part(self, name: str) -> Path | None:
        """Where the file ``name`` of this mosaic is made."""
        return self._kept.part(name)

    def start_afresh(self) -> None:
        """What was known of the blocks is void, and so is what was made of them."""
        self.left = {}
        for name in self._files:
            self._kept.forget(name)

    def remove_files(self) -> None:
        """Make room for new files."""
        for name in self._files:
            self._kept.remove_part(name)

    def add(self, block: Rect, checksums: list[int]) -> None:
        """A block was written, and the files tell the whole of it."""
        self._kept.note(self.product, " ".join(map(str, block)), self._mark, checksums)

    def use(self, blocks: int) -> None:
        self._kept.used[self.product] += blocks

    def damaged(self, block: Rect) -> None:
        y0, y1, x0, x1 = block
        self._kept.damaged(f"the {self.product} mosaic", f"rows {y0} to {y1}, columns {x0} to {x1}")


def block_journal(
    kept: Checkpoints,
    settings: Settings,
    product: str,
    grid: OutputGrid,
    placed: Sequence[PlacedTile],
    solution: PhotometricSolution,
    header: fits.Header,
    adjustment: Sequence[Any] | None,
    backend: Backend,
) -> BlockJournal | None:
    """The journal of a mosaic; None where its blocks cannot be used again."""
    if not kept.enabled or settings.save_final_as_uint16 or settings.engine != "native":
        return None
    tiles = [(kept.token(item.tile.path), item.tile.shape, item.weight, item.feather) for item in placed]
    photometry = [solution.gain, solution.pivot, solution.level]
    mark = fingerprint(
        product, settings, backend_name(backend), *exact_grid(grid), header.tostring(), tiles, photometry, adjustment
    )
    return BlockJournal(kept, product, mark)
