"""The inputs on which every setting has an effect, written once, and their runs, remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from scenes.outcomes import Outcome, write_all_scenes
from scenes.small_scene import digests
from zemosaic_worker import run_hierarchical_mosaic


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """The folders of `scenes.outcomes.write_all_scenes`; never to be changed."""
    root = tmp_path_factory.mktemp("scenes")
    write_all_scenes(root)
    return root


@pytest.fixture(scope="session")
def execute(scenes, tmp_path_factory) -> Callable[..., Outcome]:
    """``execute(scene, **settings)`` runs and remembers; ``fresh=True`` runs again and does not remember."""
    done: dict[tuple, Outcome] = {}

    def make(scene: str, **settings: Any) -> Outcome:
        folder, heard = tmp_path_factory.mktemp("out"), []

        def listen(*message, **more) -> None:
            heard.append((*message, more))

        result = run_hierarchical_mosaic(scenes / scene, folder, progress_callback=listen, **settings)
        return Outcome(folder, result, heard)

    def run(scene: str = "four", fresh: bool = False, **settings: Any) -> Outcome:
        if scene == "lights":
            settings["output_wcs_file"] = str(scenes / "grid.fits")
        if fresh:
            return make(scene, **settings)
        key = (scene, *sorted(settings.items()))
        if key not in done:
            done[key] = make(scene, **settings)
        return done[key]

    return run


@pytest.fixture
def run(execute, scenes) -> Iterator[Callable[..., Outcome]]:
    """`execute`; whatever the settings, the input stays as it is."""
    before = digests(scenes)
    yield execute
    assert digests(scenes) == before
