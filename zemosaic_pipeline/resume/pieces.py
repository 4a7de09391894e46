"""What a resume uses of tiles: surveys and the photometric solution, as bytes that are exact to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, fields
from typing import Any

import numpy as np
from astropy.wcs import WCS

from zemosaic_photometry import PhotometricSolution
from zemosaic_pipeline.errors import Notice
from zemosaic_pipeline.files import pack, unpack
from zemosaic_pipeline.fits.tile import Tile
from zemosaic_pipeline.overlaps.pairs import PairRelation
from zemosaic_pipeline.pixels.backend_base import Backend
from zemosaic_pipeline.resample.output_grid import OutputGrid, grid_header
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resample.placed import PlacedTile
from zemosaic_pipeline.resample.survey import TileSurvey, survey_tile
from zemosaic_pipeline.resume.checkpoints import Codec, NothingKept

# -------------------------------------------------------------------------------------------------------- surveys


def survey(kept: NothingKept, tile: Tile, pixels: PixelStore) -> TileSurvey:
    """The survey of a tile: that of the stopped run where it is valid."""
    fingerprint = kept.fingerprint("survey", kept.token(tile.path), tile.shape, tile.channels)
    return kept.cached("survey", tile.name, fingerprint, lambda: survey_tile(tile, pixels), SURVEY)


def packed_survey(facts: TileSurvey) -> bytes:
    return pack(
        {
            "valid": np.packbits(facts.valid, axis=None),
            "shape": facts.valid.shape,
            "noise": facts.noise,
            "pixels": int(facts.pixels),
            "spread": float(facts.spread),
            "saturated": np.packbits(facts.saturated, axis=None),
        }
    )


def unpacked_survey(data: bytes) -> TileSurvey:
    found = unpack(data)
    shape = tuple(found["shape"])
    valid, saturated = (
        np.unpackbits(found[name], count=shape[0] * shape[1]).reshape(shape).astype(bool)
        for name in ("valid", "saturated")
    )
    return TileSurvey(valid, found["noise"], found["pixels"], found["spread"], saturated)


SURVEY = Codec(packed_survey, unpacked_survey)


# -------------------------------------------------------------------------------------------- photometric solution


def photometry_fingerprint(
    kept: NothingKept, grid: OutputGrid, placed: Sequence[PlacedTile], cell: int, backend: Backend
) -> str:
    """Fingerprint of the photometric solution."""
    tiles = [(item.tile.name, kept.token(item.tile.path), item.tile.shape) for item in placed]
    return kept.fingerprint("photometry", backend_name(backend), cell, *exact_grid(grid), tiles)


def backend_name(backend: Backend) -> str:
    """What computes the pixels: their last bits may depend on it."""
    return f"{backend.name} {backend.description}"


def exact_grid(grid: OutputGrid) -> list[Any]:
    """The output grid for a fingerprint."""
    return [grid_header(grid).tostring(), grid.shape, *exact_numbers(grid.wcs)]


def exact_wcs(wcs: WCS) -> list[Any]:
    """A WCS for a fingerprint."""
    return [wcs.to_header_string(relax=True), *exact_numbers(wcs)]


def exact_numbers(wcs: WCS) -> list[np.ndarray]:
    """The numbers of a WCS that its header rounds."""
    exact = [wcs.wcs.crval, wcs.wcs.crpix, wcs.pixel_scale_matrix]
    if wcs.sip is not None:
        exact += [part for part in (wcs.sip.crpix, wcs.sip.a, wcs.sip.b) if part is not None]
    return exact


def packed_solution(solution: PhotometricSolution) -> bytes:
    own = {f.name: getattr(solution, f.name) for f in fields(solution)}
    pairs = own.pop("pairs")
    for field in fields(PairRelation):
        own[f"pair {field.name}"] = np.array([getattr(pair, field.name) for pair in pairs])
    return pack({**own, "warnings": [astuple(warning) for warning in solution.warnings]})


def unpacked_solution(data: bytes) -> PhotometricSolution:
    found = unpack(data)
    columns = {f.name: found.pop(f"pair {f.name}") for f in fields(PairRelation)}
    columns |= {name: columns[name].tolist() for name in ("i", "j", "samples")}  # whole numbers
    pairs = [PairRelation(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]
    found["warnings"] = tuple(Notice(*words) for words in found["warnings"])
    return PhotometricSolution(**found, pairs=tuple(pairs))


SOLUTION = Codec(packed_solution, unpacked_solution)
