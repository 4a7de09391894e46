"""Frames with their stars, and with their place on the sky."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from astropy.wcs import WCS

from zemosaic_pipeline.raw.frame import Frame
from zemosaic_pipeline.resample.survey import TileSurvey
from zemosaic_pipeline.sky import icrs_centre
from zemosaic_pipeline.stars.detection import Stars


@dataclass(frozen=True, eq=False)
class MeasuredFrame:
    """A frame, its stars, and what its pixels are like: all that one look at the pixels tells.

    ``fingerprint`` is the fingerprint of the calibrated and debayered pixels.
    """

    frame: Frame
    stars: Stars
    survey: TileSurvey
    fingerprint: str


@dataclass(frozen=True, eq=False)
class PointedFrame:
    """A frame and where on the sky it lies, or is said to lie."""

    frame: Frame
    wcs: WCS

    @property
    def name(self) -> str:
        return self.frame.name

    @cached_property
    def centre(self) -> tuple[float, float]:
        """Right ascension and declination of the frame's middle in degrees, ICRS."""
        return icrs_centre(self.wcs, self.frame.shape)

    @property
    def orientation(self) -> float:
        """Position angle of the frame's rows in degrees, counted as the WCS matrix has it."""
        matrix = self.wcs.pixel_scale_matrix
        return float(np.degrees(np.arctan2(matrix[1, 0], matrix[1, 1])) % 360)


@dataclass(frozen=True, eq=False)
class SolvedFrame(PointedFrame):
    """A measured frame with its place on the sky; ``solver`` says where the WCS comes from."""

    measured: MeasuredFrame
    solver: str

    @classmethod
    def of(cls, measured: MeasuredFrame, wcs: WCS, solver: str) -> SolvedFrame:
        return cls(measured.frame, wcs, measured, solver)

    @property
    def stars(self) -> Stars:
        return self.measured.stars


def field_of(frame: Frame) -> float:
    """Shorter side of a frame in degrees; half a degree where nobody knows its scale."""
    return 0.5 if frame.scale is None else min(frame.shape) * frame.scale / 3600
