"""What a resume uses of raw frames: stars, surveys and plate solutions, as bytes that are exact to the bit."""

from __future__ import annotations

import numpy as np
from astropy.io import fits

from zemosaic_pipeline.files import pack, unpack
from zemosaic_pipeline.platesolve.base import Solution
from zemosaic_pipeline.resample.survey import TileSurvey
from zemosaic_pipeline.resume.checkpoints import Codec
from zemosaic_pipeline.resume.pieces import packed_survey, unpacked_survey
from zemosaic_pipeline.stars.detection import Stars


def packed_frame(found: tuple[Stars, TileSurvey]) -> bytes:
    stars, facts = found
    pieces = {"stars": pack(vars(stars)), "survey": packed_survey(facts)}
    return pack({name: np.frombuffer(data, np.uint8) for name, data in pieces.items()})


def unpacked_frame(data: bytes) -> tuple[Stars, TileSurvey]:
    found = unpack(data)
    return Stars(**unpack(found["stars"].tobytes())), unpacked_survey(found["survey"].tobytes())


FRAME = Codec(packed_frame, unpacked_frame)


def packed_plate_solution(solution: Solution) -> bytes:
    return pack({"header": solution.header.tostring(), "solver": solution.solver})


def unpacked_plate_solution(data: bytes) -> Solution:
    found = unpack(data)
    return Solution(fits.Header.fromstring(found["header"]), found["solver"], 0.0)


PLATE_SOLUTION = Codec(packed_plate_solution, unpacked_plate_solution)
