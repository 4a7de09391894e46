"""How pixels are resampled and combined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from zemosaic_pipeline.pixels.backend_base import CombineLimits
from zemosaic_pipeline.pixels.methods import STREAMED, CombineMethod, ResamplingKernel


@dataclass(frozen=True)
class CoaddOptions:
    """How pixels are resampled and combined; names and meanings as in `settings.settings`."""

    kernel: ResamplingKernel = ResamplingKernel.BILINEAR
    combine: CombineMethod = CombineMethod.MEAN
    kappa_low: float = 3.0
    kappa_high: float = 3.0
    winsor_limits: tuple[float, float] = (0.05, 0.05)

    @property
    def streamed(self) -> bool:
        """Whether running sums will do; else every tile that touches a block is a layer of its own."""
        return self.combine in STREAMED

    @property
    def limits(self) -> CombineLimits:
        """What the combining functions of `pixels.combine` take: two limits in sigma, two fractions.

        For ``winsorized_sigma_clip`` the limits are in units of the narrowed spread of winsorized samples.
        """
        low, high = self.winsor_limits
        narrowed = winsorized_spread(low, high) if self.combine is CombineMethod.WINSORIZED_SIGMA_CLIP else 1.0
        return self.kappa_low / narrowed, self.kappa_high / narrowed, float(low), float(high)


def winsorized_spread(low: float, high: float) -> float:
    """Standard deviation about the median of a unit Gaussian whose fractions ``low`` and ``high`` are drawn in to their
    quantiles; from the integral of z^2 over the normal density."""
    variance = 1.0
    for fraction in (low, high):
        if fraction > 0:
            from scipy.special import ndtri

            z = -ndtri(fraction)
            density = np.exp(-0.5 * z * z) / np.sqrt(2 * np.pi)
            # beyond z lie the second moment z * density + fraction, and after drawing in z^2 * fraction
            variance += z * z * fraction - (z * density + fraction)
    return float(np.sqrt(variance))
