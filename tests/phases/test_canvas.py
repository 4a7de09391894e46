"""What is written of finished blocks."""

from __future__ import annotations

import numpy as np
import pytest

from zemosaic_pipeline.phases.phase5_canvas import alpha_of


@pytest.mark.parametrize("full", [0.3, 1.0, 7.0, 1999.0])
def test_alpha_is_zero_where_nothing_was_seen_and_255_where_a_whole_tile_was(full):
    weights = np.float32(full) * np.array([0.0, 1e-6, 0.4, 1.0, 2.0], np.float32)
    assert alpha_of(weights, full).tolist() == [0, 1, 102, 255, 255]


def test_whole_frame_counts_are_full_weights():
    """Truncated instead of rounded, one in seven of them gave 254."""
    counts = np.arange(1, 2001)
    assert {int(alpha_of(np.float32([n]), float(n))[0]) for n in counts} == {255}
