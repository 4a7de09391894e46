"""A bound on lines for a listener that must not be flooded."""

from __future__ import annotations

import time
from collections.abc import Callable


class LineLimit:
    """Lets lines through in a burst first, then at a steady rate, and counts what it holds back.

    Parameters
    ----------
    burst : int
        Lines that pass at once.
    per_second : float
        Lines a second after that.
    clock : callable
        Seconds.

    Attributes
    ----------
    left_out : int
        Lines held back since `take_left_out`.
    """

    def __init__(self, burst: int = 50, per_second: float = 20.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst, self._rate, self._clock = burst, per_second, clock
        self._tokens, self._last = float(burst), clock()
        self.left_out = 0

    def has_room(self) -> bool:
        """Whether a line would pass now."""
        now = self._clock()
        self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
        self._last = now
        return self._tokens >= 1

    def passes(self) -> bool:
        """Take one more line: whether it may go now; else it counts as left out."""
        if not self.has_room():
            self.left_out += 1
            return False
        self._tokens -= 1
        return True

    def take_left_out(self) -> int:
        """How many lines were held back, once."""
        count, self.left_out = self.left_out, 0
        return count
