"""How the samples of one pixel are combined: the functions that numba compiles for the CPU and for CUDA alike.

The samples of a pixel are sorted once; every way to combine them is a look at the sorted samples. ``values`` and
``weights`` are (K, C, h, w), a layer a tile or frame; weight 0 means "no data". Arithmetic is float64.
"""

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from zemosaic_pipeline.pixels.methods import REJECTING, TAKE_ONE, CombineMethod

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
    quantiles (``kappa`` holds the factor by which that narrows a Gaussian, see `resample.options.CoaddOptions`), but
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
def surviving_range(values, n, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high):
    """First and past-the-last of ``n`` > 0 sorted samples that a method of rejection leaves."""
    if method == CombineMethod.SIGMA_CLIP or n < FEWEST_FOR_QUARTILES:
        return clip_range(values, n, y, x, channel, kappa_low, kappa_high)
    if method == CombineMethod.WINSORIZED_SIGMA_CLIP:
        return winsorized_range(values, n, y, x, channel, kappa_low, kappa_high, trim_low, trim_high)
    return linear_fit_range(values, n, y, x, channel, kappa_low, kappa_high)


@register_jitable
def combine_sorted(values, weights, n, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high):
    """Combined value of ``n`` > 0 sorted samples of one channel of one pixel."""
    if method == CombineMethod.MEDIAN:
        return quantile(values, 0, n, y, x, channel, 0.5)
    start = 0
    stop = n
    low = np.float64(values[0, channel, y, x])
    high = np.float64(values[n - 1, channel, y, x])
    if method == CombineMethod.WINSORIZED:
        low = quantile(values, 0, n, y, x, channel, trim_low)
        high = quantile(values, 0, n, y, x, channel, 1.0 - trim_high)
    elif method in REJECTING:
        start, stop = surviving_range(values, n, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high)
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
def taken(values, weights, y, x, channel, method):
    """Value and weight of the one sample that is taken, of equal ones the first layer's; NaN and 0 without data."""
    value = np.nan
    weight = 0.0
    for k in range(values.shape[0]):
        if weights[k, channel, y, x] > 0.0:
            new = np.float64(values[k, channel, y, x])
            better = (
                weight == 0.0
                or method == CombineMethod.LAST
                or (method == CombineMethod.MIN and new < value)
                or (method == CombineMethod.MAX and new > value)
            )
            if better:
                value = new
                weight = np.float64(weights[k, channel, y, x])
    return value, weight


@register_jitable
def write_pixel(value, weight, y, x, channel, out, channels):
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
        if method in TAKE_ONE:
            value, weight = taken(values, weights, y, x, channel, method)
        else:
            value = np.nan
            weight = sum_of_weights(weights, y, x, channel)
            n = sort_layers(values, weights, y, x, channel)
            if n > 0:
                value = combine_sorted(
                    values, weights, n, y, x, channel, method, kappa_low, kappa_high, trim_low, trim_high
                )
        write_pixel(value, weight, y, x, channel, out, values.shape[1])
