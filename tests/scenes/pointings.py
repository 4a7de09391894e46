"""Where telescopes pointed: random places on the sky, for hypothesis."""

from __future__ import annotations

import numpy as np
from astropy import units as u
from astropy.coordinates import SkyCoord, angular_separation
from hypothesis import settings
from hypothesis import strategies as st

few = settings(max_examples=60, deadline=None)


def separations(ra, dec):
    ra, dec = np.radians(ra), np.radians(dec)
    return np.degrees(angular_separation(ra[:, None], dec[:, None], ra[None], dec[None]))


@st.composite
def skies(draw):
    """Positions near a place that may be the RA wrap or a pole, some of them equal; and a threshold."""
    centre = draw(st.sampled_from([(0.0, 0.0), (359.9, 60.0), (180.0, 89.8), (10.0, -90.0), (80.0, -30.0)]))
    n, seed = draw(st.integers(1, 60)), draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    away = SkyCoord(*centre, unit="deg").directional_offset_by(
        rng.uniform(0, 360, n) * u.deg, rng.exponential(1, n) * u.deg
    )
    again = rng.integers(0, n, n // 3)
    ra, dec = np.append(away.ra.deg, away.ra.deg[again]), np.append(away.dec.deg, away.dec.deg[again])
    return ra, dec, draw(st.sampled_from([0.01, 0.1, 0.3, 1.0]))
