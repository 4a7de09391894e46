"""What all phases of a run share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zemosaic_pipeline.errors import Cancelled
from zemosaic_pipeline.fits.find import SetAside
from zemosaic_pipeline.host.progress import Reporter
from zemosaic_pipeline.pixels.backend_switch import BackendSwitch
from zemosaic_pipeline.resample.pixel_store import PixelStore
from zemosaic_pipeline.resume.checkpoints import Checkpoints
from zemosaic_pipeline.settings.settings import Settings

#: Shares of the memory budget for tiles kept in memory and for the blocks under way.
STORE_SHARE, BLOCK_SHARE, COARSE_SHARE = 0.35, 0.35, 0.15
#: Share of the memory budget for frames kept in memory: the blocks of a panel are small.
FRAME_SHARE = 0.65


@dataclass
class Run:
    """What all phases of one run share.

    ``frames`` are the rows of the report on raw frames, by name; ``hubs`` is the
    number of tiles with which all others are compared (0: every overlapping pair is).
    """

    settings: Settings
    output_dir: Path
    reporter: Reporter
    switch: BackendSwitch
    jobs: int
    cancelled: Callable[[], bool] = lambda: False
    aside: list[SetAside] = field(default_factory=list)
    kept: Checkpoints = field(default_factory=Checkpoints)
    frames: dict[str, dict[str, Any]] = field(default_factory=dict)
    hubs: int = 0
    store: PixelStore | None = None

    def check(self) -> None:
        """Raise :class:`Cancelled` where the user has stopped the run."""
        if self.cancelled():
            raise Cancelled("the run was stopped by the user")

    def set_aside(self, name: str, reason: str) -> None:
        """One input less, with its named warning; ``reason`` follows the name ("is empty")."""
        self.aside.append(SetAside(name, reason))
        self.reporter.warn("", f"{name} is set aside: it {reason}", kind="set_aside", subject=name)


def nothing_usable(aside: Sequence[SetAside], where: str = "", what: str = "tile") -> str:
    """The sentence that refuses an input without a usable tile (or frame)."""
    more = f", and {len(aside) - 1} more (see the warnings)" if len(aside) > 1 else ""
    return f"There is no usable {what}{where}: {aside[0].name} {aside[0].reason}{more}."


def set_frame_aside(run: Run, name: str, reason: str) -> None:
    """One frame less, with its warning and its line in the report."""
    run.set_aside(name, reason)
    run.frames[name] |= {"status": "set aside", "reason": reason}
