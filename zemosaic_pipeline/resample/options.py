"""How pixels are resampled and combined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KERNELS = ("bilinear", "lanczos3")
COMBINE = (
    "mean", "sum", "median", "sigma_clip", "winsorized", "winsorized_clip", "linear_fit_clip", "min", "max", "first", "last",
)  # fmt: skip
#: Ways to combine that need no more than running sums; the others keep a layer a tile.
STREAMED = ("mean", "sum")


@dataclass(frozen=True)
class CoaddOptions:
    """How pixels are resampled and combined; names and meanings as in `settings.settings`."""

    kernel: str = "bilinear"
    combine: str = "mean"
    kappa_low: float = 3.0
    kappa_high: float = 3.0
    winsor_limits: tuple[float, float] = (0.05, 0.05)

    @property
    def method(self) -> int:
        """Number of the resampling kernel in `pixels.kernels`."""
        return KERNELS.index(self.kernel)

    @property
    def limits(self) -> tuple[float, float, float, float]:
        """What the combining functions of `pixels.combine` take: two limits in sigma, two fractions.

        For ``winsorized_clip`` the limits are in units of the narrowed spread of winsorized samples.
        """
        narrowed = winsorized_spread(*self.winsor_limits) if self.combine == "winsorized_clip" else 1.0
        return (self.kappa_low / narrowed, self.kappa_high / narrowed, *map(float, self.winsor_limits))


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
