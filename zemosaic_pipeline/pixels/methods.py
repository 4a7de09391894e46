"""How pixels are resampled and how their samples are combined: the ways there are, each with its one number.

A setting's word finds its member here and nowhere else: ``CombineMethod("sigma_clip")``. The members are whole numbers,
which numba compiles into the loops and kernels that compare with them.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class _Word(IntEnum):
    """Numbers that their names in small letters find too."""

    @classmethod
    def _missing_(cls, value: object) -> Self | None:
        return cls.__members__.get(value.upper()) if isinstance(value, str) else None

    @property
    def word(self) -> str:
        """The name as settings spell it."""
        return self.name.lower()


class ResamplingKernel(_Word):
    """The interpolation between the pixels of a tile."""

    BILINEAR = 0
    LANCZOS3 = 1


class CombineMethod(_Word):
    """How the samples of one pixel become one; `pixels.combine` defines each.

    The second names of a member are those of ``stacking_rejection_algorithm``: a mean of what is left after rejection.
    """

    MEAN = 0
    NONE = 0
    MEDIAN = 1
    SIGMA_CLIP = 2
    KAPPA_SIGMA = 2
    WINSORIZED = 3
    MIN = 4
    MAX = 5
    FIRST = 6
    LAST = 7
    WINSORIZED_SIGMA_CLIP = 8
    LINEAR_FIT_CLIP = 9
    #: Made of running sums alone: it has no function of a pixel.
    SUM = 10


#: These need no more than running sums; the others keep a layer a tile.
STREAMED = (CombineMethod.MEAN, CombineMethod.SUM)
#: These take one sample of each pixel, and its weight.
TAKE_ONE = (CombineMethod.MIN, CombineMethod.MAX, CombineMethod.FIRST, CombineMethod.LAST)
#: These take the weighted mean of the samples that they do not reject.
REJECTING = (CombineMethod.SIGMA_CLIP, CombineMethod.WINSORIZED_SIGMA_CLIP, CombineMethod.LINEAR_FIT_CLIP)
