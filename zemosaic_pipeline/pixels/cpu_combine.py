"""How the CPU combines layers: many pixels side by side, bit for bit what `pixels.combine` says of one pixel.

A processor works on eight or sixteen numbers at once where all go the same way. So the pixels of a piece of a row, its
*lanes*, are sorted by the same exchanges, and combined as if nothing were rejected; lanes in which something is, or
which have fewer layers than the others, are then looked at one by one. ``lanes`` and ``lane_weights`` are
(K, AT_ONCE); ``near`` and ``near_weights`` are the same memory as (K, 1, 1, AT_ONCE), which `pixels.combine` expects.
"""

from __future__ import annotations

import numpy as np
from numba.extending import register_jitable

from zemosaic_pipeline.pixels.combine import (
    combine_sorted,
    quantile,
    surviving_range,
    taken,
    weighted_mean,
    write_pixel,
)
from zemosaic_pipeline.pixels.methods import REJECTING, TAKE_ONE, CombineMethod
from zemosaic_pipeline.pixels.numba_cache import compiled

#: Pixels combined at a time on the CPU: few enough that all their samples lie near the processor.
AT_ONCE = 128


@register_jitable
def sorting_network(layers):
    """Pairs of layers to compare, in their order, to sort them: (pairs, 2), first the one to get the smaller value.

    Batcher's odd-even merge exchange (Knuth, The Art of Computer Programming, vol. 3, 5.2.2 M): which layers are
    compared does not depend on the values, so that all lanes are worked on by the same instructions.
    """
    doublings = 0
    while 1 << doublings < layers:
        doublings += 1
    # in each of the 1 + 2 + ... + doublings rounds a layer is in one pair at most
    pairs = np.empty((doublings * (doublings + 1) // 2 * (layers // 2), 2), np.int64)
    count = 0
    p = 1
    while p < layers:
        gap = p
        while gap > 0:
            for start in range(gap % p, layers - gap, 2 * gap):
                for a in range(start, min(start + gap, layers - gap)):
                    if a // (2 * p) == (a + gap) // (2 * p):
                        pairs[count, 0] = a
                        pairs[count, 1] = a + gap
                        count += 1
            gap //= 2
        p *= 2
    return pairs[:count]


@register_jitable
def gather(values, weights, y, x, width, channel, shared, lanes, lane_weights):
    """Bring the layers of ``width`` pixels from ``y, x`` on together; those of weight 0 get infinite values.

    ``channel`` is that of ``values``, ``shared`` that of ``weights``; ``lanes`` and ``lane_weights`` are (K, AT_ONCE).
    """
    for k in range(lanes.shape[0]):
        # rows of their own: with all indices in one place the compiler does not see that memory is read in order
        row, row_weights = values[k, channel, y, x : x + width], weights[k, shared, y, x : x + width]
        lane, lane_weight = lanes[k], lane_weights[k]
        for i in range(width):
            has_data = row_weights[i] > 0.0
            lane[i] = row[i] if has_data else np.float32(np.inf)
            lane_weight[i] = row_weights[i] if has_data else np.float32(0.0)


@register_jitable
def count_lanes(lane_weights, counts, totals):
    """Number of samples with data of each lane, and the sum of their weights in the order of the layers."""
    counts[:] = 0
    totals[:] = 0.0
    for k in range(lane_weights.shape[0]):
        row = lane_weights[k]
        for i in range(AT_ONCE):
            counts[i] += 1 if row[i] > 0.0 else 0
            totals[i] += np.float64(row[i])


@register_jitable
def sort_lanes(lanes, lane_weights, pairs):
    """Sort the layers of all lanes by value, their weights with them; infinite values, those without data, last."""
    for pair in range(pairs.shape[0]):
        a, b = pairs[pair, 0], pairs[pair, 1]
        below, above = lanes[a], lanes[b]
        below_weights, above_weights = lane_weights[a], lane_weights[b]
        for i in range(AT_ONCE):
            low, high = below[i], above[i]
            low_weight, high_weight = below_weights[i], above_weights[i]
            wrong = low > high
            below[i] = high if wrong else low
            above[i] = low if wrong else high
            below_weights[i] = high_weight if wrong else low_weight
            above_weights[i] = low_weight if wrong else high_weight


@register_jitable
def sort_values(lanes, pairs):
    """As :func:`sort_lanes`, for what does not look at the weights."""
    for pair in range(pairs.shape[0]):
        a, b = pairs[pair, 0], pairs[pair, 1]
        below, above = lanes[a], lanes[b]
        for i in range(AT_ONCE):
            low, high = below[i], above[i]
            wrong = low > high
            below[i] = high if wrong else low
            above[i] = low if wrong else high


@register_jitable
def means_of_lanes(near, near_weights, n, sums, result):
    """:func:`weighted_mean` of all ``n`` samples of each lane."""
    total, norm = sums[0], sums[1]
    total[:] = 0.0
    norm[:] = 0.0
    lowest, highest = near[0, 0, 0], near[n - 1, 0, 0]
    for k in range(n):
        row, row_weights = near[k, 0, 0], near_weights[k, 0, 0]
        for i in range(AT_ONCE):
            # without effect, but for what weighted_mean makes of a sample that is not a number
            value = min(max(np.float64(row[i]), np.float64(lowest[i])), np.float64(highest[i]))
            weight = np.float64(row_weights[i])
            total[i] += weight * value
            norm[i] += weight
    for i in range(AT_ONCE):
        result[i] = np.float32(total[i] / norm[i] if norm[i] > 0.0 else np.nan)


@register_jitable
def combine_lanes(near, near_weights, n, method, sums, result):
    """Combine all lanes side by side, as if each had ``n`` sorted samples and none were rejected or drawn in.

    ``sums`` (2, AT_ONCE) is room to work in. Every sum is made in the order in which :func:`combine_sorted` makes it, so
    that the results are the same to the last bit.
    """
    if n > 0 and method == CombineMethod.MEDIAN:
        for i in range(AT_ONCE):
            result[i] = np.float32(quantile(near, 0, n, 0, i, 0, 0.5))
    elif n > 0 and method != CombineMethod.WINSORIZED:
        means_of_lanes(near, near_weights, n, sums, result)


@register_jitable
def combine_others(
    near, near_weights, n, counts, totals, width, method, kappa_low, kappa_high, trim_low, trim_high, result
):  # fmt: skip
    """Combine those lanes one by one that lose samples or have not ``n`` of them; the weight of every lane."""
    for i in range(width):
        result[1, 0, i] = np.float32(totals[i])
        alike = counts[i] == n and method != CombineMethod.WINSORIZED
        if alike and n > 2 and method in REJECTING:
            start, stop = surviving_range(near, n, 0, i, 0, method, kappa_low, kappa_high, trim_low, trim_high)
            if stop - start < n:
                low, high = np.float64(near[0, 0, 0, i]), np.float64(near[n - 1, 0, 0, i])
                result[0, 0, i] = np.float32(weighted_mean(near, near_weights, start, stop, 0, i, 0, low, high))
        elif counts[i] == 0:
            result[0, 0, i] = np.nan
        elif not alike:
            value = combine_sorted(
                near, near_weights, counts[i], 0, i, 0, method, kappa_low, kappa_high, trim_low, trim_high
            )
            result[0, 0, i] = np.float32(value)


@compiled
def combine_layers(values, weights, method, kappa_low, kappa_high, trim_low, trim_high, out):
    """CPU loop over the pixels of a block; see :func:`combine_pixel`. ``weights`` may be (K, 1, h, w) for all channels.

    The layers of some pixels at a time are brought together and sorted side by side: sorting them one by one, where
    they lie, would touch as many pages of memory as there are layers, and guess wrong at every step. What most lanes
    need is then done side by side too; a lane that differs from the others is looked at on its own.
    """
    layers, channels = values.shape[:2]
    pairs = sorting_network(layers)
    lanes = np.zeros((layers, AT_ONCE), np.float32)
    lane_weights = np.zeros((layers, AT_ONCE), np.float32)
    near = lanes.reshape((layers, 1, 1, AT_ONCE))
    near_weights = lane_weights.reshape((layers, 1, 1, AT_ONCE))
    result = np.empty((2, 1, AT_ONCE), np.float32)
    totals = np.empty(AT_ONCE, np.float64)
    counts = np.empty(AT_ONCE, np.int64)
    sums = np.empty((2, AT_ONCE), np.float64)
    for y in range(out.shape[1]):
        for x in range(0, out.shape[2], AT_ONCE):
            width = min(AT_ONCE, out.shape[2] - x)
            for channel in range(channels):
                shared = min(channel, weights.shape[1] - 1)
                gather(values, weights, y, x, width, channel, shared, lanes, lane_weights)
                if channel == shared:
                    count_lanes(lane_weights, counts, totals)
                if method in TAKE_ONE:
                    for i in range(width):
                        value, weight = taken(near, near_weights, 0, i, 0, method)
                        write_pixel(value, weight, 0, i, 0, result, 1)
                else:
                    if method == CombineMethod.MEDIAN:
                        sort_values(lanes, pairs)
                    else:
                        sort_lanes(lanes, lane_weights, pairs)
                    n = counts[width // 2]
                    combine_lanes(near, near_weights, n, method, sums, result[0, 0])
                    combine_others(
                        near, near_weights, n, counts, totals, width, method, kappa_low, kappa_high, trim_low, trim_high,
                        result,
                    )  # fmt: skip
                for i in range(width):
                    out[channel, y, x + i] = result[0, 0, i]
                    if channel == 0 and out.shape[0] > channels:
                        out[channels, y, x + i] = result[1, 0, i]
