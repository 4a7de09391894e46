"""Raw pixels behind a colour filter array (CFA): repair of hot pixels, and debayering; compiled for the CPU.

Everything works on a *padded strip*: float32 (rows + 2 `MARGIN`, W + 2 `MARGIN`), of which the inner part is wanted.
Nothing is looked at beyond the margin and nothing is measured on the strip as a whole, so that a pixel's result does
not depend on how the rows of a frame are cut into strips.

Debayering follows the definitions of OpenCV's ``COLOR_Bayer*`` (bilinear) and ``COLOR_Bayer*_EA`` (edge-aware) codes,
in float32. OpenCV itself takes only 8 and 16 bit and rounds halves up: a calibrated frame (fractions, and noise that
reaches below 0) would have to be rounded, clipped and scaled, and every interpolated value gains 0.25 (of two) or
0.125 (of four neighbours) of a stored step, in a chequered pattern. The tests hold this code to OpenCV's on integers.
"""

from __future__ import annotations

import numpy as np
from numba import njit

MARGIN = 5
"""Rows and columns beyond the wanted ones: 1 for debayering, and 4 for the neighbours a pixel is judged by."""

STAR_FRACTION = np.float32(0.35)
"""A pixel is part of a star where seven of the eight pixels around it stand out by this fraction of it together."""

_ENOUGH = 6
_HALF = np.float32(0.5)
_QUARTER = np.float32(0.25)
_NAN = np.float32(np.nan)
_NONE = np.float32(-np.inf)
_SPREAD_24 = np.float32(1.753)
"""Distance of the 5th smallest from the 5th largest of 24 normal numbers, in sigma (mean of 2 million draws)."""


@njit(nogil=True, cache=True, error_model="numpy")
def pad_strip(rows, first, height, y0, out):
    """Put rows of a frame into a padded strip, mirrored about the frame's border pixels (which keeps the colours).

    Parameters
    ----------
    rows : float32 (n, W)
        Rows `first` to ``first + n`` of a frame that has `height` rows.
    first, height : int
        See `rows`.
    y0 : int
        The strip's first wanted row.
    out : float32 (wanted + 2 MARGIN, W + 2 MARGIN)
        Where to; infinity becomes NaN.

    Returns
    -------
    bool
        There is a NaN.
    """
    width = rows.shape[1]
    missing = 0
    for j in range(out.shape[0]):
        source = rows[_mirror(y0 + j - MARGIN, height) - first]
        target = out[j]
        target[MARGIN : MARGIN + width] = source
        for i in range(MARGIN):
            target[i] = source[_mirror(i - MARGIN, width)]
            target[MARGIN + width + i] = source[_mirror(width + i, width)]
        for i in range(target.size):
            finite = abs(target[i]) < np.inf
            target[i] = target[i] if finite else _NAN
            missing += not finite
    return missing > 0


@njit(nogil=True, cache=True, error_model="numpy")
def _mirror(index, length):
    """Index of a pixel beyond a border, mirrored about the border pixel."""
    period = 2 * (length - 1)
    index = index % period
    return index if index < length else period - index


# -------------------------------------------------------------------------------------------------- hot pixels


@njit(nogil=True, cache=True, error_model="numpy")
def repair(strip, sigma, floor):
    """Replace hot, dead and missing pixels by the median of their eight neighbours of the same colour.

    A pixel is *defective* where it

    1. is NaN; or
    2. stands off the median m of its 8 same-coloured neighbours (2 pixels apart) by more than `sigma` times the local
       noise, which is that of its 24 same-coloured neighbours (4 pixels and less apart; spread of their inner 16, so
       that four hot pixels or a star's wing among them do not count), beyond the second highest (lowest) of the 8, so
       that two hot pixels near each other do not hide; and
    3. is alone: the eight pixels around it, most of which have other colours, do not stand out in the same direction.
       Of their excesses over their own 8 same-coloured neighbours, the largest is left out (it may be hot, too), and
       the sum of the others must be below `STAR_FRACTION` of the pixel's excess. Around the core of a star of FWHM 2
       pixels the sum is 2.5 of it, of FWHM 1.5 pixels 1.7, and more beside the core: a star of FWHM 2 pixels is kept
       even where it is 6 times fainter in its other colours.

    What is decided rests on the original values, in whatever order. A lone NaN and a dead row or column are
    filled; a pixel with fewer than 6 valid neighbours of its 8 (in a larger hole, its edge included) is left as it is.

    Parameters
    ----------
    strip : float32 (n + 2 MARGIN, W + 2 MARGIN)
        Padded strip; not changed.
    sigma : float32
        Threshold in sigma; 0 repairs NaN only.
    floor : float32
        The local noise is taken as not less than this (the rounding of stored integers).

    Returns
    -------
    float32, same shape
        Repaired but for the outermost 4 pixels.
    """
    out = strip.copy()
    width = strip.shape[1]
    flags = np.zeros(width, np.bool_)
    reach = np.float32(0.3) * sigma  # the range is 1.7 sigma on average, seldom above 3.3
    for y in range(4, strip.shape[0] - 4):
        _suspects(strip[y - 2], strip[y], strip[y + 2], reach, sigma > 0, flags)
        for x in range(4, width - 4):
            if flags[x]:
                _judge(strip, y, x, sigma, floor, out)
    return out


@njit(nogil=True, cache=True, error_model="numpy")
def _two_highest(value, first, second):
    """The two highest numbers with one more; NaN is passed over."""
    lower = first if value > first else value
    return (value if value > first else first), (lower if lower > second else second)


@njit(nogil=True, cache=True, error_model="numpy")
def _suspects(above, here, below, reach, all_of_them, flags):
    """Flag NaN, and pixels that lie beyond the inner six of their 8 neighbours by `reach` times the range of these.

    Cheap, with no branch in the loop; with 8 sigma a normal pixel in 150 is flagged, a defect nearly always.
    """
    for x in range(4, here.size - 4):
        value = here[x]
        h1, h2 = _two_highest(above[x - 2], _NONE, _NONE)
        h1, h2 = _two_highest(above[x], h1, h2)
        h1, h2 = _two_highest(above[x + 2], h1, h2)
        h1, h2 = _two_highest(here[x - 2], h1, h2)
        h1, h2 = _two_highest(here[x + 2], h1, h2)
        h1, h2 = _two_highest(below[x - 2], h1, h2)
        h1, h2 = _two_highest(below[x], h1, h2)
        h1, h2 = _two_highest(below[x + 2], h1, h2)
        l1, l2 = _two_highest(-above[x - 2], _NONE, _NONE)
        l1, l2 = _two_highest(-above[x], l1, l2)
        l1, l2 = _two_highest(-above[x + 2], l1, l2)
        l1, l2 = _two_highest(-here[x - 2], l1, l2)
        l1, l2 = _two_highest(-here[x + 2], l1, l2)
        l1, l2 = _two_highest(-below[x - 2], l1, l2)
        l1, l2 = _two_highest(-below[x], l1, l2)
        l1, l2 = _two_highest(-below[x + 2], l1, l2)
        limit = reach * (h2 + l2)
        flags[x] = (value != value) | (all_of_them & ((value - h2 > limit) | (-l2 - value > limit)))


@njit(nogil=True, cache=True, error_model="numpy")
def _gather(strip, y, x, reach, found):
    """Sort the valid same-coloured neighbours of a pixel into `found`; return how many they are."""
    n = 0
    for dy in range(-reach, reach + 1, 2):
        for dx in range(-reach, reach + 1, 2):
            value = strip[y + dy, x + dx]
            if (dy == 0 and dx == 0) or value != value:
                continue
            i = n
            while i > 0 and found[i - 1] > value:
                found[i] = found[i - 1]
                i -= 1
            found[i] = value
            n += 1
    return n


@njit(nogil=True, cache=True, error_model="numpy")
def _middle(found, n):
    """Median of the n sorted values."""
    return (found[(n - 1) // 2] + found[n // 2]) * _HALF


@njit(nogil=True, cache=True, error_model="numpy")
def _judge(strip, y, x, sigma, floor, out):
    """Write a pixel's repaired value into `out` where it is defective."""
    found = np.empty(24, np.float32)
    n = _gather(strip, y, x, 2, found)
    if n < _ENOUGH:
        return
    middle = _middle(found, n)
    excess = strip[y, x] - middle
    if excess != excess:
        out[y, x] = middle
        return
    beyond = found[n - 2] - middle if excess > 0 else middle - found[1]
    n = _gather(strip, y, x, 4, found)
    cut = n // 6
    noise = max((found[n - 1 - cut] - found[cut]) / _SPREAD_24, floor)
    if abs(excess) > sigma * noise + beyond and _is_alone(strip, y, x, excess, found):
        out[y, x] = middle


@njit(nogil=True, cache=True, error_model="numpy")
def _is_alone(strip, y, x, excess, found):
    """Whether the pixels around a pixel do not stand out as it does."""
    sign = np.float32(1) if excess > 0 else np.float32(-1)
    total, largest = np.float32(0), _NONE
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            value = strip[y + dy, x + dx]
            if (dy == 0 and dx == 0) or value != value:
                continue
            n = _gather(strip, y + dy, x + dx, 2, found)
            if n > 0:
                value = sign * (value - _middle(found, n))
                total += value
                largest = max(largest, value)
    return total - max(largest, np.float32(0)) < STAR_FRACTION * abs(excess)


# --------------------------------------------------------------------------------------------------- debayering


@njit(nogil=True, cache=True, error_model="numpy")
def debayer(strip, red_y, red_x, edge_aware, out):
    """Interpolate red, green and blue at every wanted pixel of a padded strip.

    Red and blue are the means of their two or four nearest samples. Green at a red or blue pixel is the mean of four
    samples (bilinear), or of the two above and below or to the left and right, whichever differ less (edge-aware). A
    value that needs a NaN is NaN.

    Bilinear is a linear filter and keeps every star's flux. Edge-aware does not: beside a star's core it takes the two
    samples that are alike, which are the fainter ones. Green loses 17 % of a bright star of FWHM 2 pixels, 7 % at 3.5
    pixels, and less where noise decides (peak at 3 sigma: 7 % and 1.4 %), so that neither colour nor linearity is kept.

    Parameters
    ----------
    strip : float32 (n + 2 MARGIN, W + 2 MARGIN)
        Repaired padded strip.
    red_y, red_x : int
        0 or 1: parity of the wanted rows and columns that hold red pixels.
    edge_aware : bool
        How green is interpolated.
    out : float32 (3, n, W)
        Red, green, blue.
    """
    for j in range(out.shape[1]):
        y = j + MARGIN
        red_row = (j & 1) == red_y
        colour_x = red_x if red_row else 1 - red_x
        own, other = (0, 2) if red_row else (2, 0)
        # views that start at the same column, so that the loop is over plain arrays
        above, here, below = strip[y - 1, MARGIN - 1 :], strip[y, MARGIN - 1 :], strip[y + 1, MARGIN - 1 :]
        _debayer_row(above, here, below, colour_x, edge_aware, out[own, j], out[1, j], out[other, j])


@njit(nogil=True, cache=True, error_model="numpy")
def _debayer_row(above, here, below, colour_x, edge_aware, own, green, other):
    """Fill one row of three planes: the row's own colour, green, and the colour of the rows above and below."""
    for x in range(own.size):
        up, down, left, right, centre = above[x + 1], below[x + 1], here[x], here[x + 2], here[x + 1]
        upright, level = (up + down) * _HALF, (left + right) * _HALF
        corners = ((above[x] + above[x + 2]) + (below[x] + below[x + 2])) * _QUARTER
        if edge_aware:
            cross = upright if abs(left - right) > abs(up - down) else level
        else:
            cross = ((left + right) + (up + down)) * _QUARTER
        at_colour = (x & 1) == colour_x
        own[x] = centre if at_colour else level
        green[x] = cross if at_colour else centre
        other[x] = corners if at_colour else upright
