"""Phase 2: panels from pointings, against brute force and by their properties."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scenes.pointings import few, separations, skies
from zemosaic_pipeline.phases.clustering import AUTO_CAP, Grouping, group_frames, linking_length


def grouped(ra, dec, *, orientation_deg=None, mount=None, order=None, **grouping):
    return group_frames(ra, dec, Grouping(**grouping), orientation_deg=orientation_deg, mount=mount, order=order)


def sets(groups):
    return {frozenset(int(k) for k in group) for group in groups}


def brute_force(ra, dec, threshold):
    """Components by flooding the full distance matrix."""
    near = separations(ra, dec) <= threshold
    left, groups = set(range(len(ra))), set()
    while left:
        group, edge = set(), {left.pop()}
        while edge:
            group |= edge
            edge = {j for k in edge for j in np.flatnonzero(near[k])} - group
        left -= group
        groups.add(frozenset(int(k) for k in group))
    return groups


@few
@given(skies())
def test_components_are_those_of_brute_force(sky):
    ra, dec, threshold = sky
    assert sets(grouped(ra, dec, threshold_deg=threshold)) == brute_force(ra, dec, threshold)


@few
@given(
    skies(), st.integers(0, 2**31), st.sampled_from([0, 7]), st.sampled_from([None, 0.5]), st.sampled_from([0.0, 20.0])
)
def test_file_order_does_not_matter_and_every_frame_is_in_one_panel(sky, seed, cap, extent, split):
    ra, dec, threshold = sky
    rng = np.random.default_rng(seed)
    names = [f"frame {k:03d}" for k in range(len(ra))]
    angle, mount = rng.uniform(0, 360, len(ra)), rng.choice(["altaz", "eq"], len(ra))

    def panels(index):
        found = grouped(
            ra[index], dec[index], threshold_deg=threshold, orientation_deg=angle[index], orientation_split_deg=split,
            mount=mount[index], field_deg=extent and 2 * extent, cap=cap, order=[names[k] for k in index],
        )  # fmt: skip
        return [[names[index[k]] for k in group] for group in found]

    straight = panels(np.arange(len(ra)))
    assert straight == panels(rng.permutation(len(ra)))
    assert sorted(itertools.chain.from_iterable(straight)) == names
    for group in straight:
        k = [names.index(name) for name in group]
        assert len(set(mount[k])) == 1
        if cap:
            assert len(k) <= cap
        if extent:
            # along any direction; hence the diagonal of a square
            assert separations(ra[k], dec[k]).max() <= extent * np.sqrt(2) * 1.001
        if split:
            turned = np.abs((angle[k][:, None] - angle[k] + 180) % 360 - 180)
            assert turned.max() <= split + 1e-6


def test_a_link_between_crowds_is_found_though_their_first_frames_are_far_apart():
    # two crowds, each within one cube of the search; only one frame of each is near the other crowd
    left = np.r_[np.zeros(50), 0.9]
    right = np.r_[np.full(50, 2.6), 1.8]
    ra, dec = np.r_[left, right], np.zeros(102)
    assert len(grouped(ra, dec, threshold_deg=0.91)) == 1
    assert len(grouped(ra, dec, threshold_deg=0.89)) > 1


@pytest.mark.parametrize("kind", ["random", "one place", "dense", "crowds"])
def test_20000_frames_in_seconds(kind):
    rng = np.random.default_rng(1)
    n = 20_000
    ra, dec = {
        "random": lambda: (rng.uniform(0, 360, n), np.degrees(np.arcsin(rng.uniform(-1, 1, n)))),
        "one place": lambda: (np.full(n, 315.4), np.full(n, 68.1)),
        "dense": lambda: (rng.uniform(0, 3, n), rng.uniform(0, 3, n)),
        "crowds": lambda: (rng.integers(0, 150, n) * 0.1 + rng.normal(0, 0.004, n), rng.normal(0, 0.004, n)),
    }[kind]()
    start = time.perf_counter()
    groups = grouped(ra, dec, threshold_deg=0.07, field_deg=0.7, cap=500)
    assert time.perf_counter() - start < 5
    assert sum(map(len, groups)) == n
    assert max(map(len, groups)) <= 500


def test_a_long_chain_becomes_as_few_pieces_as_its_length_asks_for():
    ra, dec = np.linspace(0, 3.4, 341), np.zeros(341)
    assert len(grouped(ra, dec, threshold_deg=0.07)) == 1
    pieces = grouped(ra, dec, threshold_deg=0.07, field_deg=0.7)
    assert len(pieces) == 10
    assert max(np.ptp(ra[p]) for p in pieces) <= 0.35 + 1e-6


def test_a_chain_is_cut_between_its_crowds():
    ra = np.concatenate([np.linspace(c, c + 0.2, 30) for c in (0.0, 0.26, 0.52)])
    pieces = grouped(ra, np.zeros(90), threshold_deg=0.07, field_deg=0.54)
    assert [p.tolist() for p in pieces] == [list(range(k, k + 30)) for k in (0, 30, 60)]


def test_small_groups_far_apart_stay_apart():
    ra, dec = np.r_[np.full(50, 10.0), 200.0, 10.0], np.r_[np.zeros(50), 40.0, 5.0]
    assert sorted(map(len, grouped(ra, dec, threshold_deg=0.1, cap=60, min_cap=10))) == [1, 1, 50]


def test_target_groups_widens_the_threshold_only_as_far_as_needed():
    ra = np.array([0.0, 0.1, 0.3, 0.7, 50.0])
    dec = np.zeros(5)
    assert [len(grouped(ra, dec, threshold_deg=0.01, target_groups=n)) for n in (5, 4, 3, 2, 1)] == [5, 4, 3, 2, 1]
    # fields that cannot overlap are not joined, whatever the target
    assert sets(grouped(ra, dec, threshold_deg=0.01, target_groups=1, field_deg=1.0)) == {
        frozenset({0, 1, 2, 3}),
        frozenset({4}),
    }


def test_orientation_is_a_circle_and_unknown_angles_stay_apart():
    angle = [359.0, 1.0, 3.0, 180.0, 178.0, np.nan, 121.0]
    ra = dec = np.zeros(7)
    assert sets(grouped(ra, dec, threshold_deg=1, orientation_deg=angle, orientation_split_deg=10)) == {
        frozenset({0, 1, 2}),
        frozenset({3, 4}),
        frozenset({5}),
        frozenset({6}),
    }
    assert len(grouped(ra, dec, threshold_deg=1, orientation_deg=angle)) == 1


def test_a_night_of_field_rotation_is_cut_into_arcs():
    angle = np.linspace(-30, 29.9, 600)
    arcs = grouped(np.zeros(600), np.zeros(600), threshold_deg=1, orientation_deg=angle, orientation_split_deg=15)
    assert len(arcs) == 4
    assert max(np.ptp(angle[a]) for a in arcs) <= 15


def test_mounts_do_not_mix():
    groups = grouped(np.zeros(4), np.zeros(4), threshold_deg=1, mount=["eq", None, "altaz", "eq"])
    assert sets(groups) == {frozenset({0, 3}), frozenset({1}), frozenset({2})}


def test_a_cap_splits_evenly_in_time_where_the_place_is_one():
    order = [f"{k:04d}" for k in range(103)]
    groups = grouped(np.full(103, 5.0), np.zeros(103), threshold_deg=0.1, cap=25, order=order)
    assert sorted(map(len, groups)) == [20, 20, 21, 21, 21]
    assert all(np.ptp(g) == len(g) - 1 for g in groups), "each part is a stretch of time"
    # a remainder is never tiny: the smallest part goes before the cap
    assert sorted(map(len, grouped(np.zeros(26), np.zeros(26), threshold_deg=0.1, cap=25, min_cap=20))) == [26]


def test_a_cap_splits_by_place_where_frames_differ_in_place():
    rng = np.random.default_rng(4)
    ra = rng.uniform(0, 2, 100)
    groups = grouped(ra, np.zeros(100), threshold_deg=0.5, cap=25)
    spans = sorted((ra[g].min(), ra[g].max()) for g in groups)
    assert [len(g) for g in groups] == [25] * 4
    assert all(a[1] < b[0] for a, b in itertools.pairwise(spans))


def test_frames_without_a_position_are_the_last_group():
    groups = grouped([np.nan, 10.0, np.inf, 200.0], [0.0, 0.0, 0.0, 1.0], threshold_deg=1)
    assert [g.tolist() for g in groups] == [[1], [3], [2, 0]]
    assert grouped([], [], threshold_deg=1) == []


@pytest.mark.parametrize(
    "wrong", [dict(threshold_deg=-1.0), dict(threshold_deg=np.nan), dict(threshold_deg=1.0, mount=["eq"])]
)
def test_what_cannot_be_meant_raises(wrong):
    with pytest.raises(ValueError):
        grouped([0.0, 1.0], [0.0, 1.0], **wrong)


def test_an_open_limit_is_the_same_everywhere_and_a_given_one_goes_before_it():
    ra = dec = np.zeros(AUTO_CAP + 1)
    assert [len(grouped(ra, dec, threshold_deg=1, auto_cap=auto)) for auto in (True, False)] == [2, 1]
    assert len(grouped(ra, dec, threshold_deg=1, auto_cap=True, cap=1000)) == 1


def test_the_open_threshold_is_a_tenth_of_the_field():
    assert linking_length(None, [0.7, 0.72, 5.0]) == pytest.approx(0.072)
    assert linking_length(0.0, []) == 0
    with pytest.raises(ValueError):
        linking_length(None, [])
