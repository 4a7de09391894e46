"""How the samples of one pixel are combined: the functions that numba compiles for the CPU and for CUDA alike.

The samples of a pixel are sorted once; every way to combine them is a look at the sorted samples. ``values`` and
``weights`` are (K, C, h, w), a layer a tile or frame; weight 0 means "no data". Arithmetic is float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit
from numba.extending import register_jitable

MEAN = 0
MEDIAN = 1
SIGMA_CLIP = 2
WINSORIZED = 3
MINIMUM = 4
MAXIMUM = 5
FIRST = 6
LAST = 7
WINSORIZED_CLIP = 8
LINEAR_FIT_CLIP = 9

#: Pixels combined at a time on the CPU: few enough that all their samples lie near the processor.
AT_ONCE = 64
#: Slope of a straight line through the middle half of sorted Gaussian samples, sigma per unit of relative rank:
#: the least-squares line through the normal quantile function from 1/4 to 3/4.
SLOPE_OF_SIGMA = 2.61624
#: Difference of the quartiles of a Gaussian, in sigma.
QUARTILES = 1.34898
#: With fewer samples the quartiles say little; one outlier is then found by the spread of the others.
FEWEST_FOR_QUARTILES = 6


@register_jitable
def sort_layers(values, weights, y, x, channel):
    """Sort the samples of one pixel in place by value, their weights with them, "no data" (weight 0) last.

    ``values`` is (K, C, h, w); ``weights`` is (K, C, h, w) too, since each channel is ordered on its own. Returns
    the number of samples with data.
    """
    layers = values.shape[0]
    n = 0
    for k in range(layers):
        if weights[k, channel, y, x] > 0.0:
            value = values[k, channel, y, x]
            weight = weights[k, channel, y, x]
            j = n
            while j > 0 and values[j - 1, channel, y, x] > value:
                values[j, channel, y, x] = values[j - 1, channel, y, x]
                weights[j, channel, y, x] = weights[j - 1, channel, y, x]
                j -= 1
            values[j, channel, y, x] = value
            weights[j, channel, y, x] = weight
            n += 1
    return n


@register_jitable
def quantile(values, start, stop, y, x, channel, q):
    """Quantile of the sorted samples ``start:stop``, ranks interpolated linearly (numpy's, Hyndman & Fan 7)."""
    rank = q * (stop - start - 1)
    low = int(rank)
    high = min(low + 1, stop - start - 1)
    f = rank - low
    below = np.float64(values[start + low, channel, y, x])
    return (1.0 - f) * below + f * np.float64(values[start + high, channel, y, x])


@register_jitable
def weighted_mean(values, weights, start, stop, y, x, channel, low, high):
    """Weighted mean of the sorted samples ``start:stop``, each clipped to ``low .. high``."""
    total = 0.0
    norm = 0.0
    for k in range(start, stop):
        value = min(max(np.float64(values[k, channel, y, x]), low), high)
        weight = np.float64(weights[k, channel, y, x])
        total += weight * value
        norm += weight
    return total / norm


@register_jitable
def clip_range(values, n, y, x, channel, kappa_low, kappa_high):
    """First and past-the-last of ``n`` sorted samples that survive iterated kappa-sigma clipping.

    The spread is taken about the median of the samples that remain (a pivot: sums of squares cancel in float32 on a
    high pedestal), over the samples other than the one farthest out, so that one outlier among few cannot hide
    behind the spread it makes itself. Two samples cannot say which of them is wrong: both stay.
    """
    start = 0
    stop = n
    while stop - start > 2:
        m = stop - start
        middle = start + (m - 1) // 2
        centre = np.float64(values[middle, channel, y, x])
        if m % 2 == 0:
            centre = 0.5 * (centre + np.float64(values[middle + 1, channel, y, x]))
        below = centre - np.float64(values[start, channel, y, x])
        above = np.float64(values[stop - 1, channel, y, x]) - centre
        drop_low = below / kappa_low > above / kappa_high
        first = start + 1 if drop_low else start
        last = stop if drop_low else stop - 1
        squares = 0.0
        for k in range(first, last):
            d = np.float64(values[k, channel, y, x]) - centre
            squares += d * d
        sigma = math.sqrt(squares / max(m - 2, 1)) if m > 3 else math.sqrt(squares)
        limit = (kappa_low if drop_low else kappa_high) * sigma
        worst = below if drop_low else above
        if sigma <= 0.0 or worst <= limit:
            break
        start = first
        stop = last
    return start, stop


@register_jitable
def within(values, start, stop, y, x, channel, low, high):
    """Those of the sorted samples ``start:stop`` that lie within ``low .. high``; at least one stays."""
    while start < stop - 1 and np.float64(values[start, channel, y, x]) < low:
        start += 1
    while stop - 1 > start and np.float64(values[stop - 1, channel, y, x]) > high:
        stop -= 1
    return start, stop


@register_jitable
def winsorized_range(values, n, y, x, channel, kappa_low, kappa_high, trim_low, trim_high):
    """First and past-the-last of ``n`` sorted samples that survive winsorized sigma clipping.

    The spread is that of the samples about their median after the outermost fractions have been drawn in to their
    quantiles (``kappa`` holds the factor by which that narrows a Gaussian, see `zemosaic_reproject.CoaddOptions`), but
    no more than twice what the quartiles say: several outliers on one side cannot hide one another. Repeated until
    nothing is rejected.
    """
    start = 0
    stop = n
    while stop - start >= FEWEST_FOR_QUARTILES:
        centre = quantile(values, start, stop, y, x, channel, 0.5)
        low = quantile(values, start, stop, y, x, channel, trim_low)
        high = quantile(values, start, stop, y, x, channel, 1.0 - trim_high)
        squares = 0.0
        for k in range(start, stop):
            d = min(max(np.float64(values[k, channel, y, x]), low), high) - centre
            squares += d * d
        sigma = math.sqrt(squares / (stop - start - 1))
        quartiles = quantile(values, start, stop, y, x, channel, 0.75) - quantile(
            values, start, stop, y, x, channel, 0.25
        )
        sigma = min(sigma, 2.0 * quartiles / QUARTILES)
        if sigma <= 0.0:
            break
        first, last = within(
            values, start, stop, y, x, channel, centre - kappa_low * sigma, centre + kappa_high * sigma
        )
        if first == start and last == stop:
            break
        start = first
        stop = last
    return start, stop


@register_jitable
def linear_fit_range(values, n, y, x, channel, kappa_low, kappa_high):
    """First and past-the-last of ``n`` sorted samples that survive a linear fit to the sorted samples.

    A straight line through the middle half of the samples against their rank gives the centre (its middle) and the
    spread (its slope, :data:`SLOPE_OF_SIGMA`); what lies farther out than ``kappa`` of it is rejected.
    """
    first = n // 4
    last = n - first
    middle = 0.5 * (n - 1)
    level = 0.0
    slope = 0.0
    norm = 0.0
    for k in range(first, last):
        value = np.float64(values[k, channel, y, x])
        level += value
        slope += (k - middle) * value
        norm += (k - middle) * (k - middle)
    level /= last - first
    sigma = slope / norm * n / SLOPE_OF_SIGMA
    if sigma <= 0.0:
        return 0, n
    return within(values, 0, n, y, x, channel, level - kappa_low * sigma, level + kappa_high * sigma)


@register_jitable
def combine_sorted(values, weights, n, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high):
    """Combined value of ``n`` > 0 sorted samples of one channel of one pixel."""
    lowest = np.float64(values[0, channel, y, x])
    highest = np.float64(values[n - 1, channel, y, x])
    if method == MINIMUM:
        return lowest
    if method == MAXIMUM:
        return highest
    if method == MEDIAN:
        return quantile(values, 0, n, y, x, channel, 0.5)
    if method == MEAN:
        return weighted_mean(values, weights, 0, n, y, x, channel, lowest, highest)
    start = 0
    stop = n
    low = lowest
    high = highest
    if method == WINSORIZED:
        low = quantile(values, 0, n, y, x, channel, trim_low)
        high = quantile(values, 0, n, y, x, channel, 1.0 - trim_high)
    elif method == SIGMA_CLIP or n < FEWEST_FOR_QUARTILES:
        start, stop = clip_range(values, n, y, x, channel, kappa_low, kappa_high)
    elif method == WINSORIZED_CLIP:
        start, stop = winsorized_range(values, n, y, x, channel, kappa_low, kappa_high, trim_low, trim_high)
    elif method == LINEAR_FIT_CLIP:
        start, stop = linear_fit_range(values, n, y, x, channel, kappa_low, kappa_high)
    return weighted_mean(values, weights, start, stop, y, x, channel, low, high)


@register_jitable
def sum_of_weights(weights, y, x, channel):
    """Sum of the weights of all layers, in their order."""
    total = 0.0
    for k in range(weights.shape[0]):
        if weights[k, channel, y, x] > 0.0:
            total += np.float64(weights[k, channel, y, x])
    return total


@register_jitable
def extreme_weight(values, weights, n, y, x, channel, method):
    """Weight of the smallest or largest of ``n`` sorted samples; of equal ones, that of the first layer."""
    k = 0
    if method == MAXIMUM:
        k = n - 1
        while k > 0 and values[k - 1, channel, y, x] == values[k, channel, y, x]:
            k -= 1
    return np.float64(weights[k, channel, y, x])


@register_jitable
def first_or_last(values, weights, y, x, channel, method):
    """Value and weight of the first or last layer with data; NaN and 0 without."""
    value = np.nan
    weight = 0.0
    for k in range(values.shape[0]):
        if weights[k, channel, y, x] > 0.0:
            value = np.float64(values[k, channel, y, x])
            weight = np.float64(weights[k, channel, y, x])
            if method == FIRST:
                break
    return value, weight


@register_jitable
def sorted_result(
    values, weights, n, total, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high, out
):  # fmt: skip
    """Combine the ``n`` sorted samples of one channel of one pixel, whose weights sum up to ``total``."""
    if n == 0:
        store(np.nan, 0.0, y, x, channel, out, values.shape[1])
        return
    value = combine_sorted(values, weights, n, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high)
    if method == MINIMUM or method == MAXIMUM:
        total = extreme_weight(values, weights, n, y, x, channel, method)
    store(value, total, y, x, channel, out, values.shape[1])


@register_jitable
def store(value, weight, y, x, channel, out, channels):
    """Write a combined value; and its weight, where ``out`` has a plane more than there are channels."""
    out[channel, y, x] = np.float32(value)
    if channel == 0 and out.shape[0] > channels:
        out[channels, y, x] = np.float32(weight)


@register_jitable
def combine_pixel(values, weights, y, x, method, kappa_low, kappa_high, trim_low, trim_high, out):
    """Combine the layers of one pixel, channel by channel, into ``out`` (C, h, w); NaN where there is no data.

    Where ``out`` has a plane more, it gets the weight: the sum over the layers, or, where one sample is taken (first,
    last, minimum, maximum), that of the sample taken in the first channel.
    """
    for channel in range(values.shape[1]):
        if method == FIRST or method == LAST:
            value, weight = first_or_last(values, weights, y, x, channel, method)
            store(value, weight, y, x, channel, out, values.shape[1])
        else:
            total = sum_of_weights(weights, y, x, channel)
            n = sort_layers(values, weights, y, x, channel)
            sorted_result(
                values, weights, n, total, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high, out
            )


@register_jitable
def sort_lanes(values, weights):
    """Sort the layers of many pixels at once, (K, lanes): by value, those of weight 0 last, as :func:`sort_layers` does.

    Batcher's odd-even merge exchange (Knuth, The Art of Computer Programming, vol. 3, 5.2.2 M): which layers are
    compared does not depend on the values, so that all lanes are worked on by the same instructions.
    """
    layers, lanes = values.shape
    for k in range(layers):
        for i in range(lanes):
            if not weights[k, i] > 0.0:
                values[k, i] = np.inf
                weights[k, i] = 0.0
    p = 1
    while p < layers:
        gap = p
        while gap > 0:
            for start in range(gap % p, layers - gap, 2 * gap):
                for a in range(start, min(start + gap, layers - gap)):
                    if a // (2 * p) != (a + gap) // (2 * p):
                        continue
                    below, above = values[a], values[a + gap]
                    below_weights, above_weights = weights[a], weights[a + gap]
                    for i in range(lanes):
                        low, high = below[i], above[i]
                        low_weight, high_weight = below_weights[i], above_weights[i]
                        wrong = low > high
                        below[i] = high if wrong else low
                        above[i] = low if wrong else high
                        below_weights[i] = high_weight if wrong else low_weight
                        above_weights[i] = low_weight if wrong else high_weight
            gap //= 2
        p *= 2


@njit(nogil=True, cache=True, error_model="numpy")
def combine_layers(values, weights, method, kappa_low, kappa_high, trim_low, trim_high, out):
    """CPU loop over the pixels of a block; see :func:`combine_pixel`. ``weights`` may be (K, 1, h, w) for all channels.

    The layers of some pixels at a time are brought together and sorted side by side: sorting them one by one, where
    they lie, would touch as many pages of memory as there are layers, and guess wrong at every step.
    """
    layers, channels = values.shape[:2]
    lanes = np.empty((layers, AT_ONCE), np.float32)
    lane_weights = np.zeros((layers, AT_ONCE), np.float32)
    near = lanes.reshape((layers, 1, 1, AT_ONCE))
    near_weights = lane_weights.reshape((layers, 1, 1, AT_ONCE))
    result = np.empty((2, 1, AT_ONCE), np.float32)
    totals = np.empty(AT_ONCE, np.float64)
    counts = np.empty(AT_ONCE, np.int64)
    for y in range(out.shape[1]):
        for x0 in range(0, out.shape[2], AT_ONCE):
            width = min(AT_ONCE, out.shape[2] - x0)
            for channel in range(channels):
                shared = min(channel, weights.shape[1] - 1)
                totals[:] = 0.0
                counts[:] = 0
                for k in range(layers):
                    for i in range(width):
                        weight = weights[k, shared, y, x0 + i]
                        lanes[k, i] = values[k, channel, y, x0 + i]
                        lane_weights[k, i] = weight
                        totals[i] += np.float64(weight) if weight > 0.0 else 0.0
                        counts[i] += 1 if weight > 0.0 else 0
                if method == FIRST or method == LAST:
                    for i in range(width):
                        combine_pixel(
                            near, near_weights, 0, i, method, kappa_low, kappa_high, trim_low, trim_high, result
                        )
                else:
                    sort_lanes(lanes, lane_weights)
                    for i in range(width):
                        sorted_result(
                            near, near_weights, counts[i], totals[i], 0, i, 0, method,
                            kappa_low, kappa_high, trim_low, trim_high, result,
                        )  # fmt: skip
                for i in range(width):
                    out[channel, y, x0 + i] = result[0, 0, i]
                    if channel == 0 and out.shape[0] > channels:
                        out[channels, y, x0 + i] = result[1, 0, i]
