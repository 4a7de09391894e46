"""What an instrument adds to the sky and takes from it: gradients over a tile, and vignetting that a flat has left.

Positions on a tile are u and v, from the tile's middle, in units of its longer half side: u is -1..1 along it.
"""

from __future__ import annotations

import numpy as np

#: Terms of a gradient, in this order: u, v, u^2, uv, v^2, the squares less their means over the tile.
TERMS = 5


def tile_positions(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Positions u (1, W) and v (H, 1) of the pixels of a tile."""
    half = (max(shape) - 1) / 2
    v, u = ((np.arange(n) - (n - 1) / 2) / half for n in shape)
    return u[None, :], v[:, None]


def term_ranges(shape: tuple[int, int]) -> np.ndarray:
    """Range over a tile of each term of a gradient, float64 (5,)."""
    height, width = (n / max(shape) for n in shape)
    return np.array([2 * width, 2 * height, width**2, 2 * width * height, height**2])


def gradient_image(coefficients: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """A gradient over a tile, float64 (C, H, W), of zero mean, from the coefficients (C, 5) of its terms."""
    u, v = tile_positions(shape)
    terms = (u, v, u**2 - np.mean(u**2), u * v, v**2 - np.mean(v**2))
    out = np.zeros((len(coefficients), *shape))
    for k, term in enumerate(terms):
        out += coefficients[:, k, None, None] * term
    return out


def random_gradient(
    shape: tuple[int, int], channels: int, rng: np.random.Generator, plane: float, curvature: float, common: float
) -> np.ndarray:
    """Coefficients (C, 5) of a gradient, independent from channel to channel but for the common curvature.

    Parameters
    ----------
    plane : float
        Standard deviation of the range over the tile of a plane that rises in a random direction.
    curvature : float
        Standard deviation of the range over the tile of each of the terms u^2, uv and v^2.
    common : float
        Range over the tile of a bowl ``u^2 + v^2``: no random number, the same for all tiles of a camera.

    Notes
    -----
    As many random numbers are drawn whatever the sizes.
    """
    ranges = term_ranges(shape)
    angle = rng.uniform(0, 2 * np.pi, channels)
    slopes = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    slopes *= plane * (rng.normal(size=channels) / (np.abs(slopes) @ ranges[:2]))[:, None]
    curves = curvature * rng.normal(size=(channels, 3)) / ranges[2:]
    curves[:, [0, 2]] += common / (ranges[2] + ranges[4])
    return np.concatenate([slopes, curves], axis=1)


def vignetting_image(shape: tuple[int, int], fraction: float) -> np.ndarray:
    """What part of the light reaches each pixel, float64 (H, W): 1 in the middle, ``1 - fraction`` in the corner."""
    u, v = tile_positions(shape)
    radius2 = u**2 + v**2
    return 1 - fraction * radius2 / radius2.max()
