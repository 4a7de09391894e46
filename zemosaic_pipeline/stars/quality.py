"""Clouded and trailed frames, judged by their stars."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np

from zemosaic_pipeline.stars.detection import Stars

_FEWEST_STARS = 5
_ENOUGH_FRAMES = 4


def frame_quality(frames: Sequence[Stars], kinds: Sequence[Hashable] | None = None) -> list[str | None]:
    """Tell which frames of a panel are to be set aside: no stars, trailed, blurred, clouded.

    Absolute limits: 5 stars, and stars not longer than twice their width. From four frames on a frame is compared with
    the median of its kind, and set aside where its stars are

    - longer: elongation above 1.4, and above the median by 0.25 and by 5 robust sigma;
    - wider: FWHM above 1.7 times the median, and by 5 robust sigma;
    - fainter or fewer: the flux of its brightest stars below 0.4 times the median, or less than 0.4 times as many.

    Frames that are only somewhat worse get a smaller weight in the stack instead.

    Parameters
    ----------
    frames : sequence of Stars
    kinds : sequence of hashable, optional
        Frames are compared with those of the same kind only, such as (night, exposure): where exposures or telescopes
        differ, so do number and flux of the stars. None: all are of one kind.

    Returns
    -------
    list of str or None
        The reason, in words that follow the frame's name; None for a good frame.
    """
    kinds = [None] * len(frames) if kinds is None else list(kinds)
    if len(kinds) != len(frames):
        raise ValueError("frames and kinds must have the same length")
    reasons = [_unusable(stars) for stars in frames]
    for kind in dict.fromkeys(kinds):
        members = [k for k, other in enumerate(kinds) if other == kind]
        usable = [k for k in members if reasons[k] is None]
        if len(usable) < _ENOUGH_FRAMES:
            continue
        facts = np.array([_facts(frames[k]) for k in usable])
        medians = np.median(facts, axis=0)
        spread = 1.4826 * np.median(np.abs(facts - medians), axis=0)
        for k, mine in zip(usable, facts, strict=True):
            reasons[k] = _worse(mine, medians, spread)
    return reasons


def _unusable(stars: Stars) -> str | None:
    count = len(stars.x)
    if count < _FEWEST_STARS:
        return f"shows {count or 'no'} star{'' if count == 1 else 's'} (at least {_FEWEST_STARS} are needed)"
    elongation = _facts(stars)[0]
    if elongation > 2:
        return f"is trailed: its stars are {elongation:.1f} times as long as wide"
    return None


def _facts(stars: Stars) -> tuple[float, float, float, float]:
    """Elongation, FWHM and flux of the brightest stars, and their number."""
    bright = slice(0, max(10, min(60, len(stars.x) // 2)))
    counts = ~stars.saturated[:20] if (~stars.saturated[:20]).any() else slice(None)
    return (
        float(np.median(stars.elongation[bright])),
        float(np.median(stars.fwhm[bright])),
        float(np.median(stars.flux[:20][counts])),
        float(len(stars.x)),
    )


def _worse(mine: np.ndarray, median: np.ndarray, spread: np.ndarray) -> str | None:
    longer, wider = mine[:2] > median[:2] + 5 * spread[:2]
    if longer and mine[0] > 1.4 and mine[0] > median[0] + 0.25:
        return (
            f"is trailed: its stars are {mine[0]:.2f} times as long as wide, those of the other frames {median[0]:.2f}"
        )
    if wider and mine[1] > 1.7 * median[1]:
        return f"is blurred: its stars are {mine[1]:.1f} pixels wide, those of the other frames {median[1]:.1f}"
    if mine[2] < 0.4 * median[2]:
        return f"is clouded: its stars have {mine[2] / median[2]:.0%} of the light that the other frames have"
    if mine[3] < 0.4 * median[3]:
        return f"is clouded: it shows {mine[3]:.0f} stars, the other frames {median[3]:.0f}"
    return None
