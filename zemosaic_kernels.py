"""The pixel functions of Phase 5, written once and compiled for the CPU and for CUDA.

Every function marked ``register_jitable`` is ordinary Python that numba compiles into whatever calls it: the CPU
loops in this module, the CUDA kernels of :func:`cuda_kernels`, or nothing at all (CUDA simulator). All arithmetic is
in float64 with explicit casts and without fused multiply-add, so that every compilation gives the same coordinates,
masks and weights bit for bit; only Lanczos weights go through ``sin`` and ``cos``, whose last bit may differ.

Conventions: planar arrays ``(channel, y, x)``; pixel centres at integer coordinates; NaN means "no data".
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numba.extending import register_jitable

from zemosaic_combine import combine_pixel

BILINEAR = 0
LANCZOS3 = 1

#: Coordinates are rounded to this fraction of a pixel: what a mesh loses to rounding (1e-9 pixel) must not make a
#: masked neighbour contribute to a pixel that it does not touch.
COORDINATE_QUANTUM = 1.0 / 1048576.0


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
    """Round a finite coordinate to :data:`COORDINATE_QUANTUM`."""
    return math.floor(coordinate * 1048576.0 + 0.5) * COORDINATE_QUANTUM


@register_jitable
def on_tile(y, x, height, width):
    """Whether the position ``(y, x)`` lies on the tile, and the position rounded.

    A coordinate that is not finite fails the first comparison and is never made an index.
    """
    if not (y >= -0.6 and y <= height - 0.4 and x >= -0.6 and x <= width - 0.4):
        return False, y, x
    y = quantise(y)
    x = quantise(x)
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
def bilinear_corners(height, width, origin, y, x):
    """Corner indices, counted from ``origin``, and weights of tile pixel ``(y, x)``.

    Coordinates up to half a pixel outside the tile use the edge pixel.
    """
    j = int(math.floor(y))
    i = int(math.floor(x))
    fy = y - j
    fx = x - i
    j0 = max(j, 0) - origin[0]
    i0 = max(i, 0) - origin[1]
    j1 = min(j + 1, height - 1) - origin[0]
    i1 = min(i + 1, width - 1) - origin[1]
    return j0, j1, i0, i1, (1.0 - fy) * (1.0 - fx), (1.0 - fy) * fx, fy * (1.0 - fx), fy * fx


@register_jitable
def bilinear_value(source, channel, corners):
    """Bilinear value of one plane of a (C, h, w) array; a corner of weight 0 cannot spread its NaN."""
    j0, j1, i0, i1, w00, w01, w10, w11 = corners
    v00 = np.float64(source[channel, j0, i0])
    v01 = np.float64(source[channel, j0, i1])
    v10 = np.float64(source[channel, j1, i0])
    v11 = np.float64(source[channel, j1, i1])
    value = w00 * v00 + w01 * v01 + w10 * v10 + w11 * v11
    if value != value:
        value = 0.0
        if w00 != 0.0:
            value += w00 * v00
        if w01 != 0.0:
            value += w01 * v01
        if w10 != 0.0:
            value += w10 * v10
        if w11 != 0.0:
            value += w11 * v11
    return value


@register_jitable
def lanczos_value(source, channel, j, i, wy, wx):
    """Lanczos-3 value of one plane of a (C, h, w) array around pixel ``(j, i)``; NaN where a pixel of the 6 x 6 support is missing."""
    value = 0.0
    for b in range(6):
        if wy[b] != 0.0:
            line = 0.0
            for a in range(6):
                if wx[a] != 0.0:
                    line += wx[a] * np.float64(source[channel, j + b - 2, i + a - 2])
            value += wy[b] * line
    return value


@register_jitable
def map_weight(alpha, weight_map, spacing, y, x, corners):
    """Weight of tile pixel ``(y, x)`` after the tile's alpha plane and its coarse weight map, where it has them."""
    weight = 1.0
    if weight_map.size > 1:
        weight = coarse_value(weight_map, spacing, y, x)
    if alpha.size > 1:
        weight = weight * bilinear_value(alpha, 0, corners)
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
    if j < 2 or i < 2 or j + 3 >= shape[0] or i + 3 >= shape[1]:
        return np.nan
    return lanczos_value(source, channel, j - origin[0], i - origin[1], lanczos_weights(y - j), lanczos_weights(x - i))


@register_jitable
def resample_rect(
    source, origin, shape, method, alpha, weight_map, spacing, feather, scale, mesh, block, rect, values, weights, add
):  # fmt: skip
    """Resample one tile into the output rectangle ``rect`` = (y0, y1, x0, x1) of a block.

    One function from the coordinates to the sums, and no call with arrays for each pixel: numba would count
    references there, which costs more than the pixel.

    Parameters
    ----------
    source : float32 (C, h, w)
        The part of the tile in memory, its first pixel at ``origin`` = (y, x); NaN in all channels is "no data".
    shape : (int, int)
        (H, W) of the whole tile.
    method : int
        :data:`BILINEAR` or :data:`LANCZOS3`; Lanczos-3 gives way to bilinear where its support is cut.
    alpha : float32 (1, h, w), or of size 1 for none
    weight_map : float32, or of size 1 for none
        Coarse weights, cell centres ``spacing`` pixels apart.
    feather, scale : float
        Width of the ramp at the tile's edge (pixels); factor on all weights.
    mesh : (nodes, y, x, step)
        See `zemosaic_grid.CoordinateMesh`.
    values, weights : float32 (C, H', W'), (H', W')
        The block, its first pixel at ``block`` = (y, x): sums of weight times value and of weights (``add``), or a
        layer of values and weights. A pixel without data is left untouched.
    """
    nodes, mesh_y, mesh_x, step = mesh
    height, width = shape
    mapped = alpha.size > 1 or weight_map.size > 1
    for y in range(rect[0], rect[1]):
        row = (y - mesh_y) // step
        wy = cubic_weights((y - mesh_y - row * step) / step)
        j = y - block[0]
        for cell in range((rect[2] - mesh_x) // step, (rect[3] - 1 - mesh_x) // step + 1):
            # all pixels of one mesh cell on this row share the four column positions
            if step > 1:
                columns_y = cell_columns(nodes, 1, row, wy, cell)
                columns_x = cell_columns(nodes, 0, row, wy, cell)
            start = mesh_x + cell * step
            for x in range(max(rect[2], start), min(rect[3], start + step)):
                if step > 1:
                    wx = cubic_weights((x - start) / step)
                    ty = interpolate(columns_y, wx)
                    tx = interpolate(columns_x, wx)
                else:
                    ty = nodes[1, row, cell]
                    tx = nodes[0, row, cell]
                seen, ty, tx = on_tile(ty, tx, height, width)
                if not seen:
                    continue
                corners = bilinear_corners(height, width, origin, ty, tx)
                weight = scale * edge_weight(feather, height, width, ty, tx)
                if mapped:
                    weight = weight * map_weight(alpha, weight_map, spacing, ty, tx, corners)
                first = bilinear_value(source, 0, corners)
                if not (weight > 0.0 and first == first):
                    continue
                i = x - block[1]
                for channel in range(source.shape[0]):
                    value = bilinear_value(source, channel, corners)
                    if method == LANCZOS3:
                        sharp = lanczos_or_nan(source, channel, origin, shape, ty, tx)
                        if sharp == sharp:
                            value = sharp
                    if add:
                        value = np.float64(values[channel, j, i]) + weight * value
                    values[channel, j, i] = np.float32(value)
                if add:
                    weight = np.float64(weights[j, i]) + weight
                weights[j, i] = np.float32(weight)


#: The CPU loop.
resample_rows = njit(nogil=True, cache=True, error_model="numpy")(resample_rect)


@register_jitable
def spline_weights(d):
    """Weights of the pixels at -1, 0, 1 for an offset ``d`` in [-0.5, 0.5]: the quadratic B-spline.

    Unlike bilinear weights they broaden a star by the same amount (variance 1/4) whatever its sub-pixel phase, so that
    tiles of different phase have stars of the same shape.
    """
    return 0.5 * (0.5 - d) * (0.5 - d), 0.75 - d * d, 0.5 * (0.5 + d) * (0.5 + d)


@register_jitable
def spline_value(source, channel, j, i, wy, wx):
    """Weighted mean of the 3 x 3 pixels around ``(j, i)`` of one plane; NaN where one of them is missing."""
    value = 0.0
    for b in range(3):
        line = 0.0
        for a in range(3):
            line += wx[a] * np.float64(source[channel, j + b - 1, i + a - 1])
        value += wy[b] * line
    return value


@register_jitable
def measure_rect(source, origin, shape, mesh, cell_px, every, corner, wanted, rect, sums, counts):
    """Add the valid quadratic-spline samples of coarse cells to ``sums`` and their number to ``counts``.

    Parameters
    ----------
    source, origin, shape, mesh
        As for :func:`resample_rect`.
    cell_px : int
        Side of a cell in output pixels.
    every : int
        Only every so many pixels of a cell, along each axis, are sampled; it divides ``cell_px``.
    corner : (int, int)
        Row and column on the coarse grid of ``sums[:, 0, 0]``.
    wanted : uint8 (h, w)
        Cells where it is 0 are left out.
    rect : (j0, j1, i0, i1)
        The cells to do, counted from ``corner``.
    sums, counts : float64 (C, h, w), int32 (h, w)
    """
    nodes, mesh_y, mesh_x, step = mesh
    height, width = shape
    x0 = (corner[1] + rect[2]) * cell_px
    x1 = (corner[1] + rect[3]) * cell_px
    for y in range((corner[0] + rect[0]) * cell_px, (corner[0] + rect[1]) * cell_px, every):
        j = y // cell_px - corner[0]
        row = (y - mesh_y) // step
        wy = cubic_weights((y - mesh_y - row * step) / step)
        i = rect[2]
        left = cell_px
        for cell in range((x0 - mesh_x) // step, (x1 - 1 - mesh_x) // step + 1):
            if step > 1:
                columns_y = cell_columns(nodes, 1, row, wy, cell)
                columns_x = cell_columns(nodes, 0, row, wy, cell)
            start = mesh_x + cell * step
            for x in range(max(x0, start), min(x1, start + step)):
                if left == 0:
                    i += 1
                    left = cell_px
                left -= 1
                if wanted[j, i] == 0 or left % every:
                    continue
                if step > 1:
                    wx = cubic_weights((x - start) / step)
                    ty = interpolate(columns_y, wx)
                    tx = interpolate(columns_x, wx)
                else:
                    ty = nodes[1, row, cell]
                    tx = nodes[0, row, cell]
                seen, ty, tx = on_tile(ty, tx, height, width)
                if not seen:
                    continue
                py = int(math.floor(ty + 0.5))
                px = int(math.floor(tx + 0.5))
                if py < 1 or px < 1 or py + 1 >= height or px + 1 >= width:
                    continue
                ay = spline_weights(ty - py)
                ax = spline_weights(tx - px)
                first = spline_value(source, 0, py - origin[0], px - origin[1], ay, ax)
                if not first == first:
                    continue
                counts[j, i] += 1
                sums[0, j, i] += first
                for channel in range(1, source.shape[0]):
                    sums[channel, j, i] += spline_value(source, channel, py - origin[0], px - origin[1], ay, ax)


#: The CPU loop.
measure_cells = njit(nogil=True, cache=True, error_model="numpy")(measure_rect)


@njit(nogil=True, cache=True, error_model="numpy")
def cells_inside(mesh, shape, cell_px, corner, found):
    """Mark in ``found`` the coarse cells of which any corner or the centre lies on the tile."""
    nodes, mesh_y, mesh_x, step = mesh
    half = cell_px // 2
    for j in range(found.shape[0]):
        for i in range(found.shape[1]):
            y = (corner[0] + j) * cell_px
            x = (corner[1] + i) * cell_px
            for dy, dx in (
                (half, half),
                (0, 0),
                (0, cell_px - 1),
                (cell_px - 1, 0),
                (cell_px - 1, cell_px - 1),
            ):
                ty, tx = tile_position(nodes, mesh_y, mesh_x, step, y + dy, x + dx)
                if on_tile(ty, tx, shape[0], shape[1])[0]:
                    found[j, i] = 1
                    break


@njit(nogil=True, cache=True, error_model="numpy")
def stored_bytes(values, out):
    """Float32 values (h, w) as big-endian words, uint32 (h, w): what a FITS file holds; 0 where they are not finite."""
    bits = values.view(np.uint32)
    for j in range(values.shape[0]):
        for i in range(values.shape[1]):
            word = bits[j, i]
            if word & np.uint32(0x7F800000) == np.uint32(0x7F800000):
                word = np.uint32(0)
            out[j, i] = (
                (word >> np.uint32(24))
                | ((word >> np.uint32(8)) & np.uint32(0xFF00))
                | ((word & np.uint32(0xFF00)) << np.uint32(8))
                | (word << np.uint32(24))
            )


@njit(nogil=True, cache=True, error_model="numpy")
def bin_plane(plane, y, x, factor, sums, counts):
    """Add float32 pixels (h, w) that are not NaN, the first at (y, x) of a grid of squares, to the squares' sums."""
    for j in range(plane.shape[0]):
        row = (y + j) // factor
        for i in range(plane.shape[1]):
            value = plane[j, i]
            if value == value:
                column = (x + i) // factor
                sums[row, column] += value
                counts[row, column] += 1


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
        source, origin, shape, method, alpha, weight_map, spacing, feather, scale, nodes, mesh_y, mesh_x, step,
        block, rect, values, weights, add,
    ):  # fmt: skip
        i, j = cuda.grid(2)
        y = rect[0] + j
        x = rect[2] + i
        if y < rect[1] and x < rect[3]:
            resample_rect(
                source, origin, shape, method, alpha, weight_map, spacing, feather, scale,
                (nodes, mesh_y, mesh_x, step), block, (y, y + 1, x, x + 1), values, weights, add,
            )  # fmt: skip

    @cuda.jit(fastmath=False)
    def measure(source, origin, shape, nodes, mesh_y, mesh_x, step, cell_px, every, corner, wanted, sums, counts):
        i, j = cuda.grid(2)
        if j < wanted.shape[0] and i < wanted.shape[1] and wanted[j, i]:
            mesh = (nodes, mesh_y, mesh_x, step)
            measure_rect(
                source, origin, shape, mesh, cell_px, every, corner, wanted, (j, j + 1, i, i + 1), sums, counts
            )

    @cuda.jit(fastmath=False)
    def combine(values, weights, method, kappa_low, kappa_high, trim_low, trim_high, out):
        i, j = cuda.grid(2)
        if j < out.shape[1] and i < out.shape[2]:
            combine_pixel(values, weights, j, i, method, kappa_low, kappa_high, trim_low, trim_high, out)

    return {"resample": resample, "measure": measure, "combine": combine}
