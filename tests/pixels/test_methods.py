"""The ways to resample and to combine: a setting's word finds its member, and each has its place among the pixel functions."""

from __future__ import annotations

import pytest

from zemosaic_pipeline.pixels.methods import REJECTING, STREAMED, TAKE_ONE, CombineMethod, ResamplingKernel
from zemosaic_pipeline.settings.settings import SETTINGS

CHOICES = {row.key: row.choices for row in SETTINGS}


@pytest.mark.parametrize(
    ("key", "ways"),
    [
        ("kernel", ResamplingKernel),
        ("combine_method", CombineMethod),
        ("stacking_rejection_algorithm", CombineMethod),
        ("stacking_final_combine_method", CombineMethod),
    ],
)
def test_every_word_of_a_setting_is_a_member_of_its_own(key, ways):
    members = [ways(word) for word in CHOICES[key]]
    assert len(set(members)) == len(members) > 1


def test_words_and_members_name_each_other():
    for ways in (ResamplingKernel, CombineMethod):
        assert all(ways(member.word) is member for member in ways)
    assert CombineMethod("none") is CombineMethod.MEAN and CombineMethod("kappa_sigma") is CombineMethod.SIGMA_CLIP
    for wrong in ("average", "", 99, None):
        with pytest.raises(ValueError, match="not a valid CombineMethod"):
            CombineMethod(wrong)


def test_a_method_is_of_one_kind():
    kinds = [*STREAMED, *TAKE_ONE, *REJECTING, CombineMethod.MEDIAN, CombineMethod.WINSORIZED]
    assert sorted(kinds) == sorted(CombineMethod)
