"""A card that fails while it stacks: what the CPU made instead is used in that run and by no other."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from scenes.outcomes import NIGHT
from scenes.small_scene import long_ago
from zemosaic_pipeline.pixels import backend_cuda
from zemosaic_pipeline.pixels.backend_base import DeviceFailure
from zemosaic_pipeline.pixels.backend_cpu import CpuBackend
from zemosaic_pipeline.synthetic.night import write_night
from zemosaic_worker import run_hierarchical_mosaic


class ToyCard(CpuBackend):
    """A card that is the CPU under another name, and breaks down at its first work where it is told to."""

    name = "gpu"
    description = "toy"
    parallel_blocks = False

    def __init__(self, broken: bool) -> None:
        super().__init__()
        self.broken = broken

    @contextmanager
    def guard(self, what: str):
        yield

    def synchronize(self) -> None: ...

    def resample(self, *arguments) -> None:
        if self.broken:
            raise DeviceFailure("it fell off the bus")
        super().resample(*arguments)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """``run(broken)``: a run on raw frames that keeps its pieces; its report, and how many cards were opened."""
    lights, _ = write_night(tmp_path, NIGHT)
    long_ago(lights)

    def once(broken: bool):
        opened = []
        monkeypatch.setattr(backend_cuda, "open_cuda", lambda *_: opened.append(ToyCard(broken)) or opened[-1])
        result = run_hierarchical_mosaic(lights, tmp_path / "out", gpu="on", cache_retention="keep")
        return result.report, len(opened)

    return once


def test_a_stack_that_fell_back_to_the_cpu_is_not_taken_for_the_cards(run):
    first, opened = run(broken=True)
    assert opened == 1, "a card that has failed is left alone"
    assert first["backend"] == {"used": "cpu", "reason": "it fell off the bus", "fell_back": True}
    assert sum("fell off the bus" in text for text in first["warnings"]) == 1
    second, opened = run(broken=False)
    assert opened == 1 and second["backend"]["used"] == "gpu"
    assert second["resume"]["used"] == {"frame": len(second["frames"])}
    third, _ = run(broken=False)
    assert {"frame", "stack", "survey", "photometry", "science"} <= third["resume"]["used"].keys()
