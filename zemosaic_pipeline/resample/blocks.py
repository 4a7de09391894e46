"""The output in blocks: rectangles that can be made within a memory budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from zemosaic_pipeline.arrays import Rect
from zemosaic_pipeline.resample.mesh import source_rows
from zemosaic_pipeline.resample.options import CoaddOptions
from zemosaic_pipeline.resample.placed import PlacedTile

#: Pixels of a band: few enough that what is done to a finished block stays near the processor.
CACHED_PIXELS = 1 << 20
#: Smallest side of a block, in output pixels.
SMALLEST_BLOCK = 16


def intersection(a: Rect, b: Rect) -> Rect | None:
    """Common part of two rectangles; None where they do not meet."""
    rect = max(a[0], b[0]), min(a[1], b[1]), max(a[2], b[2]), min(a[3], b[3])
    return rect if rect[0] < rect[1] and rect[2] < rect[3] else None


def plan_blocks(
    shape: tuple[int, int], placed: Sequence[PlacedTile], options: CoaddOptions, bytes_per_block: int
) -> list[Rect]:
    """Rectangles (y0, y1, x0, x1) that cover the output, each of which can be made within ``bytes_per_block``.

    Full-width bands where they fit (one write a channel); halved, the longer side first, where they do not.
    """
    height, width = shape
    rows = min(max(SMALLEST_BLOCK, CACHED_PIXELS // width), height)
    blocks: list[Rect] = []
    pending = [(y, min(y + rows, height), 0, width) for y in range(0, height, rows)][::-1]
    while pending:
        block = pending.pop()
        h, w = block[1] - block[0], block[3] - block[2]
        if block_bytes(block, placed, options) <= bytes_per_block or max(h, w) <= SMALLEST_BLOCK:
            blocks.append(block)
        elif w > 4 * h:
            middle = (block[2] + block[3]) // 2
            pending += [(block[0], block[1], middle, block[3]), (block[0], block[1], block[2], middle)]
        else:
            middle = (block[0] + block[1]) // 2
            pending += [(middle, block[1], block[2], block[3]), (block[0], middle, block[2], block[3])]
    return blocks


def without(blocks: Sequence[Rect], done: Sequence[Rect]) -> list[Rect]:
    """What of ``blocks`` lies outside the rectangles ``done``, in rectangles."""
    if not done:
        return list(blocks)
    boxes, rest = np.array(done), []
    for block in blocks:
        pieces = [block]
        meets = (boxes[:, ::2] < block[1::2]).all(axis=1) & (boxes[:, 1::2] > block[::2]).all(axis=1)
        for n in np.flatnonzero(meets).tolist():
            pieces = [part for piece in pieces for part in _minus(piece, done[n])]
        rest += pieces
    return rest


def _minus(a: Rect, b: Rect) -> list[Rect]:
    """At most four rectangles: above, below, left and right of ``b`` in ``a``."""
    common = intersection(a, b)
    if common is None:
        return [a]
    y0, y1, x0, x1 = common
    parts = [(a[0], y0, a[2], a[3]), (y1, a[1], a[2], a[3]), (y0, y1, a[2], x0), (y0, y1, x1, a[3])]
    return [part for part in parts if part[0] < part[1] and part[2] < part[3]]


def block_bytes(block: Rect, placed: Sequence[PlacedTile], options: CoaddOptions) -> int:
    """Estimated working memory of a block: sums or layers, the finished pixels, and the largest tile part."""
    touching = [(item, rect) for item in placed if (rect := intersection(item.rect, block))]
    channels = touching[0][0].tile.channels if touching else 1
    pixels = (block[1] - block[0]) * (block[3] - block[2])
    layers = 1 if options.streamed else len(touching)
    plane = 4 * pixels
    source = max((_source_bytes(item, rect) for item, rect in touching), default=0)
    # layers: values, weights per channel and the weight; then finished values, their copy in file order
    work = plane * (channels + 1) if layers == 1 else plane * layers * (2 * channels + 1)
    return work + 3 * plane * channels + 3 * source


def _source_bytes(item: PlacedTile, rect: Rect) -> int:
    rows = source_rows(item.mesh, rect, item.tile.shape)
    return 0 if rows is None else 4 * item.tile.channels * (rows[1] - rows[0]) * item.tile.shape[1]
