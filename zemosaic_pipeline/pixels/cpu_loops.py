"""The CPU's loops over pixels: what the functions of `pixels.kernels` do for one pixel, done for many side by side.

A row is worked on :data:`LANES` pixels at a time, stage by stage: positions, corners and weights, values, sums. Each stage
is a plain loop over the lanes, which the compiler turns into vector instructions where the processor has them. The
arithmetic is that of the pixel functions, which each stage calls, in the same order: the same bits as on a card.

The pixels of a tile come flat, with the strides of planes and rows, so that rows of a larger array need not be copied.
No function that takes arrays is called for each pixel: numba would count references there, which costs more than the
pixel.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from zemosaic_pipeline.pixels.kernels import (
    bilinear_corners,
    bilinear_mix,
    bilinear_rest,
    cell_columns,
    cubic_weights,
    edge_weight,
    interpolate,
    lanczos_line,
    lanczos_reaches,
    lanczos_weights,
    map_weight,
    on_tile,
    spline_pixel,
    spline_weights,
    tile_position,
    weighted_three,
)
from zemosaic_pipeline.pixels.methods import ResamplingKernel
from zemosaic_pipeline.pixels.numba_cache import compiled

#: Pixels worked on side by side; at least the largest step of a mesh.
LANES = 128


@register_jitable
def mesh_weights(step, table):
    """Fill ``table`` (4, LANES) with the cubic weights of every pixel of a mesh cell."""
    for k in range(step):
        w = cubic_weights(k / step)
        table[0, k] = w[0]
        table[1, k] = w[1]
        table[2, k] = w[2]
        table[3, k] = w[3]


@register_jitable
def row_positions(mesh, table, y, x0, n, positions):
    """Tile positions of the ``n`` output pixels from ``x0`` on row ``y``: y in ``positions[0]``, x in ``positions[1]``."""
    nodes, mesh_y, mesh_x, step = mesh
    row = (y - mesh_y) // step
    wy = cubic_weights((y - mesh_y - row * step) / step)
    i = 0
    while i < n:
        # all pixels of one mesh cell on this row share the four column positions
        cell = (x0 + i - mesh_x) // step
        start = x0 + i - mesh_x - cell * step
        stop = min(n, i + step - start)
        if step == 1:
            positions[0, i] = nodes[1, row, cell]
            positions[1, i] = nodes[0, row, cell]
        else:
            ys = cell_columns(nodes, 1, row, wy, cell)
            xs = cell_columns(nodes, 0, row, wy, cell)
            shift = start - i
            for k in range(i, stop):
                t = k + shift
                wx = (table[0, t], table[1, t], table[2, t], table[3, t])
                positions[0, k] = interpolate(ys, wx)
                positions[1, k] = interpolate(xs, wx)
        i = stop


@register_jitable
def place_lanes(positions, n, shape, origin, row_stride, feather, scale, offsets, corners, weight):
    """Corners and weight of every lane; weight 0, and offsets that can be read, where a lane is not on the tile.

    ``offsets`` (3, LANES): the first corner in the flat tile, the steps to the right and down; ``corners`` (4, LANES):
    their weights. Returns whether any lane has a weight.
    """
    height, width = shape
    any_weight = 0.0
    for k in range(n):
        inside, ty, tx = on_tile(positions[0, k], positions[1, k], height, width)
        positions[0, k] = ty
        positions[1, k] = tx
        j0, j1, i0, i1, w00, w01, w10, w11 = bilinear_corners(height, width, ty, tx)
        offsets[0, k] = (j0 - origin[0]) * row_stride + i0 - origin[1] if inside else 0
        offsets[1, k] = i1 - i0 if inside else 0
        offsets[2, k] = (j1 - j0) * row_stride if inside else 0
        corners[0, k] = w00
        corners[1, k] = w01
        corners[2, k] = w10
        corners[3, k] = w11
        lane = scale * edge_weight(feather, height, width, ty, tx) if inside else 0.0
        weight[k] = lane
        any_weight = max(any_weight, lane)
    return any_weight > 0.0


@register_jitable
def map_lanes(positions, n, shape, origin, alpha, weight_map, spacing, weight):
    """Multiply the weight of every lane by the tile's alpha plane and its coarse weight map."""
    height, width = shape
    for k in range(n):
        if weight[k] > 0.0:
            ty = positions[0, k]
            tx = positions[1, k]
            corners = bilinear_corners(height, width, ty, tx)
            weight[k] = weight[k] * map_weight(alpha, origin, weight_map, spacing, ty, tx, corners)


@register_jitable
def bilinear_lanes(pixels, base, n, offsets, corners, weight, value):
    """Bilinear values of one plane, whose first pixel is ``pixels[base]``; those without a weight mean nothing."""
    for k in range(n):
        at = base + offsets[0, k]
        right = at + offsets[1, k]
        down = offsets[2, k]
        value[k] = bilinear_mix(
            pixels[at], pixels[right], pixels[at + down], pixels[right + down],
            corners[0, k], corners[1, k], corners[2, k], corners[3, k],
        )  # fmt: skip
    missing = 0
    for k in range(n):
        missing += 1 if value[k] != value[k] else 0
    for k in range(n if missing else 0):
        if value[k] != value[k] and weight[k] > 0.0:
            at = base + offsets[0, k]
            right = at + offsets[1, k]
            down = offsets[2, k]
            value[k] = bilinear_rest(
                pixels[at], pixels[right], pixels[at + down], pixels[right + down],
                corners[0, k], corners[1, k], corners[2, k], corners[3, k],
            )  # fmt: skip


@register_jitable
def drop_missing(n, value, weight):
    """No weight for lanes without a value."""
    for k in range(n):
        weight[k] = weight[k] if value[k] == value[k] else 0.0


@register_jitable
def lanczos_lanes(pixels, plane_stride, row_stride, positions, n, shape, origin, weight, values):
    """Put Lanczos-3 values in the place of the bilinear ``values`` (C, LANES) where the tile holds their support."""
    for k in range(n):
        j = int(np.floor(positions[0, k]))
        i = int(np.floor(positions[1, k]))
        if not (weight[k] > 0.0 and lanczos_reaches(shape, j, i)):
            continue
        wy = lanczos_weights(positions[0, k] - j)
        wx = lanczos_weights(positions[1, k] - i)
        for channel in range(values.shape[0]):
            at = channel * plane_stride + (j - 2 - origin[0]) * row_stride + i - 2 - origin[1]
            value = 0.0
            for b in range(6):
                if wy[b] != 0.0:
                    value += wy[b] * lanczos_line(
                        wx, pixels[at], pixels[at + 1], pixels[at + 2], pixels[at + 3], pixels[at + 4], pixels[at + 5]
                    )
                at += row_stride
            if value == value:
                values[channel, k] = value


@register_jitable
def store_lanes(n, value, weight, add, row):
    """Add weight times value to a row of float32 sums, or set the row to the values, where there is a weight."""
    if add:
        for k in range(n):
            row[k] = np.float32(np.float64(row[k]) + weight[k] * value[k]) if weight[k] > 0.0 else row[k]
    else:
        for k in range(n):
            row[k] = np.float32(value[k]) if weight[k] > 0.0 else row[k]


@compiled
def resample_rows(
    pixels, plane_stride, row_stride, origin, shape, kernel, alpha, weight_map, spacing, feather, scale, mesh, block,
    rect, values, weights, add,
):  # fmt: skip
    """Resample one tile into the output rectangle ``rect`` = (y0, y1, x0, x1) of a block.

    Parameters
    ----------
    pixels : float32 (N,)
        The part of the tile in memory, channel by channel and row by row.
    plane_stride, row_stride : int
        From a channel's first pixel to the next one's, from a row's to the next one's.
    others
        As for `kernels.resample_pixel`.
    """
    table = np.zeros((4, LANES))
    positions, corners = np.zeros((2, LANES)), np.zeros((4, LANES))
    offsets = np.zeros((3, LANES), np.int64)
    weight, ones = np.zeros(LANES), np.ones(LANES)
    value = np.zeros((values.shape[0], LANES))
    mesh_weights(mesh[3], table)
    for y in range(rect[0], rect[1]):
        j = y - block[0]
        for x0 in range(rect[2], rect[3], LANES):
            n = min(LANES, rect[3] - x0)
            row_positions(mesh, table, y, x0, n, positions)
            if not place_lanes(positions, n, shape, origin, row_stride, feather, scale, offsets, corners, weight):
                continue
            if alpha.size > 1 or weight_map.size > 1:
                map_lanes(positions, n, shape, origin, alpha, weight_map, spacing, weight)
            for channel in range(values.shape[0]):
                base = channel * plane_stride
                bilinear_lanes(pixels, base, n, offsets, corners, weight, value[channel])
            drop_missing(n, value[0], weight)
            if kernel == ResamplingKernel.LANCZOS3:
                lanczos_lanes(pixels, plane_stride, row_stride, positions, n, shape, origin, weight, value)
            i = x0 - block[1]
            for channel in range(values.shape[0]):
                store_lanes(n, value[channel], weight, add, values[channel, j, i : i + n])
            store_lanes(n, weight if not add else ones, weight, add, weights[j, i : i + n])


@compiled
def measure_cells(
    pixels, plane_stride, row_stride, origin, shape, mesh, cell_px, every, corner, wanted, sums, counts
):  # fmt: skip
    """Add the samples of coarse cells to ``sums`` and their number to ``counts``; see `kernels.measure_cell`.

    ``pixels``, ``plane_stride`` and ``row_stride`` are those of :func:`resample_rows`; ``wanted`` is uint8 (h, w), cells
    where it is 0 are left out.
    """
    table = np.zeros((4, LANES))
    positions, splines = np.zeros((2, LANES)), np.zeros((6, LANES))
    offsets = np.zeros((1, LANES), np.int64)
    mesh_weights(mesh[3], table)
    at_once = max(LANES // cell_px, 1)
    for j in range(wanted.shape[0]):
        for first in range(0, wanted.shape[1], at_once):
            last = min(first + at_once, wanted.shape[1])
            some = 0
            for i in range(first, last):
                some |= wanted[j, i]
            if not some:
                continue
            for y in range((corner[0] + j) * cell_px, (corner[0] + j + 1) * cell_px, every):
                row_positions(mesh, table, y, (corner[1] + first) * cell_px, (last - first) * cell_px, positions)
                spline_lanes(positions, (last - first) * cell_px, shape, origin, row_stride, offsets, splines)
                measure_lanes(
                    pixels,
                    plane_stride,
                    row_stride,
                    offsets,
                    splines,
                    cell_px,
                    every,
                    wanted,
                    j,
                    first,
                    last,
                    sums,
                    counts,
                )


@register_jitable
def spline_lanes(positions, n, shape, origin, row_stride, offsets, splines):
    """Where the 3 x 3 pixels of every lane begin in a flat plane (-1: not on the tile), and their weights (6, LANES)."""
    height, width = shape
    for k in range(n):
        inside, ty, tx = on_tile(positions[0, k], positions[1, k], height, width)
        py, px, whole = spline_pixel(ty, tx, height, width)
        offsets[0, k] = (py - 1 - origin[0]) * row_stride + px - 1 - origin[1] if inside and whole else -1
        wy = spline_weights(ty - py)
        wx = spline_weights(tx - px)
        splines[0, k], splines[1, k], splines[2, k] = wy
        splines[3, k], splines[4, k], splines[5, k] = wx


@register_jitable
def measure_lanes(
    pixels, plane_stride, row_stride, offsets, splines, cell_px, every, wanted, j, first, last, sums, counts
):  # fmt: skip
    """Add the samples of one row of pixels of the wanted cells ``first:last`` of a row ``j`` of cells."""
    for i in range(first, last):
        start = (i - first) * cell_px
        for k in range(start, start + (cell_px if wanted[j, i] else 0), every):
            if offsets[0, k] < 0:
                continue
            wy = (splines[0, k], splines[1, k], splines[2, k])
            wx = (splines[3, k], splines[4, k], splines[5, k])
            for channel in range(sums.shape[0]):
                a = channel * plane_stride + offsets[0, k]
                b = a + row_stride
                c = b + row_stride
                value = weighted_three(
                    wy,
                    weighted_three(wx, pixels[a], pixels[a + 1], pixels[a + 2]),
                    weighted_three(wx, pixels[b], pixels[b + 1], pixels[b + 2]),
                    weighted_three(wx, pixels[c], pixels[c + 1], pixels[c + 2]),
                )
                if channel == 0:
                    if value != value:
                        break
                    counts[j, i] += 1
                sums[channel, j, i] += value


@compiled
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


@compiled
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


@compiled
def means_of_squares(block, y, x, factor, wanted, means, row, column, rows):
    """Mean of the pixels that are not NaN in squares of ``factor`` pixels, NaN where there are none.

    The first square starts at ``y, x`` of ``block`` (C, h, w) and belongs to ``row, column`` of ``means``; there are
    ``rows`` of them, and as many columns as ``wanted`` has, which tells those to write. The last ones may be cut.
    """
    columns = wanted.size
    totals = np.empty(columns, np.float32)
    counts = np.empty(columns, np.int32)
    for channel in range(block.shape[0]):
        for r in range(rows):
            totals[:] = 0
            counts[:] = 0
            top = y + r * factor
            for j in range(top, min(top + factor, block.shape[1])):
                for i in range(x, min(x + factor, block.shape[2])):
                    part = block[channel, j, i::factor]
                    for c in range(min(columns, part.size)):
                        has_data = part[c] == part[c]
                        totals[c] += part[c] if has_data else np.float32(0)
                        counts[c] += 1 if has_data else 0
            target = means[channel, row + r, column : column + columns]
            for c in range(columns):
                if wanted[c]:
                    target[c] = totals[c] / np.float32(counts[c])
