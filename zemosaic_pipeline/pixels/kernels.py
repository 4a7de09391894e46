"""The pixel functions of Phase 5, written once and compiled for the CPU and for CUDA.

Every function marked ``register_jitable`` is ordinary Python that numba compiles into whatever calls it: the CPU's
loops (`pixels.cpu_loops`), the CUDA kernels of :func:`cuda_kernels`, or nothing at all (CUDA simulator). All arithmetic is
in float64 with explicit casts and without fused multiply-add, so that every compilation gives the same coordinates,
masks and weights bit for bit; only Lanczos weights go through ``sin`` and ``cos``, whose last bit may differ.

Conventions: planar arrays ``(channel, y, x)``; pixel centres at integer coordinates; NaN means "no data".
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from zemosaic_pipeline.pixels.combine import combine_pixel
from zemosaic_pipeline.pixels.methods import ResamplingKernel

#: Coordinates are rounded to this fraction of a pixel: what a mesh loses to rounding (1e-9 pixel) must not make a
#: masked neighbour contribute to a pixel that it does not touch.
COORDINATE_QUANTUM = 1.0 / 1048576.0
#: A float64 of this size (below 2^31 added to it or not) has :data:`COORDINATE_QUANTUM` as its last place.
_LAST_PLACE = 6442450944.0


@register_jitable
def cubic_weights(t):
    """Weights of the four nodes at -1, 0, 1, 2 for cubic Lagrange interpolation at ``t`` in [0, 1)."""
    a = t + 1.0
    b = t - 1.0
    c = t - 2.0
    return -(t * b * c) / 6.0, (a * b * c) / 2.0, -(a * t * c) / 2.0, (a * t * b) / 6.0


@register_jitable
def column_position(nodes, axis, row, weights, column):
    """Tile coordinate ``axis`` on mesh column ``column``, interpolated between four mesh rows around ``row``."""
    return (
        weights[0] * nodes[axis, row - 1, column]
        + weights[1] * nodes[axis, row, column]
        + weights[2] * nodes[axis, row + 1, column]
        + weights[3] * nodes[axis, row + 2, column]
    )


@register_jitable
def cell_columns(nodes, axis, row, weights, cell):
    """Tile coordinate on the four mesh columns around ``cell``, for one output row."""
    return (
        column_position(nodes, axis, row, weights, cell - 1),
        column_position(nodes, axis, row, weights, cell),
        column_position(nodes, axis, row, weights, cell + 1),
        column_position(nodes, axis, row, weights, cell + 2),
    )


@register_jitable
def interpolate(columns, weights):
    """Cubic interpolation between four values."""
    return weights[0] * columns[0] + weights[1] * columns[1] + weights[2] * columns[2] + weights[3] * columns[3]


@register_jitable
def tile_position(nodes, mesh_y, mesh_x, step, y, x):
    """Tile pixel ``(ty, tx)`` of output pixel ``(y, x)``; exact where the mesh has a node for every pixel."""
    if step == 1:
        return nodes[1, y - mesh_y, x - mesh_x], nodes[0, y - mesh_y, x - mesh_x]
    row = (y - mesh_y) // step
    cell = (x - mesh_x) // step
    wy = cubic_weights((y - mesh_y - row * step) / step)
    wx = cubic_weights((x - mesh_x - cell * step) / step)
    return (
        interpolate(cell_columns(nodes, 1, row, wy, cell), wx),
        interpolate(cell_columns(nodes, 0, row, wy, cell), wx),
    )


@register_jitable
def quantise(coordinate):
    """Round a coordinate below 2^31 to :data:`COORDINATE_QUANTUM`: adding a large number loses what is smaller."""
    return (coordinate + _LAST_PLACE) - _LAST_PLACE


@register_jitable
def on_tile(y, x, height, width):
    """Whether the position ``(y, x)`` lies on the tile, and the position rounded; (-1, -1) for one far off or not finite,
    which is never made an index."""
    near = y >= -0.6 and y <= height - 0.4 and x >= -0.6 and x <= width - 0.4
    y = quantise(y if near else -1.0)
    x = quantise(x if near else -1.0)
    return y >= -0.5 and y <= height - 0.5 and x >= -0.5 and x <= width - 0.5, y, x


@register_jitable
def lanczos_weights(f):
    """Six normalised Lanczos-3 weights for the pixels at -2..3 around fraction ``f`` in [0, 1).

    sinc(d) sinc(d/3) with d = f - k; all sines follow from one sine and one cosine of pi f / 3
    (angle addition and the triple-angle formula).
    """
    if f == 0.0:
        return 0.0, 0.0, 1.0, 0.0, 0.0, 0.0
    s = math.sin(math.pi * f / 3.0)
    c = math.cos(math.pi * f / 3.0)
    full = s * (3.0 - 4.0 * s * s)
    h = 0.8660254037844386
    # sin(pi (f - k)) = (-1)^k sin(pi f); the common sin(pi f) cancels in the normalisation except for its sign
    a = full * (0.5 * (-s) + h * c) / ((f + 2.0) * (f + 2.0))
    b = -full * (0.5 * s + h * c) / ((f + 1.0) * (f + 1.0))
    d = full * s / (f * f)
    e = -full * (0.5 * s - h * c) / ((f - 1.0) * (f - 1.0))
    g = full * (-0.5 * s - h * c) / ((f - 2.0) * (f - 2.0))
    i = -full * (-s) / ((f - 3.0) * (f - 3.0))
    total = a + b + d + e + g + i
    return a / total, b / total, d / total, e / total, g / total, i / total


@register_jitable
def coarse_value(grid, spacing, y, x):
    """Bilinear value at tile pixel ``(y, x)`` of a coarse map whose cell centres lie ``spacing`` pixels apart."""
    rows, columns = grid.shape
    v = min(max((y + 0.5) / spacing - 0.5, 0.0), rows - 1.0)
    u = min(max((x + 0.5) / spacing - 0.5, 0.0), columns - 1.0)
    j = min(int(v), rows - 1)
    i = min(int(u), columns - 1)
    jj = min(j + 1, rows - 1)
    ii = min(i + 1, columns - 1)
    fv = v - j
    fu = u - i
    top = (1.0 - fu) * np.float64(grid[j, i]) + fu * np.float64(grid[j, ii])
    bottom = (1.0 - fu) * np.float64(grid[jj, i]) + fu * np.float64(grid[jj, ii])
    return (1.0 - fv) * top + fv * bottom


@register_jitable
def bilinear_corners(height, width, y, x):
    """Rows and columns of the corners around tile pixel ``(y, x)``, none below -1, and their weights.

    Coordinates up to half a pixel outside the tile use the edge pixel.
    """
    j = np.int32(y + 1.0) - 1
    i = np.int32(x + 1.0) - 1
    fy = y - j
    fx = x - i
    j0 = max(j, 0)
    i0 = max(i, 0)
    j1 = min(j + 1, height - 1)
    i1 = min(i + 1, width - 1)
    return j0, j1, i0, i1, (1.0 - fy) * (1.0 - fx), (1.0 - fy) * fx, fy * (1.0 - fx), fy * fx


@register_jitable
def bilinear_mix(v00, v01, v10, v11, w00, w01, w10, w11):
    """Weighted sum of the four corners; NaN where one of them is."""
    return w00 * np.float64(v00) + w01 * np.float64(v01) + w10 * np.float64(v10) + w11 * np.float64(v11)


@register_jitable
def bilinear_rest(v00, v01, v10, v11, w00, w01, w10, w11):
    """Weighted sum of those corners that have a weight: one of weight 0 cannot spread its NaN."""
    value = 0.0
    if w00 != 0.0:
        value += w00 * np.float64(v00)
    if w01 != 0.0:
        value += w01 * np.float64(v01)
    if w10 != 0.0:
        value += w10 * np.float64(v10)
    if w11 != 0.0:
        value += w11 * np.float64(v11)
    return value


@register_jitable
def bilinear_value(source, channel, origin, corners):
    """Bilinear value of one plane of a (C, h, w) array, its first pixel at ``origin``."""
    j0, j1, i0, i1, w00, w01, w10, w11 = corners
    v00 = source[channel, j0 - origin[0], i0 - origin[1]]
    v01 = source[channel, j0 - origin[0], i1 - origin[1]]
    v10 = source[channel, j1 - origin[0], i0 - origin[1]]
    v11 = source[channel, j1 - origin[0], i1 - origin[1]]
    value = bilinear_mix(v00, v01, v10, v11, w00, w01, w10, w11)
    if value != value:
        value = bilinear_rest(v00, v01, v10, v11, w00, w01, w10, w11)
    return value


@register_jitable
def lanczos_reaches(shape, j, i):
    """Whether the tile holds the 6 x 6 pixels around ``(j, i)``."""
    return j >= 2 and i >= 2 and j + 3 < shape[0] and i + 3 < shape[1]


@register_jitable
def lanczos_line(w, a, b, c, d, e, f):
    """Weighted sum of six neighbours; NaN where one that has a weight is missing."""
    line = 0.0
    line += w[0] * np.float64(a) if w[0] != 0.0 else 0.0
    line += w[1] * np.float64(b) if w[1] != 0.0 else 0.0
    line += w[2] * np.float64(c) if w[2] != 0.0 else 0.0
    line += w[3] * np.float64(d) if w[3] != 0.0 else 0.0
    line += w[4] * np.float64(e) if w[4] != 0.0 else 0.0
    line += w[5] * np.float64(f) if w[5] != 0.0 else 0.0
    return line


@register_jitable
def lanczos_value(source, channel, j, i, wy, wx):
    """Lanczos-3 value of one plane of a (C, h, w) array around pixel ``(j, i)``; NaN where a pixel of the 6 x 6 support
    is missing."""
    value = 0.0
    for b in range(6):
        if wy[b] != 0.0:
            y = j + b - 2
            value += wy[b] * lanczos_line(
                wx, source[channel, y, i - 2], source[channel, y, i - 1], source[channel, y, i],
                source[channel, y, i + 1], source[channel, y, i + 2], source[channel, y, i + 3],
            )  # fmt: skip
    return value


@register_jitable
def map_weight(alpha, origin, weight_map, spacing, y, x, corners):
    """Weight of tile pixel ``(y, x)`` after the tile's alpha plane and its coarse weight map, where it has them."""
    weight = 1.0
    if weight_map.size > 1:
        weight = coarse_value(weight_map, spacing, y, x)
    if alpha.size > 1:
        weight = weight * bilinear_value(alpha, 0, origin, corners)
    return weight


@register_jitable
def edge_weight(feather, height, width, y, x):
    """Ramp from 0 at the tile's edge to 1 at ``feather`` pixels from it; 1 everywhere for a feather of 0."""
    if feather > 0.0:
        edge = min(min(x + 0.5, width - 0.5 - x), min(y + 0.5, height - 0.5 - y))
        return min(edge / feather, 1.0)
    return 1.0


@register_jitable
def lanczos_or_nan(source, channel, origin, shape, y, x):
    """Lanczos-3 value at tile pixel ``(y, x)``; NaN where the tile's edge or a missing pixel cuts its support."""
    j = int(math.floor(y))
    i = int(math.floor(x))
    if not lanczos_reaches(shape, j, i):
        return np.nan
    return lanczos_value(source, channel, j - origin[0], i - origin[1], lanczos_weights(y - j), lanczos_weights(x - i))


@register_jitable
def resample_pixel(
    source, origin, shape, kernel, alpha, weight_map, spacing, feather, scale, mesh, block, y, x, values, weights, add
):  # fmt: skip
    """Resample one tile into the output pixel ``(y, x)`` of a block.

    Parameters
    ----------
    source : float32 (C, h, w)
        The part of the tile in memory, its first pixel at ``origin`` = (y, x); NaN in all channels is "no data".
    shape : (int, int)
        (H, W) of the whole tile.
    kernel : int
        A :class:`ResamplingKernel`; Lanczos-3 gives way to bilinear where its support is cut.
    alpha : float32 (1, h, w), or of size 1 for none
    weight_map : float32, or of size 1 for none
        Coarse weights, cell centres ``spacing`` pixels apart.
    feather, scale : float
        Width of the ramp at the tile's edge (pixels); factor on all weights.
    mesh : (nodes, y, x, step)
        See `resample.mesh.CoordinateMesh`.
    values, weights : float32 (C, H', W'), (H', W')
        The block, its first pixel at ``block`` = (y, x): sums of weight times value and of weights (``add``), or a
        layer of values and weights. A pixel without data is left untouched.
    """
    nodes, mesh_y, mesh_x, step = mesh
    height, width = shape
    ty, tx = tile_position(nodes, mesh_y, mesh_x, step, y, x)
    inside, ty, tx = on_tile(ty, tx, height, width)
    if not inside:
        return
    corners = bilinear_corners(height, width, ty, tx)
    weight = scale * edge_weight(feather, height, width, ty, tx)
    if alpha.size > 1 or weight_map.size > 1:
        weight = weight * map_weight(alpha, origin, weight_map, spacing, ty, tx, corners)
    first = bilinear_value(source, 0, origin, corners)
    if not (weight > 0.0 and first == first):
        return
    j = y - block[0]
    i = x - block[1]
    for channel in range(source.shape[0]):
        value = bilinear_value(source, channel, origin, corners)
        if kernel == ResamplingKernel.LANCZOS3:
            sharp = lanczos_or_nan(source, channel, origin, shape, ty, tx)
            if sharp == sharp:
                value = sharp
        if add:
            value = np.float64(values[channel, j, i]) + weight * value
        values[channel, j, i] = np.float32(value)
    if add:
        weight = np.float64(weights[j, i]) + weight
    weights[j, i] = np.float32(weight)


@register_jitable
def spline_weights(d):
    """Weights of the pixels at -1, 0, 1 for an offset ``d`` in [-0.5, 0.5]: the quadratic B-spline.

    Unlike bilinear weights they broaden a star by the same amount (variance 1/4) whatever its sub-pixel phase, so that
    tiles of different phase have stars of the same shape.
    """
    return 0.5 * (0.5 - d) * (0.5 - d), 0.75 - d * d, 0.5 * (0.5 + d) * (0.5 + d)


@register_jitable
def weighted_three(w, a, b, c):
    """Weighted sum of three values; NaN where one of them is."""
    return w[0] * np.float64(a) + w[1] * np.float64(b) + w[2] * np.float64(c)


@register_jitable
def spline_pixel(y, x, height, width):
    """The pixel nearest to ``(y, x)`` on the tile, and whether the tile holds the 3 x 3 pixels around it."""
    j = np.int32(y + 1.5) - 1
    i = np.int32(x + 1.5) - 1
    return j, i, j >= 1 and i >= 1 and j + 1 < height and i + 1 < width


@register_jitable
def spline_value(source, channel, j, i, wy, wx):
    """Weighted mean of the 3 x 3 pixels around ``(j, i)`` of one plane; NaN where one of them is missing."""
    above = weighted_three(wx, source[channel, j - 1, i - 1], source[channel, j - 1, i], source[channel, j - 1, i + 1])
    middle = weighted_three(wx, source[channel, j, i - 1], source[channel, j, i], source[channel, j, i + 1])
    below = weighted_three(wx, source[channel, j + 1, i - 1], source[channel, j + 1, i], source[channel, j + 1, i + 1])
    return weighted_three(wy, above, middle, below)


@register_jitable
def measure_cell(source, origin, shape, mesh, cell_px, every, corner, j, i, sums, counts):
    """Add the valid quadratic-spline samples of a coarse cell to ``sums`` and their number to ``counts``.

    Parameters
    ----------
    source, origin, shape, mesh
        As for :func:`resample_pixel`.
    cell_px : int
        Side of a cell in output pixels.
    every : int
        Only every so many pixels of a cell, along each axis, are sampled; it divides ``cell_px``.
    corner : (int, int)
        Row and column on the coarse grid of ``sums[:, 0, 0]``.
    j, i : int
        The cell, counted from ``corner``.
    sums, counts : float64 (C, h, w), int32 (h, w)
    """
    nodes, mesh_y, mesh_x, step = mesh
    height, width = shape
    y0 = (corner[0] + j) * cell_px
    x0 = (corner[1] + i) * cell_px
    for y in range(y0, y0 + cell_px, every):
        for x in range(x0, x0 + cell_px, every):
            ty, tx = tile_position(nodes, mesh_y, mesh_x, step, y, x)
            inside, ty, tx = on_tile(ty, tx, height, width)
            py, px, whole = spline_pixel(ty, tx, height, width)
            if not (inside and whole):
                continue
            wy = spline_weights(ty - py)
            wx = spline_weights(tx - px)
            first = spline_value(source, 0, py - origin[0], px - origin[1], wy, wx)
            if not first == first:
                continue
            counts[j, i] += 1
            for channel in range(source.shape[0]):
                sums[channel, j, i] += spline_value(source, channel, py - origin[0], px - origin[1], wy, wx)


def cuda_kernels(cuda):
    """The same loops as CUDA kernels, one thread a pixel (or coarse cell).

    Parameters
    ----------
    cuda : module
        ``numba.cuda``, real or its simulator.

    Returns
    -------
    dict
        Kernels by name: ``resample``, ``measure``, ``combine``; arguments as those of the CPU loops.
    """

    @cuda.jit(fastmath=False)
    def resample(
        source, origin, shape, kernel, alpha, weight_map, spacing, feather, scale, nodes, mesh_y, mesh_x, step,
        block, rect, values, weights, add,
    ):  # fmt: skip
        i, j = cuda.grid(2)
        y = rect[0] + j
        x = rect[2] + i
        if y < rect[1] and x < rect[3]:
            resample_pixel(
                source, origin, shape, kernel, alpha, weight_map, spacing, feather, scale,
                (nodes, mesh_y, mesh_x, step), block, y, x, values, weights, add,
            )  # fmt: skip

    @cuda.jit(fastmath=False)
    def measure(source, origin, shape, nodes, mesh_y, mesh_x, step, cell_px, every, corner, wanted, sums, counts):
        i, j = cuda.grid(2)
        if j < wanted.shape[0] and i < wanted.shape[1] and wanted[j, i]:
            mesh = (nodes, mesh_y, mesh_x, step)
            measure_cell(source, origin, shape, mesh, cell_px, every, corner, j, i, sums, counts)

    @cuda.jit(fastmath=False)
    def combine(values, weights, method, kappa_low, kappa_high, trim_low, trim_high, out):
        i, j = cuda.grid(2)
        if j < out.shape[1] and i < out.shape[2]:
            combine_pixel(values, weights, j, i, method, kappa_low, kappa_high, trim_low, trim_high, out)

    return {"resample": resample, "measure": measure, "combine": combine}
