"""The photometric model of Phase 5: array in, array out; no files, no WCS, no logging.

Sequence of Phase 5, the same on both backends
----------------------------------------------
1. *Measure.* Every tile is resampled onto one coarse grid of cells (means over ``photometry_cell_px`` squared output
   pixels): a :class:`CoarseTile`. (`resample.measure.measure_tile`)
2. *Solve.* :func:`compute_photometric_gains_and_offsets`: pair relations in the overlaps (`overlaps.pairs`), then one
   global robust least squares for the gains (`overlaps.gains`) and one for levels and gradients together
   (`overlaps.backgrounds`) -> :class:`PhotometricSolution`. On the CPU in both modes, so that it is bit-identical.
3. *Coadd.* Each tile is normalised with :func:`apply_photometric_normalization` as it is read, for both backends alike,
   then resampled, weighted and combined block by block: the science mosaic. (`resample.coadd.coadd_block`)
4. *Coverage renormalisation*, if asked for: :func:`coverage_scale`, :func:`coverage_gain` and
   :func:`relative_coverage_gains` on the coverage of step 3, then a second coadd.
5. *Level sky, RGB balance and black point*, if asked for: a plane a channel (`phases.phase5_sky_plane`),
   :func:`rgb_balance_gains`, :func:`black_point`. Steps 4 and 5 make the aesthetic mosaic and never touch the science
   one; the preview shows them.

Model
-----
Tile k, channel c, sky position p, place (u, v) on the tile: ``y = g_kc S_c(p) + o_kc + G_kc(u, v) + noise`` with G a
polynomial of the second order and of mean 0 over the tile. The normalised tile is ``C = (y - pivot - G) / g + level``:
the gain acts about the tile's own sky (the pivot), so that limiting a gain cannot move the sky. The derivation and its
limits stand in docs/photometry.md.

Limitations
-----------
A plane over the whole mosaic, and weakly a quadratic, show in no overlap: priors keep the mean slope of the tiles, and
``sky_error`` says how well the sky is known. One gain per tile and channel: vignetting that a flat has left stays in the
stars' fluxes. Tiles whose overlaps have no structure keep gain 1. The absolute scale is the geometric mean of the
tiles' own, the absolute background their median.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from zemosaic_pipeline.errors import Notice
from zemosaic_pipeline.overlaps.backgrounds import Measured, sky_errors, solve_backgrounds
from zemosaic_pipeline.overlaps.gains import GAUGE_FACTOR, components, solve_gains, tiles_of
from zemosaic_pipeline.overlaps.gradients import TERMS
from zemosaic_pipeline.overlaps.overlap import in_units
from zemosaic_pipeline.overlaps.pairs import CoarseTile, PairRelation, measure_pairs

#: Pixels that :func:`apply_photometric_normalization` works on at a time.
NORMALISED_AT_ONCE = 1 << 17
#: Size of gradients, in units of the noise of a pixel, below which there are none that matter.
NO_GRADIENT = 0.1
#: Size of gradients, in the same unit, beyond which fits go astray (measured: 0.8 % of a gain at 300).
STEEP = 300.0
#: Smallest error of a smooth difference, in the same unit: one overlap must not outweigh all others by any factor.
LEAST_ERROR = 1e-4
#: Most places at which the error of the low-frequency sky is computed.
MOST_PLACES = 1000


class Normalisation(NamedTuple):
    """What :func:`apply_photometric_normalization` takes for one tile, its pixels apart; it can be a key."""

    gain: tuple[float, ...]
    pivot: tuple[float, ...]
    level: tuple[float, ...]
    gradient: tuple[tuple[float, ...], ...] | None = None


@dataclass(frozen=True)
class PhotometricSolution:
    """Gain, pivot, level and gradient of every tile and channel: ``C = (y - pivot - G) / gain + level``.

    ``gain``, ``pivot`` and ``level`` are float64 (K, C), ``gradient`` (K, C, 5) the coefficients of G in tile units
    (`overlaps.gradients.polynomial_terms` without the constant).
    ``gain_se`` is the standard error of ln gain (inf: undetermined), ``offset_se`` of the level in mosaic units.
    ``gradient_sizes`` are those of slopes, curvatures and of the curvature common to all tiles of a camera, and
    ``sky_error`` is the standard error of the low-frequency sky (with a constant, a plane, a quadratic over the whole
    mosaic taken out; of the largest group of tiles, NaN where none overlap), both in units of the noise of a median
    tile's pixel.
    ``component`` numbers the connected groups of overlapping tiles, ``excluded`` marks tiles left out of the mosaic.
    ``step_after`` (P, C) is :attr:`PairRelation.step_before` once normalised.
    """

    gain: np.ndarray
    pivot: np.ndarray
    level: np.ndarray
    gain_se: np.ndarray
    offset_se: np.ndarray
    component: np.ndarray
    excluded: np.ndarray
    gradient: np.ndarray
    pairs: tuple[PairRelation, ...] = ()
    step_after: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))
    sky_error: np.ndarray = field(default_factory=lambda: np.zeros(3))
    gradient_sizes: np.ndarray = field(default_factory=lambda: np.zeros(0))
    warnings: tuple[Notice, ...] = ()

    @property
    def offset(self) -> np.ndarray:
        """The additive term of ``y = gain * S + offset``, (K, C), tile units."""
        return self.pivot - self.gain * self.level

    @property
    def has_gradients(self) -> bool | None:
        """Whether gradients were found that matter; None where none were looked for."""
        return bool(self.gradient_sizes.max() > NO_GRADIENT) if self.gradient_sizes.size and self.pairs else None

    def row(self, tile: int) -> Normalisation:
        """What :func:`apply_photometric_normalization` takes for one tile."""
        gain, pivot, level = (tuple(map(float, values[tile])) for values in (self.gain, self.pivot, self.level))
        gradient = self.gradient[tile]
        return Normalisation(gain, pivot, level, tuple(map(tuple, gradient.tolist())) if gradient.any() else None)

    def subset(self, tiles: Sequence[int]) -> PhotometricSolution:
        """The solution of some of the tiles, for the coadd; pairs and warnings stay those of all."""
        rows = np.asarray(tiles, dtype=int)
        names = ("gain", "pivot", "level", "gain_se", "offset_se", "component", "excluded", "gradient")
        return replace(self, **{name: getattr(self, name)[rows] for name in names})


def identity_solution(tiles: int, channels: int) -> PhotometricSolution:
    """The solution that changes nothing."""
    shape = (tiles, channels)
    return PhotometricSolution(
        gain=np.ones(shape),
        pivot=np.zeros(shape),
        level=np.zeros(shape),
        gain_se=np.zeros(shape),
        offset_se=np.zeros(shape),
        component=np.zeros(tiles, int),
        excluded=np.zeros(tiles, bool),
        gradient=np.zeros((*shape, TERMS[2] - 1)),
    )


def namespace(array):
    """Array namespace of an array; numpy before 2 and cupy's arrays do not tell it themselves."""
    own = getattr(array, "__array_namespace__", None)
    return own() if own else sys.modules[type(array).__module__.partition(".")[0]]


def apply_photometric_normalization(
    data, gain, pivot, level, gradient=None, out=None, first_row: int = 0, height: int | None = None
):
    """Bring tile pixels to the common photometric system: ``(data - pivot - G) / gain + level``.

    Parameters
    ----------
    data : array, floating, (C, ...)
        Tile pixels of any array namespace; NaN stays NaN. With a gradient (C, rows, W): whole rows of the tile.
    gain, pivot, level : sequence of C floats
        One row of :class:`PhotometricSolution`.
    gradient : sequence of C sequences of 5 floats, optional
        Coefficients of G, a polynomial of the pixel's place on the tile.
    out : array like ``data``, optional
        Where to put the result.
    first_row, height : int
        The tile's row that ``data`` begins with, and the tile's height; by default ``data`` is the whole tile.

    Returns
    -------
    array
        Same namespace, dtype, shape and device as ``data``.
    """
    xp = namespace(data)
    out = xp.empty_like(data) if out is None else out
    # pieces that stay in a processor's cache; for a GPU they are still large
    rows = data.shape[1] if data.ndim > 1 else 1
    step = max(1, NORMALISED_AT_ONCE * rows // max(data.size // data.shape[0], 1))
    shape = (height or rows, data.shape[-1])
    for c in range(data.shape[0]):
        for row in range(0, rows, step):
            piece = (c, slice(row, min(row + step, rows)), ...) if data.ndim > 1 else (c,)
            out[piece] = data[piece] - float(pivot[c])
            if gradient is not None:
                out[piece] -= gradient_of_rows(out[piece], gradient[c], first_row + row, shape)
            out[piece] *= 1.0 / float(gain[c])
            out[piece] += float(level[c])
    return out


def gradient_of_rows(like, coefficients, first_row: int, shape: tuple[int, int]):
    """G of some rows of a tile of ``shape`` (H, W): an array (rows, W) of the kind and type of ``like`` (rows, W)."""
    xp = namespace(like)
    home = {} if xp.__name__ in ("numpy", "cupy") else {"device": like.device}
    half = max(shape) / 2
    u = (xp.arange(shape[1], dtype=like.dtype, **home) - (shape[1] - 1) / 2) / half
    v = (xp.arange(first_row, first_row + like.shape[0], dtype=like.dtype, **home) - (shape[0] - 1) / 2) / half
    du, dv, duu, duv, dvv = map(float, coefficients)
    # as polynomial_terms has them, in Horner's form: three passes over the pixels
    along = dv * v + dvv * v * v - (duu * shape[1] ** 2 + dvv * shape[0] ** 2) / (12 * half**2)
    out = (du + duv * v)[:, None] + (duu * u)[None, :]
    out *= u[None, :]
    out += along[:, None]
    return out


# ------------------------------------------------------------------------------------------------------- solving


@dataclass(frozen=True)
class PhotometryOptions:
    """What the user can choose: match gains at all, the largest standard error of a believed ln gain, leave bad
    tiles out, the order (0, 1 or 2) of the tiles' gradients."""

    match_gain: bool = True
    gain_se_limit: float = 0.05
    reject_bad_tiles: bool = True
    gradient_order: int = 2


def compute_photometric_gains_and_offsets(
    tiles: Sequence[CoarseTile],
    options: PhotometryOptions | None = None,
    pairs: Sequence[PairRelation] | None = None,
) -> PhotometricSolution:
    """Gain, level and gradient of every tile and channel from the overlaps.

    Parameters
    ----------
    tiles : sequence of CoarseTile
        All with the same number of channels C.
    options : PhotometryOptions
    pairs : sequence of PairRelation, optional
        Relations measured before, for gradients of at least the order in ``options``; otherwise every overlapping pair
        is measured here.

    Returns
    -------
    PhotometricSolution

    Raises
    ------
    ValueError
        No tiles, or tiles with different numbers of channels.
    """
    options = options or PhotometryOptions()
    if not tiles or len({len(t.noise) for t in tiles}) != 1:
        raise ValueError("compute_photometric_gains_and_offsets needs tiles with the same number of channels")
    if pairs is None:
        pairs = measure_pairs(tiles, order=options.gradient_order)
    excluded = np.zeros(len(tiles), bool)
    while True:
        used = [p for p in pairs if not (excluded[p.i] or excluded[p.j])]
        gain, gain_se = gains_of_tiles(used, len(tiles), len(tiles[0].noise), options)
        bad = bad_tiles(tiles, used, gain, excluded) if options.reject_bad_tiles else []
        if not bad:
            return backgrounds_of_tiles(tiles, used, gain, gain_se, excluded, options)
        excluded[bad] = True


def gains_of_tiles(
    pairs: Sequence[PairRelation], count: int, channels: int, options: PhotometryOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Gains (K, C) and the standard errors of their logarithms; 1 and inf where they are not asked for or not known."""
    if not options.match_gain:
        return np.ones((count, channels)), np.full((count, channels), np.inf)
    log_gain, error = solve_gains(pairs, count, channels, options.gain_se_limit)
    return np.exp(log_gain), error


def bad_tiles(
    tiles: Sequence[CoarseTile], pairs: Sequence[PairRelation], gain: np.ndarray, excluded: np.ndarray
) -> list[int]:
    """Tiles to leave out: those of absurd level, all together, or else the one that disagrees most."""
    absurd = absurd_levels(np.stack([t.sky for t in tiles]) / gain, excluded)
    return absurd if absurd else worst_tile(pairs, len(tiles))


def absurd_levels(sky: np.ndarray, excluded: np.ndarray) -> list[int]:
    """Tiles whose sky (K, C), in the mosaic's units, lies further from the others' than a thousand times what the
    others are."""
    use = np.flatnonzero(~excluded)
    if len(use) < 3:
        return []
    middle = np.median(sky[use], axis=0)
    deviation = np.abs(sky[use] - middle)
    scale = np.maximum(np.abs(middle), np.median(deviation, axis=0))
    return use[np.any(deviation > 1000 * np.maximum(scale, 1e-30), axis=1)].tolist()


def worst_tile(pairs: Sequence[PairRelation], count: int) -> list[int]:
    """The tile to leave out: none of its overlaps agrees while those of the others do."""
    if len(pairs) < 3:
        return []
    # scatter in units of the expected noise, the worst channel
    scatter = np.nan_to_num(np.array([p.scatter for p in pairs])).max(axis=1)
    typical = max(float(np.median(scatter)), 1.0)
    best = np.full(count, np.inf)
    for pair, value in zip(pairs, scatter, strict=True):
        best[[pair.i, pair.j]] = np.minimum(best[[pair.i, pair.j]], value)
    best[~np.isfinite(best)] = 0
    k = int(np.argmax(best))
    return [k] if best[k] > 30 * typical else []


def backgrounds_of_tiles(
    tiles: Sequence[CoarseTile],
    pairs: Sequence[PairRelation],
    gain: np.ndarray,
    gain_se: np.ndarray,
    excluded: np.ndarray,
    options: PhotometryOptions,
) -> PhotometricSolution:
    """Levels and gradients for given gains, and all that is to be said of the solution."""
    pivot = np.stack([t.sky for t in tiles])
    component = components(len(tiles), pairs)
    unit = noise_units(tiles, gain, excluded)
    terms = TERMS[options.gradient_order]
    found = solve_backgrounds(measured_differences(tiles, pairs, gain, unit, terms))
    polynomials = found.polynomials * unit[:, None]
    level = set_gauge(-polynomials[:, :, 0], pivot, gain, component, excluded)
    gradient = np.zeros((*gain.shape, TERMS[2] - 1))
    gradient[:, :, : terms - 1] = polynomials[:, :, 1:] * gain[:, :, None]
    notes = [*bad_notes(tiles, excluded), *component_notes(tiles, component, excluded)]
    if options.match_gain:
        notes += gain_notes(tiles, gain_se, excluded)
    return PhotometricSolution(
        gain=gain,
        pivot=pivot,
        level=level,
        gain_se=gain_se,
        offset_se=found.system.level_errors(component)[:, None] * unit,
        component=component,
        excluded=excluded,
        gradient=gradient,
        pairs=tuple(pairs),
        step_after=overlap_steps(tiles, pairs, gain, level, polynomials),
        sky_error=sky_errors(
            found.system, *sampled_fields(tiles, (component == 0) & ~excluded, options.gradient_order)
        ),
        gradient_sizes=found.sizes,
        warnings=tuple(notes + steep_notes(found.sizes)),
    )


def bad_notes(tiles: Sequence[CoarseTile], excluded: np.ndarray) -> list[Notice]:
    """One named warning for each tile that is left out."""
    words = "its values do not belong to this sky; left out of the mosaic"
    return [_notice(tiles[k], "bad_tile", words) for k in np.flatnonzero(excluded).tolist()]


def steep_notes(sizes: np.ndarray) -> list[Notice]:
    """A warning where gradients are so steep that fits cannot be trusted to tell them from the sky."""
    largest = float(np.max(sizes, initial=0.0))
    if largest <= STEEP:
        return []
    words = (
        f"steep_gradients: the tiles' gradients are about {largest:.0f} times the noise of a pixel; gains and levels may "
        "be wrong: flatten the tiles, or leave the worst out"
    )
    return [Notice(words, "steep_gradients", "")]


def noise_units(tiles: Sequence[CoarseTile], gain: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    """The noise (C,) of the median tile's pixel, normalised: the unit in which gradients are judged."""
    noise = np.stack([t.pixel_noise for t in tiles]) / gain
    unit = np.median(noise[~excluded] if (~excluded).any() else noise, axis=0)
    return np.where(unit > 0, unit, 1.0)


def measured_differences(
    tiles: Sequence[CoarseTile], pairs: Sequence[PairRelation], gain: np.ndarray, unit: np.ndarray, terms: int
) -> Measured:
    """What the overlaps say of the first ``terms`` terms of the tiles' backgrounds, once their gains are known.

    The modes are made of the terms in their order: the first of them are those of the first terms alone.
    """
    i, j = tiles_of(pairs)
    if any(len(p.modes_i) < terms for p in pairs):
        raise ValueError("the pairs were measured for gradients of a lower order")
    shape = (len(pairs), len(unit), terms)
    x, y = (np.array([getattr(p, name)[:, :terms] for p in pairs]).reshape(shape) for name in ("smooth_i", "smooth_j"))
    error = np.array([p.smooth_se for p in pairs]).reshape(shape[:2]) / gain[i] / unit
    error = np.maximum(error, LEAST_ERROR)
    return Measured(
        i,
        j,
        difference=(x / gain[i][:, :, None] - y / gain[j][:, :, None]) / unit[:, None],
        weight=np.mean(error**-2.0, axis=1),
        modes_i=np.array([p.modes_i[:terms, :terms] for p in pairs]).reshape(-1, terms, terms),
        modes_j=np.array([p.modes_j[:terms, :terms] for p in pairs]).reshape(-1, terms, terms),
        camera=cameras([t.scale for t in tiles]),
    )


def sampled_fields(tiles: Sequence[CoarseTile], use: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """What `overlaps.backgrounds.sky_errors` takes: (n, K, M) and (n, 2), of places spread over the tiles in use."""
    numbers = [k for k in np.flatnonzero(use).tolist() if tiles[k].fraction.size]
    places = np.concatenate([np.zeros((0, 2)), *(tiles[k].sample_cells() for k in numbers)])
    places = places[:: max(-(-len(places) // MOST_PLACES), 1)]
    fields = np.zeros((len(places), len(tiles), TERMS[order]))
    for k in numbers:
        fields[:, k] = tiles[k].terms_within(places, order)
    covering = np.count_nonzero(fields[:, :, 0], axis=1)
    fields, places = fields[covering > 0], places[covering > 0]
    return fields / covering[covering > 0][:, None, None], places


def cameras(scales: Sequence[float]) -> np.ndarray:
    """Number of the camera of each tile: pixel scales further than 2 % from the next are those of different cameras."""
    order = np.argsort(scales, kind="stable")
    ordered = np.log(np.asarray(scales, dtype=float)[order])
    number = np.empty(len(order), int)
    number[order] = np.concatenate([[0], np.cumsum(np.diff(ordered) > 0.02)])
    return number


def gain_notes(tiles: Sequence[CoarseTile], gain_se: np.ndarray, excluded: np.ndarray) -> list[Notice]:
    """One named warning for each tile whose gain its overlaps cannot tell."""
    if np.count_nonzero(~excluded) < 2:
        return []
    words = "its overlaps have too little structure to tell its gain; gain 1 in all channels, only its background is matched"
    unknown = np.isinf(gain_se).all(axis=1) & ~excluded
    return [_notice(tiles[k], "gain_undetermined", words) for k in np.flatnonzero(unknown).tolist()]


def component_notes(tiles: Sequence[CoarseTile], component: np.ndarray, excluded: np.ndarray) -> list[Notice]:
    """One named warning for each tile or group that overlaps nothing."""
    notes: list[Notice] = []
    groups = [np.nonzero((component == c) & ~excluded)[0] for c in range(component.max() + 1)]
    groups = [g for g in groups if len(g)]
    if len(groups) < 2:
        return notes
    for group in groups[1:]:
        if len(group) == 1:
            words = "it overlaps no other tile; matched by its sky alone"
            notes.append(_notice(tiles[group[0]], "no_overlap", words))
        else:
            names = ", ".join(tiles[k].name for k in group[:5]) + (", ..." if len(group) > 5 else "")
            words = f"this group of {len(group)} tiles ({names}) overlaps no other; matched by its sky alone"
            notes.append(_notice(tiles[group[0]], "second_island", words))
    return notes


def _notice(tile: CoarseTile, kind: str, words: str) -> Notice:
    """A warning about a tile, as `run_report.json` has it."""
    return Notice(f"{tile.name}: {kind}: {words}", kind, tile.name)


def overlap_steps(
    tiles: Sequence[CoarseTile],
    pairs: Sequence[PairRelation],
    gain: np.ndarray,
    level: np.ndarray,
    polynomials: np.ndarray,
) -> np.ndarray:
    """Difference (P, C) of the sky of each pair's tiles, normalised, in units of one normalised tile's pixel noise."""
    if not pairs:
        return np.zeros((0, gain.shape[1]))
    noise = np.stack([t.pixel_noise for t in tiles]) / gain
    sides = []
    for k, smooth, modes in zip(tiles_of(pairs), ("smooth_i", "smooth_j"), ("modes_i", "modes_j"), strict=True):
        mean = np.array([getattr(p, smooth)[:, 0] for p in pairs])
        first = np.array([getattr(p, modes)[0, 1 : polynomials.shape[2]] for p in pairs])
        # the level holds the polynomial's constant already
        slope = np.sum(polynomials[k, :, 1:] * first[:, None], axis=2)
        sides.append((mean / gain[k] + level[k] - slope, noise[k] ** 2))
    (one, var_one), (other, var_other) = sides
    return in_units(one - other, np.sqrt((var_one + var_other) / 2))


def set_gauge(
    level: np.ndarray, pivot: np.ndarray, gain: np.ndarray, component: np.ndarray, excluded: np.ndarray
) -> np.ndarray:
    """Shift the levels so that each group of tiles has the median background that all tiles had, per channel.

    The background of tiles in other units is none of the mosaic's.
    """
    level = level.copy()
    usual = ~excluded & (np.abs(np.log(gain)) <= np.log(GAUGE_FACTOR)).all(axis=1)
    target = np.median(pivot[usual] if usual.any() else pivot, axis=0)
    for c in range(int(component.max()) + 1):
        members = (component == c) & ~excluded
        if members.any():
            level[component == c] += target - np.median(level[members], axis=0)
    return level


# ------------------------------------------------------------------- coverage renormalisation and colour (for the eye)


def coverage_scale(coverage, blur):
    """What evens out the coverage: ``clip(B / C, 0.5, 2)`` with ``B = blur(C) / blur(C > 0)``; 1 where C is 0.

    Parameters
    ----------
    coverage : array (H, W), floating
        Sum of weights; 0 where no tile has data.
    blur : callable
        Gaussian filter of the backend that holds ``coverage``.

    Returns
    -------
    scale, smooth : array (H, W)
        The scale and B.
    """
    xp = namespace(coverage)
    covered = coverage > 0
    one = xp.ones_like(coverage)
    support = blur(xp.where(covered, one, xp.zeros_like(coverage)))
    smooth = blur(coverage) / xp.where(support > 0, support, one)
    scale = xp.clip(smooth / xp.where(covered, coverage, one), 0.5, 2.0)
    return xp.where(covered, scale, one), smooth


def coverage_gain(
    scale: np.ndarray,
    smooth: np.ndarray,
    coverage: np.ndarray,
    footprint: np.ndarray,
    clip: tuple[float, float],
    pixels_per_cell: int = 1,
) -> float:
    """Gain of one tile: median of ``scale`` over its footprint where C > 0 and B >= 2; 1 if too few pixels qualify.

    All arrays (h, w); they may be averaged over cells of ``pixels_per_cell`` pixels.
    """
    use = footprint & (coverage > 0) & (smooth >= 2)
    if np.count_nonzero(use) * pixels_per_cell < max(64, 1e-3 * np.count_nonzero(footprint) * pixels_per_cell):
        return 1.0
    return float(np.clip(np.median(scale[use]), clip[0], clip[1]))


def relative_coverage_gains(gains: np.ndarray) -> np.ndarray:
    """Coverage gains divided by their median, so that the mosaic as a whole is not dimmed."""
    gains = np.asarray(gains, dtype=float)
    return gains / np.median(gains) if gains.size else gains


def rgb_balance_gains(sky: np.ndarray, clip: tuple[float, float]) -> np.ndarray:
    """Factors (3,) that bring the sky levels of the channels to their geometric mean, clipped all together.

    Clipping one channel alone would shift the colour that the others have found: where one factor exceeds the clip,
    all are drawn towards 1 by the same power.
    """
    sky = np.asarray(sky, dtype=float)
    if not (np.isfinite(sky).all() and (sky > 0).all()):
        return np.ones(len(sky))
    logs = np.log(np.exp(np.mean(np.log(sky))) / sky)
    limit = np.where(logs > 0, np.log(clip[1]), -np.log(clip[0]))
    power = min(1.0, float(np.min(np.where(logs != 0, limit / np.maximum(np.abs(logs), 1e-12), np.inf))))
    return np.exp(logs * power)


def black_point(samples: np.ndarray, percentile: float) -> float:
    """The brightness to subtract from all channels alike: a low percentile of all finite samples."""
    finite = samples[np.isfinite(samples)]
    return float(np.percentile(finite, percentile)) if finite.size else 0.0
