"""What a run gives, and what is called for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class MosaicResult:
    """What a run made.

    Attributes
    ----------
    science, coverage, preview, report_path : Path
    aesthetic : Path or None
        Only where a step of the aesthetic mosaic is on.
    report : dict
        The content of run_report.json.
    """

    science: Path
    aesthetic: Path | None
    coverage: Path
    preview: Path
    report_path: Path
    report: dict[str, Any]


Engine = Callable[..., MosaicResult]
"""`zemosaic_worker.run_hierarchical_mosaic`, as the entrances are handed it."""
