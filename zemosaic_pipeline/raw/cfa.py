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
        target = out[j, MARGIN:]
        for i in range(width):  # loops, not slices: these take the compiler a second
            finite = abs(source[i]) < np.inf
            target[i] = source[i] if finite else _NAN
            missing += not finite
        for i in range(MARGIN):
            out[j, i] = target[_mirror(i - MARGIN, width)]
            target[width + i] = target[_mirror(width + i, width)]
    return missing > 0


@njit(nogil=True, cache=True, error_model="numpy")
def _mirror(index, length):
    """Index of a pixel beyond a border, mirrored about the border pixel."""
    period = 2 * (length - 1)
    index = index % period
    return index if index < length else period - index


# -------------------------------------------------------------------------------------------------- hot pixels


@njit(nogil=True, cache=True, error_model="numpy")
def repair(strip, sigma, floor, out):
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
    out : float32, shape of `strip`
        Repaired but for the outermost 4 pixels.
    """
    for y in range(strip.shape[0]):
        for x in range(strip.shape[1]):
            out[y, x] = strip[y, x]
    width = strip.shape[1]
    pairs = np.empty((4, width), np.float32)
    flags = np.zeros(-(-width // 8) * 8, np.bool_)
    eights = flags.view(np.uint64)
    reach = np.float32(0.3) * sigma  # the range is 1.7 sigma on average, seldom above 3.3
    for y in range(4, strip.shape[0] - 4):
        _pairs(strip[y - 2], strip[y + 2], pairs)
        _suspects(strip[y], pairs, reach, sigma > 0, flags)
        for k in range(eights.size):
            if eights[k]:  # most pixels are passed over eight at a time
                for x in range(8 * k, 8 * k + 8):
                    if flags[x]:
                        _judge(strip, y, x + 4, sigma, floor, out)


@njit(nogil=True, cache=True, error_model="numpy")
def _lower(a, b):
    """The lower one of two numbers; the second one beside a NaN, which is one instruction of the processor."""
    return a if a < b else b


@njit(nogil=True, cache=True, error_model="numpy")
def _higher(a, b):
    return b if a < b else a


@njit(nogil=True, cache=True, error_model="numpy")
def _pairs(above, below, pairs):
    """Fill `pairs` (4, W) with the lower and the higher one of two rows without NaN, which is passed over.

    The first two rows are for a search for low numbers, where NaN is infinity, the others for high ones.
    """
    low, low_2, high_2, high = pairs[0], pairs[1], pairs[2], pairs[3]
    for x in range(above.size):
        a, b = above[x], below[x]
        c, d = (a if a == a else -_NONE), (b if b == b else -_NONE)
        low[x], low_2[x] = _lower(c, d), _higher(c, d)
        c, d = (a if a == a else _NONE), (b if b == b else _NONE)
        high_2[x], high[x] = _lower(c, d), _higher(c, d)


@njit(nogil=True, cache=True, error_model="numpy")
def _second_lowest(a, a2, b, b2, c, c2, d, d2):
    """Second lowest number of four pairs, the lower one first."""
    second_ab = _lower(_higher(a, b), _lower(a2, b2))
    second_cd = _lower(_higher(c, d), _lower(c2, d2))
    return _lower(_higher(_lower(a, b), _lower(c, d)), _lower(second_ab, second_cd))


@njit(nogil=True, cache=True, error_model="numpy")
def _second_highest(a, a2, b, b2, c, c2, d, d2):
    """Second highest number of four pairs, the higher one first."""
    second_ab = _higher(_lower(a, b), _higher(a2, b2))
    second_cd = _higher(_lower(c, d), _higher(c2, d2))
    return _higher(_lower(_higher(a, b), _higher(c, d)), _higher(second_ab, second_cd))


@njit(nogil=True, cache=True, error_model="numpy")
def _suspects(here, pairs, reach, all_of_them, flags):
    """Flag, from column 4 on, NaN and pixels that lie beyond the inner six of their 8 neighbours by `reach` times the range of these.

    Cheap, with no branch in the loop; with 8 sigma a normal pixel in 150 is flagged, a defect nearly always.
    """
    # views that start at the same column, so that the compiler sees plain arrays: nine times faster
    left, centre, right = here[2:], here[4:], here[6:]
    low, low_2, high_2, high = pairs[0, 2:], pairs[1, 2:], pairs[2, 2:], pairs[3, 2:]
    mid_low, mid_low_2, mid_high_2, mid_high = low[2:], low_2[2:], high_2[2:], high[2:]
    end_low, end_low_2, end_high_2, end_high = low[4:], low_2[4:], high_2[4:], high[4:]
    for x in range(here.size - 8):
        value, a, b = centre[x], left[x], right[x]
        c, d = (a if a == a else -_NONE), (b if b == b else -_NONE)
        bottom = _second_lowest(
            low[x], low_2[x], mid_low[x], mid_low_2[x], end_low[x], end_low_2[x], _lower(c, d), _higher(c, d)
        )
        c, d = (a if a == a else _NONE), (b if b == b else _NONE)
        top = _second_highest(
            high[x], high_2[x], mid_high[x], mid_high_2[x], end_high[x], end_high_2[x], _higher(c, d), _lower(c, d)
        )
        limit = reach * (top - bottom)
        flags[x] = (value != value) | (all_of_them & ((value - top > limit) | (bottom - value > limit)))


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
    middle, low, high, spread = _neighbours(strip, y, x)
    value = strip[y, x]
    if value != value or spread != spread:
        _judge_by_sorting(strip, y, x, sigma, floor, out)
        return
    excess = value - middle
    beyond = high - middle if excess > 0 else middle - low
    noise = max(spread / _SPREAD_24, floor)
    if abs(excess) > sigma * noise + beyond and _is_alone(strip, y, x, excess):
        out[y, x] = middle


@njit(nogil=True, cache=True, error_model="numpy")
def _judge_by_sorting(strip, y, x, sigma, floor, out):
    """Do what `_judge` does for any pixel, also one that is NaN or has NaN among its neighbours."""
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
    if abs(excess) > sigma * noise + beyond and _is_alone(strip, y, x, excess):
        out[y, x] = middle


@njit(nogil=True, cache=True, error_model="numpy")
def _neighbours(strip, y, x):
    """Median, second lowest and second highest of 8 neighbours; spread of the inner 16 of 24, NaN where one is NaN."""
    a, b, c, d, e = strip[y - 4], strip[y - 2], strip[y], strip[y + 2], strip[y + 4]
    near, missing = _sorted(b[x - 2], b[x], b[x + 2], c[x - 2], c[x + 2], d[x - 2], d[x], d[x + 2])
    far, missing_far = _sorted(a[x - 4], a[x - 2], a[x], a[x + 2], a[x + 4], b[x - 4], b[x + 4], c[x - 4])
    rest, missing_rest = _sorted(c[x + 4], d[x - 4], d[x + 4], e[x - 4], e[x - 2], e[x], e[x + 2], e[x + 4])
    spread = -_fifth_lowest(_negative(near), _negative(far), _negative(rest)) - _fifth_lowest(near, far, rest)
    spread = _NAN if missing or missing_far or missing_rest else spread
    return (near[3] + near[4]) * _HALF, near[1], near[6], spread


@njit(nogil=True, cache=True, error_model="numpy")
def _sorted(a, b, c, d, e, f, g, h):
    """Eight numbers in order, by a network of 19 exchanges (Batcher's), and whether one is NaN, when they are not."""
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    a, c = _ordered(a, c)
    b, d = _ordered(b, d)
    e, g = _ordered(e, g)
    f, h = _ordered(f, h)
    a, e = _ordered(a, e)
    b, f = _ordered(b, f)
    c, g = _ordered(c, g)
    d, h = _ordered(d, h)
    a, b = _ordered(a, b)
    c, d = _ordered(c, d)
    e, f = _ordered(e, f)
    g, h = _ordered(g, h)
    c, e = _ordered(c, e)
    d, f = _ordered(d, f)
    b, e = _ordered(b, e)
    d, g = _ordered(d, g)
    b, c = _ordered(b, c)
    d, e = _ordered(d, e)
    f, g = _ordered(f, g)
    return (a, b, c, d, e, f, g, h), total != total


@njit(nogil=True, cache=True, error_model="numpy")
def _ordered(a, b):
    return _lower(a, b), _higher(a, b)


@njit(nogil=True, cache=True, error_model="numpy")
def _negative(a):
    """The negative of eight numbers, the last first."""
    return -a[7], -a[6], -a[5], -a[4], -a[3], -a[2], -a[1], -a[0]


@njit(nogil=True, cache=True, error_model="numpy")
def _fifth_lowest(one, two, three):
    """Fifth lowest number of three rows of numbers in order."""
    # the five lowest of two rows, of which the fifth lowest of one bars the way to the second's first, and so on
    a = _lower(one[0], two[4])
    b = _lower(one[1], two[3])
    c = _lower(one[2], two[2])
    d = _lower(one[3], two[1])
    e = _lower(one[4], two[0])
    a, d = _ordered(a, d)
    b, e = _ordered(b, e)
    a, c = _ordered(a, c)
    b, d = _ordered(b, d)
    a, b = _ordered(a, b)
    c, e = _ordered(c, e)
    b, c = _ordered(b, c)
    d, e = _ordered(d, e)
    c, d = _ordered(c, d)
    ab = _higher(_lower(a, three[4]), _lower(b, three[3]))
    cd = _higher(_lower(c, three[2]), _lower(d, three[1]))
    return _higher(_higher(ab, cd), _lower(e, three[0]))


@njit(nogil=True, cache=True, error_model="numpy")
def _is_alone(strip, y, x, excess):
    """Whether the pixels around a pixel do not stand out as it does."""
    sign = np.float32(1) if excess > 0 else np.float32(-1)
    total, largest = np.float32(0), _NONE
    for dy in range(-1, 2):
        for dx in range(-1, 2):
            if dy == 0 and dx == 0:
                continue
            value = sign * _excess(strip, y + dy, x + dx)
            if value == value:
                total += value
                largest = max(largest, value)
    return total - max(largest, np.float32(0)) < STAR_FRACTION * abs(excess)


@njit(nogil=True, cache=True, error_model="numpy")
def _excess(strip, y, x):
    """Excess of a pixel over the median of its 8 neighbours as far as they are valid; NaN where it, or none of them is."""
    a, b, c = strip[y - 2], strip[y], strip[y + 2]
    near, missing = _sorted(a[x - 2], a[x], a[x + 2], b[x - 2], b[x + 2], c[x - 2], c[x], c[x + 2])
    if not missing:
        return b[x] - (near[3] + near[4]) * _HALF
    found = np.empty(8, np.float32)
    n = _gather(strip, y, x, 2, found)
    return b[x] - _middle(found, n) if n else _NAN


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
