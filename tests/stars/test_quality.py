"""Bad frames named, good ones left alone."""

from __future__ import annotations

from scenes.star_fields import night
from zemosaic_pipeline.stars.quality import frame_quality


def test_bad_frames_are_named_with_numbers():
    trailed, blurred = night(1, 1, elongation=1.7)[0], night(1, 2, fwhm=6.5)[0]
    dim, few, none = night(1, 3, light=0.2)[0], night(1, 4, stars=60)[0], night(1, 5, stars=0)[0]
    reasons = frame_quality([*night(12), trailed, blurred, dim, few, none])
    assert reasons[:12] == [None] * 12
    for reason, word in zip(reasons[12:], ["trailed", "blurred", "clouded", "clouded", "no stars"], strict=True):
        assert word in reason and any(c.isdigit() for c in reason)


def test_few_frames_are_judged_by_absolute_limits_only():
    dim, trailed = night(1, 3, light=0.2)[0], night(1, 1, elongation=2.6)[0]
    assert [bool(r) for r in frame_quality([*night(1), dim, trailed])] == [False, False, True]
    assert frame_quality([]) == []


def test_frames_are_compared_with_their_kind():
    short, long = night(8, 6, stars=60, light=0.2), night(12, 7)
    kinds = ["10 s"] * 8 + ["60 s"] * 12
    assert frame_quality([*short, *long], kinds) == [None] * 20
    assert any(frame_quality([*short, *long])[:8])
